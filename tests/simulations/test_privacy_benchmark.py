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
from ld_simulations.benchmarks.privacy.attack_table import attack_lines, attack_numbers
from ld_simulations.benchmarks.privacy.attacks import attack
from ld_simulations.benchmarks.privacy.norms import gradient_norms
from ld_simulations.benchmarks.privacy.plan import (
    PrivacyBenchmark,
    adopted_results,
    load_privacy_benchmark,
    result_name,
)
from ld_simulations.benchmarks.privacy.quality import QualityRuns
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
    assert tables["patients"] == ["100", "300", "1000", "3000", "10000"]
    assert len(plan.config.seeds) >= 3
    for _, title, setting in plan.tables():
        study = plan.study_of(setting, 0)
        assert study.privacy.enabled == (title not in ("no privacy", "public start alone"))
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


def test_too_few_left_out_show_no_rate_of_all_seeds() -> None:
    runs = {"overfitted": [attacked(0, 5, None, 1.5, held_out=20), attacked(1, 5, None, 1.5)]}
    assert "overfitted_tpr_at_1_percent_fpr_low" not in attack_numbers(runs)
    assert any("needs 100 held-out patients" in line for line in attack_lines(runs))


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
    assert sum(line.startswith("## ") for line in page.splitlines()) == 6
    private = results.quality(next(setting for table, _, setting in benchmark.tables() if table == "levers"))[0]
    assert private["epsilon"] <= 8.0
    assert private["noise_over_signal"] > 0
    again = replace(benchmark, config=replace(benchmark.config, output="elsewhere", adopt=str(files[0])))
    assert PrivacyResults(again, ResultStore(again.output, adopted_results(again))).by_part() == results.by_part()
