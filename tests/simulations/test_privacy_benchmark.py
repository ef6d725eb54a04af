"""The benchmark of privacy: its plan, and a small run of what trains, attacks and sums."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from ld_client.audit.membership import membership_report
from ld_client.audit.one_run import EpsilonBound
from ld_client.audit.statistics import share
from ld_common.core.errors import ConfigError
from ld_simulations.benchmarks.harness import ResultStore
from ld_simulations.benchmarks.privacy.aim_table import aim_lines
from ld_simulations.benchmarks.privacy.attack_table import attack_lines, attack_numbers
from ld_simulations.benchmarks.privacy.attacks import attack
from ld_simulations.benchmarks.privacy.norms import gradient_norms
from ld_simulations.benchmarks.privacy.plan import (
    PrivacyBenchmark,
    PrivacySetting,
    adopted_results,
    load_privacy_benchmark,
    result_name,
)
from ld_simulations.benchmarks.privacy.quality import QualityRuns
from ld_simulations.benchmarks.privacy.quality_table import QualityRow, interval, quality_lines
from ld_simulations.benchmarks.privacy.report import PrivacyResults, write_results
from ld_simulations.benchmarks.privacy.sums import measure_sum

CONFIG = Path(__file__).parents[2] / "configs/benchmark_privacy.yaml"
SMALL = [
    "seeds=[0]", "workers=1", "epsilons=[8]", "patients=[4]", "public_patients=2", "public_steps=2", "test_patients=2",
    "samples=4", "setting.patients=6", "setting.expected_batch_size=3", "setting.steps=2", "setting.rank=1",
    "attacked_patients=16", "attacked.expected_batch_size=4", "attacked.steps=2", "overfitted.steps=2",
]  # fmt: skip


@pytest.fixture
def benchmark(tiny_base: Path, tmp_path: Path) -> PrivacyBenchmark:
    overrides = [f"output={tmp_path / 'work'}", f"results={tmp_path / 'results'}", *SMALL]
    loaded = load_privacy_benchmark(CONFIG, overrides)
    loaded.config.levers = {"no public start": {"warm_start": False}}
    adapter = {**loaded.study.adapter, "targets": ["to_k"]}
    return replace(loaded, study=replace(loaded.study, base_model=str(tiny_base), adapter=adapter))


def test_the_plan_asks_what_a_hospital_asks() -> None:
    plan = load_privacy_benchmark(CONFIG, [])
    tables = {table: [title for own, title, _ in plan.tables() if own == table] for table, _, _ in plan.tables()}
    assert tables["epsilon"] == ["no privacy", "public start alone", "10", "8", "3", "1"]
    assert tables["patients"] == ["public start alone", "100", "300", "1000", "3000", "10000"]
    assert "public start alone, rank 1" in tables["levers"]
    assert [start for start, _, setting in plan.other_starts() if not setting.steps] == ["chest"]
    assert plan.anatomy("chest")[0].phantom != plan.anatomy()[0].phantom
    assert len(plan.config.seeds) >= 3
    for _, title, setting in plan.tables():
        study = plan.study_of(setting, 0)
        assert study.privacy.enabled == (title != "no privacy" and not title.startswith("public start"))
        assert study.privacy.target_delta * setting.patients <= 0.1 + 1e-9


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("parts=[costs]", "costs"),
        ("setting.ranc=1", "ranc"),
        ("levers.x={ranc: 1}", r"levers\.x: ranc"),
        ("seeds=[]", "seed"),
    ],
)
def test_a_wrong_plan_is_named(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_privacy_benchmark(CONFIG, [override])


def attacked(seed: int, named: int, epsilon: float | None, bound: float, held_out: int = 100) -> dict[str, Any]:
    """A result in which `named` of 50 members score above all others but one."""
    outside = [*(-1.0 for _ in range(held_out - 1)), 1.0]
    report = membership_report("loss threshold", [0.0] * named + [-2.0] * (50 - named), outside)
    found = EpsilonBound(bound, 4.0, 0.0, 0.95, 100, 10, 8, (10,))
    membership = [asdict(report), asdict(report)]
    return {"epsilon": epsilon, "seed": seed, "membership": membership, "canaries": asdict(found)}


def test_seeds_of_an_attack_are_counted_together() -> None:
    found = {
        "overfitted": [attacked(0, 5, None, 1.5), attacked(1, 15, None, 0.5)],
        "private": [attacked(0, 0, 4.0, 1.0), attacked(1, 1, 8.0, 1.0)],
    }
    numbers, lines = attack_numbers(found), attack_lines(found)
    assert numbers["overfitted_epsilon_lower_bound_least"] == 0.5
    assert numbers["private_epsilon_lower_bound_share"] == 0.25
    assert "private_epsilon_lower_bound_least" not in numbers
    together = share(20, 100)
    ends = [numbers[f"overfitted_tpr_at_1_percent_fpr_{end}"] for end in ("low", "high")]
    assert ends == [together.low, together.high]
    assert sum("| all |" in line for line in lines) == 2
    assert any("20.0% (12.7% to 29.2%)" in line for line in lines)


def test_an_attack_without_the_power_is_no_evidence() -> None:
    weak, strong = ({"private": [attacked(0, 0, epsilon, 0.0)]} for epsilon in (8.0, 3.0))  # it could show 4
    assert any("no: 4.00 < 8.00" in line for line in attack_lines(weak))
    assert any("says nothing about the ledger's ε" in line for line in attack_lines(weak))
    assert "cannot show" in " ".join(aim_lines(attack_numbers(weak)))
    assert not any("says nothing" in line for line in attack_lines(strong))
    assert "cannot show" not in " ".join(aim_lines(attack_numbers(strong)))


def row(gains: list[float], start: list[float] | None, steps: int = 100) -> QualityRow:
    def runs(values: list[float]) -> list[dict[str, Any]]:
        rest = {"parameters": 10, "noise_over_signal": 0.5, "growth_ratio": 1, "edit_direction_rate": 1, "frechet": 1}
        return [{"seed": seed, "copy_gain_db": value, **rest} for seed, value in enumerate(values)]

    return QualityRow("row", PrivacySetting(steps=steps), runs(gains), None if start is None else runs(start))


def test_gains_are_over_the_untouched_start_of_the_same_seed() -> None:
    assert row([3.0, 5.0], [1.0, 2.0, 9.0]).over_start() == [2.0, 3.0]
    assert row([3.0], None).over_start() == []
    assert row([3.0], [3.0], steps=0).over_start() == []
    assert interval([1.0]) is None
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-3)
    page = "\n".join(quality_lines("levers", [row([3.0], [1.0]), row([3.0], None), row([3.0], [])]))
    for words in ("+2.00 (one seed)", "no start", "start of rank 4 not run"):
        assert words in page
    assert "distinguishable" not in page
    assert "distinguishable" in "\n".join(quality_lines("levers", [row([1.0, 2.0], [2.0, 1.0])]))


def test_too_few_left_out_show_no_rate_of_all_seeds() -> None:
    runs = {"overfitted": [attacked(0, 5, None, 1.5, held_out=20), attacked(1, 5, None, 1.5)]}
    assert "overfitted_tpr_at_1_percent_fpr_low" not in attack_numbers(runs)
    assert any("needs 100 held-out patients" in line for line in attack_lines(runs))


@pytest.mark.slow
def test_the_published_table_is_adopted_whole() -> None:
    published = CONFIG.parents[1] / "docs/benchmarks/privacy.json"
    benchmark = load_privacy_benchmark(CONFIG, [f"adopt={published}"])
    store = ResultStore(Path("nowhere"), adopted_results(benchmark))
    assert PrivacyResults(benchmark, store).by_part() == json.loads(published.read_text())["runs"]


@pytest.mark.slow
def test_a_small_benchmark_fills_its_tables(benchmark: PrivacyBenchmark) -> None:
    store, runs = ResultStore(benchmark.output), QualityRuns(benchmark)
    results = PrivacyResults(benchmark, store)
    runs.prepare()
    for training in benchmark.trainings:
        store.write(result_name("quality", training.name), runs.run(training))
    for training in benchmark.other_trainings[::2]:  # the start alone, and with differential privacy
        store.write(result_name("starts", training.name), runs.run(training))
    for attacked in benchmark.attacked:
        store.write(result_name("attacks", attacked.name), attack(runs, attacked))
    store.write(result_name("norms", "norms"), gradient_norms(runs))
    store.write(result_name("sums", "3-25000"), measure_sum(3, 25_000))
    files = write_results(benchmark, store)
    assert [file.name for file in files] == ["privacy.json", "privacy.md", "privacy_patients.png"]
    numbers = json.loads(files[0].read_text())
    assert "copy_gain_ratio_eps8" in numbers
    assert numbers["secure_sum_3_sites_25000_uplink_ratio"] < 1.02
    assert results.sums()[0]["largest_error"] < 1e-6
    page = files[1].read_text()
    clips = results.read("norms", "norms")["clips"]
    assert [row["max_grad_norm"] for row in clips] == sorted((row["max_grad_norm"] for row in clips), reverse=True)
    shares = [row["clipped_share"] for row in clips]
    assert shares == sorted(shares)
    assert all(0 <= row["signal"] <= 1.0001 for row in clips)
    assert sum(line.startswith("## ") for line in page.splitlines()) == 7
    assert "| chest: public start alone |" in page
    private = results.quality(
        next(setting for table, _, setting in benchmark.tables() if table == "levers" and setting.epsilon)
    )[0]
    assert private["epsilon"] <= 8.0
    assert private["noise_over_signal"] > 0
    again = replace(benchmark, config=replace(benchmark.config, output="elsewhere", adopt=str(files[0])))
    assert PrivacyResults(again, ResultStore(again.output, adopted_results(again))).by_part() == results.by_part()
