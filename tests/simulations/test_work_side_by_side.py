"""Work on one model in several processes."""

from __future__ import annotations

import os

import pytest
import torch

from ld_common.core.errors import RequestError
from ld_simulations import side_by_side as module
from ld_simulations.side_by_side import side_by_side

CPU = torch.device("cpu")


def test_results_come_in_the_order_of_the_parts_from_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.os, "cpu_count", lambda: 2)
    network = torch.nn.Linear(3, 2).requires_grad_(False)  # a closure, which could not be pickled
    parts = [torch.full((1, 3), float(number)) for number in range(5)]
    results = list(side_by_side(lambda part: (os.getpid(), network(part)), parts, CPU))
    processes = [process for process, _ in results]
    assert processes[0] == os.getpid() not in processes[1:]
    for part, (_, answer) in zip(parts, results, strict=True):
        assert torch.equal(answer, network(part))


@pytest.mark.parametrize(("processors", "parts"), [(1, [1, 2]), (4, [1]), (4, [])])
def test_one_processor_or_one_part_needs_no_process(
    processors: int, parts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.os, "cpu_count", lambda: processors)
    assert list(side_by_side(lambda part: (os.getpid(), part), parts, CPU)) == [(os.getpid(), part) for part in parts]


def test_an_error_of_a_part_is_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.os, "cpu_count", lambda: 2)

    def work(part: int) -> int:
        if part:
            raise RequestError(f"part {part} cannot be used")
        return part

    for parts in ([1, 2, 3], [0, 1, 2]):  # here, and in another process
        with pytest.raises(RequestError, match="part 1 cannot be used"):
            list(side_by_side(work, parts, CPU))
