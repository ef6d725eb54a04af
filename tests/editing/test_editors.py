"""Properties that every editor has, and those of single ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from ld_common.adapters.base import inject
from ld_common.adapters.registry import read_adapter
from ld_common.core.errors import ConfigError
from ld_common.diffusion.base_model import BaseModel, load_base
from ld_common.diffusion.conditioning import Condition
from ld_common.diffusion.drift import LatentDrift
from ld_common.diffusion.schedule import predictor
from ld_common.editing.counterfactuals import Edit, InvertedScans, LatentEditor
from ld_common.editing.pix2pix_zero import cross_attention_maps
from ld_common.editing.registry import EDITORS, change_editor, editor_options, read_editor

EARLY = [0.8, 1.0]
GUIDED = [name for name in EDITORS if not EDITORS.load(name).needs_longitudinal]
HEALTHY, ILL = "axial T1 brain MRI, woman, 70 years, healthy", "axial T1 brain MRI, man, 80 years, Alzheimer's disease"


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> BaseModel:
    return load_base(str(tiny_base))


@pytest.fixture(scope="module")
def latents(base: BaseModel) -> torch.Tensor:
    return torch.randn(3, *base.latent_shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def conditioned(tiny_base: Path) -> BaseModel:
    """A base whose network also takes the scan, as editor instruct_pix2pix needs it."""
    adapted = inject(load_base(str(tiny_base)), read_adapter({"name": "instruct_pix2pix", "rank": 2}), 0)
    generator = torch.Generator().manual_seed(0)
    adapted.load({name: 0.1 * torch.randn(value.shape, generator=generator) for name, value in adapted.state().items()})
    return adapted.model


def editor(
    base: BaseModel, name: str, seed: int = 0, drift: LatentDrift | None = None, **options: object
) -> LatentEditor:
    schema = EDITORS.load(name)
    return LatentEditor(base, [HEALTHY, ILL], schema(**{"num_inference_steps": 5, **options}), drift, seed)  # type: ignore[arg-type]


@dataclass
class Inversion:
    """An editor's inversion of three scans, which every test of that editor shares; edits differ by options."""

    base: BaseModel
    name: str
    scans: InvertedScans

    def edit(self, edits: list[Edit], **options: object) -> torch.Tensor:
        return editor(self.base, self.name, **options).edit(self.scans, edits)  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=GUIDED)
def inversion(conditioned: BaseModel, latents: torch.Tensor, request: pytest.FixtureRequest) -> Inversion:
    return Inversion(conditioned, request.param, editor(conditioned, request.param).invert(latents, [HEALTHY] * 3))


@pytest.mark.slow
@pytest.mark.parametrize(("scale", "target"), [(0.0, ILL), (3.0, HEALTHY)])
def test_without_guidance_or_with_the_same_prompt_the_answer_is_the_reconstruction(
    inversion: Inversion, scale: float, target: str
) -> None:
    (answer,) = inversion.edit([Edit(1, target)], guidance_scale=scale)
    assert torch.allclose(answer, inversion.scans.reconstructions[1], atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "ddim" else pytest.mark.slow) for name in GUIDED]
)
def test_guidance_may_be_less_or_off_outside_its_interval(
    conditioned: BaseModel, latents: torch.Tensor, name: str
) -> None:
    fixed: dict[str, object] = {"noise_fraction": 1.0, "num_inference_steps": 12}
    if name == "pix2pix_zero":
        fixed["cross_attention_guidance_amount"] = 0.0
    scans = editor(conditioned, name, **fixed).invert(latents, [HEALTHY] * 3)  # type: ignore[arg-type]

    def change(**options: object) -> float:
        guided = editor(conditioned, name, guidance_scale=3.0, **fixed, **options)  # type: ignore[arg-type]
        return float((guided.edit(scans, [Edit(1, ILL)])[0] - scans.reconstructions[1]).abs().mean())

    everywhere = change()
    weaker_late, early_only = change(guidance_interval=EARLY, guidance_outside=0.3), change(guidance_interval=EARLY)
    assert min(abs(everywhere - weaker_late), abs(weaker_late - early_only)) > 1e-3 < early_only
    assert change(guidance_interval=[0.0, 1.0]) == everywhere
    assert change(guidance_interval=[1.0, 1.0]) < 1e-3


