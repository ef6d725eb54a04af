"""`ld-client check`: whether a site is ready for its study. Changes nothing."""

from __future__ import annotations

from ld_client.deployment.approvals import check_approved, check_bundle
from ld_client.deployment.audit_verify import verify_home
from ld_client.deployment.check_data import CheckedSite, check_data, guarded
from ld_client.deployment.check_result import CheckResult, failed, good, warning
from ld_client.deployment.check_server import check_server, dated
from ld_client.deployment.site_certificate import read_certificate
from ld_client.deployment.site_home import SiteHome
from ld_client.several_processes import process_count
from ld_common.core.errors import ApprovalError
from ld_common.protocol.enrollment_kit import AUTHORITY, KitManifest
from ld_common.protocol.keys import fingerprint, read_public_line

ASK_AGAIN = "ask the study for its kit again and open it with ld-client init"


def check_home(home: SiteHome) -> list[CheckResult]:
    """Results of all checks, in the order in which problems are best solved."""
    results = guarded("kit", ASK_AGAIN, lambda: _kit(home))
    results += guarded("key", "restore the folder keys from a backup, or enrol again", lambda: _key(home))
    if any(result.name == "kit" and result.status == "failed" for result in results):
        return [*results, warning("everything else", "not checked: it needs the kit", ASK_AGAIN)]
    kit = home.kit()
    results += guarded("certificate", "delete site.crt: ld-client start fetches it", lambda: _certificate(home, kit))
    results += check_server(kit.server, home.kit_folder / AUTHORITY)
    results += guarded("config", f"correct {home.config_file}", lambda: _config(home))
    if any(result.name == "config" and result.status == "failed" for result in results):
        results.append(warning("data", "not checked: it needs the config", "correct the config first"))
    else:
        results += check_data(CheckedSite(home.site(), kit, home.study()))
    results += guarded("approval", "run ld-client approve", lambda: _approval(home, kit))
    return results + guarded("audit log", "run ld-client audit verify", lambda: _audit(home))


def _kit(home: SiteHome) -> list[CheckResult]:
    kit = home.kit()
    detail = f"study {kit.study}, site {kit.site}, signed by {fingerprint(read_public_line(kit.public_key))}"
    if home.study().digest() != kit.study_digest:
        detail = "its study has another digest than its manifest: the study uses another version of this software"
        return [failed("kit", detail, f"install {kit.software}")]
    return [good("kit", detail)]


def _key(home: SiteHome) -> list[CheckResult]:
    return [good("key", f"{home.public_keys().fingerprint}, readable by its owner only")]


def _config(home: SiteHome) -> list[CheckResult]:
    site = home.site()
    count = process_count(site)
    together = f", {count} processes train a round" if count > 1 else ""
    return [good("config", f"{home.config_file.name} of site {site.site}{together}")]


def _certificate(home: SiteHome, kit: KitManifest) -> list[CheckResult]:
    if not home.certificate.exists():
        remedy = "ld-client start fetches it after the study has admitted the key that ld-client enroll prints"
        return [warning("certificate", "there is none yet", remedy)]
    certificate = read_certificate(home)
    return [dated("certificate", certificate, f"for {kit.site}", "ask the study to admit this site again")]


def _approval(home: SiteHome, kit: KitManifest) -> list[CheckResult]:
    try:
        check_bundle(home, kit.bundle_digest)
        check_approved(home, kit.study_digest, kit.base_digest, kit.modality_digest)
    except ApprovalError as error:
        return [failed("approval", str(error), f"review it with ld-client approve --home {home.path}")]
    return [good("approval", f"code {kit.bundle_digest[:16]} and study {kit.study_digest[:16]} are approved")]


def _audit(home: SiteHome) -> list[CheckResult]:
    verdict = verify_home(home)
    if verdict.problems:
        detail = f"{len(verdict.problems)} problems, the first: {verdict.problems[0]}"
        return [failed("audit log", detail, f"run ld-client audit verify --home {home.path}")]
    return [good("audit log", f"{verdict.entries} entries, complete")]
