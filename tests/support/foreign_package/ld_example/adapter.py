from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ld_common.adapters.base import Adapter
from ld_common.core.config import require
from ld_common.diffusion.base_model import Denoiser


@dataclass
class BiasOnly(Adapter):
    """Biases of the UNet's layers whose names contain one of `layers`; all of them for an empty string."""

    name: ClassVar[str] = "bias_only"

    layers: str = "attn"
    """Part of a layer's name."""

    def __post_init__(self) -> None:
        require("/" not in self.layers, f"adapter.layers is '{self.layers}': give part of a layer's name")

    def inject(self, model: Denoiser, seed: int) -> Iterator[tuple[str, nn.Parameter]]:
        """The biases start as the base has them, so the seed plays no part."""
        for name, parameter in model.unet.named_parameters():
            if name.endswith("bias") and self.layers in name:
                yield f"unet.{name}", parameter.requires_grad_(True)
