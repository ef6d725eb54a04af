"""The benchmark's round is a real one, and its shapes are those of Stable Diffusion 1.4."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from flwr.supercore.task_identity import TaskIdentity

from ld_simulations.benchmarks.performance.scale import CASES, FULL, lora_shapes, measure_round, unet_shapes


@pytest.mark.slow
def test_the_shapes_are_those_of_stable_diffusion() -> None:
    assert sum(map(math.prod, unet_shapes().values())) == 859_520_964
    for rank in (4, 16):
        shapes = lora_shapes(rank)
        assert len(shapes) == 2 * 2 * 4 * 16  # A and B of four layers in two attentions of 16 blocks
        assert sum(map(math.prod, shapes.values())) == 797_184 * rank // 4
    assert [case.name for case in CASES if case.kind == FULL] == ["full_unet_3_sites"]


def test_a_round_ends_with_what_all_sites_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, key, 1)
    found = measure_round({"a": (300, 4), "b": (5,)}, 7, tmp_path)
    assert found["parameters"] == 1205
    assert found["over_numpy_pass"] > 0
    assert 0 < found["aggregate_seconds"] <= found["seconds"]
