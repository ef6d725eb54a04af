"""Results of the attacks: flat numbers, and a table with a row for each training and one for all seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ld_client.audit.statistics import Share, share

Attacked = dict[str, list[dict[str, Any]]]
"""`overfitted` and `private`: the results of their seeds."""


def attack_numbers(attacked: Attacked) -> dict[str, Any]:
    """Flat numbers of each kind: areas, rates and bounds."""
    numbers: dict[str, Any] = {}
    for name, runs in attacked.items():
        loss = [run["membership"][0] for run in runs]
        numbers[f"{name}_membership_auc"] = float(np.mean([report["area"]["value"] for report in loss]))
        rates = [report["operating_points"][0]["true_positive_rate"] for report in loss]
        numbers[f"{name}_tpr_at_1_percent_fpr"] = [rate and rate["value"] for rate in rates]
        bounds = [run["canaries"]["epsilon"] for run in runs]
        numbers[f"{name}_epsilon_lower_bounds"] = bounds
        if all(run["epsilon"] is None for run in runs):
            numbers[f"{name}_epsilon_lower_bound_least"] = min(bounds)
        else:
            shares = [bound / run["epsilon"] for bound, run in zip(bounds, runs, strict=True)]
            numbers[f"{name}_epsilon_lower_bound_share"] = max(shares)
            numbers[f"{name}_epsilon_could_show"] = max(run["canaries"]["ceiling"] for run in runs)
            numbers[f"{name}_epsilon"] = min(run["epsilon"] for run in runs)
        pooled = _pooled(runs, 0)
        if pooled is not None:
            numbers[f"{name}_tpr_at_1_percent_fpr_low"] = pooled.low
            numbers[f"{name}_tpr_at_1_percent_fpr_high"] = pooled.high
    return numbers


def could_contradict(numbers: dict[str, Any]) -> str:
    """Why the attack on the private trainings could not have contradicted the ledger; empty where it could have."""
    could, promised = (numbers.get(key) for key in ("private_epsilon_could_show", "private_epsilon"))
    if could is None or promised is None or could >= promised:
        return ""
    return f"{could:.2f} at most, below {promised:.2f}"


def attack_lines(attacked: Attacked) -> list[str]:
    """The section of the page; empty without attacks."""
    if not attacked:
        return []
    lines = [
        "## Attacks",
        "",
        "A coin decides which patients a training gets. *TPR*: share of members that the attack names at 1 % false "
        "positives, with its 95 % interval; 1 % is chance. *ε at least*: lower bound on ε at 95 % confidence from "
        "guessing the coins by the losses, beside the largest bound that so many patients could show; 0 shows "
        "nothing. Each seed throws its own coins over the same patients; *all* pools the named members of all seeds, "
        "each at the threshold of its seed. *Could contradict ε*: whether so many patients could have shown a bound "
        "above the ledger's ε at all; where not, a low bound is no evidence for it.",
        "",
        "| run | ε | seed | AUC, loss | TPR at 1 %, loss | AUC, proximal | TPR at 1 %, proximal | ε at least | "
        "could show | could contradict ε |",
        "|---" * 10 + "|",
    ]
    for name, runs in attacked.items():
        for run in runs:
            cells = " | ".join(f"{_area(report)} | {_rate(report)}" for report in run["membership"])
            bound = f"{run['canaries']['epsilon']:.2f} | {run['canaries']['ceiling']:.2f}"
            lines.append(f"| {name} | {_promised(run)} | {run['seed']} | {cells} | {bound} | {_decides(run)} |")
        if len(runs) > 1:
            cells = " | ".join(f"{_mean_area(runs, attack)} | {_cell(_pooled(runs, attack))}" for attack in (0, 1))
            lines.append(f"| {name} | {_promised(runs[0])} | all | {cells} | | | |")
    return [*lines, "", *_power(attacked), ""]


def _power(attacked: Attacked) -> list[str]:
    """What the attacks could not have shown, in words."""
    numbers = attack_numbers(attacked)
    could, runs = could_contradict(numbers), attacked.get("private", [])
    if not could:
        return []
    rates = [run["membership"][0]["operating_points"][0]["smallest_detectable"] for run in runs]
    known = [rate for rate in rates if rate is not None]
    text = (
        f"The attack on the private trainings has less power than its comparison needs: it could show ε = {could}, "
        "whatever the training leaks. Its result says nothing about the ledger's ε, only that no large leak was found."
    )
    if known:
        text += f" A rate at 1 % false positives shows in one training from {max(known):.1%}."
    return [text]


def _decides(run: dict[str, Any]) -> str:
    if run["epsilon"] is None:
        return "no ε"
    could, promised = run["canaries"]["ceiling"], run["epsilon"]
    return "yes" if could >= promised else f"no: {could:.2f} < {promised:.2f}"


def _pooled(runs: Sequence[dict[str, Any]], attack: int) -> Share | None:
    """Members named at 1 % false positives in all trainings; None where one has no such rate."""
    rates = [run["membership"][attack]["operating_points"][0]["true_positive_rate"] for run in runs]
    if not all(rates):
        return None
    return share(sum(rate["count"] for rate in rates), sum(rate["total"] for rate in rates))


def _promised(run: dict[str, Any]) -> str:
    return "none" if run["epsilon"] is None else f"{run['epsilon']:.3g}"


def _rate(report: dict[str, Any]) -> str:
    point = report["operating_points"][0]
    rate = point["true_positive_rate"]
    return str(point["note"]) if rate is None else _cell(Share(**rate))


def _cell(rate: Share | None) -> str:
    return "" if rate is None else f"{rate.value:.1%} ({rate.low:.1%} to {rate.high:.1%})"


def _area(report: dict[str, Any]) -> str:
    area = report["area"]
    return f"{area['value']:.3f} ({area['low']:.3f} to {area['high']:.3f})"


def _mean_area(runs: Sequence[dict[str, Any]], attack: int) -> str:
    areas = [run["membership"][attack]["area"]["value"] for run in runs]
    return f"{np.mean(areas):.3f} ± {np.std(areas, ddof=1):.3f}"
