"""What a base's folder holds, by the classes that its files name: which bases load, and on which noise schedule.

A folder belongs to one `Family`. Bases of a UNet have any of diffusers' schedulers with a discrete schedule of β; those
of a transformer have one of flow matching. Others are refused by the name of their class before anything is read of
their weights.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ld_common.core.errors import ModelError

if TYPE_CHECKING:
    from diffusers import DDIMScheduler

INDEX = "model_index.json"
BESIDE = ("safety_checker", "feature_extractor", "image_encoder")
"""Components of a pipeline that its network does not need."""
VOCABULARY = ("vocab.json", "merges.txt")
WHOLE_VOCABULARY = ("tokenizer.json", "spiece.model")
LARGEST_SIDE = 1024
"""Of latents."""
FLOW_SCHEDULER = "FlowMatchEulerDiscreteScheduler"


@dataclass(frozen=True)
class Family:
    """Bases of the same classes."""

    pipelines: tuple[str, ...]
    """Beginnings of diffusers' names for their pipelines."""
    network: str
    """The part that denoises."""
    classes: Mapping[str, str]
    """Of the parts, in the order in which they are hashed; empty where any fits."""
    optional: tuple[str, ...] = ()
    """Parts that a folder may lack."""


STABLE_DIFFUSION = Family(
    ("StableDiffusion",),
    "unet",
    {
        "vae": "AutoencoderKL",
        "unet": "UNet2DConditionModel",
        "text_encoder": "CLIPTextModel",
        "tokenizer": "",
        "scheduler": "",
    },
)
XL = Family(
    ("StableDiffusion",),
    "unet",
    {**STABLE_DIFFUSION.classes, "text_encoder_2": "CLIPTextModelWithProjection", "tokenizer_2": ""},
)
STABLE_DIFFUSION_3 = Family(
    ("StableDiffusion3",),
    "transformer",
    {
        "vae": "AutoencoderKL",
        "transformer": "SD3Transformer2DModel",
        "text_encoder": "CLIPTextModelWithProjection",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "text_encoder_3": "T5EncoderModel",
        "tokenizer": "",
        "tokenizer_2": "",
        "tokenizer_3": "",
        "scheduler": FLOW_SCHEDULER,
    },
    ("text_encoder_3", "tokenizer_3"),
)
FLUX_2 = Family(
    ("Flux2Klein",),
    "transformer",
    {
        "vae": "AutoencoderKLFlux2",
        "transformer": "Flux2Transformer2DModel",
        "text_encoder": "Qwen3ForCausalLM",
        "tokenizer": "",
        "scheduler": FLOW_SCHEDULER,
    },
)
FLOWS = (STABLE_DIFFUSION_3, FLUX_2)
SUPPORTED = (
    "bases of the classes of StableDiffusionPipeline, StableDiffusionXLPipeline, StableDiffusion3Pipeline and "
    "Flux2KleinPipeline load"
)
XL_EMBEDDING = "text_time"
"""`addition_embed_type` of an SDXL UNet: a pooled prompt and sizes."""
FLUX_SIDE = 128
"""Height and width of the latents of FLUX.2's VAE for pictures of 1,024 pixels, diffusers' default."""
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


def family_of(folder: Path) -> Family:
    """The family of a folder, by its parts."""
    if (folder / "transformer").is_dir():
        kind = _class_of(folder / "transformer", str(folder))
        return next((family for family in FLOWS if family.classes["transformer"] == kind), STABLE_DIFFUSION_3)
    return XL if (folder / "text_encoder_2").is_dir() else STABLE_DIFFUSION


