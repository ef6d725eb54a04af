"""How a site's update travels to the server: `federation.wire`.

`float32` sends the trained tensors as they are. The others send the update, rounded: an update is small beside the
weights, and rounding the weights themselves would lose it. What the server sends travels as float32 in every format:
server and sites must hold the same start to the bit, since updates, ledgers and signatures refer to it.

The signature, the audit log and the limits of a reply's size are of what travels; norms, clipping and aggregation are
of the state that the server makes of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ld_common.core.errors import AdapterError
from ld_common.core.state import State, Tensors, part_of, tensor_sizes
from ld_common.protocol.study_config import FLOAT32

SCALES = "wire/scales"
"""Tensor `(T,)` float32 of `int8`: one scale a tensor, in the order of their names."""
LEVELS = 127


class UpdateFormat(ABC):
    """Rounded updates."""

    feeds_back: ClassVar[bool] = False
    """Whether a site adds what rounding took from its update to that of its next round."""

    @abstractmethod
    def encode(self, update: State) -> State:
        """What travels of a finite float32 update."""

    @abstractmethod
    def decode(self, sent: Tensors, names: Sequence[str]) -> State:
        """Some tensors of the float32 update; raises `AdapterError` for one of another type, or a bad scale."""


class BFloat16(UpdateFormat):
    """Half the bytes; each number is rounded to 8 significant bits, by at most 1/256 of itself."""

    def encode(self, update: State) -> State:
        """Round each number to the nearest."""
        return {name: value.bfloat16() for name, value in update.items()}

    def decode(self, sent: Tensors, names: Sequence[str]) -> State:
        """Widen each number; bfloat16 is a part of float32."""
        return {name: _typed(name, value, torch.bfloat16).float() for name, value in part_of(sent, names).items()}


class Int8(UpdateFormat):
    """A quarter of the bytes; each number is rounded to the nearest of 255 multiples of its tensor's scale.

    The scale is the tensor's largest magnitude over 127, so a number is off by at most 1/254 of that. With the site's
    error feedback the errors do not add up over rounds (arXiv 1901.09847).
    """

    feeds_back: ClassVar[bool] = True

    def encode(self, update: State) -> State:
        """Round each number to the nearest multiple."""
        sent: State = {}
        scales = torch.zeros(len(update))
        for place, (name, value) in enumerate(sorted(update.items())):
            scales[place] = value.abs().max() / LEVELS if value.numel() else 0.0
            levels = value / scales[place] if scales[place] > 0 else torch.zeros_like(value)
            sent[name] = levels.round().clamp(-LEVELS, LEVELS).to(torch.int8)
        return {**sent, SCALES: scales}

    def decode(self, sent: Tensors, names: Sequence[str]) -> State:
        """Multiply by the scales."""
        ordered = sorted(set(sent) - {SCALES})
        if SCALES not in sent:
            raise AdapterError("its update has no scales")
        scales = _typed(SCALES, sent[SCALES], torch.float32)
        if scales.shape != (len(ordered),) or not bool(scales.isfinite().all()) or bool((scales < 0).any()):
            raise AdapterError("the scales of its update are not one finite number a tensor, 0 or more")
        of = dict(zip(ordered, scales, strict=True))
        return {name: _typed(name, value, torch.int8) * of[name] for name, value in part_of(sent, names).items()}


FORMATS: dict[str, UpdateFormat | None] = {FLOAT32: None, "bfloat16": BFloat16(), "int8": Int8()}
"""By the value of `federation.wire`; None sends the state."""


@dataclass(frozen=True, eq=False)
class DecodedState(Mapping[str, Tensor]):
    """The float32 state that a sent update makes of a reference, tensor by tensor when it is read."""

    sent: Tensors
    reference: State
    form: UpdateFormat

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each tensor of the state; the names must be the reference's."""
        return tensor_sizes(self.reference)

    def __getitem__(self, name: str) -> Tensor:
        return self.part([name])[name]

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.sent if name != SCALES)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def part(self, names: Sequence[str]) -> State:
        """Some of the tensors; raises `AdapterError` for one of another type or shape than the format asks for."""
        state: State = {}
        for name, update in self.form.decode(self.sent, names).items():
            first = self.reference[name]
            if update.shape != first.shape:
                raise AdapterError(f"tensor '{name}' has shape {tuple(update.shape)}, not {tuple(first.shape)}")
            state[name] = first + update
        return state


@dataclass(frozen=True)
class SentUpdate:
    """What a site sends, and what it keeps."""

    tensors: State
    residual: State
    """What rounding took from the update, for the site's next one; empty where the format does not feed it back."""


def encode_state(wire: str, state: State, reference: State, residual: State) -> SentUpdate:
    """A trained state as it travels.

    Args:
        wire: the study's `federation.wire`.
        state: the trained tensors.
        reference: the same tensors in the server's task.
        residual: of the site's last round; empty for none.

    Raises:
        AdapterError: the update is not finite, and the format rounds it.
    """
    form = FORMATS[wire]
    if form is None:
        return SentUpdate(state, {})
    update = {name: value - reference[name] for name, value in state.items()}
    update = {name: value + residual[name] for name, value in update.items()} if residual else update
    if not all(bool(value.isfinite().all()) for value in update.values()):
        raise AdapterError("the trained update holds NaN or infinite values")
    sent = form.encode(update)
    if not form.feeds_back:
        return SentUpdate(sent, {})
    return SentUpdate(sent, {name: update[name] - value for name, value in form.decode(sent, list(update)).items()})


def decode_state(wire: str, sent: Tensors, reference: State) -> Tensors:
    """The state of a sent update, which is not checked yet: its tensors raise `AdapterError` where they do not fit."""
    form = FORMATS[wire]
    return sent if form is None else DecodedState(sent, reference, form)


def _typed(name: str, value: Tensor, expected: torch.dtype) -> Tensor:
    if value.dtype != expected:
        raise AdapterError(f"tensor '{name}' is {value.dtype}, not {expected}")
    return value
