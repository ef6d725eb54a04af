"""Full fine-tuning: the whole UNet learns and travels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from ld_common.adapters.base import Adapter, Named, learn
from ld_common.diffusion.base_model import Denoiser


@dataclass
class Full(Adapter):
    """Every parameter of the UNet; it has no options."""

    name: ClassVar[str] = "full"

    def inject(self, model: Denoiser, seed: int) -> Iterable[Named]:
        """All parameters of the UNet."""
        return learn(model.unet.named_parameters(), "unet.")
