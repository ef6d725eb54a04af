"""An audit's results in the words of a data protection officer: what was found, and what could have been.

An attack that finds nothing shows that this attack found nothing; no sentence here says more.
"""

from __future__ import annotations

import bisect
import json
from dataclasses import dataclass, replace
from pathlib import Path

from ld_client.audit.copies import CopyReport
from ld_client.audit.membership import MembershipReport
from ld_client.audit.one_run import EpsilonBound, chance_of_guesses
from ld_client.audit.run import Audit
from ld_client.audit.statistics import AuditError, OperatingPoint
from ld_common.core.config import from_mapping
from ld_common.core.errors import ConfigError
from ld_common.release.release import Release


@dataclass(frozen=True)
class Interval:
    """A measured share with its interval, and between which values chance would put it; all from 0 to 1."""

    low: float
    value: float
    high: float
    chance_low: float
    chance_high: float


@dataclass(frozen=True)
class AuditFinding:
    """One attack's result."""

    attack: str
    verdict: str
    results: list[str]
    power: str
    """What it could have found."""
    interval: Interval | None
    warning: str
    """To be weighed before the report is signed; empty when nothing was found."""


def read_audit(path: Path, site_name: str, release: Release) -> Audit:
    """The audit of this release by this site, without its pairs of pictures, which point to scans.

    Raises:
        AuditError: it cannot be read, or is of another release or site.
    """
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        held["copies"]["pairs"] = []
        audit = from_mapping(Audit, held)
        membership = tuple(_read_report(report) for report in held["membership"])
    except OSError as error:
        raise AuditError(f"'{path}' cannot be read: give the audit.json of ld-client audit-privacy") from error
    except (ValueError, LookupError, TypeError, ConfigError) as error:
        raise AuditError(
            f"'{path}' is no audit of this version ({error}): run ld-client audit-privacy again"
        ) from error
    adapter = release.adapter_sha256
    if audit.adapter_sha256 != adapter:
        raise AuditError(
            f"'{path}' is the audit of another adapter (sha256 {audit.adapter_sha256[:12]}..., this release's is "
            f"{adapter[:12]}...): run ld-client audit-privacy on this release"
        )
    if audit.site != site_name:
        raise AuditError(f"'{path}' is the audit of site '{audit.site}', not of '{site_name}': give this site's own")
    return replace(audit, membership=membership)


def findings(audit: Audit, promised: float | None) -> list[AuditFinding]:
    """Every attack's result in words; `promised` is the study's ε, and without one no ε is spoken of."""
    found = [_membership(report) for report in audit.membership]
    found.append(_copies(audit.copies))
    if audit.canaries is not None:
        found.append(_unpromised(audit.canaries) if promised is None else _promised(audit.canaries, promised))
    return found


def percent(value: float) -> str:
    """A share from 0 to 1 with three digits."""
    return f"{100 * value:.3g} %"


def _read_report(held: dict[str, object]) -> MembershipReport:
    points = held["operating_points"]
    if not isinstance(points, list):
        raise TypeError("membership.operating_points is no list")
    report = from_mapping(MembershipReport, held)
    return replace(report, operating_points=tuple(from_mapping(OperatingPoint, point) for point in points))


def _membership(report: MembershipReport) -> AuditFinding:
    area = report.area
    results = [
        f"Shown one patient who was trained on and one who was held out, it tells which is which in "
        f"{percent(area.value)} of cases ({percent(report.confidence)} interval {percent(area.low)} to "
        f"{percent(area.high)}; by tossing a coin 50 %). This is the AUC, {area.value:.3f}."
    ]
    leaks = area.low > 0.5
    for point in report.operating_points:
        results.append(_named(point))
        leaks |= point.chance is not None and point.chance <= (1 - report.confidence) / 2
    least = area.smallest_detectable
    power = f"{report.members} patients who were trained on, {report.held_out} held out. " + (
        "With so few, no leak would have been noticed reliably."
        if least is None
        else f"An attack that is right in {percent(least)} of cases would have been noticed in four audits of five; "
        "a weaker leak may have stayed unseen."
    )
    return AuditFinding(
        attack=f"Was this patient in the training? ({report.attack})",
        verdict="a leak was found" if leaks else "found nothing",
        results=results,
        power=power,
        interval=Interval(area.low, area.value, area.high, 0.5, 0.5),
        warning=f"An attack ({report.attack}) tells patients who were trained on from others better than chance "
        "(section 7)."
        if leaks
        else "",
    )


