"""Files of every kind, damaged or built to hurt, read one by one in a process that may die of them."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ld_common.core.errors import LdError
from ld_common.core.seeding import numpy_generator
from ld_simulations.benchmarks.security.plan import SecurityConfig

BATCH = 250
FAILURES, HOSTILE = "failures", "hostile"
START_SECONDS, MAKING_SECONDS = 300.0, 60.0
MEMORY_CAP = 6 * 2**30
"""Of address space; a length field of 32 bits reserves 4 GiB, of which a file that is shorter fills nothing."""


@dataclass(frozen=True)
class FileBatch:
    """Files `first` to `last` of a kind; those that are built to hurt are a kind of their own."""

    kind: str
    first: int
    last: int

    @property
    def name(self) -> str:
        """Name of the result."""
        return f"fuzz/{self.kind}-{self.first:05d}"


@dataclass(frozen=True)
class FileCase:
    """One file, written."""

    path: Path
    seconds: float
    """Processor time that the product's reader took, which other programs on the machine do not change."""
    mib: float
    """Memory that it took."""
    outcome: str
    """`read`, `refused`, or the exception that is not of the product."""


def batches(config: SecurityConfig) -> list[FileBatch]:
    """All batches; needs no corpus."""
    from ld_simulations.benchmarks.security.hostile import hostile

    numbers = {**config.files, HOSTILE: sum(map(len, hostile().values()))}
    size = {HOSTILE: 25}
    return [
        FileBatch(kind, first, min(first + size.get(kind, BATCH), number))
        for kind, number in numbers.items()
        for first in range(0, number, size.get(kind, BATCH))
    ]


@functools.cache
def _corpus() -> dict[str, list[bytes]]:
    from ld_simulations.benchmarks.security.corpus import corpus

    return corpus()


def write_case(kind: str, number: int, seed: int, folder: Path) -> Path:
    """Write file `number` of a kind into an empty folder."""
    from ld_simulations.benchmarks.security import corpus, hostile, mutations, readers

    content: bytes | int
    if kind == HOSTILE:
        made = [(name, make) for name, makers in hostile.hostile().items() for make in makers]
        name, content = made[number][0], made[number][1]()
    else:
        names = readers.KINDS[kind]
        rng = numpy_generator(seed, "fuzz", kind, number)
        name = names[number % len(names)]
        files = _corpus()[name]
        content = mutations.mutate(files[rng.integers(len(files))], files, rng)
    if name in ("manifest.json", "manifest.sig"):
        for other, whole in corpus.release_files().items() if not any(folder.iterdir()) else ():
            (folder / other).write_bytes(whole)
    path = folder / name
    if isinstance(content, int):
        path.write_bytes(b"")
        os.truncate(path, content)
    else:
        path.write_bytes(content)
    return path


def read_case(path: Path) -> FileCase:
    """Give a file to the product's reader."""
    from ld_simulations.benchmarks.security.readers import READERS

    before = _reset_peak()
    started, outcome = time.process_time(), "read"
    try:
        READERS[path.name](path)
    except LdError as error:
        outcome = "refused" if "needs more memory" not in str(error) else "MemoryError"
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        outcome = f"{type(error).__name__}: {str(error)[:200]} ({Path(place.filename).name}:{place.lineno})"
    return FileCase(path, time.process_time() - started, _memory("VmHWM") - before, outcome)


def _memory(line: str) -> float:
    """A number of /proc/self/status, in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(next(text for text in status.splitlines() if text.startswith(line)).split()[1]) / 1024


def _reset_peak() -> float:
    """Memory now, in MiB; VmHWM is its highest from here on."""
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def serve(seed: int) -> None:
    """Read numbered cases from standard input, and write what became of each to standard output."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_CAP, MEMORY_CAP))
    import torch

    torch.set_num_threads(1)
    _corpus()
    print(json.dumps({"started": True}), file=answers, flush=True)
    for line in sys.stdin:
        kind, number, place = json.loads(line)
        path = write_case(kind, number, seed, Path(place))
        print(json.dumps({"written": path.name}), file=answers, flush=True)
        case = read_case(path)
        answer = {"seconds": case.seconds, "mib": case.mib, "outcome": case.outcome}
        print(json.dumps(answer), file=answers, flush=True)


