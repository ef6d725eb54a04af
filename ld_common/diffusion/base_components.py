"""What a base's folder holds, by the classes that its files name: which bases load, and on which noise schedule.

Bases are of Stable Diffusion 1 and 2 (`AutoencoderKL`, `UNet2DConditionModel`, `CLIPTextModel`, `CLIPTokenizer`) and
XL, with `CLIPTextModelWithProjection` besides; their scheduler is any of diffusers' with a discrete schedule of β.
Others are refused by the name of their class before anything is read of their weights.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ld_common.core.errors import ModelError

if TYPE_CHECKING:
    from diffusers import DDIMScheduler

INDEX = "model_index.json"
PARTS = ("vae", "unet", "text_encoder", "tokenizer", "scheduler")
BESIDE = ("safety_checker", "feature_extractor", "image_encoder")
"""Components of a Stable Diffusion pipeline that its network does not need."""
XL_PARTS = (*PARTS, "text_encoder_2", "tokenizer_2")
VOCABULARY = ("vocab.json", "merges.txt")
LARGEST_SIDE = 1024
"""Of latents."""
CLASSES = {
    "vae": "AutoencoderKL",
    "unet": "UNet2DConditionModel",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
}
SUPPORTED = "bases of the classes of StableDiffusionPipeline and StableDiffusionXLPipeline load"
XL_EMBEDDING = "text_time"
"""`addition_embed_type` of an SDXL UNet: a pooled prompt and sizes."""
NOT_GIVEN = ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "time_cond_proj_dim")
"""Settings of a UNet that takes other inputs than ours, or projects them."""
SCHEDULE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
OPTIONAL = {
    "rescale_betas_zero_snr": False,
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
    "steps_offset": 0,
}
"""Further settings of diffusers' DDIM, and what another scheduler does that has none of the name."""


def is_xl(folder: Path) -> bool:
    """Whether a folder is of SDXL: it has a second text encoder."""
    return (folder / "text_encoder_2").is_dir()


def parts_of(folder: Path) -> tuple[str, ...]:
    """The components that decide what a base computes."""
    return XL_PARTS if is_xl(folder) else PARTS


def zero_for_empty_prompt(folder: Path, name: str) -> bool:
    """Whether an SDXL pipeline takes zeros for the empty prompt; raises `ModelError`."""
    index = folder / INDEX
    said = _read(index, name).get("force_zeros_for_empty_prompt", True) if index.is_file() else True
    if not isinstance(said, bool):
        raise ModelError(
            f"force_zeros_for_empty_prompt in {INDEX} of base model '{name}' is {said}: write true or false"
        )
    return said


def vae_levels(folder: Path, name: str) -> int:
    """Levels of a base's VAE, each of half the side of the one before; raises `ModelError`."""
    levels = _read(folder / "vae/config.json", name).get("block_out_channels")
    if not isinstance(levels, list) or not levels:
        raise ModelError(f"vae/config.json of base model '{name}' has block_out_channels {levels}: copy it again")
    return len(levels)


def check_components(folder: Path, name: str) -> None:
    """Refuse a base of other classes, or one whose network cannot be asked.

    Args:
        folder: the base's.
        name: as the user gave it, for messages.

    Raises:
        ModelError: one sentence with the class or setting that is not supported, or a file that cannot be read.
    """
    whole = _read(folder / INDEX, name) if (folder / INDEX).is_file() else {}
    kind, parts = str(whole.get("_class_name", "")), parts_of(folder)
    listed = {
        part: str(entry[1])
        for part, entry in whole.items()
        if isinstance(entry, list) and len(entry) == 2 and entry[1] is not None
    }
    others = {part: listed[part] for part in sorted(set(listed) - {*XL_PARTS, *BESIDE})}
    if others or (kind and not kind.startswith("StableDiffusion")):
        has = f", with {_listed(others)}" if others else ""
        raise ModelError(f"base model '{name}' is a {kind or 'pipeline'}{has}: {SUPPORTED}")
    missing = [part for part in XL_PARTS if part in {*parts, *listed} and not (folder / part).is_dir()]
    if missing:
        raise ModelError(f"base model '{name}' lacks {', '.join(missing)}: a Stable Diffusion folder holds all parts")
    for part in (part for part in parts if part.startswith("tokenizer")):
        _check_tokenizer(folder / part, name)
    for part, known in CLASSES.items():
        found = _class_of(folder / part, name) if part in parts else ""
        if found and found != known:
            raise ModelError(f"the {part} of base model '{name}' is a {found}, not {known}: {SUPPORTED}")
    unet = _read(folder / "unet/config.json", name)
    embedding, expected = unet.get("addition_embed_type"), XL_EMBEDDING if is_xl(folder) else None
    if embedding != expected:
        raise ModelError(
            f"the unet of base model '{name}' has addition_embed_type {embedding}, and beside {', '.join(parts)} it "
            f"would be {expected}: {SUPPORTED}"
        )
    _check_unet(unet, _read(folder / "vae/config.json", name), name)


