"""What trains and travels: LoRA and other ways to fine-tune a frozen base.

from ld_common import adapters
adapters.Lora(rank=8)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ld_common.core.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from ld_common.adapters.base import AdaptedModel, Adapter, Prior, inject
    from ld_common.adapters.custom_diffusion import CustomDiffusion
    from ld_common.adapters.dreambooth import DreamBooth
    from ld_common.adapters.full import Full
    from ld_common.adapters.instruct_pix2pix import InstructPix2Pix
    from ld_common.adapters.lora import Lora
    from ld_common.adapters.registry import ADAPTERS, read_adapter
    from ld_common.adapters.textual_inversion import TextualInversion

__all__ = [
    "ADAPTERS",
    "AdaptedModel",
    "Adapter",
    "CustomDiffusion",
    "DreamBooth",
    "Full",
    "InstructPix2Pix",
    "Lora",
    "Prior",
    "TextualInversion",
    "inject",
    "read_adapter",
]

if not TYPE_CHECKING:  # a type checker would take any name from `__getattr__`
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            **dict.fromkeys(("AdaptedModel", "Adapter", "Prior", "inject"), "ld_common.adapters.base"),
            **dict.fromkeys(("ADAPTERS", "read_adapter"), "ld_common.adapters.registry"),
            "CustomDiffusion": "ld_common.adapters.custom_diffusion",
            "DreamBooth": "ld_common.adapters.dreambooth",
            "Full": "ld_common.adapters.full",
            "InstructPix2Pix": "ld_common.adapters.instruct_pix2pix",
            "Lora": "ld_common.adapters.lora",
            "TextualInversion": "ld_common.adapters.textual_inversion",
        },
    )
