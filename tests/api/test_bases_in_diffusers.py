"""The bases of this repository in plain diffusers, and the ten lines of the Python API on one of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
TABLE = """\
patient,input,age,sex,diagnosis
a,a.png,70,F,CN
b,b.png,80,M,AD
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny_base", "zero_snr_base"])
def test_a_base_loads_and_draws_without_further_arguments(name: str) -> None:
    from diffusers import StableDiffusionPipeline

    from ld_common.diffusion.base_model import load_denoiser

    pipe = StableDiffusionPipeline.from_pretrained(ROOT / "simulations" / name)
    assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.float32}
    (image,) = pipe("axial T1 brain MRI, woman, 70 years, healthy", num_inference_steps=2).images
    assert image.size == (64, 64)
    assert np.asarray(image).std() > 1
    ours = load_denoiser(str(ROOT / "simulations" / name))
    assert all(torch.equal(value, ours.unet.state_dict()[key]) for key, value in pipe.unet.state_dict().items())


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """A table of two scans."""
    for number, name in enumerate("ab"):
        pixels = np.random.default_rng(number).integers(0, 255, (64, 64)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    (tmp_path / "scans.csv").write_text(TABLE)
    return tmp_path


@pytest.mark.slow
def test_the_ten_lines_run(scans: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import StableDiffusionPipeline

    from ld_common import CounterfactualPipeline, LatentDrift, TrainingData, adapters, import_lora, load_base, train

    monkeypatch.chdir(ROOT)
    base = load_base("simulations/tiny_base")
    data = TrainingData.from_table(scans / "scans.csv", modality="configs/modalities/brain_mri.yaml", base=base)
    drift = LatentDrift.estimate(data.latents, base, shape="channel")
    model = train(base, adapters.Lora(rank=8), data, drift=drift, steps=2)
    model.save_pretrained(scans / "out")

    folder = scans / "release"
    import_lora(scans / "out", "simulations/tiny_base", "configs/modalities/brain_mri.yaml", folder)
    with pytest.warns(UserWarning, match="not signed"):
        pipe = CounterfactualPipeline.from_release(folder, base="simulations/tiny_base")
    source = {"age": 70, "sex": "F", "diagnosis": "CN"}
    result = pipe(scans / "a.png", source=source, target={"age": 84}, num_inference_steps=2)
    assert len(result.save(scans / "saved")) == 5

    diffusers_pipe = StableDiffusionPipeline.from_pretrained("simulations/tiny_base")
    diffusers_pipe.load_lora_weights(scans / "out")
    generator = torch.Generator().manual_seed(0)
    latents = drift.initial_latents(diffusers_pipe.scheduler, (1, *base.latent_shape), generator, 2)
    (image,) = diffusers_pipe(data.prompts[0], latents=latents, num_inference_steps=2).images
    assert image.size == (64, 64)
