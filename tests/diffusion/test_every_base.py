"""Every base that loads, as it is published but of small width: the same tests for each."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from peft.tuners.lora.layer import LoraLayer

from ld_client.client_app import handle_train
from ld_client.data.store import open_store
from ld_client.site_config import load_modality, load_site
from ld_common.adapters.base import inject
from ld_common.adapters.lora import Lora
from ld_common.adapters.registry import ADAPTERS, read_adapter
from ld_common.adapters.train import train
from ld_common.core.command import run_cli
from ld_common.core.config import from_mapping, to_mapping
from ld_common.core.errors import AdapterError, ConfigError, ModelError
from ld_common.diffusion.base_model import BaseModel, load_base, load_denoiser
from ld_common.diffusion.drift import LatentDrift
from ld_common.diffusion.sampling import FLOW_SAMPLERS, SAMPLERS, make_sampler, sample
from ld_common.diffusion.schedule import is_flow
from ld_common.diffusion.training import TrainingData
from ld_common.editing.counterfactuals import Edit
from ld_common.protocol.messages import TrainTask
from ld_common.protocol.study_config import StudyConfig
from ld_common.release.release import ReleaseContent, load_release_base, read_release, write_release
from ld_generate.cli import cli
from ld_simulations.benchmarks.bases.flow_folders import write_flux2, write_sd3
from ld_simulations.benchmarks.bases.unet_folders import write_sdxl, write_stable_diffusion
from ld_simulations.benchmarks.stable_diffusion.cost import compute
from tests.client.test_private import attached_of, noised_gradient, reference_gradient, study_of
from tests.editing.test_editors import GUIDED, HEALTHY, ILL, editor
from tests.support.adapter_options import OPTIONS
from tests.support.site_homes import index_site


@dataclass(frozen=True)
class Base:
    """A folder as its base is published."""

    name: str
    folder: Path
    latent_shape: tuple[int, int, int]
    embedding: tuple[int, int]
    """Rows and columns of a prompt."""
    flow: bool = False
    resolution: int = 64

    @property
    def transformer(self) -> bool:
        """Whether picture and prompt are attended to together."""
        return self.flow


BASES: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    "epsilon": (
        lambda folder: write_stable_diffusion(folder, "epsilon"),
        {"latent_shape": (4, 16, 16), "embedding": (77, 32), "resolution": 128},
    ),
    "v_prediction": (
        lambda folder: write_stable_diffusion(folder, "v_prediction"),
        {"latent_shape": (4, 16, 16), "embedding": (77, 32), "resolution": 128},
    ),
    "sdxl": (write_sdxl, {"latent_shape": (4, 8, 8), "embedding": (78, 80)}),
    "sd3": (write_sd3, {"latent_shape": (16, 8, 8), "embedding": (334, 96), "flow": True}),
    "flux2": (write_flux2, {"latent_shape": (32, 4, 4), "embedding": (512, 48), "flow": True}),
}


@pytest.fixture(scope="module", params=BASES)
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A randomly initialised folder."""
    write, facts = BASES[request.param]
    return Base(request.param, write(tmp_path_factory.mktemp(request.param)), **facts)


@pytest.fixture(scope="module")
def loaded(published: Base) -> BaseModel:
    return load_base(str(published.folder))


def noise_of(base: BaseModel, count: int) -> torch.Tensor:
    return torch.randn(count, *base.latent_shape, generator=torch.Generator().manual_seed(0))


def test_what_a_folder_says_is_read_from_it(published: Base, loaded: BaseModel) -> None:
    assert (loaded.resolution, loaded.channels, loaded.latent_shape) == (
        published.resolution,
        3,
        published.latent_shape,
    )
    images = torch.rand(2, 1, loaded.resolution, loaded.resolution) * 2 - 1
    assert loaded.decode(loaded.encode(images)).shape == images.shape
    assert loaded.encode(images).shape[1:] == published.latent_shape
    assert loaded.embed(["a scan"]).shape == (1, *published.embedding)
    assert float(loaded.latent_mean.abs().sum()) == 0  # the published folder does not say
    assert is_flow(loaded.scheduler) == published.flow


