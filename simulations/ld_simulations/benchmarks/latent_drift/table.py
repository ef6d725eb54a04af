"""From the results of single runs to what they say together: means, spreads, differences within a seed, verdicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ld_simulations.benchmarks.latent_drift.plan import CONDITIONAL, HISTOGRAM, MAP, OFFSET_NOISE, PRIOR

Run = dict[str, Any]


@dataclass(frozen=True)
class Metric:
    """A number of a run and how it is read."""

    title: str
    worse: Callable[[float], float]
    """How bad a value is: 0 or less is as good as can be."""
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
    known: dict[str, Metric] = {}
    for name in sorted(name for name in held if name.startswith("frechet_") and "matched" not in name):
        features = name.removeprefix("frechet_")
        known[name] = Metric(f"FD {features}", _low)
        known[f"kernel_{features}"] = Metric(f"KD {features}", _low)
        known[f"frechet_matched_{features}"] = Metric(f"FD {features}, grey levels matched", _low, True)
    known["background_error"] = Metric("background error", _from_zero)
    known["sharpness_ratio"] = Metric("sharpness (real 1)", _from_one, True)
    known["size_slope"] = Metric("size slope (real 1)", _from_one, True)
    known["size_in_range"] = Metric("size in range (real 0.98)", _high, True)
    known["condition_auc"] = Metric("AUC on samples", _high, True)
    known["auc_synthetic"] = Metric("AUC, trained on samples", _high, True)
    known["auc_real_and_synthetic"] = Metric("AUC, on samples and real", _high, True)
    return {name: metric for name, metric in known.items() if name in held}


@dataclass(frozen=True)
class ResultRow:
    """One configuration, its runs in the order of their seeds."""

    modality: str
    adapter: str
    drift: bool
    formulation: str
    control: str | None
    runs: list[Run]

    def values(self, metric: str) -> np.ndarray:
        """The metric by seed."""
        return np.array([run["metrics"][metric] for run in self.runs])

    @property
    def title(self) -> str:
        """The configuration in words."""
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
        ResultRow(modality, adapter, drift, formulation, control, sorted(own, key=_seed))
        for (adapter, drift, formulation, control), own in grouped.items()
    ]


def _seed(run: Run) -> int:
    return int(run["seed"])


def find(rows: Sequence[ResultRow], adapter: str, formulation: str, control: str | None = None) -> ResultRow | None:
    """The configuration of an adapter with this formulation of the drift (`none` without one) and control."""
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
    """Mean over the seeds of by how much, as a share, the metric fell from one configuration to the other."""
    first, second = before.values(metric), after.values(metric)
    return float((1 - second / first).mean())


def seeds_better(before: ResultRow, after: ResultRow, name: str, metric: Metric) -> tuple[int, int]:
    """In how many of the seeds the second configuration is better than the first."""
    pairs = list(zip(before.values(name), after.values(name), strict=True))
    return sum(metric.worse(float(b)) < metric.worse(float(a)) for a, b in pairs), len(pairs)


def best_row(rows: Sequence[ResultRow], metric: str) -> ResultRow:
    """The configuration of least metric, by its mean over the seeds."""
    return min(rows, key=lambda row: float(row.values(metric).mean()))


@dataclass(frozen=True)
class AimVerdict:
    """One aim, what was measured, and whether it was met."""

    aim: str
    measured: str
    met: bool


CUT_BY = {"brain": 0.60, "chest": 0.25}
"""By how much drift should cut basic fine-tuning's distance."""


def verdicts(runs: Sequence[Run], modality: str, adapters: Sequence[str]) -> list[AimVerdict]:
    """The aims of the table for one modality, for μ by channel, as a map, and as a map that follows the prompt."""
    rows, known = rows_of(runs, modality), metrics_of(runs)
    main = next(iter(known))
    found = []
    for formulation, what in ((PRIOR, "drift"), (MAP, "drift as a map"), (CONDITIONAL, "conditional drift")):
        cuts = {}
        for adapter in adapters:
            before, after = find(rows, adapter, "none"), find(rows, adapter, formulation)
            if before and after:
                cuts[adapter] = reduction(before, after, main), *seeds_better(before, after, main, known[main])
        if "full" in cuts and modality in CUT_BY:
            aim = f"{what} cuts the {known[main].title} of basic fine-tuning by {CUT_BY[modality]:.0%} or more"
            found.append(AimVerdict(aim, f"{cuts['basic'][0]:.0%}", cuts["full"][0] >= CUT_BY[modality]))
        if cuts:
            words = ", ".join(f"{adapter} {share:.0%} ({won}/{of} seeds)" for adapter, (share, won, of) in cuts.items())
            aim = f"{what} lowers the {known[main].title} of every adapter"
            found.append(AimVerdict(aim, words, all(share > 0 for share, _, _ in cuts.values())))
    if any(row.control == HISTOGRAM for row in rows):
        found.append(_against_matching(rows, known, main))
    return found


def _against_matching(rows: Sequence[ResultRow], known: dict[str, Metric], main: str) -> AimVerdict:
    """The best configuration with drift against the best with its histogram matched, on all beyond brightness."""
    drifted = [row for row in rows if row.drift and row.control in (None, OFFSET_NOISE)]
    best, rival = best_row(drifted, main), best_row([row for row in rows if row.control == HISTOGRAM], main)
    won: list[str] = []
    lost: list[str] = []
    for name, metric in known.items():
        if metric.beyond_brightness:
            mine, other = (float(np.mean([metric.worse(float(v)) for v in row.values(name)])) for row in (best, rival))
            (won if mine < other else lost).append(metric.title)
    words = f"{best.adapter}, {best.title}, against {rival.adapter}: better in {', '.join(won) or 'nothing'}"
    words += f"; not in {', '.join(lost)}" if lost else ""
    aim = "drift at its best (offset noise allowed) beats plain histogram matching at its best beyond brightness"
    return AimVerdict(aim, words, not lost)
