"""Tables of quality: each training beside the untouched public start that it began with, and what it gained over it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from ld_simulations.benchmarks.privacy.plan import PrivacySetting

SHOWN = {
    "copy_gain_db": "copy gain, dB",
    "growth_ratio": "growth ratio",
    "edit_direction_rate": "right direction",
    "frechet": "FD efficientnet_lite0",
}
GAIN = "copy_gain_db"
CONFIDENCE = 0.95
OVER_START = (
    "*Over the start*: copy gain less that of the untouched public start of the same seed and rank, with a 95 % "
    "t-interval over the seeds. Results hold means over test patients, not single ones, so the interval does not cover "
    "the choice of test patients; one seed has none."
)
READING = {
    "epsilon": "Compare each row with the two without ε: *no privacy* is the upper bound, *public start alone* saw no "
    "patient of the hospital.",
    "patients": "At the default ε, noise matters less the more patients there are.",
    "levers": "Each row changes one option of the default. A start of another rank is another start.",
    "starts": "The default setting from a public start of another anatomy, which cannot have learned from its patients "
    "what the answer looks like. *Public start alone* is that start.",
}
TITLES = {
    "epsilon": "Quality by ε",
    "patients": "Quality by number of patients",
    "levers": "Effect of each option",
    "starts": "A public start of another anatomy",
}


@dataclass(frozen=True)
class QualityRow:
    """One setting's results, seed by seed."""

    title: str
    setting: PrivacySetting
    runs: Sequence[dict[str, Any]]
    start: Sequence[dict[str, Any]] | None
    """Results of the untouched start; None where the setting starts from the plain base."""

    @property
    def untouched(self) -> bool:
        """Whether this is a start itself."""
        return not self.setting.steps

    def over_start(self) -> list[float]:
        """Copy gain beyond the start's of the same seed, dB; empty where no seed has both."""
        gains = {run["seed"]: run[GAIN] for run in self.start or []}
        return [] if self.untouched else [run[GAIN] - gains[run["seed"]] for run in self.runs if run["seed"] in gains]


def quality_lines(table: str, rows: Sequence[QualityRow]) -> list[str]:
    """The section of a table; empty without results."""
    if not rows:
        return []
    heads = [table, "seeds", "patients a step", "numbers", "noise over signal", "over the start, dB", *SHOWN.values()]
    lines = [
        f"## {TITLES[table]}",
        "",
        READING[table] + (f" {OVER_START}" if table == "epsilon" else ""),
        "",
        f"| {' | '.join(heads)} |",
        "|---" * len(heads) + "|",
    ]
    for row in rows:
        first, setting = row.runs[0], row.setting
        noise = f"{first['noise_over_signal']:.2f}" if setting.epsilon else "none"
        cells = [
            row.title,
            f"{len(row.runs)}",
            "" if row.untouched else f"{setting.expected_batch_size}",
            f"{first['parameters']:,}",
            noise,
            _over_start(row),
            *(spread([run[key] for run in row.runs]) for key in SHOWN),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", *_nothing_shown(rows)]


def _nothing_shown(rows: Sequence[QualityRow]) -> list[str]:
    """Says so where no row's gain over its start can be told from 0."""
    ends = [interval(row.over_start()) for row in rows]
    known = [each for each in ends if each is not None]
    if not known or any(low > 0 or high < 0 for low, high in known):
        return []
    return ["No gain over the start with an interval is distinguishable from 0 with so few seeds.", ""]


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % t-interval of a mean; None of a single value."""
    if len(values) < 2:
        return None
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)
    mean = float(np.mean(values))
    return mean - half, mean + half


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation; the mean alone of a single value."""
    deviation = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{deviation}"


def _over_start(row: QualityRow) -> str:
    if row.untouched:
        return ""
    if row.start is None:
        return "no start"
    over = row.over_start()
    if not over:
        return f"start of rank {row.setting.rank} not run"
    ends = interval(over)
    return f"{np.mean(over):+.2f} " + ("(one seed)" if ends is None else f"({ends[0]:+.2f} to {ends[1]:+.2f})")
