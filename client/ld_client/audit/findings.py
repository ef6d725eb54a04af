"""An audit's results as sentences for a data protection officer: what each attack found, and its statistical power.

An attack without a finding does not prove that there is no leak, and no sentence here claims so.
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
    """A measured share with its interval, and the interval of chance; all from 0 to 1."""

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
    """Its statistical power."""
    interval: Interval | None
    warning: str
    """A point to weigh before the report is signed; empty without a finding."""


def read_audit(path: Path, site_name: str, release: Release) -> Audit:
    """Read the audit of this release by this site, without its pairs of images, which point to scans.

    Raises:
        AuditError: it cannot be read, or is of another release or site.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content["copies"]["pairs"] = []
        audit = from_mapping(Audit, content)
        membership = tuple(_read_report(report) for report in content["membership"])
    except OSError as error:
        raise AuditError(f"'{path}' cannot be read: give the audit.json of ld-client audit-privacy") from error
    except (ValueError, LookupError, TypeError, ConfigError) as error:
        raise AuditError(
            f"'{path}' is not an audit of this version ({error}): run ld-client audit-privacy again"
        ) from error
    adapter = release.adapter_sha256
    if audit.adapter_sha256 != adapter:
        raise AuditError(
            f"'{path}' is the audit of another adapter (sha256 {audit.adapter_sha256[:12]}..., this release's is "
            f"{adapter[:12]}...): run ld-client audit-privacy on this release"
        )
    if audit.site != site_name:
        raise AuditError(f"'{path}' is the audit of site '{audit.site}', not of '{site_name}'")
    return replace(audit, membership=membership)


def findings(audit: Audit, stated: float | None) -> list[AuditFinding]:
    """Every attack's result; `stated` is the study's ε, None for a study without one, of which no ε is mentioned."""
    results = [_membership(report) for report in audit.membership]
    results.append(_copies(audit.copies))
    if audit.canaries is not None:
        results.append(_canaries(audit.canaries) if stated is None else _canaries_against(audit.canaries, stated))
    return results


def percent(value: float) -> str:
    """A share from 0 to 1 with three digits."""
    return f"{100 * value:.3g} %"


def _read_report(content: dict[str, object]) -> MembershipReport:
    points = content["operating_points"]
    if not isinstance(points, list):
        raise TypeError("membership.operating_points is not a list")
    report = from_mapping(MembershipReport, content)
    return replace(report, operating_points=tuple(from_mapping(OperatingPoint, point) for point in points))


def _membership(report: MembershipReport) -> AuditFinding:
    area = report.area
    results = [
        f"It distinguishes a patient who was trained on from one who was held out in {percent(area.value)} of pairs "
        f"({percent(report.confidence)} interval {percent(area.low)} to {percent(area.high)}; 50 % by chance). This is "
        f"the AUC, {area.value:.3f}."
    ]
    leaks = area.low > 0.5
    for point in report.operating_points:
        results.append(_operating_point(point))
        leaks |= point.chance is not None and point.chance <= (1 - report.confidence) / 2
    least = area.smallest_detectable
    power = f"{report.members} patients who were trained on, {report.held_out} held out. " + (
        "With so few patients, no leak would be detected reliably."
        if least is None
        else f"A success rate of {percent(least)} would be detected in 4 of 5 audits; a weaker leak may be missed."
    )
    return AuditFinding(
        attack=f"Was this patient in the training? ({report.attack})",
        verdict="a leak was found" if leaks else "no leak found",
        results=results,
        power=power,
        interval=Interval(area.low, area.value, area.high, 0.5, 0.5),
        warning=f"An attack ({report.attack}) tells patients who were trained on from others better than chance "
        "(section 7)."
        if leaks
        else "",
    )


def _operating_point(point: OperatingPoint) -> str:
    allowed, rate, least = percent(point.false_positive_rate), point.true_positive_rate, point.smallest_detectable
    if rate is None:
        return f"Its true positive rate at {allowed} false positives cannot be measured: {point.note}."
    detectable = "no rate" if least is None else f"a rate of {percent(least)}"
    return (
        f"At {allowed} false positives it identifies {rate.count} of {rate.total} patients who were trained on: "
        f"{percent(rate.value)} ({percent(rate.low)} to {percent(rate.high)}; {detectable} would be detected reliably)."
    )


