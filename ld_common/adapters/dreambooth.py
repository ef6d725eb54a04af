"""DreamBooth (arXiv 2208.12242): the UNet or a LoRA of it, a rare token in the prompt, and prior preservation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from ld_common.adapters.base import Adapter, Named, Prior, UnetConfig
from ld_common.adapters.full import Full
from ld_common.adapters.lora import Lora
from ld_common.core.config import require
from ld_common.core.state import State
from ld_common.diffusion.base_model import Denoiser


@dataclass
class DreamBooth(Adapter):
    """Trains on the site's scans under `instance_token` + prompt, and on the base's own images under `class_prompt`."""

    name: ClassVar[str] = "dreambooth"
    RENAMED: ClassVar[dict[str, str]] = {
        "identifier": "instance_token",
        "prior_prompt": "class_prompt",
        "prior_samples": "num_class_images",
        "prior_steps": "class_inference_steps",
        "prior_weight": "prior_loss_weight",
    }

    instance_token: str = "sks"
    """Rare token in front of every prompt."""
    class_prompt: str = "scan"
    """Prompt of the class whose images by the base are preserved."""
    num_class_images: int = 64
    class_inference_steps: int = 25
    """Sampler steps of each class image."""
    prior_loss_weight: float = 1.0
    rank: int = 0
    """0 trains the whole UNet; a higher number trains a LoRA of that rank."""
    targets: list[str] = field(default_factory=list)
    """Layers of the LoRA, as those of adapter `lora`."""

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
        """Inject what `full` or `lora` injects."""
        return self._weights().inject(model, seed)

    def merge(self, model: Denoiser) -> None:
        """Merge what `lora` merges."""
        self._weights().merge(model)

    def transform_prompt(self, prompt: str) -> str:
        """The token, then the prompt."""
        return f"{self.instance_token} {prompt}".strip()

    def export_files(self, state: State, unet_config: UnetConfig) -> Iterator[tuple[str, bytes]]:
        """The files of `full` or `lora`."""
        return self._weights().export_files(state, unet_config)

    def read_files(self, folder: Path) -> State:
        """The state in those files."""
        return self._weights().read_files(folder)

    def _weights(self) -> Lora | Full:
        return Lora(rank=self.rank, targets=self.targets) if self.rank else Full()
