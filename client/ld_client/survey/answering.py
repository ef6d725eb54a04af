"""A site joins a cohort survey, and answers it once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ld_client.deployment.audit_log import AuditLog
from ld_client.deployment.site_home import SiteHome
from ld_client.site_config import SiteConfig
from ld_client.survey.counting import check_questions, count_patients, read_patients
from ld_client.survey.records import SurveyRecord, SurveyRecords
from ld_common.core.atomic_files import write_bytes
from ld_common.core.errors import ApprovalError, ConfigError, FederationError, PolicyError, SignatureError
from ld_common.protocol.keys import canonical
from ld_common.protocol.survey import CohortSurvey, JoinedSite, SurveyRoster, file_bytes
from ld_common.protocol.survey_sum import SurveyNumbers, mask_numbers


@dataclass(frozen=True)
class SiteCounts:
    """What a site counted, and what leaves of it."""

    counted: SurveyNumbers
    leaves: SurveyNumbers
    """`counted` in multiples of `policy.count_step`; masked before it leaves."""


def join_survey(site: SiteConfig, survey: CohortSurvey, out: Path) -> list[str]:
    """Make this site's key for a survey, and write its public part into the folder `out`.

    Returns:
        Lines for the data manager.

    Raises:
        ConfigError: the survey does not ask this site.
        PolicyError: fewer sites than `policy.min_summed_sites`, or `policy.private_only` is set.
        FederationError: questions that the site's modality cannot answer.
        StoreError: the site's records cannot be used.
    """
    _check_survey(site, survey)
    records = SurveyRecords(site)
    with records.locked():
        record = records.join(survey)
    path = out / f"{site.site}.joined.json"
    write_bytes(path, file_bytes(JoinedSite(record.survey, site.site, record.public_key).content()))
    return [
        f"survey of {survey.modality} over {', '.join(survey.sites)}:",
        *(f"  {table.title}: {survey.cells(table)} cells" for table in survey.tables),
        f"the private key stays in {records.file(survey)}; nothing was counted yet",
        f"wrote {path}: send it to the engineer, who sends roster.json back, for ld-client survey answer",
    ]


def answer_survey(
    site: SiteConfig,
    roster: SurveyRoster,
    fingerprint: str,
    show: Callable[[SiteCounts], None],
    confirm: Callable[[], bool],
    *,
    another: bool = False,
    home: SiteHome | None = None,
) -> SurveyRecord:
    """Count, show, ask, and keep the answer, which `write_answer` then writes.

    A survey that this site has answered gives the same answer again, without asking.

    Args:
        site: the site.
        roster: survey and keys.
        fingerprint: the roster's, as the other sites said it.
        show: shows the data manager the counts.
        confirm: asks the data manager.
        another: answer although this site has answered another survey.
        home: where an audit log records the answer.

    Raises:
        SignatureError: the fingerprint is missing or differs.
        ConfigError: the survey does not ask this site.
        PolicyError: fewer sites or patients than the policy asks for, `policy.private_only`, another survey without
            `another`, or another roster or other data than those of this site's answer.
        FederationError: the site has not joined, its key is not in the roster, or its modality cannot answer.
        StoreError: store or records cannot be used.
        ApprovalError: the data manager said no.
    """
    survey, records = roster.survey, SurveyRecords(site)
    check_fingerprint(site, roster, fingerprint)
    _check_survey(site, survey)
    with records.locked():
        record = records.load(survey)
        if record is None or roster.keys[site.site] != record.public_key:
            raise FederationError(
                f"the roster's key of {site.site} is not this site's: "
                + ("run ld-client survey join first" if record is None else "do not answer, and tell the other sites")
            )
        if record.answer is not None and record.sent().roster != roster.session.hex():
            raise PolicyError(
                f"this site answered this survey on {record.answered} with other keys of the other sites: a second "
                "answer could show its own counts. Ask for a new survey"
            )
        others = records.answered_others(survey)
        if others and record.answer is None and not another:
            raise PolicyError(
                f"this site answered {len(others)} other survey{'s' * (len(others) > 1)}, last on {others[-1]}: two "
                "sums that differ by few patients, sites or bins can show them. If this one is needed, give --another"
            )
        counted = count_patients(survey, read_patients(site))
        counts = SiteCounts(counted, counted.rounded(site.policy.count_step))
        digest = hashlib.sha256(canonical([survey.digest(), counts.leaves.vector()])).hexdigest()
        if record.answer is not None:
            if digest != record.counts:
                raise PolicyError(
                    f"this site answered this survey on {record.answered}, and its counts or policy.count_step have "
                    "changed since: the difference would show patients. The former answer stands; ask for a new survey"
                )
            return record
        answer = mask_numbers(roster, site.site, record.key(), counts.leaves)
        show(counts)
        if not confirm():
            raise ApprovalError("nothing was written, and the survey can still be answered")
        record = record.with_answer(answer, digest)
        if home is not None:
            details = {"survey": survey.digest(), "roster": roster.session.hex(), "sites": list(survey.sites)}
            AuditLog.of(home).append("survey", {**details, "numbers": len(answer.masked)})
        records.save(survey, record)
    return record


def write_answer(site: SiteConfig, record: SurveyRecord, out: Path) -> Path:
    """Write the answer into the folder `out`; returns its file. Raises `CheckpointError`."""
    path = out / f"{site.site}.answer.json"
    write_bytes(path, file_bytes(record.sent().content()))
    return path


def check_fingerprint(site: SiteConfig, roster: SurveyRoster, fingerprint: str) -> None:
    """Raise `SignatureError` unless the fingerprint is the roster's."""
    others = [name for name in roster.survey.sites if name != site.site]
    whom = f"{', '.join(others[:-1])} and {others[-1]}"
    if not fingerprint.strip():
        raise SignatureError(
            f"whoever made this roster could have replaced a key. Its fingerprint is {roster.fingerprint}: compare it "
            f"by telephone with the data managers of {whom}, who see theirs in the same way, and give it with "
            "--fingerprint"
        )
    if fingerprint.strip() != roster.fingerprint:
        raise SignatureError(
            f"this roster has the fingerprint {roster.fingerprint}, not {fingerprint.strip()}: do not answer it, and "
            f"tell {whom} that the sites were sent different rosters"
        )


def _check_survey(site: SiteConfig, survey: CohortSurvey) -> None:
    if site.site not in survey.sites:
        raise ConfigError(f"the survey asks {', '.join(survey.sites)}, and this site is '{site.site}'")
    if site.policy.private_only:
        raise PolicyError(
            "this site lets results leave under differential privacy only (policy.private_only), and a survey's counts "
            "are rounded, not noised"
        )
    least = site.policy.min_summed_sites
    if len(survey.sites) < least:
        raise PolicyError(f"the survey sums {len(survey.sites)} sites, and policy.min_summed_sites is {least}")
    check_questions(site, survey)
