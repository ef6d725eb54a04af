"""The differential privacy that a release's manifest states."""

from __future__ import annotations

from typing import Any

from ld_common.protocol.dp_accounting import epsilon_rdp
from ld_common.protocol.study_config import StudyConfig


def privacy_statement(study: StudyConfig) -> dict[str, Any]:
    """The guarantee of a study for its patients; without differential privacy there is no ε in it."""
    if not study.privacy.enabled:
        return {"differential_privacy": False}
    planned, privacy = study.privacy_plan(), study.privacy
    return {
        "differential_privacy": True,
        "unit": "one patient of one site, with all visits; neighbouring data sets differ by that patient",
        "horizon": "all rounds of this study",
        "epsilon": planned.epsilon,
        "epsilon_by_renyi": epsilon_rdp(planned.charges, privacy.target_delta),
        "delta": privacy.target_delta,
        "accountant": "PRV (Opacus)",
        "noise_multiplier": planned.step.noise_multiplier,
        "sampling_rate": planned.step.sampling_rate,
        "sampling": "Poisson",
        "max_grad_norm": privacy.max_grad_norm,
        "steps": planned.step.steps,
        "drift_noise_multiplier": None if planned.drift is None else planned.drift.noise_multiplier,
    }
