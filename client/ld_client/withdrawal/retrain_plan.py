"""`ld-client forget --retrain-plan`: what a model that never saw some patients would cost. It starts nothing.

Exact removal means to repeat the training without the patients, from the last state before their first round. Who
repeats it is the study, at all sites; what a site knows of the cost are its own rounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from ld_client.privacy.ledger import Ledger, by_study, private_charges
from ld_client.site_config import SiteConfig
from ld_client.withdrawal.studies import (
    StudyPart,
    UnrecordedRounds,
    part_lines,
    read_manifests,
    rounds_text,
    studies_of,
    unrecorded_lines,
    unrecorded_rounds,
)


@dataclass(frozen=True)
class RetrainCost:
    """Cost of repeating one study without the patients."""

    part: StudyPart
    first_round: int
    """First round to repeat."""
    rounds: int
    """Rounds to repeat."""
    steps_here: int
    steps_of_all_sites: int
    """For the sites of the study, each in every round."""
    hours_here: float | None
    """Of the rounds to repeat, from the site's audit log; None where it has no such round."""
    measured_rounds: int
    """Rounds to repeat whose time the audit log has; the others count with their mean."""
    hours_of_all_sites: float | None
    """Sum over the sites, from a release at this site; None where none states it for each of these rounds."""
    spent_epsilon: float | None
    """ε of this site's charges for the study, at the study's δ; None without differential privacy."""


@dataclass(frozen=True)
class RetrainPlan:
    """The studies that would have to be repeated."""

    patients: int
    """Asked about."""
    studies: list[RetrainCost]
    unrecorded: list[UnrecordedRounds]


def plan_retraining(
    site: SiteConfig, pseudonyms: frozenset[str], releases: Sequence[Path], audit_log: Path | None
) -> RetrainPlan:
    """What exact removal of these patients costs.

    Args:
        site: the site.
        pseudonyms: of the patients.
        releases: folders of releases at this site.
        audit_log: the home's; None for a site without a home.

    Raises:
        LdError: ledger, log or a record of participation cannot be read.
    """
    costs = []
    for part in studies_of(site, pseudonyms, releases):
        first = part.rounds[0]
        repeated = range(first, part.last_round + 1)
        measured = {} if audit_log is None else _measured_seconds(audit_log, part.study_digest)
        known = [measured[number] for number in repeated if number in measured]
        costs.append(
            RetrainCost(
                part=part,
                first_round=first,
                rounds=len(repeated),
                steps_here=len(repeated) * part.steps,
                steps_of_all_sites=len(repeated) * part.steps * len(part.sites),
                hours_here=sum(known) / len(known) * len(repeated) / 3600 if known else None,
                measured_rounds=len(known),
                hours_of_all_sites=_reported_hours(releases, part.study_digest, repeated),
                spent_epsilon=_spent(site, part),
            )
        )
    return RetrainPlan(len(pseudonyms), costs, unrecorded_rounds(site))


def plan_lines(plan: RetrainPlan) -> list[str]:
    """The plan as text."""
    if not plan.studies:
        return part_lines([], plan.unrecorded, plan.patients)
    lines = []
    for cost in plan.studies:
        part = cost.part
        who = f"{part.patients} of {plan.patients} patients" if plan.patients > 1 else "the patient"
        lines += [
            f"study '{part.study}' ({part.study_digest[:16]}): {who} took part in {rounds_text(part.rounds)} of "
            f"{part.planned_rounds}, the last round here was {part.last_round}",
            f"  to repeat: {rounds_text(range(cost.first_round, part.last_round + 1))}, {part.steps:,} steps each at "
            f"{len(part.sites)} sites: {cost.steps_of_all_sites:,} steps, {cost.steps_here:,} of them here",
            f"  time: {_time(cost)}",
            f"  from: {_from(cost)}",
            *([] if part.drift == "none" else ["  the drift is estimated again, in rounds that are counted above"]),
            f"  releases to replace: {_releases(part)}",
            f"  without repeating: {_bound(cost)}",
        ]
    return [
        *lines,
        *unrecorded_lines(plan.unrecorded),
        "nothing was started: repeating is the study's decision, and needs all its sites. Copies of a release that "
        "others hold, and pictures drawn with it, are not reached by it",
    ]


