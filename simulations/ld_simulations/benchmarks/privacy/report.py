"""Files of the privacy benchmark: flat numbers, a page, and a plot of quality by the number of patients."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ld_common.core.atomic_files import write_bytes
from ld_simulations.benchmarks.harness import ResultStore, json_bytes
from ld_simulations.benchmarks.privacy.aim_table import aim_lines
from ld_simulations.benchmarks.privacy.attack_table import Attacked, attack_lines, attack_numbers
from ld_simulations.benchmarks.privacy.plan import (
    NO_PRIVACY,
    RUNS,
    START_ALONE,
    TABLES,
    PrivacyBenchmark,
    PrivacySetting,
    result_name,
)
from ld_simulations.benchmarks.privacy.quality_table import GAIN, TITLES, QualityRow, interval, quality_lines
from ld_simulations.benchmarks.privacy.reconstruction_plan import confirmed_name, requests
from ld_simulations.benchmarks.privacy.reconstruction_table import (
    best_request,
    reconstruction_lines,
    reconstruction_numbers,
    reconstruction_picture,
)

NUMBERS, PAGE, PLOT = "privacy.json", "privacy.md", "privacy_patients.png"
RECONSTRUCTIONS = "privacy_reconstruction.png"


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

    def row(self, title: str, setting: PrivacySetting) -> QualityRow:
        """A row of a table, with the start that the setting began with."""
        start = self.benchmark.start_of(setting)
        return QualityRow(title, setting, self.quality(setting), None if start is None else self.quality(start))

    def from_other_start(self, start: str, setting: PrivacySetting) -> list[dict[str, Any]]:
        """Results of a setting from a start of another anatomy, seed by seed."""
        runs = [run for run in self.benchmark.other_trainings if (run.start, run.setting) == (start, setting)]
        results = [self.read("starts", run.name) for run in runs]
        return [result for result in results if result is not None]

    def other_rows(self) -> list[QualityRow]:
        """Rows of the table of other starts."""
        rows, untouched = [], dict[str, list[dict[str, Any]]]()
        for start, title, setting in self.benchmark.other_starts():
            runs = self.from_other_start(start, setting)
            untouched.setdefault(start, runs)  # the first row of a start is the start alone
            rows.append(QualityRow(f"{start}: {title}", setting, runs, untouched[start]))
        return [row for row in rows if row.runs]

    def sums(self) -> list[dict[str, Any]]:
        """Costs of secure sums."""
        config = self.benchmark.config
        rows = [self.read("sums", f"{sites}-{length}") for sites in config.sums for length in config.lengths]
        return [row for row in rows if row is not None]

    def reconstructions(self) -> list[dict[str, Any]]:
        """Attacked requests of a malicious server."""
        names = [request.name for request in requests(self.benchmark.config.reconstruction)]
        results = [self.read("reconstruction", name) for name in names]
        return [result for result in results if result is not None]

    def confirmed_reconstruction(self) -> dict[str, Any] | None:
        """Fresh rounds of the best request within the default policy."""
        best = best_request(self.reconstructions())
        return None if best is None else self.read("reconstruction", confirmed_name(best))

    def by_part(self) -> dict[str, dict[str, Any]]:
        """Part -> name -> result, of all that belongs to this benchmark."""
        config, benchmark = self.benchmark.config, self.benchmark
        names = {
            "cost": ["step"],
            "kills": ["kills"],
            "sums": [f"{sites}-{length}" for sites in config.sums for length in config.lengths],
            "norms": ["norms"],
            "attacks": [run.name for run in benchmark.attacked],
            "reconstruction": [
                *(request.name for request in requests(config.reconstruction)),
                *((confirmed_name(best),) if (best := best_request(self.reconstructions())) else ()),
            ],
            "quality": [run.name for run in benchmark.trainings],
            "starts": [run.name for run in benchmark.other_trainings],
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
    pictures = reconstruction_picture(results.reconstructions(), benchmark.output / "reconstruction")
    if pictures is None and benchmark.config.adopt and results.reconstructions():
        adopted = Path(benchmark.config.adopt).with_name(RECONSTRUCTIONS)
        pictures = adopted.read_bytes() if adopted.exists() else None
    if pictures is not None:
        write_bytes(folder / RECONSTRUCTIONS, pictures)
        files.append(folder / RECONSTRUCTIONS)
    write_bytes(folder / PAGE, _page(benchmark, results, numbers, [file.name for file in files]).encode())
    return files


def _numbers(benchmark: PrivacyBenchmark, results: PrivacyResults) -> dict[str, Any]:
    numbers: dict[str, Any] = dict(results.read("cost", "step") or {})
    kills = results.read("kills", "kills")
    if kills:
        numbers |= {"ledger_kills": kills["kills"], "ledger_under_counts": kills["under_counts"]}
        numbers["ledger_lost_rounds"] = kills["lost"]
    rows = _rows(benchmark, "epsilon")
    gains = {title: _mean(results.quality(setting), GAIN) for _, title, setting in rows}
    reference = gains.get(NO_PRIVACY)
    for title, gain in gains.items():
        if gain is not None and reference is not None and title != NO_PRIVACY:
            numbers[f"copy_gain_ratio_{_key(title)}"] = gain / reference
    for _, title, setting in rows:
        over = results.row(title, setting).over_start()
        key = f"gain_over_start_db_{_key(title)}"
        if over:
            numbers[key] = float(np.mean(over))
        ends = interval(over)
        if ends is not None:
            numbers |= {f"{key}_low": ends[0], f"{key}_high": ends[1]}
    for row in results.sums():
        name = f"secure_sum_{row['sites']}_sites_{row['numbers']}"
        numbers[f"{name}_site_seconds"] = row["site_seconds"]
        numbers[f"{name}_server_seconds"] = row["server_seconds"]
        numbers[f"{name}_uplink_ratio"] = row["uplink_bytes"] / row["plain_uplink_bytes"]
    numbers |= reconstruction_numbers(results.reconstructions(), results.confirmed_reconstruction())
    return numbers | attack_numbers(_attacked(benchmark, results))


def _key(title: str) -> str:
    """A row of the table of ε in the names of flat numbers."""
    return f"eps{title}" if title[0].isdigit() else title.replace(" ", "_")


def _attacked(benchmark: PrivacyBenchmark, results: PrivacyResults) -> Attacked:
    by_kind: Attacked = {}
    for kind in ("overfitted", "private"):
        runs = [results.read("attacks", run.name) for run in benchmark.attacked if run.kind == kind]
        if any(runs):
            by_kind[kind] = [run for run in runs if run]
    return by_kind


def _rows(benchmark: PrivacyBenchmark, table: str) -> list[tuple[str, str, PrivacySetting]]:
    return [row for row in benchmark.tables() if row[0] == table]


def _mean(runs: Sequence[dict[str, Any]], key: str) -> float | None:
    return float(np.mean([run[key] for run in runs])) if runs else None


def _page(benchmark: PrivacyBenchmark, results: PrivacyResults, numbers: dict[str, Any], files: Sequence[str]) -> str:
    lines = [
        "# Privacy",
        "",
        "Written by `make benchmark-privacy` (`ld-benchmark privacy`). Values are means ± standard deviations over the "
        "seeds. A part that has not run yet is not shown.",
        "",
        *aim_lines(numbers),
        *_secure_sums(results.sums()),
        *_norms(results.read("norms", "norms")),
        *attack_lines(_attacked(benchmark, results)),
        *reconstruction_lines(
            results.reconstructions(),
            results.confirmed_reconstruction(),
            RECONSTRUCTIONS if RECONSTRUCTIONS in files else "",
        ),
    ]
    for table in TABLES:
        rows = [results.row(title, setting) for _, title, setting in _rows(benchmark, table)]
        lines += quality_lines(table, [row for row in rows if row.runs])
        if table == "patients" and PLOT in files:
            lines += [f"![copy gain by the number of patients]({PLOT})", ""]
    lines += quality_lines("starts", results.other_rows()) or _not_run(benchmark)
    return "\n".join(lines)


def _not_run(benchmark: PrivacyBenchmark) -> list[str]:
    """The section of the starts of another anatomy before they ran."""
    if not benchmark.config.other_starts:
        return []
    return [
        f"## {TITLES['starts']}",
        "",
        f"Not run yet: {', '.join(benchmark.config.other_starts)}. The tables above show what a private training adds "
        "to a start from another hospital of the same anatomy, and not what it learns without one that nearly knows "
        "the answer. `ld-benchmark privacy parts=[starts] adopt=docs/benchmarks/privacy.json` runs it.",
        "",
    ]


def _secure_sums(rows: Sequence[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    lines = [
        "## Secure aggregation",
        "",
        "One round in one process, without network or drop-outs. Bytes are those of one site over all stages; an "
        "uplink ratio near 1 means that the sum costs hardly more traffic than plain updates.",
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


def _norms(norms: dict[str, Any] | None) -> list[str]:
    if not norms:
        return []
    lines = [
        "## Clip norm",
        "",
        f"In {norms['patients']} draws of public patients at the public start ({norms['augmentation_multiplicity']} "
        f"examples each), a patient's gradient has a median norm of {norms['quantiles']['0.5']:.2g}; 90 % lie between "
        f"{norms['quantiles']['0.05']:.2g} and {norms['quantiles']['0.95']:.2g}. *Signal* is the norm of the mean "
        "clipped gradient in units of the clip norm, as the noise is: choose a clip norm with a high signal.",
        "",
        "| clip norm | patients whose gradient is clipped | signal |",
        "|---" * 3 + "|",
    ]
    rows = [
        f"| {row['max_grad_norm']:g} | {row['clipped_share']:.0%} | {row['signal']:.3f} |" for row in norms["clips"]
    ]
    return [*lines, *rows, ""]


def _plot(benchmark: PrivacyBenchmark, results: PrivacyResults) -> bytes:
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.subplots()
    settings = [setting for _, _, setting in _rows(benchmark, "patients") if setting.steps]
    rows = [(setting.patients, results.quality(setting)) for setting in settings]
    rows = [row for row in rows if row[1]]
    places = [patients for patients, _ in rows]
    means = [float(np.mean([run[GAIN] for run in runs])) for _, runs in rows]
    axes.plot(places, means, color="#1b6ca8", marker="o")
    for patients, runs in rows:
        axes.plot([patients] * len(runs), [run[GAIN] for run in runs], ".", color="#1b6ca8", alpha=0.5)
    for _, title, setting in _rows(benchmark, "epsilon"):
        reference = _mean(results.quality(setting), GAIN)
        if title in (NO_PRIVACY, START_ALONE) and reference is not None:
            axes.axhline(reference, color="#c8553d", lw=1)
            label = title if title == START_ALONE else f"{title},\n{setting.patients:,} patients"
            beside = axes.get_yaxis_transform()
            axes.text(1.01, reference, label, color="#c8553d", va="center", transform=beside)
    axes.set(xscale="log", xlabel="patients of the hospital", ylabel="gain over copying the scan, dB")
    axes.set_title(f"ε = {benchmark.config.base_setting().epsilon:g}: each seed, and their mean", fontsize=10)
    axes.set_xticks(places, [f"{place:,}" for place in places])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=120)
    return stream.getvalue()
