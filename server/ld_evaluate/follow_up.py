"""Baselines edited to their follow-ups' attributes, beside the real follow-ups."""

from __future__ import annotations

from ld_evaluate.comparison import ComparedMethod, Comparison
from ld_evaluate.protocol import Numbers


def follow_up_metrics(comparison: Comparison, method: ComparedMethod) -> Numbers:
    """The headline numbers of the follow-ups alone, as `followup_<name>`; empty without any."""
    return {f"followup_{name}": value for name, value in comparison.headline(method, follow_ups=True).items()}
