"""LoRA (arXiv 2106.09685): low-rank updates of the network's layers, in the formats of diffusers and peft."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save

from ld_common.adapters.base import METADATA, Adapter, Named, UnetConfig
from ld_common.adapters.low_rank import DOWN, dense_update, down_names, is_lora
from ld_common.adapters.state_dict import TRANSFORMER, diffusers_prefix, read_tensors
from ld_common.core.config import require
from ld_common.core.errors import AdapterError
from ld_common.core.seeding import torch_generator
from ld_common.core.state import State
from ld_common.diffusion.base_model import Denoiser

UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
"""Layers of a UNet that train by default; a transformer of ours names its own as `lora_targets`."""
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
DIFFUSERS_METADATA = "lora_adapter_metadata"
"""Key of the safetensors metadata in which diffusers keeps a LoRA's config."""
PEFT_PREFIX = "base_model.model."
LAYER_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
MAGNITUDE = ".lora_magnitude_vector"
"""End of the name of a DoRA's lengths in files; in the network `.weight` follows."""


@dataclass
class Lora(Adapter):
    """LoRA on the network's layers whose names end in one of `targets`."""

    name: ClassVar[str] = "lora"

    rank: int = 8
    targets: list[str] = field(default_factory=list)
    """Empty for attention, feed-forward and projections, by the base's class."""
    freeze_a: bool = False
    """Keep A at its initial value, from the study's seed or its start, and train and send only B (FFA-LoRA, arXiv
    2403.12313). The default under differential privacy, where noise on both would enter as a product."""

    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Rank of the layers whose name ends in a key, such as `attn2.to_k: 16`; all others have `rank`."""
    use_rslora: bool = False
    """Scale updates by √rank (rsLoRA, arXiv 2312.03732), so that a higher rank does not learn more slowly."""
    use_dora: bool = False
    """Train the length of each column of a weight beside its direction (DoRA, arXiv 2402.09353); slower, and not under
    differential privacy."""

    drawn_rank: int = 0
    """Rank of the initial A whose first rows this one takes, so that sites of smaller ranks (`federation.ranks`) start
    from parts of the same A; 0 for its own rank."""

    private_defaults: ClassVar[Mapping[str, object]] = {"freeze_a": True}

    def __post_init__(self) -> None:
        require(self.rank > 0, f"adapter.rank is {self.rank}: it must be above 0")
        for name, rank in self.rank_pattern.items():
            require(rank > 0, f"adapter.rank_pattern: the rank of '{name}' is {rank}: it must be above 0")
            plain = bool(LAYER_NAME.fullmatch(name))  # peft would read it as a regular expression
            require(plain, f"adapter.rank_pattern: '{name}' is no end of a layer's name, such as attn2.to_k")
            inner = [other for other in self.rank_pattern if other.endswith(f".{name}")]
            require(not inner, f"adapter.rank_pattern: '{name}' is also the end of '{', '.join(inner)}': keep one")
        fits = self.drawn_rank == 0 or self.drawn_rank >= self.rank
        require(fits, f"adapter.drawn_rank is {self.drawn_rank}: use 0, or adapter.rank and more")

    def inject(self, model: Denoiser, seed: int) -> Iterator[Named]:
        """Add A and B to the network; B starts at zero, so the model is unchanged until it trains.

        Raises:
            AdapterError: no layer of this base matches the targets, or a key of `rank_pattern`.
        """
        from peft import LoraConfig  # it imports all of transformers
        from peft.tuners.lora.layer import LoraLayer

        from ld_common.adapters.fused_lora import FusedUpdate

        targets = list(self.targets or getattr(model.unet, "lora_targets", UNET_TARGETS))
        config = LoraConfig(target_modules=targets, **self._strengths())
        try:
            model.unet.add_adapter(config)
        except ValueError as error:
            raise AdapterError(f"adapter.targets match no layer of this base: {', '.join(targets)}") from error
        layers = {name: layer for name, layer in model.unet.named_modules() if isinstance(layer, LoraLayer)}
        for key in self.rank_pattern:
            if not any(f".{name}".endswith(f".{key}") for name in layers):
                raise AdapterError(f"adapter.rank_pattern: no layer that trains has a name that ends in '{key}'")
        for layer in layers.values() if not self.use_dora else ():
            layer.lora_variant = dict.fromkeys(layer.lora_A, FusedUpdate)
        for name, parameter in model.unet.named_parameters():
            if ".lora_" not in name:
                continue
            wire_name = "unet." + name.replace(".default.", ".")
            with torch.no_grad():
                if "lora_A" in name:
                    shape = (self.drawn_rank or len(parameter), *parameter.shape[1:])
                    start = torch.randn(shape, generator=torch_generator(seed, "lora", wire_name))
                    parameter.copy_(start[: len(parameter)] / parameter[0].numel() ** 0.5)
                    parameter.requires_grad_(not self.freeze_a)
                elif "lora_B" in name:
                    parameter.zero_()
            yield wire_name, parameter

    def add_to_base(self, model: Denoiser, carried: State) -> None:
        """Add the products of carried factors, named as the adapter's own, to the weights of their layers."""
        from peft.tuners.lora.layer import LoraLayer

        if carried and not is_lora(carried):
            raise AdapterError("what is to be added to the base is not pairs of A and B")
        for name in down_names(carried):
            layer = dict(model.unet.named_modules()).get(name.removeprefix("unet.").partition(DOWN)[0])
            weight = layer.get_base_layer().weight if isinstance(layer, LoraLayer) else None
            added = dense_update(carried, name)
            if not isinstance(weight, torch.Tensor) or weight.shape != added.shape:
                raise AdapterError(f"carried tensor '{name}' does not fit this base and adapter")
            with torch.no_grad():
                weight.copy_((weight.double() + added.to(weight.device)).to(weight.dtype))

    def merge(self, model: Denoiser) -> None:
        """Replace each layer of the network by one of weights W + BA, as large and as fast as the base's."""
        from peft.tuners.lora.layer import LoraLayer

        for name, layer in list(model.unet.named_modules()):
            if isinstance(layer, LoraLayer):
                if not self.use_dora:
                    layer.lora_variant.clear()  # a variant merges itself; ours is plain LoRA
                layer.merge()
                model.unet.set_submodule(name, layer.get_base_layer())

    def export_files(self, state: State, unet_config: UnetConfig) -> Iterator[tuple[str, bytes]]:
        """Files for `load_lora_weights` and for `PeftModel.from_pretrained`, which want different tensor names."""
        config, prefix = self._peft_config(state), diffusers_prefix(state)
        metadata = json.dumps({prefix + key: value for key, value in config.items()}, indent=2, sort_keys=True)
        state = {name.removesuffix(".weight") if MAGNITUDE in name else name: state[name] for name in state}
        named = {prefix + name.removeprefix("unet."): value for name, value in state.items()}
        yield DIFFUSERS_WEIGHTS, save(named, {DIFFUSERS_METADATA: metadata})
        renamed = {PEFT_PREFIX + name.removeprefix("unet."): value for name, value in state.items()}
        yield PEFT_WEIGHTS, save(renamed, METADATA)
        yield PEFT_CONFIG, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()

    def read_files(self, folder: Path) -> State:
        """The state in diffusers' file."""
        state, _ = read_tensors(folder / DIFFUSERS_WEIGHTS)
        named = {
            "unet." + name.removeprefix(TRANSFORMER) if name.startswith(TRANSFORMER) else name: value
            for name, value in state.items()
        }
        return {f"{name}.weight" if name.endswith(MAGNITUDE) else name: value for name, value in named.items()}

    def _strengths(self) -> dict[str, Any]:
        """Ranks and scales as peft's config has them: an update is B A, or √rank B A with `use_rslora`."""
        pattern = dict(self.rank_pattern)
        ranks = {"r": self.rank, "lora_alpha": self.rank, "rank_pattern": pattern, "alpha_pattern": pattern}
        return ranks | {"use_rslora": self.use_rslora, "use_dora": self.use_dora}

    def _peft_config(self, state: State) -> dict[str, Any]:
        return {
            "peft_type": "LORA",
            **self._strengths(),
            "target_modules": list(self.targets) or _default_targets(state),
            "lora_dropout": 0.0,
            "bias": "none",
            "init_lora_weights": True,
            "inference_mode": True,
        }


def _default_targets(state: State) -> list[str]:
    """The targets of a state by which it can be put in again: of a UNet endings, of a transformer whole names."""
    layers = [name.removeprefix("unet.").partition(DOWN)[0] for name in down_names(state)]
    endings = tuple(f".{target}" for target in UNET_TARGETS)
    return list(UNET_TARGETS) if all(layer.endswith(endings) for layer in layers) else layers
