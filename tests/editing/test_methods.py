"""Each way of editing: what comes back when nothing is asked, what when something is, and what the seed decides."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ld_common.adapters.base import inject
from ld_common.adapters.registry import read_adapter
from ld_common.core.config import from_mapping
from ld_common.core.errors import ConfigError
from ld_common.diffusion.base_model import BaseModel, load_base
from ld_common.diffusion.conditioning import Condition
from ld_common.diffusion.drift import LatentDrift
from ld_common.diffusion.schedule import predictor
from ld_common.editing.base import Editor
from ld_common.editing.counterfactuals import Edit, LatentEditor
from ld_common.editing.pix2pix_zero import watched
from ld_common.editing.registry import EDITORS

HEALTHY, ILL = "axial T1 brain MRI, woman, 70 years, healthy", "axial T1 brain MRI, man, 80 years, Alzheimer's disease"


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> BaseModel:
    return load_base(str(tiny_base))


@pytest.fixture
def latents(base: BaseModel) -> torch.Tensor:
    return torch.randn(3, *base.latent_shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def seeing(tiny_base: Path) -> BaseModel:
    """A base that also sees the scan, as method instruct needs it."""
    adapted = inject(load_base(str(tiny_base)), read_adapter({"name": "instruct", "rank": 2}), 0)
    generator = torch.Generator().manual_seed(0)
    adapted.load({name: 0.1 * torch.randn(own.shape, generator=generator) for name, own in adapted.state().items()})
    return adapted.model


def editor(base: BaseModel, seed: int = 0, drift: LatentDrift | None = None, **options: object) -> LatentEditor:
    return LatentEditor(base, [HEALTHY, ILL], Editor(**{"steps": 12, **options}), drift, seed)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", EDITORS)
def test_no_strength_and_an_unchanged_prompt_return_the_reconstruction(
    seeing: BaseModel, latents: torch.Tensor, method: str
) -> None:
    for strength, target in ((0.0, ILL), (3.0, HEALTHY)):
        own = editor(seeing, method=method, strength=strength)
        abducted = own.abduct(latents, [HEALTHY] * 3)
        drawn = own.answer(abducted, [Edit(1, target)])
        assert torch.allclose(drawn[0], abducted.reconstructions[1], atol=1e-3)


@pytest.mark.parametrize("method", EDITORS)
def test_late_steps_may_be_guided_less_or_not_at_all(seeing: BaseModel, latents: torch.Tensor, method: str) -> None:
    def change(**options: float) -> float:
        own = editor(seeing, method=method, strength=3.0, depth=1.0, attention=0.0, **options)
        abducted = own.abduct(latents, [HEALTHY] * 3)
        return float((own.answer(abducted, [Edit(1, ILL)])[0] - abducted.reconstructions[1]).abs().mean())

    whole, less, early = change(), change(late_share=0.3), change(late_share=0.0)
    assert min(abs(whole - less), abs(less - early)) > 1e-3 < early
    assert change(late_share=0.0, late_below=0.0) == whole
    assert change(late_share=0.0, late_below=1.0) < 1e-3


@pytest.mark.parametrize("method", EDITORS)
def test_another_prompt_changes_the_answer_and_the_batch_size_does_not(
    seeing: BaseModel, latents: torch.Tensor, method: str
) -> None:
    answers = []
    for size in (1, 3):
        own = editor(seeing, method=method, strength=3.0, batch_size=size)
        abducted = own.abduct(latents, [HEALTHY] * 3)
        answers.append(own.answer(abducted, [Edit(1, ILL), Edit(0, ILL)]))
        assert float((answers[-1][0] - abducted.reconstructions[1]).abs().max()) > 1e-2
    assert torch.allclose(answers[0], answers[1], atol=1e-3)


@pytest.mark.parametrize("method", EDITORS)
def test_only_methods_that_draw_depend_on_the_seed(seeing: BaseModel, latents: torch.Tensor, method: str) -> None:
    answers = []
    for seed in (1, 1, 2):
        own = editor(seeing, seed, method=method)
        answers.append(own.answer(own.abduct(latents, [HEALTHY] * 3), [Edit(0, ILL)]))
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2]) is not EDITORS[method]().uses_noise


@pytest.mark.parametrize("method", EDITORS)
def test_an_answer_does_not_depend_on_what_else_is_asked(seeing: BaseModel, latents: torch.Tensor, method: str) -> None:
    together = editor(seeing, method=method, batch_size=2)
    answers = together.answer(together.abduct(latents, [HEALTHY] * 3), [Edit(row, ILL) for row in range(3)])
    alone = editor(seeing, method=method)
    (own,) = alone.answer(alone.abduct(latents[2:], [HEALTHY]), [Edit(0, ILL)])
    assert torch.allclose(own, answers[2], atol=1e-3)


@pytest.mark.parametrize("method", EDITORS)
def test_a_shift_moves_the_answer_its_own_way(seeing: BaseModel, latents: torch.Tensor, method: str) -> None:
    own = editor(seeing, method=method)
    abducted = own.abduct(latents, [HEALTHY] * 3)
    up, down = own.answer(abducted, [Edit(1, HEALTHY, 0.1), Edit(1, HEALTHY, -0.1)]) - abducted.reconstructions[1]
    assert float(up.mean()) > 5e-3 > -5e-3 > float(down.mean())


@pytest.mark.parametrize("depth", [0.3, 1.0])
@pytest.mark.parametrize("formulation", [None, "prior", "centred", "per-step"])
@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize("method", ["belm", "ddpm", "flowedit"])
def test_an_exact_method_returns_every_scan(
    base: BaseModel,
    seeing: BaseModel,
    latents: torch.Tensor,
    method: str,
    formulation: str | None,
    depth: float,
    seen: bool,
) -> None:
    model, prompts = seeing if seen else base, [HEALTHY, ILL, HEALTHY]
    drift = None if formulation is None else LatentDrift(torch.full((4, 1, 1), 0.3), formulation)
    restored = editor(model, drift=drift, method=method, depth=depth).abduct(latents, prompts).reconstructions
    assert float((restored - latents).abs().max()) < 1e-4
    inverted = editor(model, drift=drift, method="invert", depth=depth).abduct(latents, prompts).reconstructions
    assert float((inverted - latents).abs().max()) > 1e-3


def test_belm_starts_below_a_level_without_signal(base: BaseModel, latents: torch.Tensor) -> None:
    own = editor(base, method="belm")
    own.setting.path.levels[0] = 0.0
    assert float((own.abduct(latents, [HEALTHY] * 3).reconstructions - latents).abs().max()) < 1e-4


def test_flowedit_sees_as_much_of_its_edit_as_it_is_given(base: BaseModel, latents: torch.Tensor) -> None:
    def edit(strength: float, feedback: float) -> torch.Tensor:
        own = editor(base, method="flowedit", strength=strength, feedback=feedback, depth=1.0)
        own.setting.path.levels[0] = 0.0  # without signal, as in a base of zero terminal SNR
        return own.answer(own.abduct(latents, [HEALTHY] * 3), [Edit(row, ILL) for row in range(3)]) - latents

    unseen = edit(1.0, 0.0)  # both prompts of the scan alone: what they differ by, so linear in w
    assert float(unseen.abs().mean()) > 1e-2
    assert torch.allclose(edit(2.0, 0.0), 2 * unseen, atol=1e-3)
    assert float((edit(2.0, 1.0) - 2 * edit(1.0, 1.0)).abs().max()) > 1e-2
    assert float((edit(1.0, 0.5) - unseen).abs().max()) > 1e-2


def test_belm_says_that_it_needs_steps(base: BaseModel, latents: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match="two levels at a time"):
        editor(base, method="belm", steps=1).abduct(latents, [HEALTHY] * 3)


def test_a_method_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match="did you mean 'invert'"):
        from_mapping(Editor, {"method": "inverse"})


def test_pix2pix_zero_holds_the_edit_to_where_the_scan_s_prompt_looked(base: BaseModel, latents: torch.Tensor) -> None:
    moved = []
    for attention in (0.0, 20.0):
        own = editor(base, method="pix2pix-zero", strength=3.0, attention=attention)
        abducted = own.abduct(latents, [HEALTHY] * 3)
        drawn = own.answer(abducted, [Edit(row, ILL) for row in range(3)])
        moved.append(_attention_moved(base, abducted.reconstructions, drawn))
    inverted = editor(base, method="invert", strength=3.0)
    plain = inverted.answer(inverted.abduct(latents, [HEALTHY] * 3), [Edit(row, ILL) for row in range(3)])
    unheld = editor(base, method="pix2pix-zero", strength=3.0, attention=0.0)
    drawn = unheld.answer(unheld.abduct(latents, [HEALTHY] * 3), [Edit(row, ILL) for row in range(3)])
    assert torch.allclose(drawn, plain, atol=1e-4)
    assert moved[1] < moved[0]


@torch.no_grad()
def _attention_moved(base: BaseModel, first: torch.Tensor, second: torch.Tensor) -> float:
    """Distance between the maps of two sets of latents, the first under its own prompt, the second under its target."""
    found = []
    with watched(base.unet) as maps:
        for latents, prompt in ((first, HEALTHY), (second, ILL)):
            predictor(base, Condition(base.embed([prompt] * len(latents))))(latents, 0)
            found.append([own.clone() for own in maps()])
    return sum(float((one - other).square().sum()) for one, other in zip(*found, strict=True))
