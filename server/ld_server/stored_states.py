"""Sites' states of a round as the files that came, so that the server's memory does not grow with the sites.

A reply's tensors are a safetensors file already: its bytes are kept as they came, the first ones in memory and the
others on disk, and are read by name where they are checked and aggregated. The files on disk are the run's own (mode
0600) and are deleted when the round ends.
"""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from flwr.app import ArrayRecord
from torch import Tensor

from ld_common.adapters.state_dict import BLOCK
from ld_common.core.errors import CheckpointError
from ld_common.core.state import State, Tensors, part_of, tensor_sizes
from ld_common.protocol.messages import tensor_bytes

FOLDER = "round"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
DTYPES |= {"C64": torch.complex64, "BOOL": torch.bool}
NEAR_BYTES = 2**20
"""Bytes between tensors that are read with them."""
FLAT_BYTES = 2**26
"""Of states whose tensors are taken together as one."""
HELD_BYTES = 2**28
"""Replies of a round that stay in memory; the others are written to files."""


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies in the data of a safetensors file."""

    kind: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class StoredState(Mapping[str, Tensor]):
    """The tensors of a safetensors file, read when they are asked for.

    They are read without the library, whose reader takes longer for a small tensor than the disk does.
    """

    def __init__(self, content: memoryview | Path) -> None:
        """Read the names and places.

        Args:
            content: the file's bytes, or its path.

        Raises:
            ValueError: it is no safetensors file.
        """
        self.content = content
        """As given."""
        size = content.stat().st_size if isinstance(content, Path) else len(content)
        length = int.from_bytes(self._read(0, min(8, size)), "little")
        if size < 8 or length > size - 8:
            raise ValueError("not a safetensors file")
        self._start, self._size = 8 + length, size - 8 - length
        self.places = _places(bytes(self._read(8, length)), self._size)
        """By name."""

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each tensor."""
        return {name: place.end - place.begin for name, place in self.places.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self.part([name])[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def part(self, names: Sequence[str]) -> State:
        """Some of the tensors, in one read where they lie near each other."""
        places = {name: self.places[name] for name in names}
        first, last = min(place.begin for place in places.values()), max(place.end for place in places.values())
        if last - first > sum(place.end - place.begin for place in places.values()) + NEAR_BYTES:
            return {name: tensor for one in names for name, tensor in self.part([one]).items()}
        content = bytearray(self._read(self._start + first, last - first))
        return {name: _tensor(place, content, place.begin - first) for name, place in places.items()}

    def numbers(self) -> np.ndarray:
        """All numbers of a file of float32 tensors in its order, read-only."""
        return np.frombuffer(self._read(self._start, self._size), np.float32)

    def _read(self, begin: int, count: int) -> memoryview | bytes:
        if not isinstance(self.content, Path):
            return self.content[begin : begin + count]
        with self.content.open("rb", buffering=0) as file:
            file.seek(begin)
            content = file.read(count)
            while len(content) < count:
                more = file.read(count - len(content))
                if not more:
                    raise ValueError("the file is shorter than its header says")
                content += more
            return content


class FlatReference:
    """A reference's numbers as one vector, so that states of its names and shapes are read as one.

    Large states are read tensor by tensor instead, so of them it has no numbers.
    """

    def __init__(self, reference: State) -> None:
        size = sum(value.numel() * value.element_size() for value in reference.values())
        self._places: dict[str, TensorPlace] = {}
        """In the order of the vector, as safetensors writes them."""
        self._fitting: Mapping[str, TensorPlace] = {}
        """The same places as a file has them; honest sites' files share them."""
        end = 0
        for name, value in sorted(reference.items() if size <= FLAT_BYTES else ()):
            begin, end = end, end + value.numel() * value.element_size()
            self._places[name] = TensorPlace(value.dtype, tuple(value.shape), begin, end)
        vectors = [reference[name].reshape(-1).numpy() for name in self._places]
        self._numbers = np.concatenate([np.empty(0, np.float32), *vectors])
        self.count = self._numbers.size
        """Of the numbers; 0 for a large reference."""
        self.largest = float(np.abs(self._numbers).max(initial=0.0))

    def update_norm(self, state: Tensors) -> float | None:
        """L2 norm of a state's update, not finite where a number is not; None for a file of another layout."""
        if not self.count or not isinstance(state, StoredState) or not self._fits(state):
            return None
        numbers, square, difference = state.numbers(), 0.0, np.empty(BLOCK, np.float32)
        with np.errstate(invalid="ignore", over="ignore"):
            for start in range(0, self.count, BLOCK):
                block = slice(start, min(start + BLOCK, self.count))
                part = difference[: block.stop - start]
                np.subtract(numbers[block], self._numbers[block], out=part)
                square += float(np.dot(part, part))
        return math.sqrt(square)

    def numbers(self, state: Tensors) -> np.ndarray:
        """The numbers of a checked state, in the order of the reference's."""
        if isinstance(state, StoredState) and self._fits(state):
            return state.numbers()
        return np.concatenate([value.reshape(-1).numpy() for value in part_of(state, list(self._places)).values()])

    def _fits(self, state: StoredState) -> bool:
        if state.places is not self._fitting and state.places == self._places:
            self._fitting = state.places
        return state.places is self._fitting

    def state(self, numbers: Tensor) -> State:
        """A vector of numbers as tensors."""
        parts = {name: numbers[place.begin // 4 : place.end // 4] for name, place in self._places.items()}
        return {name: parts[name].view(place.shape).clone() for name, place in self._places.items()}


@dataclass(frozen=True, eq=False)
class ScaledState(Mapping[str, Tensor]):
    """A state whose update is scaled, tensor by tensor when it is read."""

    state: Tensors
    reference: State
    scale: float

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each tensor."""
        return tensor_sizes(self.state)

    def __getitem__(self, name: str) -> Tensor:
        return self.part([name])[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)

    def part(self, names: Sequence[str]) -> State:
        """Some of the tensors."""
        return {
            name: (
                self.reference[name].double() + (value.double() - self.reference[name].double()) * self.scale
            ).float()
            for name, value in part_of(self.state, names).items()
        }


class RoundFolder:
    """The replies of a round: the first ones in memory, the others in a folder of the run."""

    def __init__(self, output: Path) -> None:
        self._folder = output / FOLDER
        self._held = 0

    def clear(self) -> None:
        """Delete the files of the round, or of one that was stopped."""
        self._held = 0
        shutil.rmtree(self._folder, ignore_errors=True)

    def keep(self, site: str, state: Tensors) -> Tensors:
        """Keep a site's tensors, as they came; raises `CheckpointError` when their file cannot be written."""
        content = state.content if isinstance(state, StoredState) else None
        if not isinstance(content, memoryview):
            return state
        if self._held + len(content) <= HELD_BYTES:
            self._held += len(content)
            return state
        path = self._folder / f"{site}.safetensors"
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb", buffering=0) as file:
                while content:
                    content = content[file.write(content) :]
        except OSError as error:
            raise CheckpointError(f"cannot write '{path}' ({error.strerror}): is the disk full?") from error
        return StoredState(path)


def stored_state(record: ArrayRecord) -> Tensors:
    """The tensors of a message, read from its bytes when they are asked for.

    Raises:
        ValueError: they are no safetensors file; a `KeyError` where there are none.
    """
    return StoredState(tensor_bytes(record)) if record else {}


@functools.lru_cache(maxsize=2)  # honest sites send the same header
def _places(header: bytes, size: int) -> Mapping[str, TensorPlace]:
    """The entries of a safetensors header, by name; raises `ValueError` unless they fill `size` bytes of data."""
    try:
        entries = json.loads(header)
        places = {
            name: TensorPlace(
                DTYPES[entry["dtype"]], tuple(map(_whole, entry["shape"])), *map(_whole, entry["data_offsets"])
            )
            for name, entry in sorted(entries.items())
            if name != "__metadata__"
        }
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError("not a safetensors file, or of a type of numbers that is not used") from error
    at = 0
    for place in sorted(places.values(), key=lambda place: (place.begin, place.end)):
        fits = place.begin == at and place.end - place.begin == math.prod(place.shape) * place.kind.itemsize
        if not fits:
            raise ValueError("its tensors overlap, leave gaps or have other sizes than their shapes")
        at = place.end
    if at != size:
        raise ValueError("its data are longer or shorter than its header says")
    return MappingProxyType(places)


def _whole(number: object) -> int:
    if type(number) is not int or number < 0:
        raise ValueError("not a length")
    return number


def _tensor(place: TensorPlace, content: bytearray, begin: int) -> Tensor:
    if place.begin == place.end:
        return torch.empty(place.shape, dtype=place.kind)
    count = math.prod(place.shape)
    return torch.frombuffer(content, dtype=place.kind, count=count, offset=begin).view(place.shape)