def _named(point: OperatingPoint) -> str:
    allowed, found, least = percent(point.false_positive_rate), point.true_positive_rate, point.smallest_detectable
    if found is None:
        return f"How many it names at {allowed} of wrongly named others cannot be said: {point.note}."
    noticed = "no rate" if least is None else f"a rate of {percent(least)}"
    return (
        f"When it may name {allowed} of the others wrongly, it names {found.count} of {found.total} patients who were "
        f"trained on: {percent(found.value)} ({percent(found.low)} to {percent(found.high)}; {noticed} would have been "
        "noticed reliably)."
    )


def _copies(copies: CopyReport) -> AuditFinding:
    nearer, closer = copies.nearer_to_training, copies.closer_than_real
    results = [
        f"Of {nearer.total} generated pictures {nearer.count} lie nearer to a patient who was trained on than to one "
        f"held out: {percent(nearer.value)} (interval {percent(nearer.low)} to {percent(nearer.high)}; by chance "
        f"{percent(copies.chance_low)} to {percent(copies.chance_high)}; p = {copies.chance:.2g})."
    ]
    copied = nearer.value > copies.chance_high
    if closer is None:
        results.append(f"Whether they lie nearer than real pictures of others cannot be said: {copies.note}.")
    else:
        copied |= closer.low > copies.quantile
        results.append(
            f"{closer.count} of {closer.total}, {percent(closer.value)} ({percent(closer.low)} to "
            f"{percent(closer.high)}), lie as near to a training picture as only {percent(copies.quantile)} of real "
            "pictures of other patients do."
        )
    return AuditFinding(
        attack="Do generated pictures copy a patient?",
        verdict="a leak was found" if copied else "found nothing",
        results=results,
        power=f"{copies.patients_on_each_side} patients on each side. The search finds a picture copied as it stands, "
        "not one that was moved or mirrored, and knows only the pictures that were drawn for it.",
        interval=Interval(nearer.low, nearer.value, nearer.high, copies.chance_low, copies.chance_high),
        warning="Generated pictures lie nearer to training patients than chance explains: some may be copies. The "
        "likeliest are listed in audit.json, which stays at the site."
        if copied
        else "",
    )


def _unpromised(bound: EpsilonBound) -> AuditFinding:
    leaks = bound.epsilon > 0
    return AuditFinding(
        attack="Does a rehearsal betray who took part?",
        verdict="it does" if leaks else "found nothing",
        results=[_guessed(bound)],
        power=_needed(bound),
        interval=None,
        warning="A rehearsal of the study betrays which patients took part: so may the study itself." if leaks else "",
    )


def _promised(bound: EpsilonBound, promised: float) -> AuditFinding:
    refuted = bound.epsilon > promised
    short = "less than the promise, which it therefore could not have refuted"
    return AuditFinding(
        attack="Does a rehearsal betray who took part?",
        verdict="refutes the promise" if refuted else "does not refute the promise",
        results=[
            _guessed(bound),
            f"At {percent(bound.confidence)} confidence ε of the rehearsal is at least {bound.epsilon:.2f} at the "
            f"study's δ; the study promises at most {promised:.4g}.",
        ],
        power=f"{_needed(bound)} The most that so many patients can show is ε {bound.ceiling:.2f}, "
        + (short if bound.ceiling <= promised else "more than the promise")
        + ".",
        interval=None,
        warning=f"A rehearsal of the study shows an ε of at least {bound.epsilon:.2f} ({percent(bound.confidence)} "
        f"confidence), above the {promised:.4g} that is accounted for: the promise does not hold as computed. Do not "
        "sign; report it."
        if refuted
        else "",
    )


def _guessed(bound: EpsilonBound) -> str:
    return (
        f"The study was rehearsed at this site alone on its own patients, and a coin decided for {bound.canaries} of "
        f"them whether they took part; of {bound.guesses} guesses who did, {bound.correct} were right (by tossing a "
        "coin, half)."
    )


def _needed(bound: EpsilonBound) -> str:
    """From how many right guesses on the same test shows a leak, at its confidence for each number of guesses tried."""
    sure = (1 - bound.confidence) / len(bound.guesses_tried)

    def shows(right: int) -> bool:
        return chance_of_guesses(bound.canaries, bound.guesses, right, 0.0, bound.delta) < sure

    least = bisect.bisect_left(range(bound.guesses + 1), True, key=shows)
    if least > bound.guesses:
        return f"{bound.guesses} guesses are too few to show anything."
    return f"From {least} right guesses on a leak would have shown."
