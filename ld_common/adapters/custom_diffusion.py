"""Custom Diffusion (arXiv 2212.04488): the keys and values of the UNet's attention to the prompt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import save

from ld_common.adapters.base import METADATA, Adapter, Named, UnetConfig, train_all
from ld_common.adapters.state_dict import read_tensors
from ld_common.core.errors import AdapterError
from ld_common.core.state import State
from ld_common.diffusion.base_model import Denoiser

CUSTOM_DIFFUSION = "pytorch_custom_diffusion_weights.safetensors"
OURS, THEIRS = (
    (".to_k.weight", ".to_v.weight"),
    (
        ".processor.to_k_custom_diffusion.weight",
        ".processor.to_v_custom_diffusion.weight",
    ),
)


@dataclass
class CustomDiffusion(Adapter):
    """K and V of every cross-attention; it has no options."""

    name: ClassVar[str] = "custom_diffusion"

    def inject(self, model: Denoiser, seed: int) -> Iterable[Named]:
        """Train `attn2.to_k` and `attn2.to_v`.

        Raises:
            AdapterError: a base without attention to the prompt alone.
        """
        if not model.has_unet:
            raise AdapterError(
                "adapter custom_diffusion trains the layers that attend to the prompt alone, and this base attends to "
                "prompt and picture together: use lora"
            )
        layers = tuple("attn2" + ending for ending in OURS)
        named = ((name, value) for name, value in model.unet.named_parameters() if name.endswith(layers))
        return train_all(named, "unet.")

    def export_files(self, state: State, unet_config: UnetConfig) -> Iterator[tuple[str, bytes]]:
        """Attention processors for `load_attn_procs`.

        diffusers wants an entry for each processor; an empty tensor stands for those without weights.
        """
        from diffusers import UNet2DConditionModel

        with torch.device("meta"):
            processors = UNet2DConditionModel.from_config(dict(unet_config())).attn_processors
        weights = {_renamed(name.removeprefix("unet."), OURS, THEIRS): value for name, value in state.items()}
        bare = {name for name in processors if f"{name}.to_k_custom_diffusion.weight" not in weights}
        yield CUSTOM_DIFFUSION, save({**weights, **{name: torch.empty(0) for name in sorted(bare)}}, METADATA)

    def read_files(self, folder: Path) -> State:
        """The keys and values of the processors."""
        tensors, _ = read_tensors(folder / CUSTOM_DIFFUSION)
        named = {_renamed(name, THEIRS, OURS): value for name, value in tensors.items() if len(value)}
        return {f"unet.{name}": value for name, value in sorted(named.items())}


def _renamed(name: str, before: tuple[str, ...], after: tuple[str, ...]) -> str:
    for old, new in zip(before, after, strict=True):
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name
