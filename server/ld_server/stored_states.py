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
from safetensors.torch import save
from torch import Tensor

from ld_common.adapters.state_dict import squared_distance
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
        self._content = content
        size = content.stat().st_size if isinstance(content, Path) else len(content)
        length = int.from_bytes(self._read(0, min(8, size)), "little")
        if size < 8 or length > size - 8:
            raise ValueError("not a safetensors file")
        self._start = 8 + length
        self.places = _places(bytes(self._read(8, length)), size - self._start)
        """By name."""
        self.sizes = {name: place.end - place.begin for name, place in self.places.items()}
        """Bytes of each tensor."""

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
        if last - first > sum(self.sizes[name] for name in names) + NEAR_BYTES:
            return {name: tensor for one in names for name, tensor in self.part([one]).items()}
        content = bytearray(self._read(self._start + first, last - first))
        return {name: _tensor(place, content, place.begin - first) for name, place in places.items()}

    def numbers(self) -> np.ndarray | None:
        """All numbers in the order of the file, read-only; None where some are not float32, or there are too many."""
        total = sum(self.sizes.values())
        if total > FLAT_BYTES or any(place.kind != torch.float32 for place in self.places.values()):
            return None
        return np.frombuffer(self._read(self._start, total), np.float32)

    def _read(self, begin: int, count: int) -> memoryview | bytes:
        if not isinstance(self._content, Path):
            return self._content[begin : begin + count]
        with self._content.open("rb", buffering=0) as file:
            file.seek(begin)
            content = file.read(count)
            while len(content) < count:
                more = file.read(count - len(content))
                if not more:
                    raise ValueError("the file is shorter than its header says")
                content += more
            return content


class FlatReference:
    """A reference's numbers in the order in which a site's file has them, so that they are compared in one pass."""

    def __init__(self, reference: State) -> None:
        self.places: Mapping[str, TensorPlace] = {}
        self._numbers: np.ndarray | None = None
        small = sum(value.numel() * value.element_size() for value in reference.values()) <= FLAT_BYTES
        if reference and small:
            stored = StoredState(memoryview(save({name: value.contiguous() for name, value in reference.items()})))
            self.places, self._numbers = stored.places, stored.numbers()

    def update_norm(self, state: Tensors) -> float | None:
        """L2 norm of a state's update, not finite where a number is not; None for another layout."""
        if not isinstance(state, StoredState) or self._numbers is None or state.places != self.places:
            return None
        numbers = state.numbers()
        return None if numbers is None else math.sqrt(squared_distance(numbers, self._numbers))


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

    def keep(self, site: str, record: ArrayRecord) -> Tensors:
        """Keep a site's tensors as they came.

        Raises:
            ValueError: they are no safetensors file; a `KeyError` where there are none.
            CheckpointError: the file cannot be written.
        """
        if not record:
            return {}
        content = tensor_bytes(record)
        if self._held + len(content) <= HELD_BYTES:
            state = StoredState(content)
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
