"""Decodes image files that others made in child processes, so that no file can end, fill or stop the process that asks.

A thread that reads has a child (`decoding_worker`) to itself; the next thread gets the same one. A file on which it
dies, takes too long or needs too much memory is refused with that reason, and the next file gets a new child. The child
is not trusted: its answers are JSON and raw numbers of a checked size, never pickles.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ld_common.core.ahead import available_processors
from ld_common.core.config import to_mapping
from ld_common.core.errors import DeploymentError
from ld_common.imaging.decoding_answers import MALFORMED_ANSWER, headers_of, refusal_of, scan_of, volume_of
from ld_common.imaging.decoding_worker import MAX_REPLY_JSON, REPLY, REQUEST, header_fields
from ld_common.imaging.dicom_header import DicomHeader
from ld_common.imaging.geometry import Scan
from ld_common.imaging.modality import Modality
from ld_common.imaging.rejection import MAX_PIXELS, Rejection, ScanRejected
from ld_common.imaging.scan_reader import Source
from ld_common.imaging.volume import Volume

Answer = TypeVar("Answer")
START_SECONDS = 120.0
RUN = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); sys.modules['requests'] = None; "
    "from ld_common.imaging.decoding_worker import main; main(*map(int, sys.argv[2:]))"
)
"""What the child runs. pydicom would load a network library, to fetch its own test files: a fifth of the start."""


@dataclass(frozen=True)
class Limits:
    """What decoding one file may take."""

    memory_bytes: int = 2**30
    """Beyond what the child has at its start. Only Linux holds it."""
    seconds: int = 60
    """Of processor time; of any time it may take twice as much."""


class _ChildEndedError(Exception):
    """The child ended, or was ended, before its answer was complete; the message gives the reason."""


@dataclass
class DecodingProcess:
    """A child that decodes files, started when it is needed. Its methods may be called from several threads."""

    limits: Limits = field(default_factory=Limits)
    _child: subprocess.Popen[bytes] | None = field(default=None, init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def read_scan(
        self,
        source: Source,
        modality: Modality,
        slice_index: int | None = None,
        released: bool = False,
        headers: Sequence[DicomHeader] | None = None,
    ) -> Scan:
        """The scan that `scan_reader.decode_scan` gives, with its refusals; text in its pixels is not looked for."""
        places = [header_fields(one) | {"path": str(Path.cwd() / one.path)} for one in headers or ()]
        request = {
            "kind": "scan",
            "modality": json.dumps(to_mapping(modality)),
            "slice_index": slice_index,
            "headers": places or None,
        }
        return self._one(request, source, released, lambda content, values: scan_of(content, values, modality))

    def read_volume(self, source: Source, modality: Modality, released: bool = False) -> Volume:
        """The volume that `volume.decode_volume` gives, with its refusals; text is not looked for."""
        request = {"kind": "volume", "modality": json.dumps(to_mapping(modality))}
        return self._one(request, source, released, lambda content, values: volume_of(content, values, modality))

    def read_headers(
        self, files: Sequence[tuple[Path, bool]], modalities: Sequence[str]
    ) -> list[list[DicomHeader] | ScanRejected]:
        """As `dicom.read_headers` for each path and whether it is released, with the refusals in their places."""
        return self._ask({"kind": "headers", "modalities": list(modalities)}, files, headers_of)

    def close(self) -> None:
        """End the child."""
        with self._lock:
            self._end()

    def _one(
        self,
        request: dict[str, Any],
        source: Source,
        released: bool,
        understand: Callable[[dict[str, Any], np.ndarray], Answer],
    ) -> Answer:
        (answer,) = self._ask(request, [(source, released)], lambda content, values, _: understand(content, values))
        if isinstance(answer, ScanRejected):
            raise answer
        return answer

    def _ask(
        self,
        request: dict[str, Any],
        files: Sequence[tuple[Source, bool]],
        understand: Callable[[dict[str, Any], np.ndarray, Path], Answer],
    ) -> list[Answer | ScanRejected]:
        answers: list[Answer | ScanRejected] = []
        with self._lock:
            while len(answers) < len(files):
                waiting = files[len(answers) :]
                asked = [([str(Path.cwd() / path) for path in source_paths(source)], free) for source, free in waiting]
                self._send(request | {"files": asked})
                try:
                    for source, _ in waiting:
                        content, values = self._receive()
                        path = source_paths(source)[0]
                        answers.append(refusal_of(content, path) or understand(content, values, path))
                except _ChildEndedError as error:
                    at = source_paths(files[len(answers)][0])[0]
                    answers.append(ScanRejected(at, Rejection.UNREADABLE, str(error)))
                except MALFORMED_ANSWER:
                    at, detail = (
                        source_paths(files[len(answers)][0])[0],
                        "its decoder gave an answer that no decoder gives",
                    )
                    answers.append(ScanRejected(at, Rejection.UNREADABLE, detail))
                    self._end()
                except BaseException:
                    self._end()  # the rest of an answer is on its way
                    raise
        return answers

    def _send(self, request: dict[str, Any]) -> None:
        text = json.dumps(request).encode()
        for _ in range(2):
            if self._child is None or self._child.poll() is not None:
                self._start()
            assert self._child is not None and self._child.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it was ended while it had nothing to do
                self._child.stdin.write(REQUEST.pack(len(text)) + text)
                self._child.stdin.flush()
                return
            self._end()
        raise DeploymentError("the process that decodes image files ends again and again: is there enough memory?")

    def _start(self) -> None:
        self._end()
        places = [place for place in sys.path if place]  # never the current folder
        arguments = [json.dumps(places), str(self.limits.memory_bytes), str(self.limits.seconds)]
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-c", RUN, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | threads,
            bufsize=0,
        )
        try:
            self._receive(START_SECONDS)
        except _ChildEndedError as error:
            raise DeploymentError("the process that decodes image files did not start") from error

    def _receive(self, seconds: float | None = None) -> tuple[dict[str, Any], np.ndarray]:
        deadline = time.monotonic() + (2 * self.limits.seconds if seconds is None else seconds)
        text_length, array_bytes = REPLY.unpack(self._read(REPLY.size, deadline))
        if text_length > MAX_REPLY_JSON or array_bytes > 4 * MAX_PIXELS or array_bytes % 4:
            raise ValueError
        content = json.loads(self._read(text_length, deadline))
        if not isinstance(content, dict):
            raise TypeError
        return content, np.frombuffer(self._read(array_bytes, deadline), np.float32)

    def _read(self, length: int, deadline: float) -> bytearray:
        assert self._child is not None and self._child.stdout is not None
        stream, content, at = self._child.stdout.fileno(), bytearray(length), 0
        poll = select.poll()
        poll.register(stream, select.POLLIN)
        while at < length:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                self._end()
                raise _ChildEndedError(f"decoding it took longer than {2 * self.limits.seconds} s")
            count = os.readv(stream, [memoryview(content)[at:]])
            if not count:
                raise _ChildEndedError(self._reason())
            at += count
        return content

    def _reason(self) -> str:
        """Why the child closed its answers; it is ended where it has not ended itself."""
        assert self._child is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(1)
        code = self._child.returncode
        self._end()
        if code == -signal.SIGXCPU:
            return f"decoding it took longer than {self.limits.seconds} s of processor time"
        if code == -signal.SIGALRM:
            return f"decoding it took longer than {2 * self.limits.seconds} s"
        return "its decoder ended" if code is None or code >= 0 else f"its decoder ended by signal {-code}"

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            with contextlib.suppress(OSError):
                child.kill()
            for stream in (child.stdin, child.stdout):
                with contextlib.suppress(OSError):
                    if stream is not None:
                        stream.close()
            child.wait()


@dataclass
class DecodingProcesses:
    """Children that decode side by side, at most one a processor, each started when it is first needed."""

    _free: list[DecodingProcess] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _places: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(available_processors()))

    @contextlib.contextmanager
    def one(self) -> Iterator[DecodingProcess]:
        """A child for this thread alone; waits while all are taken."""
        with self._places:
            with self._lock:
                child = self._free.pop() if self._free else DecodingProcess()
            try:
                yield child
            finally:
                with self._lock:
                    self._free.append(child)

    def close(self) -> None:
        """End the children that nobody has."""
        with self._lock:
            for child in self._free:
                child.close()


def source_paths(source: Source) -> Sequence[Path]:
    """The files that a scan is read from, the one that names it first."""
    return [source] if isinstance(source, Path) else source


_shared = DecodingProcesses()


def shared_process() -> contextlib.AbstractContextManager[DecodingProcess]:
    """One of this process's children, for this thread alone; waits while all are taken."""
    return _shared.one()


def _renew() -> None:
    global _shared
    _shared = DecodingProcesses()  # a forked process must not use its parent's child


os.register_at_fork(after_in_child=_renew)
atexit.register(lambda: _shared.close())
