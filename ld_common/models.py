"""The frozen base: VAE, UNet, text encoder, tokenizer and scheduler of a Stable Diffusion folder or hub id.

Channel counts, latent scale, latent size and prediction type are read from the model, never assumed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from ld_common.errors import ModelError

PARTS = ("vae", "unet", "text_encoder", "tokenizer", "scheduler")
STATISTICS = "latent_statistics.json"


@dataclass(frozen=True)
class BaseModel:
    """A loaded base; every parameter frozen, everything in float32 and in eval mode."""

    vae: AutoencoderKL
    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: DDIMScheduler
    digest: str
    """SHA-256 over the folder's weights and configs."""
    latent_mean: Tensor
    """Mean of the base's own training latents by channel, `(C,)`; zeros where the folder does not say."""

    @property
    def side(self) -> int:
        """Height and width of the model's pictures, in pixels."""
        return int(self.unet.config["sample_size"]) * 2 ** (len(self.vae.config["block_out_channels"]) - 1)

    @property
    def channels(self) -> int:
        """Image channels of the VAE; grey scans are repeated to fill them."""
        return int(self.vae.config["in_channels"])

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape `(C, h, w)` of one latent."""
        size = int(self.unet.config["sample_size"])
        return int(self.unet.config["in_channels"]), size, size

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Grey images `(B,1,H,W)` in [-1,1] -> scaled latent means `(B,C,h,w)`."""
        mean = self.vae.encode(images.expand(-1, self.channels, -1, -1)).latent_dist.mean
        return (mean - self._shift) * self._scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents `(B,C,h,w)` -> grey images `(B,1,H,W)`, clipped to [-1,1]."""
        images = self.vae.decode(latents / self._scale + self._shift).sample
        return images.mean(1, keepdim=True).clamp(-1, 1)

    @torch.no_grad()
    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> the text encoder's last hidden states `(B,T,D)`.

        Raises:
            ModelError: a prompt is longer than the text encoder can read.
        """
        longest = int(self.text_encoder.config.max_position_embeddings)
        tokens = self.tokenizer(list(prompts), padding="max_length", max_length=longest, return_tensors="pt").input_ids
        if tokens.shape[1] > longest:
            raise ModelError(f"a prompt has {tokens.shape[1]} tokens, the base reads {longest}: shorten the prompt")
        return self.text_encoder(tokens).last_hidden_state

    @property
    def _scale(self) -> float:
        return float(self.vae.config["scaling_factor"])

    @property
    def _shift(self) -> float:
        return float(self.vae.config.get("shift_factor") or 0.0)


def load_base(name: str) -> BaseModel:
    """Load a base from a folder, or from the hub's local cache by its id (nothing is downloaded).

    Raises:
        ModelError: no such folder or cached id, a missing part, or unreadable weights.
    """
    folder = locate_base(name)
    transformers_logging.disable_progress_bar()
    unet, scheduler = load_unet(name)
    with _readable(name):
        vae = AutoencoderKL.from_pretrained(folder / "vae", dtype=torch.float32)
        text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        statistics = _read_statistics(folder)
    for part in (vae, text_encoder):
        part.requires_grad_(False).eval()
    mean = torch.tensor(statistics.get("mean", [0.0] * int(unet.config["in_channels"])))
    return BaseModel(vae, unet, text_encoder, tokenizer, scheduler, base_digest(name), mean)


def load_unet(name: str) -> tuple[UNet2DConditionModel, DDIMScheduler]:
    """Only what training needs of a base: the frozen UNet in float32 and the scheduler; raises `ModelError`."""
    folder = locate_base(name)
    with _readable(name):
        unet = UNet2DConditionModel.from_pretrained(folder / "unet", dtype=torch.float32)
        scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    return unet.requires_grad_(False).eval(), scheduler


def locate_base(name: str) -> Path:
    """The folder of a base given by path or by hub id; raises `ModelError` when it is not on this machine."""
    folder = Path(name)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(name, local_files_only=True))
        except (OSError, ValueError) as error:
            raise ModelError(
                f"base model '{name}' is neither a folder nor in the hub's local cache: "
                "give the path of a Stable Diffusion folder"
            ) from error
    missing = [part for part in PARTS if not (folder / part).is_dir()]
    if missing:
        raise ModelError(f"base model '{name}' lacks {', '.join(missing)}: a Stable Diffusion folder holds all parts")
    return folder


def base_digest(name: str) -> str:
    """SHA-256 over every weight, config and vocabulary file of a base's parts, in the order of their names."""
    folder, digest = locate_base(name), hashlib.sha256()
    for part in PARTS:
        for file in sorted(path for path in (folder / part).rglob("*") if path.is_file()):
            digest.update(file.relative_to(folder).as_posix().encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Turn whatever a broken model file makes the libraries raise into one `ModelError`."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"cannot load base model '{name}': {' '.join(str(error).split())}") from error


def _read_statistics(folder: Path) -> dict[str, Any]:
    file = folder / STATISTICS
    return json.loads(file.read_text()) if file.exists() else {}