def parts_of(folder: Path) -> tuple[str, ...]:
    """The components that decide what a base computes."""
    family = family_of(folder)
    return tuple(part for part in family.classes if part not in family.optional or (folder / part).is_dir())


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
    kind, family = str(whole.get("_class_name", "")), family_of(folder)
    listed = {
        part: str(entry[1])
        for part, entry in whole.items()
        if isinstance(entry, list) and len(entry) == 2 and entry[1] is not None
    }
    known = {*family.classes, *XL.classes} if family.network == "unet" else set(family.classes)
    if "transformer" in listed and not (folder / "transformer").is_dir():
        raise ModelError(f"base model '{name}' lacks transformer: a base's folder holds all parts")
    others = {part: listed[part] for part in sorted(set(listed) - {*known, *BESIDE})}
    if others or (kind and not kind.startswith(family.pipelines)):
        has = f", with {_listed(others)}" if others else ""
        raise ModelError(f"base model '{name}' is a {kind or 'pipeline'}{has}: {SUPPORTED}")
    expected = {*parts_of(folder), *(part for part in listed if part in known)}
    missing = [part for part in (*family.classes, *XL.classes) if part in expected and not (folder / part).is_dir()]
    if missing:
        raise ModelError(
            f"base model '{name}' lacks {', '.join(dict.fromkeys(missing))}: a base's folder holds all parts"
        )
    for part, expected_class in family.classes.items():
        if part not in expected:
            continue
        if part.startswith("tokenizer"):
            _check_tokenizer(folder / part, name)
        found = _class_of(folder / part, name) if expected_class else ""
        if found and found != expected_class:
            raise ModelError(f"the {part} of base model '{name}' is a {found}, not {expected_class}: {SUPPORTED}")
    network, vae = _read(folder / family.network / "config.json", name), _read(folder / "vae/config.json", name)
    if family.network == "unet":
        _check_unet(network, XL_EMBEDDING if family is XL else None, name)
    _check_sizes(family, network, vae, name)


def flux_side(folder: Path, name: str) -> int:
    """Height and width of the latents of a VAE of FLUX.2 for this base's pictures: 128, for 1,024 pixels.

    `sample_size` in transformer/config.json, which diffusers has no use for, sets another.
    """
    return int(_read(folder / "transformer/config.json", name).get("sample_size", FLUX_SIDE))


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
    whole = any((part / file).is_file() for file in WHOLE_VOCABULARY)
    if not (whole or all((part / file).is_file() for file in VOCABULARY)):
        raise ModelError(f"base model '{name}' lacks {part.name}/tokenizer.json, or {' and '.join(VOCABULARY)} there")


def _check_unet(unet: dict[str, Any], embedding: str | None, name: str) -> None:
    """Refuse a UNet that takes other inputs than ours; `embedding` is what its family has of `addition_embed_type`."""
    found = unet.get("addition_embed_type")
    if found != embedding:
        raise ModelError(
            f"the unet of base model '{name}' has addition_embed_type {found}, and beside these parts it would be "
            f"{embedding}: {SUPPORTED}"
        )
    taken = [key for key in NOT_GIVEN if unet.get(key) is not None]
    if taken:
        raise ModelError(f"the unet of base model '{name}' has {taken[0]} {unet[taken[0]]}: {SUPPORTED}")


def _check_sizes(family: Family, network: dict[str, Any], vae: dict[str, Any], name: str) -> None:
    """Refuse a network of no size, or one whose channels are not the VAE's."""
    side, step = network.get("sample_size", FLUX_SIDE if family is FLUX_2 else None), 2 if family is FLUX_2 else 1
    if type(side) is not int or not 1 <= side <= LARGEST_SIDE or side % step:
        raise ModelError(
            f"{family.network}/config.json of base model '{name}' has sample_size {side}: write the height of "
            "its latents there, for Stable Diffusion 64, or 96 for pictures of 768 pixels"
        )
    if family is FLUX_2 and network.get("guidance_embeds", True):
        raise ModelError(f"the transformer of base model '{name}' has guidance_embeds: of FLUX.2, klein loads")
    latent, taken = vae.get("latent_channels", 4) * step**2, network.get("in_channels", 4)
    if latent != taken:
        raise ModelError(
            f"the {family.network} of base model '{name}' takes {taken} channels, its vae makes {latent}: bases for "
            "inpainting and upscaling do not load"
        )


def _class_of(part: Path, name: str) -> str:
    """The class that a component's config names; empty where it names none."""
    config = _read(part / ("scheduler_config.json" if part.name == "scheduler" else "config.json"), name)
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
