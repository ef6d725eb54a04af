"""Times alternatives beside each other in one process, in turn: other work on the machine then slows all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median


def interleaved(work: Mapping[str, Callable[[], object]], repeats: int, warm: int = 1) -> dict[str, list[float]]:
    """Seconds of each repeat of each alternative.

    Args:
        work: the alternatives by name.
        repeats: times that each is timed.
        warm: times that each runs before, not timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for repeat in range(warm + repeats):
        for name, run in work.items():
            started = time.perf_counter()
            run()
            if repeat >= warm:
                seconds[name].append(round(time.perf_counter() - started, 4))
    return seconds


def ratio(seconds: Mapping[str, list[float]], numerator: str, denominator: str) -> float:
    """Median over the repeats of one alternative's seconds over the other's in the same repeat."""
    return median(a / b for a, b in zip(seconds[numerator], seconds[denominator], strict=True))
