"""Time and memory of a run and all its child processes."""

from __future__ import annotations

import contextlib
import threading
import time
from types import TracebackType

import psutil

INTERVAL_SECONDS = 0.5


class ResourceMonitor:
    """Samples the resident memory of this process and of all its descendants until the block ends."""

    def __init__(self) -> None:
        self.peak_rss_mb = 0.0
        """Largest sum of resident memory seen; pages that processes share count once for each."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @property
    def seconds(self) -> float:
        """Wall-clock seconds since this process started, imports included."""
        return time.time() - psutil.Process().create_time()

    def __enter__(self) -> ResourceMonitor:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        this = psutil.Process()
        while not self._ended.wait(INTERVAL_SECONDS):
            total = 0
            for process in [this, *this.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                    total += process.memory_info().rss
            self.peak_rss_mb = max(self.peak_rss_mb, total / 2**20)
