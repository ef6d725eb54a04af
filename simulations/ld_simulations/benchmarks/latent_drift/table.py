"""Results of single runs put together: means, deviations, differences within a seed, verdicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ld_simulations.benchmarks.latent_drift.plan import CONDITIONAL, HISTOGRAM, MAP, OFFSET_NOISE, PRIOR

Run = dict[str, Any]


@dataclass(frozen=True)
class Metric:
    """A metric's title, and which values are bad."""

    title: str
    worse: Callable[[float], float]
    """Badness of a value; lower is better."""
    beyond_brightness: bool = False


def _low(value: float) -> float:
    return value


def _high(value: float) -> float:
    return -value


def _from_zero(value: float) -> float:
    return abs(value)


def _from_one(value: float) -> float:
    return abs(value - 1)


def metrics_of(runs: Sequence[Run]) -> dict[str, Metric]:
    """The metrics that the runs hold, in the order of the table."""
    held = {name for run in runs for name in run["metrics"]}
    metrics: dict[str, Metric] = {}
    for name in sorted(name for name in held if name.startswith("frechet_") and "matched" not in name):
        features = name.removeprefix("frechet_")
        metrics[name] = Metric(f"FD {features}", _low)
        metrics[f"kernel_{features}"] = Metric(f"KD {features}", _low)
        metrics[f"frechet_matched_{features}"] = Metric(f"FD {features}, grey levels matched", _low, True)
    metrics["background_error"] = Metric("background error", _from_zero)
    metrics["sharpness_ratio"] = Metric("sharpness (real 1)", _from_one, True)
    metrics["size_slope"] = Metric("size slope (real 1)", _from_one, True)
    metrics["size_in_range"] = Metric("size in range (real 0.98)", _high, True)
    metrics["condition_auc"] = Metric("AUC on samples", _high, True)
    metrics["auc_synthetic"] = Metric("AUC, trained on samples", _high, True)
    metrics["auc_real_and_synthetic"] = Metric("AUC, on samples and real", _high, True)
    return {name: metric for name, metric in metrics.items() if name in held}


@dataclass(frozen=True)
class ResultRow:
    """One configuration with its runs in the order of their seeds."""

    modality: str
    adapter: str
    drift: bool
    formulation: str
    control: str | None
    runs: list[Run]

    def values(self, metric: str) -> np.ndarray:
        """The metric of each seed."""
        return np.array([run["metrics"][metric] for run in self.runs])

    @property
    def title(self) -> str:
        """Title of the configuration."""
        drift = "no drift"
        if self.drift:
            drift = "drift" if self.formulation == PRIOR else f"drift ({self.formulation.removeprefix(f'{PRIOR}-')})"
        return drift + ("" if self.control is None else f" + {self.control.replace('_', ' ')}")


def rows_of(runs: Sequence[Run], modality: str) -> list[ResultRow]:
    """A modality's configurations in the order in which the runs come."""
    grouped: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        if run["modality"] == modality:
            key = run["adapter"], run["drift"], run["formulation"], run["control"]
            grouped.setdefault(key, []).append(run)
    return [
        ResultRow(modality, adapter, drift, formulation, control, sorted(group, key=_seed))
        for (adapter, drift, formulation, control), group in grouped.items()
    ]


def _seed(run: Run) -> int:
    return int(run["seed"])


def find(rows: Sequence[ResultRow], adapter: str, formulation: str, control: str | None = None) -> ResultRow | None:
    """The configuration of an adapter with this formulation of the drift (`none` without one) and control, or None."""
    for row in rows:
        if (row.adapter, row.formulation, row.control) == (adapter, formulation, control):
            return row
    return None


def shown(row: ResultRow, metric: str) -> str:
    """Mean ± standard deviation over the seeds."""
    values = row.values(metric)
    digits = 3 if abs(values.mean()) < 10 else 1
    spread = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{spread}"


def reduction(before: ResultRow, after: ResultRow, metric: str) -> float:
    """Relative decrease of the metric from one configuration to the other, mean over the seeds."""
    first, second = before.values(metric), after.values(metric)
    return float((1 - second / first).mean())


def seeds_better(before: ResultRow, after: ResultRow, name: str, metric: Metric) -> tuple[int, int]:
    """Number of seeds in which the second configuration is better than the first, and number of seeds."""
    pairs = list(zip(before.values(name), after.values(name), strict=True))
    return sum(metric.worse(float(b)) < metric.worse(float(a)) for a, b in pairs), len(pairs)


def best_row(rows: Sequence[ResultRow], metric: str) -> ResultRow:
    """The configuration with the lowest mean of the metric."""
    return min(rows, key=lambda row: float(row.values(metric).mean()))


@dataclass(frozen=True)
class AimVerdict:
    """One aim, what was measured, and whether it was met."""

    aim: str
    measured: str
    met: bool


CUT_BY = {"brain": 0.60, "chest": 0.25}
"""Share by which drift should cut the distance of full fine-tuning."""


def verdicts(runs: Sequence[Run], modality: str, adapters: Sequence[str]) -> list[AimVerdict]:
    """The aims of the table for one modality, for μ by channel, as a map, and as a map that follows the prompt."""
    rows, metrics = rows_of(runs, modality), metrics_of(runs)
    main = next(iter(metrics))
    results = []
    for formulation, what in ((PRIOR, "drift"), (MAP, "drift as a map"), (CONDITIONAL, "conditional drift")):
        cuts = {}
        for adapter in adapters:
            before, after = find(rows, adapter, "none"), find(rows, adapter, formulation)
            if before and after:
                cuts[adapter] = reduction(before, after, main), *seeds_better(before, after, main, metrics[main])
        if "full" in cuts and modality in CUT_BY:
            aim = f"{what} cuts the {metrics[main].title} of full fine-tuning by {CUT_BY[modality]:.0%} or more"
            results.append(AimVerdict(aim, f"{cuts['full'][0]:.0%}", cuts["full"][0] >= CUT_BY[modality]))
        if cuts:
            measured = ", ".join(
                f"{adapter} {share:.0%} ({better}/{seeds} seeds)" for adapter, (share, better, seeds) in cuts.items()
            )
            aim = f"{what} lowers the {metrics[main].title} of every adapter"
            results.append(AimVerdict(aim, measured, all(share > 0 for share, _, _ in cuts.values())))
    if any(row.control == HISTOGRAM for row in rows):
        results.append(_against_matching(rows, metrics, main))
    return results


def _against_matching(rows: Sequence[ResultRow], metrics: dict[str, Metric], main: str) -> AimVerdict:
    """The best configuration with drift against the best with matched histograms, in all metrics beyond brightness."""
    drifted = [row for row in rows if row.drift and row.control in (None, OFFSET_NOISE)]
    best, rival = best_row(drifted, main), best_row([row for row in rows if row.control == HISTOGRAM], main)
    better: list[str] = []
    worse: list[str] = []
    for name, metric in metrics.items():
        if metric.beyond_brightness:
            of_best, of_rival = (
                float(np.mean([metric.worse(float(value)) for value in row.values(name)])) for row in (best, rival)
            )
            (better if of_best < of_rival else worse).append(metric.title)
    measured = f"{best.adapter}, {best.title}, against {rival.adapter}: better in {', '.join(better) or 'nothing'}"
    measured += f"; not in {', '.join(worse)}" if worse else ""
    aim = "the best drift (offset noise allowed) beats the best histogram matching in metrics beyond brightness"
    return AimVerdict(aim, measured, not worse)