def _copies(copies: CopyReport) -> AuditFinding:
    nearer, closer = copies.nearer_to_training, copies.closer_than_real
    results = [
        f"Of {nearer.total} generated images, {nearer.count} are nearer to a patient who was trained on than to one "
        f"held out: {percent(nearer.value)} (interval {percent(nearer.low)} to {percent(nearer.high)}; by chance "
        f"{percent(copies.chance_low)} to {percent(copies.chance_high)}; p = {copies.chance:.2g})."
    ]
    copied = nearer.value > copies.chance_high
    if closer is None:
        results.append(f"Whether they are nearer than real images of others cannot be measured: {copies.note}.")
    else:
        copied |= closer.low > copies.quantile
        results.append(
            f"{closer.count} of {closer.total}, {percent(closer.value)} ({percent(closer.low)} to "
            f"{percent(closer.high)}), are as near to a training image as only {percent(copies.quantile)} of real "
            "images of other patients are."
        )
    return AuditFinding(
        attack="Do generated images copy a patient?",
        verdict="a leak was found" if copied else "no leak found",
        results=results,
        power=f"{copies.patients_on_each_side} patients on each side. The search finds unchanged copies, not shifted "
        "or mirrored ones, and only among the images that were generated for it.",
        interval=Interval(nearer.low, nearer.value, nearer.high, copies.chance_low, copies.chance_high),
        warning="Generated images are nearer to training patients than chance explains: some may be copies. The file "
        "audit.json, which stays at the site, lists the likeliest."
        if copied
        else "",
    )


def _canaries(bound: EpsilonBound) -> AuditFinding:
    leaks = bound.epsilon > 0
    return AuditFinding(
        attack="Does a rehearsal reveal who took part?",
        verdict="a leak was found" if leaks else "no leak found",
        results=[_guessed(bound)],
        power=_needed(bound),
        interval=None,
        warning="A rehearsal of the study reveals which patients took part, so the study may, too." if leaks else "",
    )


def _canaries_against(bound: EpsilonBound, stated: float) -> AuditFinding:
    refuted = bound.epsilon > stated
    short = "less than the stated ε, which it therefore could not have refuted"
    return AuditFinding(
        attack="Does a rehearsal reveal who took part?",
        verdict="refutes the stated ε" if refuted else "does not refute the stated ε",
        results=[
            _guessed(bound),
            f"At {percent(bound.confidence)} confidence, ε of the rehearsal is at least {bound.epsilon:.2f} at the "
            f"study's δ; the study states at most {stated:.4g}.",
        ],
        power=f"{_needed(bound)} The largest bound that so many patients can show is ε {bound.ceiling:.2f}, "
        + (short if bound.ceiling <= stated else "more than the stated ε")
        + ".",
        interval=None,
        warning=f"A rehearsal of the study shows an ε of at least {bound.epsilon:.2f} ({percent(bound.confidence)} "
        f"confidence), above the stated {stated:.4g}: the stated ε is wrong. Do not sign, and report it."
        if refuted
        else "",
    )


def _guessed(bound: EpsilonBound) -> str:
    return (
        f"The study was rehearsed at this site only, and a coin decided for {bound.canaries} patients whether they "
        f"took part; of {bound.guesses} guesses about them, {bound.correct} were right (half by chance)."
    )


def _needed(bound: EpsilonBound) -> str:
    """The number of right guesses with which the test shows a leak, at its confidence."""
    sure = (1 - bound.confidence) / len(bound.guesses_tried)

    def shows(right: int) -> bool:
        return chance_of_guesses(bound.canaries, bound.guesses, right, 0.0, bound.delta) < sure

    least = bisect.bisect_left(range(bound.guesses + 1), True, key=shows)
    if least > bound.guesses:
        return f"{bound.guesses} guesses are too few to show a leak."
    return f"A leak would have been shown by {least} right guesses or more."
