"""Which parameters of the frozen base learn, and as which named set of tensors they travel.

Training, messages, aggregation and release know a scheme only as `dict[str, Tensor]`. LoRA's names are those of
diffusers, so a release's adapter loads into any diffusers pipeline with `load_lora_weights`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn

from ld_common.errors import AdapterError
from ld_common.seeding import torch_generator
from ld_common.study import SchemeConfig

State = dict[str, Tensor]


def attach(unet: UNet2DConditionModel, scheme: SchemeConfig, seed: int) -> None:
    """Add the scheme's parameters to the frozen `unet`; the same seed starts them alike on every side.

    Raises:
        AdapterError: no layer of this UNet matches the scheme's targets.
    """
    config = LoraConfig(r=scheme.rank, lora_alpha=scheme.rank, target_modules=list(scheme.targets))
    try:
        unet.add_adapter(config)
    except ValueError as error:
        raise AdapterError(f"scheme.targets fit no layer of this UNet: {', '.join(scheme.targets)}") from error
    with torch.no_grad():
        for name, parameter in _adapter_parameters(unet):
            if "lora_A" in name:
                start = torch.randn(parameter.shape, generator=torch_generator(seed, "lora", _wire_name(name)))
                parameter.copy_(start / parameter[0].numel() ** 0.5)
                parameter.requires_grad_(not scheme.freeze_a)
            else:
                parameter.zero_()


def learned_state(unet: nn.Module) -> State:
    """The tensors that learn, and therefore travel, as float32 copies in the order of their names."""
    return _copies((name, value) for name, value in _adapter_parameters(unet) if value.requires_grad)


def adapter_state(unet: nn.Module) -> State:
    """All tensors of the adapter, learned and shared, as float32 copies: what a release holds."""
    return _copies(_adapter_parameters(unet))


def load_state(unet: nn.Module, state: State) -> None:
    """Copy `state` into the attached adapter.

    Raises:
        AdapterError: a name or a shape does not fit.
    """
    parameters = {_wire_name(name): value for name, value in _adapter_parameters(unet)}
    with torch.no_grad():
        for name, value in state.items():
            if name not in parameters or parameters[name].shape != value.shape:
                raise AdapterError(f"tensor '{name}' of shape {tuple(value.shape)} does not fit this base and scheme")
            parameters[name].copy_(value)


def _copies(parameters: Iterable[tuple[str, nn.Parameter]]) -> State:
    named = {_wire_name(name): value.detach().float().clone() for name, value in parameters}
    return dict(sorted(named.items()))


def _adapter_parameters(unet: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, value) for name, value in unet.named_parameters() if ".lora_" in name]


def _wire_name(parameter_name: str) -> str:
    return "unet." + parameter_name.replace(".default.", ".")