@pytest.mark.slow
def test_every_editor_takes_the_guidance_interval(inversion: Inversion) -> None:
    edits = [Edit(1, ILL)]
    options = {"noise_fraction": 0.7, "guidance_scale": 3.0}
    if inversion.name == "pix2pix_zero":
        options["cross_attention_guidance_amount"] = 0.0
    everywhere = inversion.edit(edits, **options)
    never = inversion.edit(edits, guidance_interval=[1.0, 1.0], **options)
    assert float((everywhere - never).abs().mean()) > 1e-3
    assert float((never[0] - inversion.scans.reconstructions[1]).abs().mean()) < 1e-3


@pytest.mark.slow
def test_another_prompt_changes_the_answer_and_the_batch_size_does_not(inversion: Inversion) -> None:
    edits = [Edit(1, ILL), Edit(0, ILL)]
    one_by_one, together = (inversion.edit(edits, guidance_scale=3.0, batch_size=size) for size in (1, 2))
    assert float((together[0] - inversion.scans.reconstructions[1]).abs().max()) > 1e-2
    assert torch.allclose(one_by_one, together, atol=1e-3)


@pytest.mark.slow
def test_only_editors_that_draw_noise_depend_on_the_seed(inversion: Inversion, latents: torch.Tensor) -> None:
    answers = []
    for seed in (1, 1, 2):
        seeded = editor(inversion.base, inversion.name, seed, num_inference_steps=4)
        answers.append(seeded.edit(seeded.invert(latents[:1], [HEALTHY]), [Edit(0, ILL)]))
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2]) is not EDITORS.load(inversion.name).draws_noise()


@pytest.mark.slow
def test_an_answer_does_not_depend_on_the_rest_of_the_batch(inversion: Inversion, latents: torch.Tensor) -> None:
    answers = inversion.edit([Edit(row, ILL) for row in range(3)], batch_size=2)
    alone = editor(inversion.base, inversion.name)
    (answer,) = alone.edit(alone.invert(latents[2:], [HEALTHY]), [Edit(0, ILL)])
    assert torch.allclose(answer, answers[2], atol=1e-3)


@pytest.mark.slow
def test_a_shift_moves_the_answer_its_own_way(inversion: Inversion) -> None:
    answers = inversion.edit([Edit(1, HEALTHY, 0.1), Edit(1, HEALTHY, -0.1)])
    up, down = answers - inversion.scans.reconstructions[1]
    assert float(up.mean()) > 5e-3 > -5e-3 > float(down.mean())


