from __future__ import annotations

import threading
import time

import pytest

from ld_common.core.ahead import map_ahead


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_the_order_of_their_items_and_an_error_in_its_place(workers: int) -> None:
    def invert(item: int) -> float:
        time.sleep(0.01 * (item % 3))
        return 1 / item

    results = map_ahead(invert, [4, 2, 5, 0, 1], workers)
    assert [next(results) for _ in range(3)] == [0.25, 0.5, 0.2]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_a_caller_that_takes_its_time_is_not_run_away_from() -> None:
    begun: list[int] = []
    lock = threading.Lock()

    def note(item: int) -> int:
        with lock:
            begun.append(item)
        return item

    results = map_ahead(note, range(1000), workers=2)
    assert next(results) == 0
    time.sleep(0.2)
    assert len(begun) <= 2 * 2 + 1
    results.close()
    assert len(begun) <= 2 * 2 + 1


def test_several_workers_work_at_once() -> None:
    together = threading.Barrier(3, timeout=10)
    assert list(map_ahead(lambda item: together.wait() >= 0 and item, range(6), workers=3)) == list(range(6))
