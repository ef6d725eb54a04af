"""Full fine-tuning: all weights of the UNet train and travel."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from safetensors.torch import save

from ld_common.adapters.base import METADATA, Adapter, Named, UnetConfig, train_all
from ld_common.adapters.state_dict import read_tensors
from ld_common.core.state import State
from ld_common.diffusion.base_model import Denoiser

UNET_WEIGHTS, UNET_CONFIG = "unet/diffusion_pytorch_model.safetensors", "unet/config.json"


@dataclass
class Full(Adapter):
    """Every parameter of the UNet; it has no options."""

    name: ClassVar[str] = "full"

    def inject(self, model: Denoiser, seed: int) -> Iterable[Named]:
        """Train all parameters of the UNet."""
        return train_all(model.unet.named_parameters(), "unet.")

    def export_files(self, state: State, unet_config: UnetConfig) -> Iterator[tuple[str, bytes]]:
        """A folder `unet` for `UNet2DConditionModel.from_pretrained`."""
        yield UNET_WEIGHTS, save({name.removeprefix("unet."): value for name, value in state.items()}, METADATA)
        # keys with an underscore are diffusers' own, `_name_or_path` among them: a path of the machine that wrote it
        config = {key: value for key, value in unet_config().items() if not key.startswith("_")}
        config["_class_name"] = "UNet2DConditionModel"
        yield UNET_CONFIG, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()

    def read_files(self, folder: Path) -> State:
        """The weights of the folder `unet`."""
        tensors, _ = read_tensors(folder / UNET_WEIGHTS)
        return {f"unet.{name}": value for name, value in tensors.items()}
