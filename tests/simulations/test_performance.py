"""The performance benchmark: what is compared does the same work, and the page says what is missing."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from ld_common.core.errors import ConfigError
from ld_common.diffusion.base_model import BaseModel, load_base
from ld_simulations.benchmarks.harness import ResultStore
from ld_simulations.benchmarks.performance import interleaved as timing
from ld_simulations.benchmarks.performance import training
from ld_simulations.benchmarks.performance.interleaved import interleaved, ratio
from ld_simulations.benchmarks.performance.plan import load_performance_config
from ld_simulations.benchmarks.performance.report import AIMS, NUMBERS, PAGE, write_report

CONFIG = Path(__file__).parents[2] / "configs/benchmark_performance.yaml"


def test_alternatives_are_timed_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(step=3.0)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    ran: list[str] = []
    seconds = interleaved({"a": lambda: ran.append("a"), "b": lambda: ran.append("b")}, repeats=2)
    assert ran == ["a", "b"] * 3
    assert seconds == {"a": [3.0, 3.0], "b": [3.0, 3.0]}


def test_a_ratio_is_of_the_same_repeat() -> None:
    # a machine that was ten times as slow during one repeat does not change it
    assert ratio({"a": [2.0, 20.0, 2.0], "b": [1.0, 10.0, 1.0]}, "a", "b") == 2.0


def test_both_loops_train(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bases: list[BaseModel] = []
    monkeypatch.setattr(training, "load_base", lambda name: bases.append(load_base(name)) or bases[-1])

    def run_once(work: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
        before = [_trainable(base) for base in bases]
        for loop in work.values():
            loop()
        for base, start in zip(bases, before, strict=True):
            assert sum(float((after - first).abs().sum()) for after, first in zip(_trainable(base), start, strict=True))
        return {name: [1.0] for name in work}

    monkeypatch.setattr(training, "interleaved", run_once)
    result = training.measure_training(str(tiny_base), steps=1, batch_size=1, repeats=1)
    assert len(bases) == 2
    assert result["training_over_diffusers_loop"] == 1.0
    assert result["gigaflops_a_step"] > 0


def _trainable(base: BaseModel) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in base.unet.parameters() if parameter.requires_grad]


def test_the_page_names_what_was_not_measured(tmp_path: Path) -> None:
    store = ResultStore(tmp_path / "run")
    machine = {"processor": "a processor", "threads": 2}
    store.write("demo", {"seconds_total": 250.0, "first_picture_seconds": 40.0, "peak_rss_mb": 1.0} | machine)
    write_report(store, tmp_path)
    numbers = json.loads((tmp_path / NUMBERS).read_text())
    assert set(AIMS) < set(numbers)
    assert numbers["demo_seconds"] == 250.0
    assert numbers["training_over_diffusers_loop"] is None
    page = (tmp_path / PAGE).read_text()
    assert page.count("not measured") == len(AIMS) - 2
    assert page.count("**missed**") == 1
    assert page.count("| met |") == 1


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(ConfigError, match="parts: 'speed'"):
        load_performance_config(CONFIG, ["parts=[speed]"])
