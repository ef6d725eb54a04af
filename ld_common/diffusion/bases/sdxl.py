"""Stable Diffusion XL (arXiv 2307.01952): two text encoders, and a UNet that also takes a pooled embedding and sizes.

Everything else of this project knows a prompt as one tensor `(B,T,D)`. Here its last row is the pooled embedding of the
second encoder, filled up with zeros; `XlUNet` takes it apart again. The sizes that the UNet was trained to tell apart
are those of an uncropped picture of the base's own resolution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from ld_common.core.errors import ModelError
from ld_common.diffusion.base_weights import load_whole

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

SIZES = 6
"""Numbers that the UNet takes: height and width of the original, the crop's corner, height and width asked for."""
Tokens = Callable[[Sequence[str], "CLIPTokenizer"], Tensor]
"""From prompts to token ids `(B,T)`."""


@dataclass(frozen=True)
class SecondText:
    """The second text encoder of a base."""

    text_encoder: CLIPTextModelWithProjection
    tokenizer: CLIPTokenizer
    zero_empty: bool
    """Whether the empty prompt is zeros, as `force_zeros_for_empty_prompt` of the pipeline's index says."""

    def embed(self, prompts: Sequence[str], first: CLIPTextModel, tokenizer: CLIPTokenizer, tokens: Tokens) -> Tensor:
        """The prompts' embeddings `(B,T+1,D)`: of both encoders side by side, then the pooled one.

        Args:
            prompts: B prompts.
            first: the first text encoder.
            tokenizer: its own.
            tokens: makes token ids.
        """
        hidden = first(tokens(prompts, tokenizer), output_hidden_states=True).hidden_states[-2]
        second = self.text_encoder(tokens(prompts, self.tokenizer), output_hidden_states=True)
        words = torch.cat([hidden, second.hidden_states[-2]], -1)
        pooled = torch.nn.functional.pad(second.text_embeds, (0, words.shape[-1] - second.text_embeds.shape[-1]))
        context = torch.cat([words, pooled[:, None]], 1)
        if self.zero_empty:
            said = torch.tensor([bool(prompt) for prompt in prompts], device=context.device)
            context = context * said[:, None, None].to(context)
        return context


class XlUNet(UNet2DConditionModel):
    """The UNet of SDXL, whose prompt embeddings `(B,T+1,D)` are those of `SecondText`."""

    picture_side = 0
    """Height and width of the base's pictures, in pixels."""

    def forward(self, sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, **options: Any) -> Any:
        """The network's prediction; arguments as diffusers'."""
        pooled = encoder_hidden_states[:, -1, : self.pooled_width]
        side = self.picture_side
        sizes = torch.tensor([side, side, 0, 0, side, side], device=sample.device, dtype=sample.dtype)
        given = {"text_embeds": pooled, "time_ids": sizes.expand(len(sample), -1)}
        return super().forward(sample, timestep, encoder_hidden_states[:, :-1], added_cond_kwargs=given, **options)

    @property
    def pooled_width(self) -> int:
        """Numbers of the pooled embedding."""
        config = self.config
        return int(config["projection_class_embeddings_input_dim"]) - SIZES * int(config["addition_time_embed_dim"])


def load_xl_unet(folder: Path, vae_levels: int, **options: Any) -> XlUNet:
    """The UNet of a folder.

    Args:
        folder: the base's.
        vae_levels: levels of its VAE; each but the first halves a picture's side.
        options: as diffusers' `from_pretrained`.
    """
    unet: XlUNet = load_whole(XlUNet, folder / "unet", **options)
    unet.picture_side = int(unet.config["sample_size"]) * 2 ** (vae_levels - 1)
    return unet


def load_second_text(folder: Path, unet: XlUNet, zero_empty: bool, **options: Any) -> SecondText:
    """The second text encoder of a folder.

    Raises:
        ModelError: the UNet takes another pooled embedding, as that of SDXL's refiner does.
    """
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    encoder = load_whole(CLIPTextModelWithProjection, folder / "text_encoder_2", **options)
    width = int(encoder.config.projection_dim)
    if unet.pooled_width != width:
        raise ModelError(
            f"its unet takes {unet.pooled_width} numbers of a pooled prompt, text_encoder_2 makes {width}: refiners do "
            "not load"
        )
    return SecondText(encoder, CLIPTokenizer.from_pretrained(folder / "tokenizer_2"), zero_empty)
