"""LoRA (arXiv 2106.09685): low-rank updates of layers, named as diffusers' `load_lora_weights` reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from ld_common.adapters.base import Adapter, Named
from ld_common.core.config import require
from ld_common.core.errors import AdapterError
from ld_common.core.seeding import torch_generator
from ld_common.diffusion.base_model import Denoiser

DEFAULT_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]


@dataclass
class Lora(Adapter):
    """LoRA on the UNet's layers whose names end in one of `targets`."""

    name: ClassVar[str] = "lora"

    rank: int = 8
    targets: list[str] = field(default_factory=lambda: list(DEFAULT_TARGETS))
    freeze_a: bool = False
    """Keep A at its start, drawn from the study's seed or learned by the release that the study starts from, and let
    only B learn and travel back (FFA-LoRA, arXiv 2403.12313); the default under differential privacy, where noise on
    both would enter as a product."""

    private_defaults: ClassVar[Mapping[str, object]] = {"freeze_a": True}

    def __post_init__(self) -> None:
        require(self.rank > 0, f"adapter.rank is {self.rank}: it must be above 0")
        require(bool(self.targets), "adapter.targets is empty: name at least one layer")

    def inject(self, model: Denoiser, seed: int) -> Iterator[Named]:
        """Add A and B to the UNet; B starts at zero.

        Raises:
            AdapterError: no layer of this UNet matches the targets.
        """
        from peft import LoraConfig  # it imports all of transformers

        config = LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=list(self.targets))
        try:
            model.unet.add_adapter(config)
        except ValueError as error:
            raise AdapterError(f"adapter.targets fit no layer of this UNet: {', '.join(self.targets)}") from error
        for name, parameter in model.unet.named_parameters():
            if ".lora_" not in name:
                continue
            wire_name = "unet." + name.replace(".default.", ".")
            with torch.no_grad():
                if "lora_A" in name:
                    start = torch.randn(parameter.shape, generator=torch_generator(seed, "lora", wire_name))
                    parameter.copy_(start / parameter[0].numel() ** 0.5)
                    parameter.requires_grad_(not self.freeze_a)
                else:
                    parameter.zero_()
            yield wire_name, parameter