def _time(cost: RetrainCost) -> str:
    here = "not known here: the audit log has no such round"
    if cost.hours_here is not None:
        guessed = (
            "" if cost.measured_rounds == cost.rounds else f", {cost.measured_rounds} of {cost.rounds} rounds known"
        )
        here = f"{_hours(cost.hours_here)} at this site by its audit log{guessed}"
    if cost.hours_of_all_sites is None:
        return f"{here}; that of the other sites only they and the server know"
    return f"{here}; {_hours(cost.hours_of_all_sites)} in sum over the sites, as the release states"


def _hours(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 0.95 else f"{hours * 60:.1f} min"


def _from(cost: RetrainCost) -> str:
    if cost.first_round == 1:
        return "the study's first weights: the patient was there from round 1, so no checkpoint saves a round"
    before = cost.first_round - 1
    return (
        f"the weights after round {before}, if the server still has them: it keeps the last two rounds' by itself, and "
        "this site cannot see whether somebody kept more. Without them, from round 1: "
        f"{cost.part.last_round:,} rounds"
    )


def _releases(part: StudyPart) -> str:
    others = "the server knows whether there are others, and studies that began with one have to be repeated as well"
    return f"{', '.join(part.releases)}; {others}" if part.releases else f"none at this site; {others}"


def _bound(cost: RetrainCost) -> str:
    if cost.spent_epsilon is None:
        return "nothing bounds what the releases reveal about the patient, as the study has no differential privacy"
    ratio = math.exp(min(cost.spent_epsilon, 700.0))
    return (
        f"the study's differential privacy holds already: what this site sent could have come from the same patients "
        f"without this one, up to a factor e^ε = {ratio:,.3g} (ε {cost.spent_epsilon:.3g} charged here, target "
        f"{cost.part.epsilon:g}) and a chance δ = {cost.part.delta:g}. Whether that is enough is for the data "
        "protection officer to say"
    )


def _spent(site: SiteConfig, part: StudyPart) -> float | None:
    """ε of the site's charges for a study, at its δ."""
    if part.delta is None:
        return None
    from ld_common.protocol.dp_accounting import epsilon

    charged = by_study(Ledger(site.ledger_path).entries()).get(part.study_digest, [])
    return epsilon(private_charges(charged), part.delta)


def _measured_seconds(log: Path, study_digest: str) -> dict[int, float]:
    """Round -> seconds from the start of its training to its result, of the last time that it ran."""
    from ld_client.deployment.audit_log import log_entries

    seconds: dict[int, float] = {}
    ours: set[tuple[str, int]] = set()
    """Run and round of this study's tasks."""
    began: dict[tuple[str, int], datetime] = {}
    for entry in log_entries(log):
        if entry.details.get("kind") != "train" or "round" not in entry.details:
            continue
        place = str(entry.details.get("run")), int(entry.details["round"])
        time = datetime.fromisoformat(entry.time)
        if entry.event == "task":
            ours = ours | {place} if entry.details.get("study_digest") == study_digest else ours - {place}
        elif entry.event == "training" and place in ours:
            began[place] = time
        elif entry.event == "left" and place in began:
            seconds[place[1]] = (time - began.pop(place)).total_seconds()
    return seconds


def _reported_hours(releases: Sequence[Path], study_digest: str, rounds: Sequence[int]) -> float | None:
    """Hours of all sites in these rounds, by the release with the most of the study's rounds."""
    manifests = [
        manifest for manifest in read_manifests(releases).values() if manifest.get("study_digest") == study_digest
    ]
    newest = max(manifests, key=lambda manifest: len(manifest.get("rounds", [])), default={})
    records = {record["round"]: record["sites"] for record in newest.get("rounds", [])}
    seconds = [
        numbers.get("seconds") for number in rounds for numbers in records.get(number, {"": {"seconds": None}}).values()
    ]
    return None if None in seconds or not seconds else sum(seconds) / 3600
