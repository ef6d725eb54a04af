"""The harness of the benchmarks: nothing is done twice, and nothing of another plan is mixed in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

from ld_common.core.errors import ConfigError
from ld_simulations.benchmarks.harness import Harness, ResultStore, claim_plan, read_table


@dataclass(frozen=True)
class Square:
    """A task whose result is a square."""

    number: int

    @property
    def name(self) -> str:
        return f"squares/{self.number}"


class Calculator:
    """A worker that fails at one number."""

    def __init__(self, bad: int = -1) -> None:
        self.bad = bad
        self.done: list[int] = []

    def square(self, task: Square) -> int:
        if task.number == self.bad:
            raise ConfigError(f"cannot square {task.number}")
        self.done.append(task.number)
        return task.number**2


TASKS = [Square(number) for number in range(4)]


def harness(folder: Path, adopted: dict[str, int] | None = None) -> Harness:
    return Harness(ResultStore(folder, adopted or {}), Console(quiet=True))


def test_a_stopped_run_resumes_with_what_is_missing(tmp_path: Path) -> None:
    first, second = Calculator(bad=2), Calculator()
    with pytest.raises(ConfigError, match="cannot square 2"):
        harness(tmp_path).run("squares", TASKS, lambda: first, Calculator.square)
    assert first.done == [0, 1]
    harness(tmp_path, {"squares/3": 9}).run("squares", TASKS, lambda: second, Calculator.square)
    assert second.done == [2]  # 0 and 1 are there, 3 was adopted
    names = [task.name for task in TASKS]
    assert ResultStore(tmp_path, {"squares/3": 9}).collect(names) == dict(zip(names, (0, 1, 4, 9), strict=True))
    assert list(ResultStore(tmp_path).collect(names)) == names[:3]
    log = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split(" ")[3] for line in log] == names[:3]


def test_a_single_result_is_computed_once(tmp_path: Path) -> None:
    calls: list[int] = []

    def compute() -> dict[str, int]:
        calls.append(1)
        return {"value": 3}

    assert [harness(tmp_path).once("single", compute) for _ in range(2)] == [{"value": 3}] * 2
    assert len(calls) == 1


@pytest.mark.slow
def test_several_processes_do_every_task_once(tmp_path: Path) -> None:
    parallel = Harness(ResultStore(tmp_path), Console(quiet=True), workers=2)
    parallel.run("squares", TASKS, Calculator, Calculator.square)
    results = ResultStore(tmp_path).collect(task.name for task in TASKS)
    assert list(results.values()) == [0, 1, 4, 9]


def test_results_of_another_plan_are_refused(tmp_path: Path) -> None:
    claim_plan(tmp_path, {"samples": 12, "seeds": (0, 1)})
    claim_plan(tmp_path, {"samples": 12, "seeds": (0, 1)})
    with pytest.raises(ConfigError, match="another samples"):
        claim_plan(tmp_path, {"samples": 13, "seeds": (0, 1)})
    (tmp_path / "plan.json").unlink()
    ResultStore(tmp_path).write("one", 1)
    with pytest.raises(ConfigError, match="unknown plan"):
        claim_plan(tmp_path, {"samples": 12})


@pytest.mark.parametrize("text", ["{", "[]", '{"other": 1}', None])
def test_a_table_of_another_kind_is_not_adopted(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "table.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=r"adopt: .*table\.json.*privacy"):
        read_table(str(file), "privacy", ("runs",))
