"""Points of the privacy report that a person has to weigh before signing it."""

from __future__ import annotations

from collections.abc import Sequence

from ld_client.data.participation import read_participations
from ld_client.data.withdrawals import withdrawn
from ld_client.privacy.ledger import DRIFT, TRAINING, LedgerEntry
from ld_client.privacy_report.report_data import (
    BudgetSpent,
    DatasetSummary,
    PrivacyStatement,
    RoundParticipation,
    StudyUse,
    decimal,
    number,
)
from ld_client.site_config import SiteConfig

TOLERANCE = 1e-3
"""Relative difference up to which two computations of an ε agree."""


def statement_warnings(
    site: SiteConfig,
    statement: PrivacyStatement | None,
    spent: BudgetSpent | None,
    dataset: DatasetSummary,
    studies: Sequence[StudyUse],
) -> list[str]:
    """What speaks against the release's privacy statement."""
    if statement is None or spent is None:
        return [
            "The study ran without differential privacy: nothing bounds what its release reveals about a patient, and "
            "pictures that it generates may show training patients."
        ]
    warnings, policy = [], site.policy
    if spent.recomputed > statement.epsilon * (1 + TOLERANCE):
        warnings.append(
            f"The release states ε {number(statement.epsilon)}, but its noise, sampling rate and steps give "
            f"{number(spent.recomputed)}: do not sign before the server has explained the difference."
        )
    if spent.this_study > statement.epsilon * (1 + TOLERANCE):
        warnings.append(
            f"This site's ledger holds ε {number(spent.this_study)} for this study, more than the "
            f"{number(statement.epsilon)} that the release states: rounds that ran again were charged again, and their "
            "results may have left. For this site the ledger's number holds."
        )
    if spent.total > policy.max_epsilon:
        warnings.append(
            f"All studies together have cost ε {number(spent.total)}, above the site's limit "
            f"{number(policy.max_epsilon)}: the limit or its δ was changed afterwards."
        )
    for delta in sorted({statement.delta, policy.delta}):
        if delta * dataset.trained_patients >= 1:
            warnings.append(
                f"δ {decimal(delta)} is not below one in {dataset.trained_patients:,} patients: it does not protect "
                "each of them."
            )
    outside = [use.name for use in studies if not use.charges]
    if outside:
        warnings.append(
            f"Studies without differential privacy used the same patients ({', '.join(outside)}): no ε in this report "
            "covers them."
        )
    return warnings


def ledger_warnings(
    rounds: Sequence[RoundParticipation], charged: Sequence[LedgerEntry], statement: PrivacyStatement | None
) -> list[str]:
    """Where the ledger's charges of a study do not match the release."""
    if not charged:
        return [
            "The site's ledger holds no charge of this study, though the site took part: it was lost or replaced, or "
            "belongs to another data set. Restore it from a backup before anything else trains."
        ]
    missing = [str(entry.number) for entry in rounds if entry.sent_bytes is not None and not entry.charged]
    if missing:
        return [f"The ledger holds no charge for round {', '.join(missing)}, in which the site sent an update."]
    sent = any(entry.sent_bytes is not None for entry in rounds)
    warnings = []
    steps = [entry.charge for entry in charged if entry.purpose == TRAINING and entry.charge]
    noised_drift = statement is not None and statement.drift_noise_multiplier is not None
    if noised_drift and sent and all(entry.purpose != DRIFT for entry in charged):
        warnings.append("The release has a noised drift of this site, but the ledger holds no charge for it.")
    if statement and any(step.noise_multiplier > statement.noise_multiplier * (1 + TOLERANCE) for step in steps):
        warnings.append(
            "The ledger was charged for more noise than the release states, so it under-counts the privacy loss."
        )
    return warnings


def site_warnings(site: SiteConfig, dataset: DatasetSummary) -> list[str]:
    """What in the site's own setup limits the report."""
    warnings = []
    if not dataset.held_out_patients:
        warnings.append(
            f"The site holds out no patients (held_out is {site.held_out:g}), so nobody can test whether this release "
            "reveals training patients. Set held_out before a study, not after it."
        )
    if not dataset.same_study:
        warnings.append(
            "The store was indexed again with another base model or modality: its numbers are not those of this study."
        )
    return warnings


def withdrawal_warnings(site: SiteConfig, study_digest: str) -> list[str]:
    """Patients of the release who withdrew consent since; raises `StoreError`."""
    records = [record for record in read_participations(site.ledger_path) if record.study_digest == study_digest]
    count = len(withdrawn(site.store_path).intersection(name for record in records for name in record.pseudonyms))
    if not count:
        return []
    who = "One patient" if count == 1 else f"{count} patients"
    return [
        f"{who} whom this study trained on withdrew consent since: the release still holds what it learned of them. "
        "ld-client forget --retrain-plan --withdrawn states what exact removal costs."
    ]
