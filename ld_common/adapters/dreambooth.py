"""DreamBooth (arXiv 2208.12242): the UNet or a LoRA of it, a rare word in the prompt, the base's prior preserved."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ld_common.adapters.base import Named, Prior, Scheme
from ld_common.adapters.full import Basic
from ld_common.adapters.lora import DEFAULT_TARGETS, Lora
from ld_common.core.config import require
from ld_common.diffusion.base_model import Denoiser


@dataclass
class DreamBooth(Scheme):
    """Pictures of the site under `identifier` + prompt, the base's own pictures under `prior_prompt`."""

    identifier: str = "sks"
    """Rare word before every prompt."""
    prior_prompt: str = "scan"
    """The class whose pictures by the base are preserved."""
    prior_samples: int = 64
    prior_steps: int = 25
    prior_weight: float = 1.0
    rank: int = 0
    """0 trains the whole UNet, a higher number a LoRA of that rank."""
    targets: list[str] = field(default_factory=lambda: list(DEFAULT_TARGETS))
    """Layers of the LoRA."""

    def __post_init__(self) -> None:
        require(self.rank >= 0, f"scheme.rank is {self.rank}: use 0 for the whole UNet, or a rank")
        require(bool(self.prior_prompt.strip()), "scheme.prior_prompt is empty: name the class to preserve")
        require(self.prior_samples > 0 and self.prior_steps > 0, "scheme.prior_samples and prior_steps must be above 0")
        require(self.prior_weight >= 0, f"scheme.prior_weight is {self.prior_weight}: it must not be negative")

    @property
    def prior(self) -> Prior:
        """The preserved prior."""
        return Prior(self.prior_prompt, self.prior_samples, self.prior_steps, self.prior_weight)

    def attach(self, model: Denoiser, seed: int) -> Iterable[Named]:
        """What basic fine-tuning or LoRA attach."""
        scheme = Lora(rank=self.rank, targets=self.targets) if self.rank else Basic()
        return scheme.attach(model, seed)

    def decorate(self, prompt: str) -> str:
        """The identifier before the prompt."""
        return f"{self.identifier} {prompt}".strip()
