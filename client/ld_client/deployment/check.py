"""`ld-client check`: whether a site is ready for its study, each doubt with its remedy. Changes nothing."""

from __future__ import annotations

from ld_client.deployment.approvals import check_approved, check_bundle
from ld_client.deployment.audit_verify import verify_home
from ld_client.deployment.check_data import Checked, check_data, guarded
from ld_client.deployment.check_result import CheckResult, failed, good, warning
from ld_client.deployment.check_server import check_server, dated
from ld_client.deployment.site_certificate import read_certificate
from ld_client.deployment.site_home import SiteHome
from ld_common.core.errors import ApprovalError
from ld_common.protocol.enrollment_kit import AUTHORITY, KitManifest
from ld_common.protocol.keys import fingerprint, read_public_line

ASK_AGAIN = "ask the study for its kit again and open it with ld-client init"


def check_home(home: SiteHome) -> list[CheckResult]:
    """All findings, in the order in which they are best mended."""
    findings = guarded("kit", ASK_AGAIN, lambda: _kit(home))
    findings += guarded("key", "restore site.key from a backup, or enrol again", lambda: _key(home))
    if any(one.name == "kit" and one.standing == "failed" for one in findings):
        return [*findings, warning("everything else", "not checked: it needs the kit", ASK_AGAIN)]
    kit = home.kit()
    findings += guarded("certificate", "delete site.crt: ld-client start fetches it", lambda: _certificate(home, kit))
    findings += check_server(kit.server, home.kit_folder / AUTHORITY)
    findings += guarded("config", f"mend {home.config_file}", lambda: _config(home))
    if any(one.name == "config" and one.standing == "failed" for one in findings):
        findings.append(warning("data", "not checked: it needs the config", "mend the config first"))
    else:
        findings += check_data(Checked(home.site(), kit, home.study()))
    findings += guarded("approval", "see ld-client approve", lambda: _approval(home, kit))
    return findings + guarded("audit log", "see ld-client audit verify", lambda: _audit(home))


def _kit(home: SiteHome) -> list[CheckResult]:
    kit = home.kit()
    said = f"study {kit.study}, site {kit.site}, signed by {fingerprint(read_public_line(kit.public_key))}"
    if home.study().digest() != kit.study_digest:
        said = "its study has another digest than its manifest: this software is not the version of the study's"
        return [failed("kit", said, f"install {kit.software}")]
    return [good("kit", said)]


def _key(home: SiteHome) -> list[CheckResult]:
    return [good("key", f"{fingerprint(home.key().public_key())}, readable by its owner alone")]


def _config(home: SiteHome) -> list[CheckResult]:
    return [good("config", f"{home.config_file.name} of site {home.site().site}")]


def _certificate(home: SiteHome, kit: KitManifest) -> list[CheckResult]:
    if not home.certificate.exists():
        remedy = "ld-client start fetches it, once the study has admitted what ld-client enroll prints"
        return [warning("certificate", "there is none yet", remedy)]
    certificate = read_certificate(home)
    return [dated("certificate", certificate, f"of {kit.site}", "ask the study to admit this site again")]


def _approval(home: SiteHome, kit: KitManifest) -> list[CheckResult]:
    try:
        check_bundle(home, kit.bundle_digest)
        check_approved(home, kit.study_digest, kit.base_digest, kit.modality_digest)
    except ApprovalError as error:
        return [failed("approval", str(error), f"read and allow it with ld-client approve --home {home.path}")]
    return [good("approval", f"code {kit.bundle_digest[:16]} and study {kit.study_digest[:16]} are approved")]


def _audit(home: SiteHome) -> list[CheckResult]:
    verdict = verify_home(home)
    if verdict.problems:
        said = f"{len(verdict.problems)} problems, the first: {verdict.problems[0]}"
        return [failed("audit log", said, f"see ld-client audit verify --home {home.path}")]
    return [good("audit log", f"{verdict.entries} entries, whole")]
