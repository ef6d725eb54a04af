"""The frozen base: VAE, denoising network, text encoders, tokenizers and scheduler of a folder or hub id.

Which classes load is in `base_components`; a class that is more than a UNet, a CLIP and a VAE has its file in `bases`.
Channel counts, latent scale, latent size and prediction type are read from the model's configs. diffusers and
transformers take seconds to import, so only the functions that load a model import them.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

import ld_common.core.offline  # noqa: F401  (before any model library)
from ld_common.core.errors import ModelError
from ld_common.diffusion.base_components import (
    FLUX_2,
    STABLE_DIFFUSION_3,
    XL,
    check_components,
    family_of,
    flux_side,
    parts_of,
    read_schedule,
    zero_for_empty_prompt,
)
from ld_common.diffusion.base_weights import load_part, weights_of
from ld_common.diffusion.prompts import TextReader, token_ids

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    from ld_common.diffusion.bases.flow import FlowSchedule
    from ld_common.diffusion.bases.flux2 import PatchScaling

STATISTICS = "latent_statistics.json"
PRECISIONS = ("float32", "bfloat16", "float16")
AUTOENCODED_TOGETHER = 16


@dataclass(frozen=True, kw_only=True)
class Denoiser:
    """A base without its VAE: frozen networks in eval mode, tokenizer and scheduler."""

    unet: UNet2DConditionModel
    """The network that denoises: a UNet, or the transformer of a base of flow matching."""
    text_encoder: CLIPTextModel
    """The first text encoder."""
    tokenizer: CLIPTokenizer
    """Its own."""
    scheduler: DDIMScheduler | FlowSchedule
    transform_prompt: Callable[[str], str] = str
    """An adapter's change of a prompt before it is tokenized; the empty prompt stays empty."""
    reader: TextReader | None = None
    """Reads the prompts where more than one CLIP does."""
    image_conditioned: bool = False
    """Whether the UNet takes a scan, by `image_condition`, in channels behind the noisy latents'."""

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """The network that denoises, then all text encoders."""
        return (self.unet, *((self.text_encoder,) if self.reader is None else self.reader.encoders))

    @property
    def has_unet(self) -> bool:
        """Whether a UNet denoises, with layers that attend to the prompt alone; a transformer has none of these."""
        return hasattr(self.unet, "conv_in")

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape `(C, h, w)` of one latent."""
        side = latent_side(self.unet)
        return int(self.unet.config["in_channels"]), side, side

    @property
    def device(self) -> torch.device:
        """Device of the network that denoises."""
        return torch.device(self.unet.device)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of its weights."""
        return cast(torch.dtype, self.unet.dtype)

    @property
    def prompt_tokens(self) -> int:
        """Tokens that a prompt may have."""
        return self._longest - 2 if self.reader is None else self.reader.prompt_tokens  # its beginning and end are two

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings of prompts, `(B,T,D)`; only trained tokens get a gradient.

        They are the text encoder's last hidden states, or what the base's `TextReader` makes.

        Raises:
            ModelError: a prompt has more tokens than the text encoder reads.
        """
        words = self._words(prompts)
        if self.reader is not None:
            return self.reader.embed(words)
        ids = torch.tensor(token_ids(self.tokenizer, words, self._longest), device=self.device)
        return self.text_encoder(ids).last_hidden_state

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise `ModelError` for a prompt that has more tokens than the text encoders read."""
        words = self._words(prompts)
        if self.reader is None:
            token_ids(self.tokenizer, words, self._longest)
        else:
            self.reader.check(words)

    def _words(self, prompts: Sequence[str]) -> list[str]:
        return [self.transform_prompt(prompt) if prompt else "" for prompt in prompts]

    @property
    def _longest(self) -> int:
        return int(self.text_encoder.config.max_position_embeddings)


