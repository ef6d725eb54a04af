"""Sites' states in files of the round, so that the server's memory holds one site's tensors at a time.

A reply's tensors are a safetensors file already: its bytes are written as they came, and read by name where they are
checked and aggregated. The files are the run's own (mode 0600) and are deleted when the round ends.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flwr.app import ArrayRecord
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ld_common.core.errors import CheckpointError
from ld_common.core.state import State, Tensors, part_of, tensor_sizes
from ld_common.protocol.messages import tensor_bytes

FOLDER = "round"
NUMBER_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


class StoredState(Mapping[str, Tensor]):
    """The tensors of a safetensors file, read when they are asked for."""

    def __init__(self, path: Path) -> None:
        """Read the names and sizes; raises `ValueError` for a file that is none."""
        self._path = path
        self.sizes: dict[str, int] = {}
        """Bytes of each tensor."""
        try:
            with safe_open(path, framework="pt") as file:
                for name in sorted(file.keys()):
                    held = file.get_slice(name)
                    numbers = 1
                    for length in held.get_shape():
                        numbers *= length
                    self.sizes[name] = numbers * NUMBER_BYTES.get(str(held.get_dtype()), 8)
        except SafetensorError as error:
            raise ValueError("not a safetensors file") from error

    def __getitem__(self, name: str) -> Tensor:
        return self.part([name])[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sizes)

    def __len__(self) -> int:
        return len(self.sizes)

    def part(self, names: Sequence[str]) -> State:
        """Some of the tensors."""
        for name in names:
            self.sizes[name]  # raises `KeyError`
        with safe_open(self._path, framework="pt") as file:
            return {name: file.get_tensor(name).clone() for name in names}  # the file's pages are given back


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
    """The folder of a round's replies, in that of the run."""

    def __init__(self, output: Path) -> None:
        self._folder = output / FOLDER

    def clear(self) -> None:
        """Delete the files of the round, or of one that was stopped."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def keep(self, site: str, record: ArrayRecord) -> Tensors:
        """Write a site's tensors as they came.

        Raises:
            ValueError: they are no safetensors file; a `KeyError` where there are none.
            CheckpointError: the file cannot be written.
        """
        if not record:
            return {}
        content = tensor_bytes(record)
        path = self._folder / f"{site}.safetensors"
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(content)
        except OSError as error:
            raise CheckpointError(f"cannot write '{path}' ({error.strerror}): is the disk full?") from error
        return StoredState(path)
