"""Folders as Stable Diffusion 1.4 and XL are published, at small width: classes, config keys, RGB VAE, 77 tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from ld_client.client_app import handle_train
from ld_client.data.store import open_store
from ld_client.site_config import load_modality, load_site
from ld_common.adapters.base import inject
from ld_common.adapters.registry import ADAPTERS, read_adapter
from ld_common.core.command import run_cli
from ld_common.core.config import from_mapping, to_mapping
from ld_common.core.errors import AdapterError
from ld_common.diffusion.base_components import is_xl
from ld_common.diffusion.base_model import load_base, load_denoiser
from ld_common.diffusion.drift import LatentDrift
from ld_common.diffusion.sampling import SAMPLERS, make_sampler, sample
from ld_common.protocol.messages import TrainTask
from ld_common.protocol.study_config import StudyConfig
from ld_common.release.release import ReleaseContent, load_release_base, read_release, write_release
from ld_generate.cli import cli
from ld_simulations.benchmarks.stable_diffusion.cost import compute
from tests.support.adapter_options import OPTIONS
from tests.support.site_homes import index_site
from tests.support.stable_diffusion import write_sdxl, write_stable_diffusion

EPSILON, V_PREDICTION, XL = "epsilon", "v_prediction", "sdxl"


@pytest.fixture(scope="module", params=[pytest.param(EPSILON, marks=pytest.mark.slow), V_PREDICTION, XL])
def stable_diffusion(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A randomly initialised folder as SD 1.4 is published, its v-prediction twin, or one as SDXL is."""
    folder = tmp_path_factory.mktemp(f"sd-{request.param}")
    return write_sdxl(folder) if request.param == XL else write_stable_diffusion(folder, request.param)


def test_what_a_folder_says_is_read_from_it(stable_diffusion: Path) -> None:
    base = load_base(str(stable_diffusion))
    assert (base.resolution, base.channels, base.latent_shape) == (64, 3, (4, 8, 8))
    embedded = (1, 77, 32) if base.second_text is None else (1, 78, 80)  # the last row is the pooled one
    assert isinstance(base.scheduler, DDIMScheduler)
    images = torch.rand(2, 1, 64, 64) * 2 - 1
    assert base.decode(base.encode(images)).shape == images.shape
    assert base.embed(["a scan"]).shape == embedded
    assert float(base.latent_mean.abs().sum()) == 0  # the published folder does not say


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_it_samples_with_every_sampler_and_in_half_precision(
    stable_diffusion: Path, sampler: str, precision: str
) -> None:
    base = load_base(str(stable_diffusion), precision=precision)
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
    stable_diffusion: Path, site_yaml: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = site_yaml.read_text()
    site_yaml.write_text(
        "\n".join(
            f"base_model: {stable_diffusion}" if line.startswith("base_model:") else line for line in text.splitlines()
        )
    )
    site = load_site(site_yaml)
    index_site(site)
    options: dict[str, Any] = {
        "base_model": str(stable_diffusion),
        "adapter": {"name": name, **OPTIONS[name]},
        "training": {"steps": 2, "batch_size": 2, "learning_rate": 0.01},
    }
    study, modality = from_mapping(StudyConfig, options), load_modality(site)
    if name == "textual_inversion" and is_xl(stable_diffusion):
        with pytest.raises(AdapterError, match="this base has two: use lora"):
            inject(load_denoiser(str(stable_diffusion)), read_adapter(study.adapter), study.seed)
        return
    adapted = inject(load_denoiser(str(stable_diffusion)), read_adapter(study.adapter), study.seed)
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
def test_a_gpu_trains_and_samples(stable_diffusion: Path, site_yaml: Path) -> None:
    base = load_base(str(stable_diffusion), device="cuda", precision="float16")
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