def test_a_prompt_that_is_too_long_is_refused_before_it_is_cut(loaded: BaseModel) -> None:
    fits = " ".join(["a"] * loaded.prompt_tokens)
    loaded.check_prompts([fits, ""])
    with pytest.raises(ModelError, match="shorten it"):
        loaded.check_prompts([fits + " a"])
    with pytest.raises(ModelError, match="shorten it"):
        loaded.embed([fits + " a"])


@pytest.mark.parametrize("name", ["belm", "ddpm", "flowedit"])
@pytest.mark.parametrize("fraction", [0.6, 1.0])
def test_an_exact_editor_returns_every_scan(loaded: BaseModel, name: str, fraction: float) -> None:
    exact = editor(loaded, name, noise_fraction=fraction)
    latents = noise_of(loaded, 2)
    inverted = exact.invert(latents, [HEALTHY, ILL])
    assert float((exact.redraw(inverted) - latents).abs().max()) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in GUIDED if name != "instruct_pix2pix"])
def test_another_prompt_changes_the_answer(published: Base, loaded: BaseModel, name: str) -> None:
    """All editors but those that need another network or a longitudinal drift."""
    latent_editor = editor(loaded, name, noise_fraction=0.8, guidance_scale=3.0)
    scans = latent_editor.invert(noise_of(loaded, 1), [HEALTHY])
    if name == "pix2pix_zero" and published.transformer:
        with pytest.raises(ConfigError, match="attends to prompt and picture together: use flowedit"):
            latent_editor.edit(scans, [Edit(0, ILL)])
        return
    answers = latent_editor.edit(scans, [Edit(0, HEALTHY), Edit(0, ILL)])
    assert float((answers[0] - answers[1]).abs().max()) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [{"name": "lora", "rank": 2}, {"name": "custom_diffusion"}, {"name": "full"}])
def test_a_patients_gradient_is_the_plain_one(published: Base, adapter: dict[str, object]) -> None:
    if adapter["name"] == "custom_diffusion" and published.transformer:
        return
    study = study_of(adapter, max_grad_norm=1e3)  # no gradient is that long
    adapted, rows = attached_of(published.folder, study), torch.tensor([[0, 1], [2, 2], [5, 3]])
    found = noised_gradient(adapted, study, rows, 0.0)
    for layer in adapted.model.unet.modules():
        if isinstance(layer, LoraLayer):
            layer.lora_variant.clear()  # peft's own arithmetic, as under opacus: norms over one pixel enlarge rounding
    expected = reference_gradient(adapted, study, rows)
    largest = max(float(value.abs().max()) for value in expected)
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).abs().max()) < 1e-5 * largest


@pytest.mark.slow
def test_an_adapter_learns_a_drifted_set(loaded: BaseModel) -> None:
    """The frozen parts stay, and the copy that trains has encoders of its own."""
    drift = LatentDrift(torch.full((loaded.latent_shape[0], 1, 1), 0.5), "centred")
    data, before = TrainingData(noise_of(loaded, 8) + 0.5, [HEALTHY] * 8, drift), digest_of(loaded)
    losses: list[float] = []
    options = {"steps": 30, "batch_size": 8, "learning_rate": 5e-3}
    adapted = train(loaded, Lora(rank=2), data, on_step=lambda _, loss: losses.append(loss), **options)  # type: ignore[arg-type]
    assert sum(losses[-8:]) < sum(losses[:8])
    assert digest_of(loaded) == before
    assert adapted.model.text_encoder is not loaded.text_encoder
    if loaded.reader is not None and adapted.model.reader is not None:
        assert adapted.model.reader.encoders[0] is adapted.model.text_encoder