def test_another_editor_keeps_the_options_that_both_have() -> None:
    flowedit = read_editor({"name": "flowedit", "guidance_scale": 4.5, "feedback": 0.5})
    belm = change_editor(flowedit, "belm")
    assert (belm.name, belm.guidance_scale) == ("belm", 4.5)
    assert read_editor(editor_options(flowedit)) == flowedit


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "invert"}, "now called 'ddim'"),
        ({"method": "belm"}, "now called 'edit.name'"),
        ({"name": "ddim", "strength": 2}, "now called 'edit.guidance_scale'"),
        ({"name": "ddim", "feedback": 0.5}, "unknown config key 'edit.feedback'"),
        ({"guidance_interval": [0.5]}, "edit.guidance_interval"),
        ({"noise_fraction": 0.0}, "edit.noise_fraction"),
    ],
)
def test_options_that_an_editor_lacks_are_named(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_editor(options)


@pytest.mark.slow
@pytest.mark.parametrize("noise_fraction", [pytest.param(0.3, marks=pytest.mark.slow), 1.0])
@pytest.mark.parametrize("formulation", [None, pytest.param("prior", marks=pytest.mark.slow), "centred", "per-step"])
@pytest.mark.parametrize("seen", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["belm", "ddpm", "flowedit"])
def test_an_exact_editor_returns_every_scan(
    base: BaseModel,
    conditioned: BaseModel,
    latents: torch.Tensor,
    name: str,
    formulation: str | None,
    noise_fraction: float,
    seen: bool,
) -> None:
    model, prompts = conditioned if seen else base, [HEALTHY, ILL, HEALTHY]
    drift = None if formulation is None else LatentDrift(torch.full((4, 1, 1), 0.3), formulation)
    options = {"noise_fraction": noise_fraction, "num_inference_steps": 6}
    exact = editor(model, name, drift=drift, **options)
    inverted = exact.invert(latents, prompts)
    assert torch.equal(inverted.reconstructions, latents)
    assert float((exact.redraw(inverted) - latents).abs().max()) < 1e-4
    approximate = editor(model, "ddim", drift=drift, **options).invert(latents, prompts).reconstructions
    assert float((approximate - latents).abs().max()) > 1e-3


def test_belm_starts_below_a_level_without_signal(base: BaseModel, latents: torch.Tensor) -> None:
    latent_editor = editor(base, "belm", num_inference_steps=12)
    latent_editor.context.schedule.alphas_cumprod[0] = 0.0
    inverted = latent_editor.invert(latents, [HEALTHY] * 3)
    assert float((latent_editor.redraw(inverted) - latents).abs().max()) < 1e-4


@pytest.mark.slow
def test_flowedit_sees_as_much_of_its_edit_as_it_is_given(base: BaseModel, latents: torch.Tensor) -> None:
    def edit(scale: float, feedback: float) -> torch.Tensor:
        options = {"guidance_scale": scale, "feedback": feedback, "noise_fraction": 1.0, "num_inference_steps": 8}
        latent_editor = editor(base, "flowedit", **options)  # type: ignore[arg-type]
        latent_editor.context.schedule.alphas_cumprod[0] = 0.0  # without signal, as in a base of zero terminal SNR
        return (
            latent_editor.edit(latent_editor.invert(latents, [HEALTHY] * 3), [Edit(row, ILL) for row in range(3)])
            - latents
        )

    unseen = edit(1.0, 0.0)  # both prompts of the scan alone: what they differ by, so linear in w
    assert float(unseen.abs().mean()) > 1e-2
    assert torch.allclose(edit(2.0, 0.0), 2 * unseen, atol=1e-3)
    assert float((edit(2.0, 1.0) - 2 * edit(1.0, 1.0)).abs().max()) > 1e-2
    assert float((edit(1.0, 0.5) - unseen).abs().max()) > 1e-2


def test_belm_says_that_it_needs_steps(base: BaseModel, latents: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match="two levels at a time"):
        editor(base, "belm", num_inference_steps=1).invert(latents, [HEALTHY] * 3)


def test_an_editor_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match="did you mean 'ddim'"):
        read_editor({"name": "dim"})


@pytest.mark.slow
def test_pix2pix_zero_holds_the_edit_to_where_the_scan_s_prompt_looked(base: BaseModel, latents: torch.Tensor) -> None:
    moved = []
    for attention in (0.0, 20.0):
        latent_editor = editor(base, "pix2pix_zero", guidance_scale=3.0, cross_attention_guidance_amount=attention)
        inverted = latent_editor.invert(latents, [HEALTHY] * 3)
        drawn = latent_editor.edit(inverted, [Edit(row, ILL) for row in range(3)])
        moved.append(_attention_moved(base, inverted.reconstructions, drawn))
    inverted = editor(base, "ddim", guidance_scale=3.0)
    plain = inverted.edit(inverted.invert(latents, [HEALTHY] * 3), [Edit(row, ILL) for row in range(3)])
    unheld = editor(base, "pix2pix_zero", guidance_scale=3.0, cross_attention_guidance_amount=0.0)
    drawn = unheld.edit(unheld.invert(latents, [HEALTHY] * 3), [Edit(row, ILL) for row in range(3)])
    assert torch.allclose(drawn, plain, atol=1e-4)
    assert moved[1] < moved[0]


@torch.no_grad()
def _attention_moved(base: BaseModel, first: torch.Tensor, second: torch.Tensor) -> float:
    """Distance between the maps of two sets of latents, the first under its own prompt, the second under its target."""
    recorded = []
    with cross_attention_maps(base.unet) as maps:
        for latents, prompt in ((first, HEALTHY), (second, ILL)):
            predictor(base, Condition(base.embed([prompt] * len(latents))))(latents, 0)
            recorded.append([layer.clone() for layer in maps()])
    return sum(float((one - other).square().sum()) for one, other in zip(*recorded, strict=True))
