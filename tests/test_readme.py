"""The README's file tree and numbers are those of the repository."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from ld_simulations.benchmarks.latent_drift.plan import CONDITIONAL, MAP, OFFSET_NOISE, PRIOR, ZERO_SNR
from ld_simulations.benchmarks.latent_drift.table import find, reduction, rows_of
from ld_simulations.benchmarks.privacy.plan import load_privacy_benchmark
from ld_simulations.summary import AIMS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PACKAGES = ("ld_common", "server/ld_server", "client/ld_client", "simulations/ld_simulations")


@pytest.mark.parametrize("package", PACKAGES)
def test_the_tree_names_every_module_and_no_other(package: str) -> None:
    section = re.split(r"\n(?! )", README.split(f"\n{package}/ ", 1)[1], maxsplit=1)[0]
    rooms = {path.parent.name for path in (ROOT / package).glob("*/__init__.py")}
    assert rooms <= {name.rstrip("/") for name in re.findall(r"^  (\w+/) ", section, re.M)}
    folder, named = Path(), {Path(): set[str]()}
    for indent, name in re.findall(r"^( {2}|  {2}  )(\S+) ", section, re.M):
        folder = folder if len(indent) == 4 else Path()
        if name.endswith("/") and len(indent) == 2:
            folder = Path(name)
        elif name.endswith(".py"):
            named.setdefault(folder, set()).add(name)
    for place, names in named.items():
        assert names == {path.name for path in (ROOT / package / place).glob("*.py")} - {"__init__.py"}


def test_the_numbers_are_those_of_the_recorded_run() -> None:
    recorded = json.loads((ROOT / "docs" / "benchmarks" / "demo.json").read_text())
    for key in AIMS:
        row = next(line for line in README.splitlines() if line.startswith(f"| `{key}` |"))
        shown = float(row.split("|")[2].replace(",", ""))
        assert shown == pytest.approx(recorded[key], rel=0.01)


def test_how_true_counterfactuals_are_is_what_the_table_says() -> None:
    table = json.loads((ROOT / "docs/benchmarks/counterfactuals.json").read_text())

    def mean(method: str, key: str, modality: str = "brain") -> float:
        own = [run for run in table["runs"] if run["modality"] == modality and run["method"] == method]
        return float(np.mean([run["metrics"][key] for run in own]))

    said = []
    for method in ("ddpm", "ddpm, longer", "ddpm, wider", "flowedit, wider"):
        cut = percent(mean(method, "followup_ventricles_error_cut"))
        said.append((f"{mean(method, 'copy_gain_db'):.1f} dB", cut))
    flat = " ".join(README.split())
    assert f"asked by `ddpm`, comes {said[0][0]} nearer" in flat
    assert f"with {said[0][1]} less error than copying" in flat
    assert f"four times as long {' and '.join(said[1])}; one as long" in flat
    assert f"(`late_share`), {' and '.join(said[2])}; that one" in flat
    assert f"(`feedback`), {' and '.join(said[3])} (three seeds" in flat
    for method, before, after in (("ddpm", "by `ddpm` at", ", as"), ("flowedit", "with the true one at", " of the")):
        correlation = mean(f"{method}, wider", "growth_correlation") / table["ceilings"]["brain"]
        assert f"{before} {correlation:.2f}{after}" in flat
    ratios = [mean(method, "growth_ratio") for method in ("flowedit, wider", "ddpm, wider", "instruct, belm")]
    assert f"It draws {ratios[0]:.2f} of the true growth on average, `ddpm` {ratios[1]:.2f}:" in flat
    gains = [mean("flowedit", "copy_gain_db", modality) for modality in ("brain", "chest")]
    others = [mean(method, "copy_gain_db", "chest") for method in ("belm", "ddpm", "invert")]
    assert f"`flowedit` gains {gains[0]:.1f} dB in the brain and {gains[1]:.1f} on the chest" in flat
    assert f"`belm`, `ddpm` and `invert` gain {min(others):.1f} to {max(others):.1f}." in flat
    predicted = percent(mean("instruct, belm", "followup_ventricles_error_cut"))
    assert (
        f"that network draws {ratios[2]:.2f} of the true growth and foretells follow-ups with {predicted} less" in flat
    )


def test_what_privacy_costs_is_what_the_table_says() -> None:
    recorded = json.loads((ROOT / "docs/benchmarks/privacy.json").read_text())
    setting = load_privacy_benchmark(ROOT / "configs/benchmark_privacy.yaml", []).config.base_setting()
    rows = {"plain": replace(setting, epsilon=0.0), "start": replace(setting, epsilon=0.0, steps=0), "private": setting}
    runs = recorded["runs"]["quality"].values()
    gains = {
        name: np.mean([run["copy_gain_db"] for run in runs if run["setting"] == asdict(own)])
        for name, own in rows.items()
    }
    flat, kept = " ".join(README.split()), percent(recorded["copy_gain_ratio_eps8"])
    assert f"at one rendered hospital of {setting.patients:,} patients" in flat
    assert f"edits at ε = 8 keep {kept} of the gain without privacy" in flat
    assert f"({gains['private']:.2f} of {gains['plain']:.2f} dB nearer" in flat
    assert f"the start's, which has {gains['start']:.2f} dB alone" in flat
    page = (ROOT / "docs/benchmarks/privacy.md").read_text()
    added = next(part for part in page.split("public start: ")[1].split("; ") if part.startswith("8 "))[2:]
    assert added.startswith(f"{recorded['gain_over_start_db_eps8']:.2f} ± ")
    assert f"what ε = 8 adds, {added} over three seeds" in flat
    assert f"patients keep {kept} of the gain" in " ".join((ROOT / "docs/privacy.md").read_text().split())


def test_what_drift_does_is_what_the_table_says() -> None:
    runs = json.loads((ROOT / "docs/benchmarks/latent_drift.json").read_text())
    metric = "frechet_efficientnet_lite0"
    forms = {
        "drift, a value for each latent channel": PRIOR,
        "drift as a map": MAP,
        "drift as a map that follows the prompt": CONDITIONAL,
    }
    for words, formulation in forms.items():
        cells = []
        for modality in ("brain", "chest"):
            rows = rows_of(runs, modality)
            before, after = find(rows, "full", "none"), find(rows, "full", formulation)
            assert before is not None
            assert after is not None
            cells.append(percent(reduction(before, after, metric)))
        assert f"| {words} | {cells[0]} | {cells[1]} |" in README
    brain = rows_of(runs, "brain")
    plain, mapped, conditional, offset = (
        find(brain, "full", formulation, control)
        for formulation, control in (
            ("none", None),
            (MAP, None),
            (CONDITIONAL, None),
            ("none", OFFSET_NOISE),
        )
    )
    assert plain and mapped and conditional and offset
    matched = reduction(plain, mapped, "frechet_matched_efficientnet_lite0")
    flat = " ".join(README.split())
    assert f"with all grey levels matched, the brain's distance still falls by {percent(matched)}" in flat
    slopes = [row.values("size_slope").mean() for row in (mapped, plain, conditional)]
    assert f"slope {slopes[0]:.2f}, without drift {slopes[1]:.2f}" in flat
    assert f"brings the slope to {slopes[2]:.2f}" in flat
    assert f"Offset noise alone cuts the brain's distance by {percent(reduction(plain, offset, metric))}" in flat
    chest = rows_of(runs, "chest")
    bare, noisy = find(chest, "full", "none"), find(chest, "full", "none", OFFSET_NOISE)
    assert bare and noisy
    assert f"(the chest's by {percent(reduction(bare, noisy, metric))})" in flat
    ends = [find(rows, "full", "none", ZERO_SNR) for rows in (brain, chest)]
    assert ends[0] and ends[1]
    cuts = [percent(reduction(plain, ends[0], metric)), percent(reduction(bare, ends[1], metric))]
    slopes = [row.values("size_slope").mean() for row in ends if row]
    assert f"needs no drift: {cuts[0]} and {cuts[1]}" in flat
    assert f"(slope {slopes[0]:.2f} and {slopes[1]:.2f})" in flat


def percent(share: float) -> str:
    """As the README writes it."""
    return f"{share:.0%}".replace("%", " %")
