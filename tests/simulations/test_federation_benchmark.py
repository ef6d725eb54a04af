"""The benchmark of federated learning, on a few patients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console

from ld_common.core.config import from_mapping
from ld_common.core.errors import ConfigError
from ld_simulations.benchmarks.federation.judge import FederationJudge, FederationTask
from ld_simulations.benchmarks.federation.plan import METHODS, FederationBenchmark
from ld_simulations.benchmarks.federation.report import flat_numbers, improvement_shares, page_lines
from ld_simulations.benchmarks.federation.run import run

SCANNER = {"rows": 70, "columns": 70, "spacing_mm": 3.0}


@pytest.fixture
def config(tmp_path: Path) -> FederationBenchmark:
    hospitals = [
        {"name": name, "patients": count, "test_patients": 1, "scanner": SCANNER}
        for name, count in (("aster", 5), ("birch", 4))
    ]
    file = tmp_path / "hospitals.yaml"
    file.write_text(yaml.safe_dump({"hospitals": hospitals}))
    return FederationBenchmark(
        output=str(tmp_path / "output"),
        results=str(tmp_path / "results"),
        hospitals={"non-iid": str(file)},
        splits=["non-iid"],
        seeds=[71, 72],
        test_patients=1,
        rounds=1,
        steps=1,
        methods=["mean", "fedprox", "flora"],
        tried={"fedprox": [{"training.proximal_mu": 0.001}, {"training.proximal_mu": 0.01}]},
        workers=1,
    )


@pytest.mark.slow
def test_a_small_run_writes_its_page_and_resumes(config: FederationBenchmark) -> None:
    config.seeds, config.methods = [71], ["fedprox"]
    config.tried = {"fedprox": [{"training.proximal_mu": 0.001}]}
    numbers, page = run(config, False, Console(quiet=True))
    found = json.loads(numbers.read_text())
    assert found["federated_over_pooled"] > 0
    assert 0 <= found["sites_better_than_alone"] <= 1
    assert found["methods_compared"] == 1
    text = page.read_text()
    for words in ("| aster |", "FedProx, proximal_mu", "pooled, more steps", "non-IID"):
        assert words in text
    log = (Path(config.output) / "log.txt").read_text()
    assert run(config, False, Console(quiet=True)) == [numbers, page]
    assert (Path(config.output) / "log.txt").read_text() == log  # nothing was done again
    assert page.read_text() == text


@pytest.mark.slow
def test_pooled_rows_see_as_many_scans_as_all_sites_together(config: FederationBenchmark) -> None:
    judge = FederationJudge(config)

    def scans(row: str, options: tuple[tuple[str, Any], ...] = ()) -> int:
        study = judge._study(FederationTask("network", "non-iid", 71, row, options), ["aster", "birch", "cedar"])
        sites = 1 if row.startswith("pooled") else 3
        return study.federation.rounds * study.training.steps * study.training.batch_size * sites

    rows = ["pooled, more steps", "pooled, larger batch", *(name for name in METHODS if name != "fedprox")]
    assert {scans(row) for row in rows} == {scans("fedprox", (("training.proximal_mu", 0.1),))}


def parts_of(losses: dict[str, float]) -> dict[str, Any]:
    return {f"network/non-iid/{seed}/{row}": {"aster": loss} for seed in (71, 72) for row, loss in losses.items()}


def test_shares_are_of_the_better_pooled_training(config: FederationBenchmark) -> None:
    losses = {"base, not trained": 1.0, "pooled, more steps": 0.9, "pooled, larger batch": 0.8, "alone": 0.9}
    losses |= {"each site's own drift": 0.84, "one drift of all sites": 0.86}
    parts = parts_of(losses | {"mean": 0.85, "fedprox": 0.9, "flora": 0.8})
    assert improvement_shares(config, parts, "non-iid", "mean") == pytest.approx([0.75, 0.75])
    assert improvement_shares(config, parts, "non-iid", "flora") == pytest.approx([1.0, 1.0])
    del parts["network/non-iid/72/fedprox"]  # a seed without one row shows none
    assert len(improvement_shares(config, parts, "non-iid", "mean")) == 1
    assert "Of seed 71." in list(page_lines(config, parts, {}))


def test_answers_are_compared_hospital_by_hospital(config: FederationBenchmark) -> None:
    gains = {"pooled": 4.0, "federated": 3.9, "alone": 2.0}
    parts = {
        f"answers/non-iid/{seed}/{row}": {"aster": [gain] * 5, "birch": [gain] * 5}
        for seed in (71, 72)
        for row, gain in gains.items()
    }
    parts["answers/non-iid/72/alone"]["birch"] = [5.0] * 5
    numbers = flat_numbers(config, parts)
    assert numbers["federated_over_pooled"] == pytest.approx(0.975)
    assert numbers["sites_better_than_alone"] == pytest.approx(np.mean([1, 1, 1, 0]))
    text = "\n".join(page_lines(config, parts, {}))
    assert "| birch | 3.90 | 3.50 | +1.90, -1.10 |" in text
    assert flat_numbers(config, {})["federated_over_pooled"] is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seeds": [70]}, "all must differ"),
        ({"seeds": [1070]}, "all must differ"),
        ({"methods": ["krum"]}, "is not one of"),
        ({"splits": ["other"]}, "has no 'other'"),
        ({"steps": 0}, "must be above 0"),
    ],
)
def test_a_plan_that_mixes_patients_or_names_nothing_is_refused(change: dict[str, Any], words: str) -> None:
    values = {"hospitals": {"iid": "x", "non-iid": "y"}, **change}
    with pytest.raises(ConfigError, match=words):
        from_mapping(FederationBenchmark, values)
