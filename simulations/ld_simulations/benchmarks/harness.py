"""The harness of all benchmarks: tasks in several processes, each result kept as it ends, nothing done twice.

Below a benchmark's output folder:

    results/<task>.json    the result of each task, written in one step
    log.txt                when each task ended, and how long it took
    plan.json              what decides the results; a folder with results of another plan is refused
"""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rich.console import Console

from ld_common.core.atomic_files import write_bytes
from ld_common.core.command import progress_bar
from ld_common.core.errors import ConfigError

RESULTS, LOG, PLAN = "results", "log.txt", "plan.json"
PART_RESULTS = "parts"
"""Key of a table of the results that its flat numbers are computed from."""


class NamedTask(Protocol):
    """Anything with a name that no other task of the benchmark has."""

    @property
    def name(self) -> str:
        """Name of the task's result; it may have slashes."""


Worker = TypeVar("Worker")
Task = TypeVar("Task", bound=NamedTask)
Result = Any
"""What JSON can hold."""


@dataclass(frozen=True)
class ResultStore:
    """Results by task name: those kept in a folder, and those adopted from an earlier table."""

    folder: Path
    adopted: Mapping[str, Result] = field(default_factory=dict)

    def read(self, name: str) -> Result | None:
        """A result, or None."""
        file = self._file(name)
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else self.adopted.get(name)

    def write(self, name: str, result: Result) -> None:
        """Keep a result, in one step; raises `CheckpointError`."""
        write_bytes(self._file(name), json_bytes(result))

    def collect(self, names: Iterable[str]) -> dict[str, Result]:
        """The results that there are, in the order of the names."""
        results = {name: self.read(name) for name in names}
        return {name: result for name, result in results.items() if result is not None}

    def _file(self, name: str) -> Path:
        return self.folder / RESULTS / f"{name}.json"


@dataclass(frozen=True)
class Harness:
    """Runs the tasks of one benchmark."""

    store: ResultStore
    console: Console
    workers: int = 1

    def run(
        self,
        title: str,
        tasks: Sequence[Task],
        make: Callable[[], Worker],
        work: Callable[[Worker, Task], Result],
        done: Callable[[Task], bool] | None = None,
    ) -> None:
        """Do `work(worker, task)` for every task without a result, and keep what it returns.

        Args:
            title: shown beside the bar and in the log.
            tasks: independent of each other, started in this order.
            make: makes a process's worker; like `work` and the tasks it must pickle where there are several workers.
            work: what is done, for example a method of the worker's class.
            done: whether a task needs no work; then results are the worker's to keep, and what `work` returns is
                dropped. By default a task is done when it has a result.
        """
        missing = [task for task in tasks if not (self._has_result(task) if done is None else done(task))]
        with progress_bar(self.console, title, len(missing), transient=False) as advance:
            for task, result, seconds in _work_through(make, work, missing, self.workers):
                if done is None:
                    self.store.write(task.name, result)
                self.log(f"{title}: {task.name}", seconds)
                advance(1)

    def once(self, name: str, compute: Callable[[], Result]) -> Result:
        """A result that is computed in this process, or that is there already."""
        result = self.store.read(name)
        if result is None:
            started = time.monotonic()
            with self.console.status(name):
                result = compute()
            self.store.write(name, result)
            self.log(name, time.monotonic() - started)
        return result

    def log(self, text: str, seconds: float) -> None:
        """Add a line with the time to the log."""
        file = self.store.folder / LOG
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as stream:
            print(f"{datetime.datetime.now():%F %T} {text} ({seconds:.1f} s)", file=stream)

    def _has_result(self, task: NamedTask) -> bool:
        return self.store.read(task.name) is not None


def this_machine() -> dict[str, Any]:
    """The processor's name and the number of threads that it runs at once."""
    name = platform.processor() or platform.machine()
    facts = Path("/proc/cpuinfo")
    if facts.exists():
        lines = [line.partition(":")[2].strip() for line in facts.read_text().splitlines() if line[:10] == "model name"]
        name = lines[0] if lines else name
    return {"processor": name, "threads": os.cpu_count() or 1}


def json_bytes(content: Any, sort_keys: bool = False) -> bytes:
    """JSON as all results and tables have it."""
    return (json.dumps(content, indent=1, sort_keys=sort_keys) + "\n").encode()


def read_table(path: str, kind: str, keys: Sequence[str] = ()) -> Any:
    """An earlier table whose results count as done.

    Args:
        path: JSON file, the value of a config's `adopt`.
        kind: of table, for messages.
        keys: top-level keys that it must have; none for a list.

    Raises:
        ConfigError: it cannot be read or is of another kind.
    """
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"adopt: cannot read '{path}' ({error}): name the JSON file of a {kind} table") from error
    fits = set(keys) <= set(table) if isinstance(table, dict) and keys else isinstance(table, list) and not keys
    if not fits:
        raise ConfigError(f"adopt: '{path}' is not a {kind} table: name the JSON file that this benchmark wrote")
    return table


def adopted_parts(path: str, kind: str) -> dict[str, Result]:
    """Results by part of an earlier table, which count as done; none without a path. Raises `ConfigError`."""
    parts: dict[str, Result] = read_table(path, kind, (PART_RESULTS,))[PART_RESULTS] if path else {}
    return parts


def claim_plan(folder: Path, plan: Mapping[str, Any]) -> None:
    """Mark an output folder as that of a plan; raises `ConfigError` where it holds results of another."""
    text, file = json.dumps(plan, indent=1, sort_keys=True), folder / PLAN
    if not file.exists() and (folder / RESULTS).exists():
        raise ConfigError(f"'{folder}' holds results of an unknown plan: choose another output")
    if file.exists() and file.read_text() != text:
        old = json.loads(file.read_text())
        differing = [key for key in plan if json.loads(json.dumps(plan[key])) != old.get(key)]
        raise ConfigError(f"'{folder}' holds results of another {', '.join(differing)}: choose another output")
    write_bytes(file, text.encode())


_process_worker: list[Any] = []
"""A pool's process has one worker for its life."""


def _work_through(
    make: Callable[[], Any], work: Callable[[Any, Any], Any], tasks: Sequence[Task], workers: int
) -> Iterator[tuple[Task, Any, float]]:
    """Each task as it ends, with its result and the seconds it took."""
    if not tasks:
        return
    if workers == 1:
        _process_worker[:] = [make()]
        for task in tasks:
            yield task, *_do(work, task)
        return
    threads, context = max(1, (os.cpu_count() or 1) // workers), multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start, (make, threads)) as pool:
        futures = {pool.submit(_do, work, task): task for task in tasks}
        for future in as_completed(futures):
            yield futures[future], *future.result()


def _start(make: Callable[[], Any], threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    _process_worker[:] = [make()]


def _do(work: Callable[[Any, Any], Any], task: Any) -> tuple[Any, float]:
    started = time.monotonic()
    result = work(_process_worker[0], task)
    return result, time.monotonic() - started
