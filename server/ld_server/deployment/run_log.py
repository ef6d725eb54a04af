"""`flower.log` of a deployed run: what its ServerApp prints, Flower's own log included.

Flower discards the output of that process, and keeps it in the SuperLink's database only.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from flwr.supercore.logger import update_console_handler

from ld_common.core.plain_log import without_escapes

FLOWER_LOG = "flower.log"


@contextmanager
def logged_to(path: Path) -> Iterator[None]:
    """Append what the block prints, and the error that ends it, to a file, without escape codes and with times."""
    update_console_handler(timestamps=True, colored=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", buffering=1) as log, _copied(sys.stdout, log), _copied(sys.stderr, log):
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError):
                log.write(traceback.format_exc())
            raise


@contextmanager
def _copied(stream: TextIO, log: TextIO) -> Iterator[None]:
    """Copy a stream's text to the log; Flower's handler writes to the same stream."""
    plain: Callable[[str], int] = stream.write

    def write(text: str) -> int:
        with contextlib.suppress(OSError):  # a full disk must not end the run
            log.write(without_escapes(text))
        return plain(text)

    attributes: Any = stream
    attributes.write = write
    try:
        yield
    finally:
        attributes.write = plain