def read_schedule(folder: Path, name: str) -> DDIMScheduler:
    """The base's schedule as diffusers' DDIM, with every setting as the folder's own scheduler has it.

    A scheduler without DDIM's `clip_sample` does not clip, one without `set_alpha_to_one` ends at the image; DDIM's own
    defaults would clip latents. A spacing `linspace` becomes `leading`, since DDIM takes steps of equal length.

    Raises:
        ModelError: a scheduler without a discrete schedule of β, such as one of flow matching, or an unreadable file.
    """
    import diffusers

    written = _read(folder / "scheduler/scheduler_config.json", name)
    kind = str(written.get("_class_name") or "DDIMScheduler")
    own_class = getattr(diffusers, kind, None)
    if not isinstance(own_class, type) or not issubclass(own_class, diffusers.SchedulerMixin):
        raise ModelError(f"the scheduler of base model '{name}' is a {kind}, which the installed diffusers lacks")
    known = inspect.signature(own_class).parameters
    own = own_class(**{key: value for key, value in written.items() if key in known})
    settings: dict[str, Any] = {**own.config, **written}
    if not hasattr(own, "alphas_cumprod") or settings.get("use_flow_sigmas"):
        raise ModelError(f"the scheduler of base model '{name}' is a {kind}, which has no schedule of β: {SUPPORTED}")
    options = {key: settings[key] for key in SCHEDULE if key in settings}
    options |= {key: settings.get(key, absent) for key, absent in OPTIONAL.items()}
    options["set_alpha_to_one"] = settings.get("set_alpha_to_one", settings.get("final_sigmas_type", "zero") == "zero")
    spacing = settings.get("timestep_spacing", "leading")
    equal_steps = kind == "DDIMScheduler" or spacing != "linspace"
    return diffusers.DDIMScheduler(**options, timestep_spacing=spacing if equal_steps else "leading")


def _check_tokenizer(part: Path, name: str) -> None:
    """Refuse a tokenizer without its words, which would read every prompt alike."""
    if not ((part / "tokenizer.json").is_file() or all((part / file).is_file() for file in VOCABULARY)):
        raise ModelError(f"base model '{name}' lacks {part.name}/tokenizer.json, or {' and '.join(VOCABULARY)} there")


def _check_unet(unet: dict[str, Any], vae: dict[str, Any], name: str) -> None:
    taken = [key for key in NOT_GIVEN if unet.get(key) is not None]
    if taken:
        raise ModelError(f"the unet of base model '{name}' has {taken[0]} {unet[taken[0]]}: {SUPPORTED}")
    side = unet.get("sample_size")
    if type(side) is not int or not 1 <= side <= LARGEST_SIDE:
        raise ModelError(
            f"unet/config.json of base model '{name}' has sample_size {side}: write the height of "
            "its latents there, for Stable Diffusion 64, or 96 for pictures of 768 pixels"
        )
    latent, taken_channels = vae.get("latent_channels", 4), unet.get("in_channels", 4)
    if latent != taken_channels:
        raise ModelError(
            f"the unet of base model '{name}' takes {taken_channels} channels, its vae makes {latent}: bases for "
            "inpainting and upscaling do not load"
        )


def _class_of(part: Path, name: str) -> str:
    """The class that a component's config names; empty where it names none."""
    config = _read(part / "config.json", name)
    architectures = config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else architectures
    return str(config.get("_class_name") or first or "")


def _listed(components: dict[str, str]) -> str:
    return ", ".join(f"{part} ({kind})" for part, kind in components.items())


def _read(file: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"cannot read '{file.name}' of base model '{name}' ({error}): copy the folder again"
        ) from error
    if not isinstance(content, dict):
        raise ModelError(f"'{file}' of base model '{name}' is no JSON object: copy the folder again")
    return content
