"""What the benchmark of the wire's formats finds on small tensors."""

from __future__ import annotations

import pytest
import torch

from ld_simulations.benchmarks.performance import wire
from ld_simulations.benchmarks.performance.wire import VARIANTS, measure_wire, wire_table


def test_rounding_costs_what_the_formats_say(monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"w": torch.zeros(4)}
    monkeypatch.setattr(wire, "lora_shapes", lambda rank: {"a": (300, 40), "b": (40, 30)})
    monkeypatch.setattr(wire, "_train", lambda variant, base: (state, 0.5, {"w": torch.ones(4)}))
    found = measure_wire(sites=3, rounds=8)
    rows = found["formats"]
    assert list(rows) == [variant.name for variant in VARIANTS]
    assert rows["float32"]["relative_error"] == 0
    assert 0 < rows["int8"]["relative_error"] < rows["int8 without error feedback"]["relative_error"] < 0.02
    assert 0.45 < rows["bfloat16"]["of_float32"] < 0.55
    assert 0.2 < rows["int8"]["of_float32"] < 0.3
    assert len(wire_table(found)) == 2 + len(rows)


@pytest.mark.slow
def test_a_short_training_gives_a_loss_and_its_weights(smallest_base: object) -> None:
    start, loss, result = wire._train(VARIANTS[2], str(smallest_base), sites=2, rounds=1)
    assert loss > 0
    assert any(not torch.equal(value, start[name]) for name, value in result.items())
