"""`ld-client cohort --renew`: a study goes on with changed data, which a person at the site decides."""

from __future__ import annotations

from ld_client.deployment.audit_log import AuditLog
from ld_client.deployment.site_home import SiteHome
from ld_client.privacy.ledger import Ledger
from ld_common.core.errors import PolicyError


def renew_cohort(ledger: Ledger, start: str, home: SiteHome | None) -> list[str]:
    """Release the frozen data of one study, and log it; returns lines for the data manager.

    Args:
        ledger: of the data set.
        start: first digits of the study's digest.
        home: the site's home, if it has one.

    Raises:
        PolicyError: no study, or several, begin with these digits.
    """
    matching = [entry for entry in ledger.cohorts() if entry.study_digest.startswith(start)]
    if len(matching) != 1:
        raise PolicyError(f"{len(matching)} studies begin with '{start}': ld-client cohort lists them")
    ledger.release_cohort(matching[0].study_digest)
    if home is not None:
        AuditLog.of(home).append("cohort", {"study_digest": matching[0].study_digest})
    return [
        f"study '{matching[0].study}' goes on with the present store, which its next round freezes",
        "the server can compare rounds before and after: without differential privacy, they show the patients who came "
        "or went, the more the fewer they are. Change the data by many patients at once",
    ]
