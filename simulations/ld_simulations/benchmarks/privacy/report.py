"""The benchmark's results as files: flat JSON, a page, a picture of how many patients it takes."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ld_common.core.atomic_files import write_bytes
from ld_simulations.benchmarks.harness import ResultStore, json_bytes
from ld_simulations.benchmarks.privacy.attack_table import Attacked, attack_lines, attack_numbers
from ld_simulations.benchmarks.privacy.plan import (
    NO_PRIVACY,
    RUNS,
    START_ALONE,
    PrivacyBenchmark,
    PrivacySetting,
    result_name,
)

NUMBERS, PAGE, PLOT = "privacy.json", "privacy.md", "privacy_patients.png"
SHOWN = {
    "copy_gain_db": "copy gain, dB",
    "growth_correlation": "growth correlation",
    "growth_ratio": "growth ratio",
    "edit_direction_rate": "right direction",
    "frechet": "FD efficientnet_lite0",
}


class PrivacyResults:
    """The results that there are, as the page needs them."""

    def __init__(self, benchmark: PrivacyBenchmark, store: ResultStore) -> None:
        self.benchmark, self.store = benchmark, store

    def read(self, part: str, name: str) -> Any:
        """A result, or None."""
        return self.store.read(result_name(part, name))

    def quality(self, setting: PrivacySetting) -> list[dict[str, Any]]:
        """Results of a setting, seed by seed."""
        results = [self.read("quality", run.name) for run in self.benchmark.trainings if run.setting == setting]
        return [result for result in results if result is not None]

    def sums(self) -> list[dict[str, Any]]:
        """Costs of secure sums."""
        config = self.benchmark.config
        rows = [self.read("sums", f"{sites}-{length}") for sites in config.sums for length in config.lengths]
        return [row for row in rows if row is not None]

    def by_part(self) -> dict[str, dict[str, Any]]:
        """Part -> name -> result, of all that belongs to this benchmark."""
        config, benchmark = self.benchmark.config, self.benchmark
        names = {
            "cost": ["step"],
            "kills": ["kills"],
            "sums": [f"{sites}-{length}" for sites in config.sums for length in config.lengths],
            "norms": ["norms"],
            "attacks": [run.name for run in benchmark.attacked],
            "quality": [run.name for run in benchmark.trainings],
        }
        results = {part: {name: self.read(part, name) for name in of_part} for part, of_part in names.items()}
        return {
            part: {name: result for name, result in of_part.items() if result is not None}
            for part, of_part in results.items()
        }


def write_results(benchmark: PrivacyBenchmark, store: ResultStore) -> list[Path]:
    """Write the page of the results that there are; returns the files."""
    folder, results = Path(benchmark.config.results), PrivacyResults(benchmark, store)
    numbers = _numbers(benchmark, results)
    write_bytes(folder / NUMBERS, json_bytes(numbers | {RUNS: results.by_part()}))
    files = [folder / NUMBERS, folder / PAGE]
    if all(results.quality(setting) for _, _, setting in _rows(benchmark, "patients")):  # not a line through gaps
        write_bytes(folder / PLOT, _plot(benchmark, results))
        files.append(folder / PLOT)
    write_bytes(folder / PAGE, _page(benchmark, results, numbers, PLOT if len(files) > 2 else "").encode())
    return files


def _numbers(benchmark: PrivacyBenchmark, results: PrivacyResults) -> dict[str, Any]:
    numbers: dict[str, Any] = dict(results.read("cost", "step") or {})
    kills = results.read("kills", "kills")
    if kills:
        numbers |= {"ledger_kills": kills["kills"], "ledger_under_counts": kills["under_counts"]}
        numbers["ledger_lost_rounds"] = kills["lost"]
    rows = _rows(benchmark, "epsilon")
    gains = {title: _mean(results.quality(setting), "copy_gain_db") for _, title, setting in rows}
    reference = gains.get(NO_PRIVACY)
    for title, gain in gains.items():
        if gain is not None and reference is not None and title != NO_PRIVACY:
            numbers[f"copy_gain_ratio_{_key(title)}"] = gain / reference
    for title, added in _over_start(benchmark, results).items():
        numbers[f"gain_over_start_db_{_key(title)}"] = float(np.mean(added))
    for row in results.sums():
        name = f"secure_sum_{row['sites']}_sites_{row['numbers']}"
        numbers[f"{name}_site_seconds"] = row["site_seconds"]
        numbers[f"{name}_server_seconds"] = row["server_seconds"]
        numbers[f"{name}_uplink_ratio"] = row["uplink_bytes"] / row["plain_uplink_bytes"]
    return numbers | attack_numbers(_attacked(benchmark, results))


def _key(title: str) -> str:
    """Of a row of the table of ε, in the names of flat numbers."""
    return f"eps{title}" if title[0].isdigit() else title.replace(" ", "_")


def _over_start(benchmark: PrivacyBenchmark, results: PrivacyResults) -> dict[str, list[float]]:
    """Row of the table of ε -> dB of copy gain beyond the public start of the same seed, seed by seed."""
    gains = {
        title: {run["seed"]: run["copy_gain_db"] for run in results.quality(setting)}
        for _, title, setting in _rows(benchmark, "epsilon")
    }
    start = gains.pop(START_ALONE)
    pairs = {title: [own[seed] - start[seed] for seed in own if seed in start] for title, own in gains.items()}
    return {title: found for title, found in pairs.items() if found}


def _attacked(benchmark: PrivacyBenchmark, results: PrivacyResults) -> Attacked:
    found: Attacked = {}
    for name in ("overfitted", "private"):
        runs = [results.read("attacks", run.name) for run in benchmark.attacked if run.kind == name]
        if any(runs):
            found[name] = [run for run in runs if run]
    return found


def _rows(benchmark: PrivacyBenchmark, table: str) -> list[tuple[str, str, PrivacySetting]]:
    return [row for row in benchmark.tables() if row[0] == table]


def _mean(runs: Sequence[dict[str, Any]], key: str) -> float | None:
    return float(np.mean([run[key] for run in runs])) if runs else None


def _page(benchmark: PrivacyBenchmark, results: PrivacyResults, numbers: dict[str, Any], plot: str) -> str:
    lines = [
        "# Privacy, measured",
        "",
        "`make benchmark-privacy` (`ld-evaluate-privacy --config configs/benchmark_privacy.yaml`) wrote this page. "
        "Means ± standard deviation over the seeds. A part that has not run yet is not shown.",
        "",
        *_aims(numbers),
        *_secure_sums(results.sums()),
        *_norms(results.read("norms", "norms")),
        *attack_lines(_attacked(benchmark, results)),
    ]
    for table, title in TITLES.items():
        rows = [(name, setting, results.quality(setting)) for _, name, setting in _rows(benchmark, table)]
        lines += _quality(title, table, [row for row in rows if row[2]])
        if table == "epsilon" and (over := _over_start(benchmark, results)):
            added = [f"{name} {_cell(found)} dB" for name, found in over.items()]
            lines += [f"Added to the copy gain of the same seed's public start: {'; '.join(added)}.", ""]
        if table == "patients" and plot:
            lines += [f"![copy gain by the number of patients]({plot})", ""]
    return "\n".join(lines)


TITLES = {"epsilon": "Quality at ε", "patients": "How many patients does it take?", "levers": "What each lever buys"}
AIMS: tuple[tuple[str, str, str, Callable[[float], bool]], ...] = (
    ("dp_step_ratio", "private step over plain step, same batch, paired, median", "<= 1.3", lambda value: value <= 1.3),
    ("copy_gain_ratio_eps8", "copy gain at ε = 8 over that without privacy", ">= 0.8", lambda value: value >= 0.8),
    ("ledger_under_counts", "ledger below what was sent, after {ledger_kills} kills", "0", lambda value: value == 0),
    (
        "private_epsilon_lower_bound_share",
        "largest ε that an attack shows of the private runs, over the ledger's",
        "<= 1",
        lambda value: value <= 1,
    ),
    (
        "overfitted_epsilon_lower_bound_least",
        "least ε that an attack shows of the overfitted runs",
        "> 0",
        lambda value: value > 0,
    ),
    (
        "private_tpr_at_1_percent_fpr_low",
        "private runs, TPR at 1 % false positives, lower end of its interval over all seeds",
        "<= 0.01",
        lambda value: value <= 0.01,
    ),
    (
        "overfitted_tpr_at_1_percent_fpr_low",
        "overfitted runs, the same",
        "> 0.01",
        lambda value: value > 0.01,
    ),
)


def _aims(numbers: dict[str, Any]) -> list[str]:
    lines = ["| | measured | aim | |", "|---|---|---|---|"]
    for key, words, aim, met in AIMS:
        if key in numbers:
            verdict = "held" if met(numbers[key]) else "**missed**"
            lines.append(f"| {words.format(**numbers)} | {numbers[key]:.3g} | {aim} | {verdict} |")
    return [*lines, ""] if len(lines) > 2 else []


def _secure_sums(rows: Sequence[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    lines = [
        "## Secure aggregation",
        "",
        "One round in one process, without network or drop-outs; bytes are a site's, all stages together.",
        "",
        "| sites | numbers | a site's seconds | server's seconds | plain average, seconds | uplink over plain | "
        "error of the mean |",
        "|---" * 7 + "|",
    ]
    for row in rows:
        ratio = row["uplink_bytes"] / row["plain_uplink_bytes"]
        lines.append(
            f"| {row['sites']} | {row['numbers']:,} | {row['site_seconds']:.3f} | {row['server_seconds']:.2f} | "
            f"{row['plain_server_seconds']:.4f} | {ratio:.3f} | {row['largest_error']:.1e} |"
        )
    return [*lines, ""]


def _norms(found: dict[str, Any] | None) -> list[str]:
    if not found:
        return []
    lines = [
        "## Which clip norm?",
        "",
        f"Of {found['patients']} draws of public patients at the public start ({found['augmentation_multiplicity']} "
        f"examples each), the norm of a patient's gradient has the median {found['quantiles']['0.5']:.2g}, and nine "
        f"in ten lie between {found['quantiles']['0.05']:.2g} and {found['quantiles']['0.95']:.2g}. Noise is in units "
        "of the clip norm, so the norm of the mean clipped gradient in that unit is the signal that it hides.",
        "",
        "| clip norm | patients whose gradient is clipped | signal |",
        "|---" * 3 + "|",
    ]
    rows = [
        f"| {row['max_grad_norm']:g} | {row['clipped_share']:.0%} | {row['signal']:.3f} |" for row in found["clips"]
    ]
    return [*lines, *rows, ""]


def _quality(title: str, table: str, rows: Sequence[tuple[str, PrivacySetting, list[dict[str, Any]]]]) -> list[str]:
    if not rows:
        return []
    heads = " | ".join(SHOWN.values())
    lines = [f"## {title}", "", f"| {table} | seeds | patients a step | numbers | noise over signal | {heads} |"]
    lines.append("|---" * (5 + len(SHOWN)) + "|")
    for name, setting, runs in rows:
        cells = " | ".join(_cell([run[key] for run in runs]) for key in SHOWN)
        noise = f"{runs[0]['noise_over_signal']:.2f}" if setting.epsilon else "none"
        lines.append(
            f"| {name} | {len(runs)} | {setting.expected_batch_size} | {runs[0]['parameters']:,} | {noise} | {cells} |"
        )
    return [*lines, ""]


def _cell(values: Sequence[float]) -> str:
    spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{spread}"


def _plot(benchmark: PrivacyBenchmark, results: PrivacyResults) -> bytes:
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.subplots()
    rows = [(setting.patients, results.quality(setting)) for _, _, setting in _rows(benchmark, "patients")]
    rows = [row for row in rows if row[1]]
    places = [patients for patients, _ in rows]
    means = [float(np.mean([run["copy_gain_db"] for run in runs])) for _, runs in rows]
    axes.plot(places, means, color="#1b6ca8", marker="o")
    for patients, runs in rows:
        axes.plot([patients] * len(runs), [run["copy_gain_db"] for run in runs], ".", color="#1b6ca8", alpha=0.5)
    for _, title, setting in _rows(benchmark, "epsilon"):
        reference = _mean(results.quality(setting), "copy_gain_db")
        if title in (NO_PRIVACY, START_ALONE) and reference is not None:
            axes.axhline(reference, color="#c8553d", lw=1)
            words = title if title == START_ALONE else f"{title},\n{setting.patients:,} patients"
            beside = axes.get_yaxis_transform()
            axes.text(1.01, reference, words, color="#c8553d", va="center", transform=beside)
    axes.set(xscale="log", xlabel="patients of the hospital", ylabel="gain over copying the scan, dB")
    axes.set_title(f"ε = {benchmark.config.base_setting().epsilon:g}: each seed, and their mean", fontsize=10)
    axes.set_xticks(places, [f"{place:,}" for place in places])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=120)
    return stream.getvalue()
