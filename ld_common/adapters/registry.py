"""Fine-tuning schemes: which parameters of the frozen base learn, and as which named set of tensors they travel.

Training, messages, aggregation, release and generation know a scheme only through this module. A new scheme is a file
with a subclass of `Scheme` and a line in `SCHEMES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from ld_common.adapters.base import Prior, Scheme, State
from ld_common.adapters.custom_diffusion import CustomDiffusion
from ld_common.adapters.dreambooth import DreamBooth
from ld_common.adapters.full import Basic
from ld_common.adapters.instruct_pix2pix import Instruct
from ld_common.adapters.lora import Lora
from ld_common.adapters.textual_inversion import TextualInversion
from ld_common.core.config import checked, nearest, require, to_mapping
from ld_common.core.errors import AdapterError
from ld_common.diffusion.base_model import Denoiser

__all__ = ["SCHEMES", "Attached", "Prior", "Scheme", "State", "attach", "complete", "read_scheme"]

SCHEMES: dict[str, type[Scheme]] = {
    "lora": Lora,
    "basic": Basic,
    "textual_inversion": TextualInversion,
    "dreambooth": DreamBooth,
    "custom_diffusion": CustomDiffusion,
    "instruct": Instruct,
}

M = TypeVar("M", bound=Denoiser)


@dataclass(frozen=True, eq=False)
class Attached(Generic[M]):
    """A model with a scheme's parameters in it."""

    model: M
    """It reads prompts as the scheme decorates them."""
    parameters: dict[str, nn.Parameter]
    """All of the adapter's, by the name under which they travel, sorted."""

    @property
    def learned(self) -> dict[str, nn.Parameter]:
        """Those that learn, and therefore travel."""
        return {name: value for name, value in self.parameters.items() if value.requires_grad}

    def learned_state(self) -> State:
        """Copies of those that learn."""
        return _copies(self.learned)

    def frozen_state(self) -> State:
        """Copies of those that do not: every side draws them from the study's seed, or has them from its start."""
        return _copies({name: value for name, value in self.parameters.items() if not value.requires_grad})

    def state(self) -> State:
        """Copies of all, learned and shared: what a release holds."""
        return _copies(self.parameters)

    def load(self, state: State) -> None:
        """Copy `state` into the parameters; raises `AdapterError` when a name or a shape does not fit."""
        with torch.no_grad():
            for name, value in state.items():
                own = self.parameters.get(name)
                if own is None or own.shape != value.shape:
                    shape = tuple(value.shape)
                    raise AdapterError(f"tensor '{name}' of shape {shape} does not fit this base and scheme")
                own.copy_(value)


def attach(model: M, scheme: Scheme, seed: int) -> Attached[M]:
    """Put a scheme's parameters into a frozen model, in place; the same seed starts them alike on every side.

    Raises:
        AdapterError: the scheme does not fit this model.
    """
    parameters = dict(sorted(scheme.attach(model, seed)))
    if not parameters:
        raise AdapterError("the scheme finds nothing in this base that could learn")
    return Attached(replace(model, decorate=scheme.decorate, sees_baseline=scheme.sees_baseline), parameters)


def read_scheme(options: Mapping[str, Any]) -> Scheme:
    """The scheme of a study's `scheme` section.

    Raises:
        ConfigError: no such scheme, an unknown option or a value out of range.
    """
    name = str(options.get("name", ""))
    require(name in SCHEMES, f"scheme.name is '{name}': {nearest(name, list(SCHEMES))}")
    return checked(SCHEMES[name], {key: value for key, value in options.items() if key != "name"}, "scheme.")


def complete(options: Mapping[str, Any], private: bool = False) -> dict[str, Any]:
    """A study's `scheme` section with every option said; raises `ConfigError`.

    With `private`, an option that is not said takes the scheme's default under differential privacy.
    """
    if private:
        options = {**read_scheme(options).private_defaults, **options}
    return {"name": str(options.get("name", "")), **to_mapping(read_scheme(options))}


def _copies(parameters: Mapping[str, nn.Parameter]) -> State:
    return {name: value.detach().float().cpu().clone() for name, value in parameters.items()}
