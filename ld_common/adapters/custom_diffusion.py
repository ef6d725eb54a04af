"""Custom Diffusion (arXiv 2212.04488): the keys and values of the UNet's attention to the prompt."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from ld_common.adapters.base import Adapter, Named, learn
from ld_common.diffusion.base_model import Denoiser


@dataclass
class CustomDiffusion(Adapter):
    """K and V of every cross-attention; it has no options."""

    name: ClassVar[str] = "custom_diffusion"

    def inject(self, model: Denoiser, seed: int) -> Iterable[Named]:
        """`attn2.to_k` and `attn2.to_v`."""
        layers = ("attn2.to_k.weight", "attn2.to_v.weight")
        return learn(((name, value) for name, value in model.unet.named_parameters() if name.endswith(layers)), "unet.")
