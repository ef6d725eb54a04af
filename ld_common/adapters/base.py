"""The interface of an adapter: which parameters of a frozen base train, and how prompts change."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Generic, TypeVar

import torch
from torch import nn

from ld_common.core.errors import AdapterError
from ld_common.core.state import State
from ld_common.diffusion.base_model import Denoiser

Named = tuple[str, nn.Parameter]
M = TypeVar("M", bound=Denoiser)


@dataclass(frozen=True)
class Prior:
    """Prior preservation (DreamBooth, arXiv 2208.12242, Eq. 2): the base's own pictures, learned beside the site's."""

    prompt: str
    """What the base is asked to draw."""
    samples: int
    steps: int
    """Sampler steps for each of them."""
    weight: float
    """Weight of their loss."""


class Adapter(ABC):
    """A way to fine-tune a base. Subclasses are dataclasses whose fields are options of a study's `adapter` section."""

    name: ClassVar[str]
    """Name in configs and in `ADAPTERS`."""
    private_defaults: ClassVar[Mapping[str, object]] = {}
    """Options whose default is another under differential privacy."""

    @property
    def prior(self) -> Prior | None:
        """The prior that training preserves, if any."""
        return None

    @property
    def image_conditioned(self) -> bool:
        """Whether the network also takes another visit of the same patient, from which it draws a visit."""
        return False

    @abstractmethod
    def inject(self, model: Denoiser, seed: int) -> Iterable[Named]:
        """Make the adapter's parameters in `model` and name them as they travel; those that learn require a gradient.

        The same seed starts them alike on every side, and a prompt that is not decorated is read as the base reads it
        until they are trained.
        """

    def transform_prompt(self, prompt: str) -> str:
        """The prompt as the adapted model shall read it."""
        return prompt


def learn(parameters: Iterable[Named], prefix: str) -> Iterable[Named]:
    """Let the base's own parameters learn, under the names `prefix` + their own."""
    for name, parameter in parameters:
        yield prefix + name, parameter.requires_grad_(True)


@dataclass(frozen=True, eq=False)
class AdaptedModel(Generic[M]):
    """A model with an adapter's parameters in it."""

    model: M
    """It transforms prompts as the adapter does."""
    parameters: dict[str, nn.Parameter]
    """All of the adapter's, by the name under which they travel, sorted."""

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """Those that train, and therefore travel."""
        return {name: value for name, value in self.parameters.items() if value.requires_grad}

    def trainable_state(self) -> State:
        """Copies of those that train."""
        return _copies(self.trainable)

    def frozen_state(self) -> State:
        """Copies of those that do not: every side draws them from the study's seed, or has them from its start."""
        return _copies({name: value for name, value in self.parameters.items() if not value.requires_grad})

    def state(self) -> State:
        """Copies of all, trained and shared: what a release holds."""
        return _copies(self.parameters)

    def load(self, state: State) -> None:
        """Copy `state` into the parameters; raises `AdapterError` when a name or a shape does not fit."""
        with torch.no_grad():
            for name, value in state.items():
                parameter = self.parameters.get(name)
                if parameter is None or parameter.shape != value.shape:
                    shape = tuple(value.shape)
                    raise AdapterError(f"tensor '{name}' of shape {shape} does not fit this base and adapter")
                parameter.copy_(value)


def inject(model: M, adapter: Adapter, seed: int) -> AdaptedModel[M]:
    """Put an adapter's parameters into a frozen model, in place; the same seed starts them alike on every side.

    Raises:
        AdapterError: the adapter does not fit this model.
    """
    parameters = dict(sorted(adapter.inject(model, seed)))
    if not parameters:
        raise AdapterError("the adapter finds nothing in this base that could train")
    adapted = replace(model, transform_prompt=adapter.transform_prompt, image_conditioned=adapter.image_conditioned)
    return AdaptedModel(adapted, parameters)


def _copies(parameters: Mapping[str, nn.Parameter]) -> State:
    return {name: value.detach().float().cpu().clone() for name, value in parameters.items()}
