"""The interface of an adapter: which parameters of a frozen base train, how prompts change, and how it is saved."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from safetensors.torch import save
from torch import nn

from ld_common.adapters.state_dict import read_tensors
from ld_common.core.atomic_files import write_bytes
from ld_common.core.errors import AdapterError
from ld_common.core.state import State
from ld_common.diffusion.base_model import Denoiser
from ld_common.diffusion.drift import LatentDrift

Named = tuple[str, nn.Parameter]
UnetConfig = Callable[[], Mapping[str, Any]]
"""Returns the config of the base's UNet; called only by adapters whose files depend on it."""
WEIGHTS = "adapter.safetensors"
"""Weights of an adapter that has no file format in diffusers."""
DRIFT = "drift.safetensors"
METADATA = {"format": "pt"}
"""Files have one key of metadata at most: safetensors writes several in a random order."""
M = TypeVar("M", bound=Denoiser)


@dataclass(frozen=True)
class Prior:
    """Prior preservation (DreamBooth, arXiv 2208.12242, Eq. 2): training also shows images by the base itself."""

    prompt: str
    """Prompt of these images."""
    samples: int
    """Number of images."""
    steps: int
    """Sampler steps for each of them."""
    weight: float
    """Weight of their loss."""


class Adapter(ABC):
    """A way to fine-tune a base. Subclasses are dataclasses whose fields are options of a study's `adapter` section."""

    name: ClassVar[str]
    """Name in configs and in `ADAPTERS`."""
    private_defaults: ClassVar[Mapping[str, object]] = {}
    """Options that have another default under differential privacy."""

    @property
    def prior(self) -> Prior | None:
        """The prior that training preserves, if any."""
        return None

    @property
    def image_conditioned(self) -> bool:
        """Whether the network takes another visit of the same patient as an input."""
        return False

    @abstractmethod
    def inject(self, model: Denoiser, seed: int) -> Iterable[Named]:
        """Add the adapter's parameters to `model` and yield them by name; trainable ones require a gradient.

        The server and every site call this with the same seed and must get the same initial values.
        """

    def merge(self, model: Denoiser) -> None:  # noqa: B027  (most adapters train the weights themselves)
        """Add what was learned to the weights that it changes, where it is not there already: for inference alone."""

    def add_to_base(self, model: Denoiser, carried: State) -> None:
        """Add to the base's weights what earlier rounds left there (aggregators `fedex` and `flora`), in place.

        Raises:
            AdapterError: the adapter has no such form, or a tensor does not fit.
        """
        raise AdapterError(f"adapter {self.name} cannot add to the base's weights: use lora")

    def transform_prompt(self, prompt: str) -> str:
        """The prompt as the adapted model reads it."""
        return prompt

    def export_files(self, state: State, unet_config: UnetConfig) -> Iterator[tuple[str, bytes]]:
        """Yield the names and contents of the files of `state`, in diffusers' format where there is one.

        The file of the weights comes first. A name has at most one folder.
        """
        yield WEIGHTS, save(state, METADATA)

    def read_files(self, folder: Path) -> State:
        """The state in the files that `export_files` wrote to `folder`; raises `AdapterError`."""
        return read_tensors(folder / WEIGHTS)[0]


def train_all(parameters: Iterable[Named], prefix: str) -> Iterable[Named]:
    """Make parameters of the base trainable and yield them, their names prefixed."""
    for name, parameter in parameters:
        yield prefix + name, parameter.requires_grad_(True)


@dataclass(frozen=True, eq=False)
class AdaptedModel(Generic[M]):
    """A model with an adapter's parameters in it."""

    model: M
    """The adapted base; it transforms prompts as the adapter does."""
    parameters: dict[str, nn.Parameter]
    """All parameters of the adapter, sorted by name."""
    adapter: Adapter
    drift: LatentDrift | None = None
    """The latent drift that `train` used."""

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that train: the ones that a site sends."""
        return {name: value for name, value in self.parameters.items() if value.requires_grad}

    def trainable_state(self) -> State:
        """Copies of the trainable parameters."""
        return _copies(self.trainable)

    def frozen_state(self) -> State:
        """Copies of the frozen parameters, which come from the study's seed or its start."""
        return _copies({name: value for name, value in self.parameters.items() if not value.requires_grad})

    def state(self) -> State:
        """Copies of all parameters, as a release holds them."""
        return _copies(self.parameters)

    def load(self, state: State) -> None:
        """Copy `state` into the parameters; raises `AdapterError` if a name or a shape does not fit."""
        with torch.no_grad():
            for name, value in state.items():
                parameter = self.parameters.get(name)
                if parameter is None or parameter.shape != value.shape:
                    shape = tuple(value.shape)
                    raise AdapterError(f"tensor '{name}' of shape {shape} does not fit this base and adapter")
                parameter.copy_(value)

    def save_pretrained(self, folder: Path | str) -> Path:
        """Write the adapter in the format that diffusers has for it, and the drift as `drift.safetensors`.

        A LoRA then loads by `pipe.load_lora_weights(folder)` and by `PeftModel.from_pretrained(unet, folder)`.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        folder = Path(folder)
        for name, content in self.adapter.export_files(self.state(), lambda: self.model.unet.config):
            write_bytes(folder / name, content)
        if self.drift is not None:
            write_bytes(folder / DRIFT, save({"mean": self.drift.mean}, {"formulation": self.drift.formulation}))
        return folder


def inject(model: M, adapter: Adapter, seed: int) -> AdaptedModel[M]:
    """Put an adapter's parameters into a frozen model, in place; equal seeds give equal initial values.

    Raises:
        AdapterError: the adapter does not fit this model.
    """
    parameters = dict(sorted(adapter.inject(model, seed)))
    if not parameters:
        raise AdapterError(f"adapter {adapter.name} has no parameter in this base that could train")
    adapted = replace(model, transform_prompt=adapter.transform_prompt, image_conditioned=adapter.image_conditioned)
    return AdaptedModel(adapted, parameters, adapter)


def _copies(parameters: Mapping[str, nn.Parameter]) -> State:
    return {name: value.detach().float().cpu().clone() for name, value in parameters.items()}
