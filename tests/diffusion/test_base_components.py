"""Folders as people bring them: other classes are named, other schedulers give the same schedule."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from ld_common.core.errors import ModelError
from ld_common.diffusion.base_model import base_digest, base_latent_mean, load_denoiser, locate_base
from ld_common.diffusion.sampling import make_sampler, sample
from ld_common.diffusion.schedule import ddim_schedule

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
SCHEDULERS = [
    "DDPMScheduler",
    "PNDMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "LMSDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LCMScheduler",
]


@pytest.fixture
def folder(smallest_base: Path, tmp_path: Path) -> Path:
    """A base to be changed."""
    return shutil.copytree(smallest_base, tmp_path / "base")


def change(file: Path, **values: Any) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({**content, **values}))


def set_scheduler(folder: Path, kind: str, **values: Any) -> None:
    shutil.rmtree(folder / "scheduler")
    written = {"clip_sample": False} if kind == "DDPMScheduler" else {}
    getattr(diffusers, kind)(**SCHEDULE, **written, **values).save_pretrained(folder / "scheduler")


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_the_schedule_is_the_folders_whatever_scheduler_it_names(folder: Path, kind: str, prediction: str) -> None:
    set_scheduler(folder, "DDIMScheduler", clip_sample=False, set_alpha_to_one=False, prediction_type=prediction)
    expected = load_denoiser(str(folder)).scheduler
    set_scheduler(folder, kind, prediction_type=prediction)
    read = load_denoiser(str(folder)).scheduler
    assert isinstance(read, diffusers.DDIMScheduler)
    torch.testing.assert_close(read.alphas_cumprod, expected.alphas_cumprod)
    assert read.config["prediction_type"] == prediction
    assert not read.config["clip_sample"]  # latents reach beyond 1: clipping them draws grey
    steps = ddim_schedule(read, 10)
    assert steps.timesteps == sorted(steps.timesteps, reverse=True)
    gaps = {high - low for high, low in zip(steps.timesteps, steps.timesteps[1:], strict=False)}
    assert gaps == {100}  # DDIM's steps are of equal length


def test_a_dpm_solver_folder_draws_what_its_ddim_twin_draws(folder: Path) -> None:
    """Read with DDIM's own defaults it would clip latents at 1."""
    drawn = []
    for kind, options in (
        ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": True, "timestep_spacing": "leading"}),
        ("DPMSolverMultistepScheduler", {}),
    ):
        set_scheduler(folder, kind, **options)
        model = load_denoiser(str(folder))
        noise = torch.randn(4, *model.latent_shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            context = model.embed(["a scan"]).expand(4, -1, -1)
        drawn.append(sample(model, context, noise, make_sampler(model.scheduler, "ddim", 5)))
    assert torch.equal(*drawn)
    assert float(drawn[0].abs().max()) > 1.5


def test_what_a_scheduler_says_of_clipping_and_spacing_is_kept(folder: Path) -> None:
    set_scheduler(folder, "DDIMScheduler", clip_sample=True, timestep_spacing="trailing", steps_offset=1)
    config = load_denoiser(str(folder)).scheduler.config
    assert (config["clip_sample"], config["timestep_spacing"], config["steps_offset"]) == (True, "trailing", 1)
    set_scheduler(folder, "EulerDiscreteScheduler", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    read = load_denoiser(str(folder)).scheduler
    assert read.config["timestep_spacing"] == "trailing"
    assert float(read.alphas_cumprod[-1]) < 1e-4


def index(**components: Any) -> Callable[[Path], None]:
    return lambda folder: change(folder / "model_index.json", **components)


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "half of SDXL": (
        index(_class_name="StableDiffusionXLPipeline", text_encoder_2=["transformers", "CLIPTextModelWithProjection"]),
        "lacks text_encoder_2",
    ),
    "SD3 without its transformer": (
        index(_class_name="StableDiffusion3Pipeline", transformer=["diffusers", "SD3Transformer2DModel"]),
        "lacks transformer",
    ),
    "a controlled pipeline": (
        index(_class_name="StableDiffusionControlNetPipeline", controlnet=["diffusers", "ControlNetModel"]),
        r"StableDiffusionControlNetPipeline, with controlnet \(ControlNetModel\)",
    ),
    "another transformer": (
        lambda folder: change(folder / "transformer/config.json", _class_name="SanaTransformer2DModel"),
        r"is a StableDiffusionPipeline, with unet \(UNet2DConditionModel\)",
    ),
    "FLUX": (index(_class_name="FluxPipeline"), "is a FluxPipeline: bases of the classes of StableDiffusionPipeline"),
    "another vae": (
        lambda folder: change(folder / "vae/config.json", _class_name="AutoencoderTiny"),
        "the vae of base model .* is a AutoencoderTiny",
    ),
    "another text encoder": (
        lambda folder: change(folder / "text_encoder/config.json", architectures=["T5EncoderModel"]),
        "is a T5EncoderModel",
    ),
    "a UNet of SDXL": (
        lambda folder: change(folder / "unet/config.json", addition_embed_type="text_time"),
        "addition_embed_type text_time",
    ),
    "class labels": (lambda folder: change(folder / "unet/config.json", num_class_embeds=10), "num_class_embeds 10"),
    "inpainting": (
        lambda folder: change(folder / "unet/config.json", in_channels=9),
        "takes 9 channels, its vae makes 4",
    ),
    "no sample_size": (lambda folder: change(folder / "unet/config.json", sample_size=None), "sample_size None"),
    "flow matching": (
        lambda folder: change(
            folder / "scheduler/scheduler_config.json", _class_name="FlowMatchEulerDiscreteScheduler"
        ),
        "FlowMatchEulerDiscreteScheduler, which has no schedule of β",
    ),
    "flow sigmas": (
        lambda folder: change(
            folder / "scheduler/scheduler_config.json",
            _class_name="DPMSolverMultistepScheduler",
            use_flow_sigmas=True,
            prediction_type="flow_prediction",
        ),
        "no schedule of β",
    ),
    "an unknown scheduler": (
        lambda folder: change(folder / "scheduler/scheduler_config.json", _class_name="NextYearScheduler"),
        "NextYearScheduler, which the installed diffusers lacks",
    ),
    "a cut config": (lambda folder: (folder / "unet/config.json").write_text("{"), "cannot read 'config.json'"),  # type: ignore[dict-item,return-value]
    "no object": (lambda folder: (folder / "vae/config.json").write_text("[]"), "no JSON object"),  # type: ignore[dict-item,return-value]
    "no words": (
        lambda folder: [file.unlink() for file in (folder / "tokenizer").iterdir()],  # type: ignore[dict-item,return-value]
        "lacks tokenizer/tokenizer.json, or vocab.json and merges.txt",
    ),
    "a size of nothing": (lambda folder: change(folder / "unet/config.json", sample_size=True), "sample_size True"),
    "a scheduler of another kind": (
        lambda folder: change(folder / "scheduler/scheduler_config.json", _class_name="DiffusionPipeline"),
        "DiffusionPipeline, which the installed diffusers lacks",
    ),
    "a scheduler that needs more software": (
        lambda folder: change(folder / "scheduler/scheduler_config.json", _class_name="DPMSolverSDEScheduler"),
        "cannot load base model|lacks",
    ),
    "words for numbers in a scheduler": (
        lambda folder: change(folder / "scheduler/scheduler_config.json", num_train_timesteps="1000"),
        "cannot load base model",
    ),
    "nested too deep": (
        lambda folder: (folder / "vae/config.json").write_text("[" * 100_000),  # type: ignore[dict-item,return-value]
        "cannot read 'config.json'",
    ),
    "architectures of no kind": (
        lambda folder: change(folder / "text_encoder/config.json", architectures={"a": 1}),
        "is a {'a': 1}",
    ),
    "a missing part": (lambda folder: shutil.rmtree(folder / "tokenizer"), "lacks tokenizer"),
}


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_what_cannot_load_is_refused_in_one_sentence_that_names_it(folder: Path, kind: str) -> None:
    spoil, words = REFUSED[kind]
    spoil(folder)
    with pytest.raises(ModelError, match=words) as refused:
        load_denoiser(str(folder))
    assert "\n" not in str(refused.value)
    if "scheduler" not in kind and "flow" not in kind:  # before anything is hashed or indexed
        with pytest.raises(ModelError, match=words):
            base_digest(str(folder))


def test_a_folder_without_an_index_and_one_with_a_safety_checker_load(folder: Path) -> None:
    index(
        _class_name="StableDiffusionImg2ImgPipeline",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        image_encoder=[None, None],
    )(folder)
    assert locate_base(str(folder)) == folder
    (folder / "model_index.json").unlink()
    assert locate_base(str(folder)) == folder


WEIGHTS = "diffusion_pytorch_model"


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_the_hash_is_of_the_weights_that_load(folder: Path) -> None:
    """A file of safetensors beside a pickle would be hashed, and the pickle read."""
    unet = folder / "unet"
    torch.save(load_file(unet / f"{WEIGHTS}.safetensors"), unet / f"{WEIGHTS}.bin")
    digest = base_digest(str(folder))
    (unet / f"{WEIGHTS}.bin").write_bytes(b"not read, as safetensors are there")
    assert base_digest(str(folder)) == digest
    load_denoiser(str(folder))
    (unet / f"{WEIGHTS}.safetensors").rename(unet / "decoy.safetensors")
    with pytest.raises(ModelError, match=r"decoy\.safetensors' has a name that neither"):
        base_digest(str(folder))
    with pytest.raises(ModelError, match="cannot load base model"):
        load_denoiser(str(folder))


def test_an_index_of_weights_stays_in_its_part(folder: Path) -> None:
    part = folder / "text_encoder"
    tensors = load_file(part / "model.safetensors")
    (part / "model.safetensors").unlink()
    names = sorted(tensors)
    for number, some in enumerate((names[::2], names[1::2]), start=1):
        save_file(
            {name: tensors[name] for name in some}, part / f"model-0000{number}-of-00002.safetensors", {"format": "pt"}
        )
    index = part / "model.safetensors.index.json"
    places = {name: f"model-0000{1 + position % 2}-of-00002.safetensors" for position, name in enumerate(names)}
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    digest = base_digest(str(folder))
    loaded = load_denoiser(str(folder)).text_encoder.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items() if name in loaded)
    rewrite(part / "model-00002-of-00002.safetensors", lambda shard: shard.update({min(shard): shard[min(shard)] + 1}))
    assert base_digest(str(folder)) != digest
    save_file(tensors, folder / "out.safetensors")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "../out.safetensors")}))
    with pytest.raises(ModelError, match="names weights that are not beside it"):
        base_digest(str(folder))


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_weights_that_are_missing_are_not_drawn_at_random(folder: Path, part: str) -> None:
    (file,) = (folder / part).glob("*.safetensors")
    rewrite(file, lambda tensors: tensors.pop(sorted(tensors)[-1]))
    with pytest.raises(ModelError, match="lack 1 tensors, the first is"):
        load_denoiser(str(folder))


@pytest.mark.parametrize("text", ["[1]", '{"mean": "abc"}', '{"mean": [1.0]}', '{"mean": [NaN, 0, 0, 0]}', "{"])
def test_statistics_that_would_poison_the_drift_are_refused(folder: Path, text: str) -> None:
    (folder / "latent_statistics.json").write_text(text)
    with pytest.raises(ModelError, match=r"latent_statistics\.json"):
        base_latent_mean(str(folder), 4)
