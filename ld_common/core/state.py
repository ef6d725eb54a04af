"""Named tensors: what an adapter trains, what crosses the wire and what a release holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

State = dict[str, Tensor]
"""Float32 tensors on the CPU, sorted by name."""
Tensors = Mapping[str, Tensor]
"""A state that is only read, such as one in a file."""


def part_of(state: Tensors, names: Sequence[str]) -> State:
    """Some tensors of a state; one in a file is opened once for all of them."""
    part = getattr(state, "part", None)
    return {name: state[name] for name in names} if part is None else dict(part(names))


def tensor_sizes(state: Tensors) -> dict[str, int]:
    """Bytes of each tensor; of a state in a file, without reading them."""
    sizes = getattr(state, "sizes", None)
    known = {name: value.numel() * value.element_size() for name, value in state.items()} if sizes is None else sizes
    return dict(known)


def grouped_names(state: Tensors, most_bytes: int) -> Iterator[list[str]]:
    """The names of a state in order, in groups whose tensors take at most `most_bytes`, or one tensor each."""
    group: list[str] = []
    total = 0
    for name, size in sorted(tensor_sizes(state).items()):
        if group and total + size > most_bytes:
            yield group
            group, total = [], 0
        group.append(name)
        total += size
    if group:
        yield group
