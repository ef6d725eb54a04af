"""The frozen base: VAE, UNet, text encoders, tokenizers and scheduler of a Stable Diffusion folder or hub id.

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
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

import ld_common.core.offline  # noqa: F401  (before any model library)
from ld_common.core.errors import ModelError
from ld_common.diffusion.base_components import (
    check_components,
    is_xl,
    parts_of,
    read_schedule,
    vae_levels,
    zero_for_empty_prompt,
)
from ld_common.diffusion.base_weights import load_whole, weights_are_safetensors, weights_of, weights_variant

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    from ld_common.diffusion.bases.sdxl import SecondText

STATISTICS = "latent_statistics.json"
PRECISIONS = ("float32", "bfloat16", "float16")
AUTOENCODED_TOGETHER = 16


@dataclass(frozen=True, kw_only=True)
class Denoiser:
    """A base without its VAE: frozen UNet and text encoder in eval mode, tokenizer and scheduler."""

    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: DDIMScheduler
    transform_prompt: Callable[[str], str] = str
    """An adapter's change of a prompt before it is tokenized; the empty prompt stays empty."""
    second_text: SecondText | None = None
    """The second text encoder of SDXL."""
    image_conditioned: bool = False
    """Whether the UNet takes a scan, by `image_condition`, in channels behind the noisy latents'."""

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape `(C, h, w)` of one latent."""
        size = int(self.unet.config["sample_size"])
        return int(self.unet.config["in_channels"]), size, size

    @property
    def device(self) -> torch.device:
        """Device of the UNet."""
        return torch.device(self.unet.device)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the UNet's weights."""
        return cast(torch.dtype, self.unet.dtype)

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings of prompts, `(B,T,D)`; only trained tokens get a gradient.

        They are the text encoder's last hidden states, or those of `SecondText` with a pooled one as their last row.

        Raises:
            ModelError: a prompt has more tokens than the text encoder reads.
        """
        if self.second_text is not None:
            return self.second_text.embed(prompts, self.text_encoder, self.tokenizer, self._ids)
        return self.text_encoder(self._ids(prompts, self.tokenizer)).last_hidden_state

    def _ids(self, prompts: Sequence[str], tokenizer: CLIPTokenizer) -> Tensor:
        return torch.tensor(self.tokens(prompts, tokenizer), device=self.device)

    def tokens(self, prompts: Sequence[str], tokenizer: CLIPTokenizer | None = None) -> list[list[int]]:
        """Token ids of prompts, `(B,T)`, filled up to what the text encoder reads.

        Args:
            prompts: B prompts.
            tokenizer: another one of the base than the first.

        Raises:
            ModelError: a prompt has more tokens than that.
        """
        if not prompts:
            return []  # the tokenizer takes no empty batch
        longest = int(self.text_encoder.config.max_position_embeddings)
        words = [self.transform_prompt(prompt) if prompt else "" for prompt in prompts]
        tokens = (tokenizer or self.tokenizer)(words, padding="max_length", max_length=longest).input_ids
        for prompt, ids in zip(words, tokens, strict=True):
            if len(ids) > longest:
                raise ModelError(f"prompt '{prompt}' has {len(ids)} tokens, the base reads {longest}: shorten it")
        return [list(ids) for ids in tokens]


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
        return int(self.unet.config["sample_size"]) * 2 ** (len(self.vae.config["block_out_channels"]) - 1)

    @property
    def channels(self) -> int:
        """Image channels of the VAE; grey images are repeated to fill them."""
        return int(self.vae.config["in_channels"])

    def move(self, device: str, dtype: torch.dtype) -> BaseModel:
        """Move all networks to a device and convert their weights, in place; returns the base."""
        second = () if self.second_text is None else (self.second_text.text_encoder,)
        for part in (self.unet, self.text_encoder, *second):
            nn.Module.to(part, device=device, dtype=dtype)  # diffusers' own `to` logs a list of what it would not do
        nn.Module.to(self.vae, device=device, dtype=_vae_dtype(self.vae, dtype))
        return self

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode grey images `(B,1,H,W)` in [-1,1] to scaled latent means `(B,C,h,w)`, on the base's device."""
        pictures = images.to(self.device, self.vae.dtype).expand(-1, self.channels, -1, -1)
        mean = self.vae.encode(pictures).latent_dist.mean.to(self.dtype)
        return (mean - self._shift) * self._scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode scaled latents `(B,C,h,w)` to grey images `(B,1,H,W)`, float32 on the CPU, clipped to [-1,1]."""
        images = self.vae.decode(latents.to(self.device, self.vae.dtype) / self._scale + self._shift).sample
        return images.mean(1, keepdim=True).clamp(-1, 1).float().cpu()

    def autoencode(self, images: Tensor) -> Tensor:
        """Grey images `(N,1,H,W)` in [-1,1] as the VAE returns them, in batches; float32 on the CPU."""
        return torch.cat([self.decode(self.encode(batch)) for batch in images.split(AUTOENCODED_TOGETHER)])

    @property
    def _scale(self) -> float:
        return float(self.vae.config["scaling_factor"])

    @property
    def _shift(self) -> float:
        return float(self.vae.config.get("shift_factor") or 0.0)


def load_base(name: str, device: str = "cpu", precision: str = "float32") -> BaseModel:
    """Load a base from a folder or, by its hub id, from the local hub cache; nothing is downloaded.

    Args:
        name: path of a Stable Diffusion folder, or a hub id.
        device: `cpu` or `cuda`.
        precision: `float32`, `bfloat16` or `float16`; training needs float32 weights.

    Raises:
        ModelError: no such folder or cached id, a missing part, unreadable weights, or an unavailable device.
    """
    from diffusers import AutoencoderKL

    denoiser, folder = load_denoiser(name, device, precision), locate_base(name)
    with _readable(name):
        vae = load_whole(AutoencoderKL, folder / "vae", **_weights_options(folder / "vae"))
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
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer
    from transformers.utils import logging as transformers_logging

    folder, dtype = locate_base(name), checked_dtype(device, precision)
    transformers_logging.disable_progress_bar()
    with _readable(name):
        second, options = None, _weights_options(folder / "unet") | {"dtype": dtype}
        if is_xl(folder):
            from ld_common.diffusion.bases.sdxl import load_second_text, load_xl_unet

            unet = load_xl_unet(folder, vae_levels(folder, name), **options)
            options |= _weights_options(folder / "text_encoder_2")
            second = load_second_text(folder, unet, zero_for_empty_prompt(folder, name), **options)
        else:
            unet = load_whole(UNet2DConditionModel, folder / "unet", **options)
        options |= _weights_options(folder / "text_encoder")
        text_encoder = load_whole(CLIPTextModel, folder / "text_encoder", **options)
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        scheduler = read_schedule(folder, name)
        for part in (unet, text_encoder, *([] if second is None else [second.text_encoder])):
            part.requires_grad_(False).eval().to(device)
    return Denoiser(unet=unet, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler, second_text=second)


def checked_dtype(device: str, precision: str) -> torch.dtype:
    """The dtype of a precision; raises `ModelError` for an unknown one, or a device that this machine lacks."""
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
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
                "give the path of a Stable Diffusion folder"
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
    if is_xl(folder):
        total.update(f"zero for the empty prompt: {zero_for_empty_prompt(folder, name)}".encode())
    return total.hexdigest()


def _files_of(part: Path) -> list[Path]:
    """The files of one part, sorted; of its weights those that are loaded."""
    words = [path for path in part.iterdir() if path.suffix in (".json", ".txt", ".model")]
    return sorted({*words, *weights_of(part)})


@functools.cache
def _file_digest(file: Path, size: int, changed_ns: int) -> bytes:
    """A file's SHA-256; size and time of change are part of the cache's key, so a changed file is read again."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def _weights_options(part: Path) -> dict[str, Any]:
    """Options by which diffusers and transformers load the weights that `weights_of` names."""
    return {"variant": weights_variant(part), "use_safetensors": weights_are_safetensors(part)}


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
