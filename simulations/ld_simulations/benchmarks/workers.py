"""Tasks of a benchmark in several processes, each with a worker that keeps what it has loaded."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, TypeVar

import torch

Worker = TypeVar("Worker")
Task = TypeVar("Task")
Result = TypeVar("Result")

_own: list[Any] = []
"""A pool's process has one worker for its life."""


def work_through(
    make: Callable[[], Worker], work: Callable[[Worker, Task], Result], tasks: Sequence[Task], workers: int
) -> Iterator[tuple[Task, Result]]:
    """Do `work(worker, task)` for every task; yields each task with its result as it ends.

    Args:
        make: makes a process's worker; like `work` and the tasks it must pickle when there are several processes.
        work: what is done, a method of the worker's class.
        tasks: independent of each other, started in this order.
        workers: processes that share the processors' threads; 1 works in this process.
    """
    if workers == 1:
        worker = make()
        for task in tasks:
            yield task, work(worker, task)
        return
    threads, context = max(1, (os.cpu_count() or 1) // workers), multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start, (make, threads)) as pool:
        futures = {pool.submit(_do, work, task): task for task in tasks}
        for future in as_completed(futures):
            yield futures[future], future.result()


def _start(make: Callable[[], Any], threads: int) -> None:
    torch.set_num_threads(threads)
    _own[:] = [make()]


def _do(work: Callable[[Any, Any], Any], task: Any) -> Any:
    return work(_own[0], task)