@dataclass
class Fuzzer:
    """A process that reads cases, which ends with this one; it is started again when it has ended before."""

    config: SecurityConfig
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    _received: bytes = field(default=b"", repr=False)

    def run(self, batch: FileBatch) -> dict[str, Any]:
        """Read a batch; a failing file is kept under `failures`."""
        outcomes: Counter[str] = Counter()
        failures: list[dict[str, Any]] = []
        slowest = largest = 0.0
        for number in range(batch.first, batch.last):
            with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
                case = self._case(batch.kind, number, Path(place))
                slowest, largest = max(slowest, case["seconds"]), max(largest, case["mib"])
                problems = self._problems(case)
                outcomes["failed" if problems else case["outcome"]] += 1
                if problems:
                    failures.append({"kind": batch.kind, "number": number, "problems": problems, **case})
                    self._keep(batch.kind, number, Path(place))
        return {
            "files": batch.last - batch.first,
            "outcomes": outcomes,
            "slowest_seconds": round(slowest, 3),
            "largest_mib": round(largest, 1),
            "failures": failures,
        }

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process, self._received = None, b""

    def _problems(self, case: dict[str, Any]) -> list[str]:
        problems = []
        if case["outcome"] not in ("read", "refused", "MemoryError", "took too long"):
            problems.append("crash")
        if case["outcome"] == "took too long" or case["seconds"] > self.config.hang_seconds:
            problems.append("hang")
        if case["outcome"] == "MemoryError" or case["mib"] > self.config.memory_mib:
            problems.append("memory")
        return problems

    def _case(self, kind: str, number: int, place: Path) -> dict[str, Any]:
        process = self._started()
        assert process.stdin is not None
        process.stdin.write(json.dumps([kind, number, str(place)]).encode() + b"\n")
        name, started = "", time.monotonic()
        try:
            name = self._answer(MAKING_SECONDS)["written"]
            started = time.monotonic()
            return {"file": name, **self._answer(3 * self.config.hang_seconds)}
        except (EOFError, TimeoutError) as error:
            seconds = time.monotonic() - started
            ended = "took too long" if isinstance(error, TimeoutError) else f"the process ended ({process.wait()})"
            self.close()
            return {"file": name, "seconds": seconds, "mib": 0.0, "outcome": ended}

    def _answer(self, seconds: float) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        deadline = time.monotonic() + seconds
        while b"\n" not in self._received:
            if not select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError
            received = os.read(self._process.stdout.fileno(), 2**16)
            if not received:
                raise EOFError
            self._received += received
        line, _, self._received = self._received.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            run = f"from {__name__} import serve; serve({self.config.seed})"
            threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
            self._process = subprocess.Popen(
                [sys.executable, "-c", run],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                env=os.environ | threads,
            )
            self._answer(START_SECONDS)
        return self._process

    def _keep(self, kind: str, number: int, place: Path) -> None:
        kept = Path(self.config.output) / FAILURES / f"{kind}-{number}"
        shutil.rmtree(kept, ignore_errors=True)
        for file in place.iterdir():
            if file.is_file() and file.stat().st_size < 2**26:  # others follow from the seed
                kept.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(OSError):
                    shutil.copy(file, kept)


def totals(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The flat numbers of all batches."""
    failures = [failure for result in results for failure in result["failures"]]
    count = Counter(problem for failure in failures for problem in failure["problems"])
    return {
        "files_fuzzed": sum(result["files"] for result in results),
        "crashes": count["crash"],
        "hangs_over_10s": count["hang"],
        "memory_over_1gib": count["memory"],
        "slowest_file_seconds": max((result["slowest_seconds"] for result in results), default=0.0),
        "largest_file_mib": max((result["largest_mib"] for result in results), default=0.0),
    }