@dataclass(frozen=True, kw_only=True)
class BaseModel(Denoiser):
    """A base with its VAE, as `load_base` returns it."""

    vae: AutoencoderKL
    digest: str
    """SHA-256 of the folder's weights and configs, by `base_digest`."""
    latent_mean: Tensor
    """Mean of the base's training latents by channel, `(C,)`, on the CPU; zeros if the folder has no statistics."""

    @property
    def resolution(self) -> int:
        """Height and width of the model's images, in pixels."""
        factor = 2 ** (len(self.vae.config["block_out_channels"]) - 1) * self.scaling.factor
        return latent_side(self.unet) * factor

    @property
    def channels(self) -> int:
        """Image channels of the VAE; grey images are repeated to fill them."""
        return int(self.vae.config["in_channels"])

    def move(self, device: str, dtype: torch.dtype) -> BaseModel:
        """Move all networks to a device and convert their weights, in place; returns the base."""
        for part in self.networks:
            nn.Module.to(part, device=device, dtype=dtype)  # diffusers' own `to` logs a list of what it would not do
        nn.Module.to(self.vae, device=device, dtype=_vae_dtype(self.vae, dtype))
        return self

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode grey images `(B,1,H,W)` in [-1,1] to scaled latent means `(B,C,h,w)`, on the base's device."""
        pictures = images.to(self.device, self.vae.dtype).expand(-1, self.channels, -1, -1)
        return self.scaling.scaled(self.vae.encode(pictures).latent_dist.mean.to(self.dtype))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode scaled latents `(B,C,h,w)` to grey images `(B,1,H,W)`, float32 on the CPU, clipped to [-1,1]."""
        images = self.vae.decode(self.scaling.unscaled(latents.to(self.device, self.vae.dtype))).sample
        return images.mean(1, keepdim=True).clamp(-1, 1).float().cpu()

    def autoencode(self, images: Tensor) -> Tensor:
        """Grey images `(N,1,H,W)` in [-1,1] as the VAE returns them, in batches; float32 on the CPU."""
        return torch.cat([self.decode(self.encode(batch)) for batch in images.split(AUTOENCODED_TOGETHER)])

    @property
    def scaling(self) -> LatentScaling | PatchScaling:
        """Between the VAE's latents and those of the network."""
        if hasattr(self.vae, "bn"):
            from ld_common.diffusion.bases.flux2 import PatchScaling

            return PatchScaling.of(self.vae)
        return LatentScaling(float(self.vae.config["scaling_factor"]), float(self.vae.config.get("shift_factor") or 0))


@dataclass(frozen=True)
class LatentScaling:
    """Between the VAE's latents `(B,C,h,w)` and those of the network, of equal shape."""

    scale: float
    shift: float

    factor = 1
    """Latents of the VAE along one of the network's."""

    def scaled(self, latents: Tensor) -> Tensor:
        """From the VAE's latents."""
        return (latents - self.shift) * self.scale

    def unscaled(self, latents: Tensor) -> Tensor:
        """To the VAE's latents."""
        return latents / self.scale + self.shift


def latent_side(network: nn.Module) -> int:
    """Height and width of a denoising network's latents."""
    side = getattr(network, "latent_side", None)
    return int(network.config["sample_size"] if side is None else side)  # type: ignore[index]


def load_base(name: str, device: str = "cpu", precision: str = "float32") -> BaseModel:
    """Load a base from a folder or, by its hub id, from the local hub cache; nothing is downloaded.

    Args:
        name: path of a base's folder, or a hub id.
        device: `cpu` or `cuda`.
        precision: `float32`, `bfloat16` or `float16`; training needs float32 weights.

    Raises:
        ModelError: no such folder or cached id, a missing part, unreadable weights, or an unavailable device.
    """
    import diffusers

    denoiser, folder = load_denoiser(name, device, precision), locate_base(name)
    with _readable(name):
        vae = load_part(getattr(diffusers, family_of(folder).classes["vae"]), folder / "vae")
        nn.Module.to(vae, device=device, dtype=_vae_dtype(vae, denoiser.dtype))
        mean = base_latent_mean(name, denoiser.latent_shape[0])
    parts = {part.name: getattr(denoiser, part.name) for part in fields(denoiser)}
    return BaseModel(**parts, vae=vae.requires_grad_(False).eval(), digest=base_digest(name), latent_mean=mean)


def base_latent_mean(name: str, channels: int) -> Tensor:
    """Mean of the base's training latents by channel, `(C,)`; zeros if the folder has no statistics.

    Raises:
        ModelError: the statistics are not one finite number a channel.
    """
    file = locate_base(name) / STATISTICS
    if not file.exists():
        return torch.zeros(channels)
    try:
        mean = torch.tensor(json.loads(file.read_text())["mean"], dtype=torch.float32)
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ModelError(f"'{file}' does not read as {{\"mean\": [...]}} ({error}): write it again") from error
    if mean.shape != (channels,) or not bool(mean.isfinite().all()):
        raise ModelError(f"'{file}' needs {channels} finite numbers, one a latent channel")
    return mean


def load_denoiser(name: str, device: str = "cpu", precision: str = "float32") -> Denoiser:
    """Load a base without its VAE, which training does not need; arguments and errors as for `load_base`."""
    from transformers.utils import logging as transformers_logging

    folder, dtype = locate_base(name), checked_dtype(device, precision)
    transformers_logging.disable_progress_bar()
    with _readable(name):
        model = _load_parts(folder, name, dtype)
        for part in model.networks:
            part.requires_grad_(False).eval().to(device)
    return model


