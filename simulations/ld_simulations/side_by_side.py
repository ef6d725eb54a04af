"""Independent work on one loaded model, in a process for each processor."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

import torch

Part = TypeVar("Part")
Result = TypeVar("Result")
_inherited: list[Any] = []
"""The work and its parts, which the processes have from this one as it was when they were made."""


def side_by_side(work: Callable[[Part], Result], parts: Sequence[Part], device: torch.device) -> Iterator[Result]:
    """`work` of each part, in their order.

    Processes are forked, as those of PyTorch's DataLoader are, so that neither the model nor the parts are copied; each
    has one thread. Where there is one processor or one part, a GPU, or no fork, the work is done here.

    Args:
        work: what is done; its result must pickle.
        parts: independent of each other.
        device: of the model.
    """
    workers = min(os.cpu_count() or 1, len(parts))
    if workers < 2 or device.type != "cpu" or "fork" not in multiprocessing.get_all_start_methods():
        yield from map(work, parts)
        return
    _inherited[:] = [work, parts]
    try:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), torch.set_num_threads, (1,)) as pool:
            yield from map(pickle.loads, pool.map(_do, range(len(parts))))
    finally:
        _inherited.clear()


def _do(number: int) -> bytes:
    """The result as bytes: a tensor of its own would travel through a file descriptor."""
    work, parts = _inherited
    return pickle.dumps(work(parts[number]))
