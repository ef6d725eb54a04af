"""The aims of the privacy benchmark, what was measured, and where a number cannot decide."""

from __future__ import annotations

from collections.abc import Callable
from string import Formatter
from typing import Any

from ld_simulations.benchmarks.privacy.attack_table import could_contradict

AIMS: tuple[tuple[str, str, str, Callable[[float], bool]], ...] = (
    (
        "dp_step_ratio",
        "seconds of a private step over a plain one of the same batch, median of pairs",
        "<= 1.3",
        lambda value: value <= 1.3,
    ),
    ("copy_gain_ratio_eps8", "copy gain at ε = 8 over copy gain without privacy", ">= 0.8", lambda value: value >= 0.8),
    (
        "gain_over_start_db_eps8",
        "copy gain at ε = 8 over the untouched public start, dB "
        "({gain_over_start_db_eps8_low:+.2f} to {gain_over_start_db_eps8_high:+.2f})",
        "interval > 0",
        lambda value: value > 0,
    ),
    (
        "ledger_under_counts",
        "kills (of {ledger_kills}) after which the ledger held less than was sent",
        "0",
        lambda value: value == 0,
    ),
    (
        "private_epsilon_lower_bound_share",
        "private trainings: largest lower bound on ε by an attack, over the ledger's ε",
        "<= 1",
        lambda value: value <= 1,
    ),
    (
        "overfitted_epsilon_lower_bound_least",
        "overfitted trainings: least lower bound on ε by an attack",
        "> 0",
        lambda value: value > 0,
    ),
    (
        "private_tpr_at_1_percent_fpr_low",
        "private trainings: TPR at 1 % FPR over all seeds, lower end of its 95 % interval",
        "<= 0.01",
        lambda value: value <= 0.01,
    ),
    (
        "overfitted_tpr_at_1_percent_fpr_low",
        "overfitted trainings: the same",
        "> 0.01",
        lambda value: value > 0.01,
    ),
    (
        "best_reconstruction_gap_db",
        "LoRA, default policy: best reconstruction by a malicious server nearer to the right scan than to the nearest "
        "other patient, dB ({best_reconstruction_gap_db_low:.2f} to {best_reconstruction_gap_db_high:.2f})",
        "<= 1",
        lambda value: value <= 1,
    ),
)


def aim_lines(numbers: dict[str, Any]) -> list[str]:
    """The table of the aims whose numbers there are."""
    lines = ["| | measured | aim | |", "|---|---|---|---|"]
    for key, text, aim, met in AIMS:
        shown = {name for _, name, _, _ in Formatter().parse(text) if name}
        if {key, *shown} <= set(numbers):
            verdict = _weak(key, numbers, met) or ("held" if met(numbers[key]) else "**missed**")
            lines.append(f"| {text.format(**numbers)} | {numbers[key]:.3g} | {aim} | {verdict} |")
    return [*lines, ""] if len(lines) > 2 else []


def _weak(key: str, numbers: dict[str, Any], met: Callable[[float], bool]) -> str:
    """What a number cannot decide, where that is so; else nothing."""
    alone = numbers.get("copy_gain_ratio_public_start_alone")
    if key == "copy_gain_ratio_eps8" and alone is not None and met(numbers[key]) and met(alone):
        return f"held, by the public start alone as well ({alone:.3g})"
    if key == "gain_over_start_db_eps8" and numbers.get(f"{key}_low", -1.0) <= 0:
        return "not shown"
    if key == "private_epsilon_lower_bound_share" and (could := could_contradict(numbers)):
        return f"cannot show: {could}" if met(numbers[key]) else ""
    return ""