def _load_parts(folder: Path, name: str, dtype: torch.dtype) -> Denoiser:
    """A denoiser by the family of its folder."""
    family = family_of(folder)
    if family is STABLE_DIFFUSION_3:
        from ld_common.diffusion.bases.sd3 import load_sd3

        transformer, sd3, flow = load_sd3(folder, name, dtype=dtype)
        encoder, tokenizer = sd3.clips[0]
        return Denoiser(unet=transformer, text_encoder=encoder, tokenizer=tokenizer, scheduler=flow, reader=sd3)
    if family is FLUX_2:
        from ld_common.diffusion.bases.flux2 import load_flux2

        transformer, qwen, flow = load_flux2(folder, name, flux_side(folder, name), dtype=dtype)
        return Denoiser(
            unet=transformer, text_encoder=qwen.encoder, tokenizer=qwen.tokenizer, scheduler=flow, reader=qwen
        )
    scheduler = read_schedule(folder, name)
    if family is XL:
        from ld_common.diffusion.bases.sdxl import load_xl

        unet, texts = load_xl(folder, name, dtype=dtype)
        encoder, tokenizer = texts.first
        return Denoiser(unet=unet, text_encoder=encoder, tokenizer=tokenizer, scheduler=scheduler, reader=texts)
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    return Denoiser(
        unet=load_part(UNet2DConditionModel, folder / "unet", dtype=dtype),
        text_encoder=load_part(CLIPTextModel, folder / "text_encoder", dtype=dtype),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        scheduler=scheduler,
    )


def checked_dtype(device: str, precision: str) -> torch.dtype:
    """The dtype of a precision; raises `ModelError` for an unknown one, or a device that this machine lacks."""
    kind, _, number = device.partition(":")
    known = device == "cpu" or (kind == "cuda" and (not number or number.isdecimal()))
    if not known or (kind == "cuda" and torch.cuda.device_count() <= int(number or 0)):
        raise ModelError(f"device is '{device}': use cpu, or cuda on a machine that has it")
    if precision not in PRECISIONS:
        raise ModelError(f"precision is '{precision}': use {', '.join(PRECISIONS)}")
    return cast(torch.dtype, getattr(torch, precision))


def _vae_dtype(vae: AutoencoderKL, dtype: torch.dtype) -> torch.dtype:
    """Precision of a VAE beside a network's: float16 overflows in one whose config says `force_upcast`."""
    upcast = dtype == torch.float16 and bool(vae.config.get("force_upcast"))
    return torch.float32 if upcast else dtype


def locate_base(name: str) -> Path:
    """The folder of a base given by path or hub id; raises `ModelError` if it is not here, or of classes that do not
    load."""
    folder = Path(name)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(name, local_files_only=True))
        except (OSError, ValueError) as error:
            raise ModelError(
                f"base model '{name}' is neither a folder (from '{Path.cwd()}') nor a hub id in the local cache: "
                "give the path of a base's folder"
            ) from error
    check_components(folder, name)
    return folder


def base_digest(name: str) -> str:
    """SHA-256 of all that decides what a base computes: loaded weights, configs, vocabulary, latent statistics."""
    folder, total = locate_base(name), hashlib.sha256()
    files = [file for part in parts_of(folder) for file in _files_of(folder / part)]
    for file in [*files, *(path for path in [folder / STATISTICS] if path.exists())]:
        state = file.stat()
        total.update(file.relative_to(folder).as_posix().encode())
        total.update(_file_digest(file, state.st_size, state.st_mtime_ns))
    if family_of(folder) is XL:
        total.update(f"zero for the empty prompt: {zero_for_empty_prompt(folder, name)}".encode())
    return total.hexdigest()


def _files_of(part: Path) -> list[Path]:
    """The files of one part, sorted; of its weights those that are loaded."""
    words = [path for path in part.iterdir() if path.suffix in (".json", ".txt", ".model", ".jinja")]
    return sorted({*words, *weights_of(part)})


@functools.cache
def _file_digest(file: Path, size: int, changed_ns: int) -> bytes:
    """A file's SHA-256; size and time of change are part of the cache's key, so a changed file is read again."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Turn the errors that a broken model file causes in the libraries into `ModelError`."""
    try:
        yield
    except ModelError:
        raise
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        ImportError,
        RuntimeError,
        SafetensorError,
    ) as error:
        raise ModelError(f"cannot load base model '{name}': {' '.join(str(error).split())}") from error
