"""Full fine-tuning: all weights of the network that denoises train and travel."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from safetensors.torch import save

from ld_common.adapters.base import METADATA, Adapter, Named, UnetConfig, train_all
from ld_common.adapters.state_dict import diffusers_prefix, read_tensors
from ld_common.core.state import State
from ld_common.diffusion.base_model import Denoiser

FULL_WEIGHTS, FULL_CONFIG = "diffusion_pytorch_model.safetensors", "config.json"


@dataclass
class Full(Adapter):
    """Every parameter of the UNet or transformer; it has no options."""

    name: ClassVar[str] = "full"

    def inject(self, model: Denoiser, seed: int) -> Iterable[Named]:
        """Train all parameters of the network."""
        return train_all(model.unet.named_parameters(), "unet.")

    def export_files(self, state: State, unet_config: UnetConfig) -> Iterator[tuple[str, bytes]]:
        """A folder `unet` or `transformer` for `from_pretrained` of its class."""
        folder = diffusers_prefix(state).removesuffix(".")
        named = {name.removeprefix("unet."): value for name, value in state.items()}
        yield f"{folder}/{FULL_WEIGHTS}", save(named, METADATA)
        # keys with an underscore are diffusers' own, `_name_or_path` among them: a path of the machine that wrote it
        config = {key: value for key, value in unet_config().items() if not key.startswith("_")}
        config["_class_name"] = _class_of(config) if folder == "transformer" else "UNet2DConditionModel"
        yield f"{folder}/{FULL_CONFIG}", (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()

    def read_files(self, folder: Path) -> State:
        """The weights of that folder."""
        part = next((part for part in ("unet", "transformer") if (folder / part).is_dir()), "unet")
        tensors, _ = read_tensors(folder / part / FULL_WEIGHTS)
        return {f"unet.{name}": value for name, value in tensors.items()}


def _class_of(config: Mapping[str, object]) -> str:
    """The class of a transformer by its config: only Stable Diffusion 3's has a table of places."""
    return "SD3Transformer2DModel" if "pos_embed_max_size" in config else "Flux2Transformer2DModel"
