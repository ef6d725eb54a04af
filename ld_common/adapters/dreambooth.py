"""DreamBooth (arXiv 2208.12242): the UNet or a LoRA of it, a rare word in the prompt, the base's prior preserved."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from ld_common.adapters.base import Adapter, Named, Prior
from ld_common.adapters.full import Full
from ld_common.adapters.lora import DEFAULT_TARGETS, Lora
from ld_common.core.config import require
from ld_common.diffusion.base_model import Denoiser


@dataclass
class DreamBooth(Adapter):
    """Pictures of the site under `instance_token` + prompt, the base's own pictures under `class_prompt`."""

    name: ClassVar[str] = "dreambooth"

    instance_token: str = "sks"
    """Rare word before every prompt."""
    class_prompt: str = "scan"
    """The class whose pictures by the base are preserved."""
    num_class_images: int = 64
    class_inference_steps: int = 25
    prior_loss_weight: float = 1.0
    rank: int = 0
    """0 trains the whole UNet, a higher number a LoRA of that rank."""
    targets: list[str] = field(default_factory=lambda: list(DEFAULT_TARGETS))
    """Layers of the LoRA."""

    def __post_init__(self) -> None:
        require(self.rank >= 0, f"adapter.rank is {self.rank}: use 0 for the whole UNet, or a rank")
        require(bool(self.class_prompt.strip()), "adapter.class_prompt is empty: name the class to preserve")
        require(
            self.num_class_images > 0 and self.class_inference_steps > 0,
            "adapter.num_class_images and adapter.class_inference_steps must be above 0",
        )
        require(
            self.prior_loss_weight >= 0,
            f"adapter.prior_loss_weight is {self.prior_loss_weight}: it must not be negative",
        )

    @property
    def prior(self) -> Prior:
        """The preserved prior."""
        return Prior(self.class_prompt, self.num_class_images, self.class_inference_steps, self.prior_loss_weight)

    def inject(self, model: Denoiser, seed: int) -> Iterable[Named]:
        """What basic fine-tuning or LoRA inject."""
        adapter = Lora(rank=self.rank, targets=self.targets) if self.rank else Full()
        return adapter.inject(model, seed)

    def transform_prompt(self, prompt: str) -> str:
        """The identifier before the prompt."""
        return f"{self.instance_token} {prompt}".strip()
