"""Basic fine-tuning: the whole UNet learns and travels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ld_common.adapters.base import Named, Scheme, learn
from ld_common.diffusion.base_model import Denoiser


@dataclass
class Basic(Scheme):
    """Every parameter of the UNet; it has no options."""

    def attach(self, model: Denoiser, seed: int) -> Iterable[Named]:
        """All parameters of the UNet."""
        return learn(model.unet.named_parameters(), "unet.")