def digest_of(base: BaseModel) -> list[float]:
    return [float(value.double().sum()) for value in base.unet.parameters()]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_it_samples_with_every_sampler_and_in_half_precision(published: Base, sampler: str, precision: str) -> None:
    base = load_base(str(published.folder), precision=precision)
    if published.flow and sampler not in FLOW_SAMPLERS:
        with pytest.raises(ConfigError, match="this base is a flow, which takes ddim or euler"):
            make_sampler(base.scheduler, sampler, 4)
        return
    with torch.no_grad():
        context = base.embed(["a scan"])
    noise = torch.randn(1, *base.latent_shape, generator=torch.Generator().manual_seed(0))
    latents = sample(base, context, noise, make_sampler(base.scheduler, sampler, 4))
    assert latents.dtype == base.dtype
    image = base.decode(latents)
    assert image.dtype == torch.float32
    assert torch.isfinite(image).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "lora" else pytest.mark.slow) for name in ADAPTERS]
)
def test_every_adapter_trains_is_released_and_edits(
    published: Base, site_yaml: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = site_yaml.read_text()
    site_yaml.write_text(
        "\n".join(
            f"base_model: {published.folder}" if line.startswith("base_model:") else line for line in text.splitlines()
        )
    )
    site = load_site(site_yaml)
    index_site(site)
    options: dict[str, Any] = {
        "base_model": str(published.folder),
        "adapter": {"name": name, **OPTIONS[name]},
        "training": {"steps": 2, "batch_size": 2, "learning_rate": 0.01},
    }
    study, modality = from_mapping(StudyConfig, options), load_modality(site)
    one_clip = published.name in ("epsilon", "v_prediction")
    needs_unet = name in ("custom_diffusion", "instruct_pix2pix")
    if (name == "textual_inversion" and not one_clip) or (needs_unet and published.transformer):
        with pytest.raises(AdapterError, match="use lora"):
            inject(load_denoiser(str(published.folder)), read_adapter(study.adapter), study.seed)
        return
    adapted = inject(load_denoiser(str(published.folder)), read_adapter(study.adapter), study.seed)
    store = open_store(site.store_path)
    said = json.dumps(to_mapping(study))
    task = TrainTask(adapted.trainable_state(), 1, said, store.base_digest, store.modality_digest)
    result = handle_train(site, task)
    assert any(not torch.equal(result.state[key], task.state[key]) for key in task.state)
    adapted.load(result.state)
    content = ReleaseContent(
        store.base_digest, adapted.state(), None if result.drift is None else LatentDrift(result.drift)
    )
    release = write_release(tmp_path / "release", study, modality, content)
    assert load_release_base(read_release(release)).digest == store.base_digest
    volume = np.random.default_rng(0).random((60, 60, 3)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(volume, np.diag([3.0, 3.0, 8.0, 1.0])), tmp_path / "scan.nii.gz")
    arguments = ["edit", release, "--input", tmp_path / "scan.nii.gz", "--source", "age=70,sex=F,diagnosis=CN"]
    arguments += [
        "--allow-unsigned",
        "--target",
        "age=80",
        "--out",
        tmp_path / "out",
        "--precision",
        "bfloat16",
        "num_inference_steps=3",
    ]
    with pytest.raises(SystemExit) as ended:
        run_cli(cli, [str(one) for one in arguments])
    assert not ended.value.code, capsys.readouterr().err
    assert (tmp_path / "out/scan/age-80.nii.gz").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_samples(published: Base) -> None:
    base = load_base(str(published.folder), device="cuda", precision="float16")
    with torch.no_grad():
        context = base.embed(["a scan"])
    latents = sample(base, context, torch.randn(1, *base.latent_shape), make_sampler(base.scheduler, "ddim", 4))
    assert latents.device.type == "cuda"
    assert torch.isfinite(base.decode(latents)).all()


def test_a_larger_size_is_computed_from_smaller_ones_and_marked() -> None:
    sides, latent = (128, 192, 256, 512), {side: (side / 8) ** 2 for side in (128, 192, 256, 512)}
    numbers = {side: 1 + 2e-3 * latent[side] + 1e-7 * latent[side] ** 2 for side in sides}
    keys = ("evaluation_seconds", "step_seconds", "peak_mb")
    measured = [{"resolution": side, "computed": False, **dict.fromkeys(keys, numbers[side])} for side in sides[:3]]
    found = compute(measured, 512)
    assert found["computed"]
    assert found["step_seconds"] == pytest.approx(numbers[512])
