"""Independent work of one process, such as on a model that it has loaded, in a process for each processor."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

Part = TypeVar("Part")
Result = TypeVar("Result")
_inherited: list[Any] = []
"""The work and its parts, which the processes have from this one as it was when they were made."""


def side_by_side(
    work: Callable[[Part], Result], parts: Sequence[Part], device: torch.device | None = None
) -> Iterator[Result]:
    """`work` of each part, in their order.

    The first part is done in this process, so that what it imports and caches is there for all. Then processes are
    forked, as those of PyTorch's DataLoader are, so that neither the model nor the parts are copied; each has one
    thread. Where there is one processor, a GPU, or no fork, all is done here.

    Args:
        work: what is done; its result must pickle.
        parts: independent of each other.
        device: of the model that the work asks, if any.
    """
    if not parts:
        return
    yield work(parts[0])
    others = parts[1:]
    workers = min(os.cpu_count() or 1, len(others))
    forks = "fork" in multiprocessing.get_all_start_methods() and (device is None or device.type == "cpu")
    if workers < 2 or not forks:
        yield from map(work, others)
        return
    _inherited[:] = [work, others]
    try:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _one_thread) as pool:
            yield from map(pickle.loads, pool.map(_do, range(len(others))))
    finally:
        _inherited.clear()


def _one_thread() -> None:
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def _do(number: int) -> bytes:
    """The result as bytes: a tensor of its own would travel through a file descriptor."""
    work, parts = _inherited
    return pickle.dumps(work(parts[number]))
