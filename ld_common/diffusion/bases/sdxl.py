"""Stable Diffusion XL (arXiv 2307.01952): two text encoders, and a UNet that also takes a pooled embedding and sizes.

Everything else of this project knows a prompt as one tensor `(B,T,D)`. Here its last row is the pooled embedding of the
second encoder, filled up with zeros; `XlUNet` takes it apart again. The sizes that the UNet was trained to tell apart
are those of an uncropped picture of the base's own resolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ld_common.core.errors import ModelError
from ld_common.diffusion.base_components import vae_levels, zero_for_empty_prompt
from ld_common.diffusion.base_weights import load_part
from ld_common.diffusion.prompts import token_ids

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

SIZES = 6
"""Numbers that the UNet takes: height and width of the original, the crop's corner, height and width asked for."""


@dataclass(frozen=True)
class XlText:
    """Both text encoders with their tokenizers."""

    first: tuple[CLIPTextModel, CLIPTokenizer]
    second: tuple[CLIPTextModelWithProjection, CLIPTokenizer]
    zero_empty: bool
    """Whether the empty prompt is zeros, as `force_zeros_for_empty_prompt` of the pipeline's index says."""

    @property
    def encoders(self) -> tuple[nn.Module, ...]:
        """CLIP, then the second one, which also makes the pooled embedding."""
        return self.first[0], self.second[0]

    @property
    def prompt_tokens(self) -> int:
        """What both read beside their tokens of beginning and end."""
        return self._longest - 2

    @property
    def _longest(self) -> int:
        return int(self.first[0].config.max_position_embeddings)

    def check(self, prompts: Sequence[str]) -> None:
        """Raise `ModelError` for a prompt that is too long."""
        for _, tokenizer in (self.first, self.second):
            token_ids(tokenizer, prompts, self._longest)

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """The embeddings `(B,T+1,D)` of both encoders side by side, then the pooled one of the second."""
        both = []
        for encoder, tokenizer in (self.first, self.second):
            ids = torch.tensor(token_ids(tokenizer, prompts, self._longest), device=encoder.device)
            both.append(encoder(ids, output_hidden_states=True))
        words = torch.cat([output.hidden_states[-2] for output in both], -1)
        pooled = both[1].text_embeds
        pooled = torch.nn.functional.pad(pooled, (0, words.shape[-1] - pooled.shape[-1]))
        context = torch.cat([words, pooled[:, None]], 1)
        if self.zero_empty:
            said = torch.tensor([bool(prompt) for prompt in prompts], device=context.device)
            context = context * said[:, None, None].to(context)
        return context


class XlUNet(UNet2DConditionModel):
    """The UNet of SDXL, whose prompt embeddings `(B,T+1,D)` are those of `XlText`."""

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


def load_xl(folder: Path, name: str, **options: Any) -> tuple[XlUNet, XlText]:
    """UNet and text encoders of a folder.

    Args:
        folder: the base's.
        name: as the user gave it, for messages.
        options: as diffusers' `from_pretrained`.

    Raises:
        ModelError: the UNet takes another pooled embedding, as that of SDXL's refiner does.
    """
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    unet: XlUNet = load_part(XlUNet, folder / "unet", **options)
    unet.picture_side = int(unet.config["sample_size"]) * 2 ** (vae_levels(folder, name) - 1)
    encoder = load_part(CLIPTextModelWithProjection, folder / "text_encoder_2", **options)
    width = int(encoder.config.projection_dim)
    if unet.pooled_width != width:
        raise ModelError(
            f"its unet takes {unet.pooled_width} numbers of a pooled prompt, text_encoder_2 makes {width}: refiners do "
            "not load"
        )
    first = load_part(CLIPTextModel, folder / "text_encoder", **options)
    tokenizers = [CLIPTokenizer.from_pretrained(folder / part) for part in ("tokenizer", "tokenizer_2")]
    text = XlText((first, tokenizers[0]), (encoder, tokenizers[1]), zero_for_empty_prompt(folder, name))
    return unet, text
