"""The site's certificate for the study's release service: fetched from the fleet proxy, and checked."""

from __future__ import annotations

import contextlib
import ssl
from datetime import UTC, datetime, timedelta

import httpx
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.x509.oid import NameOID

from ld_client.deployment.site_home import SiteHome
from ld_common.core.atomic_files import write_bytes
from ld_common.core.errors import DeploymentError
from ld_common.protocol.enrollment_kit import AUTHORITY

TIMEOUT_SECONDS = 10.0
RENEWAL = timedelta(days=30)
REFETCH = "remove it, and it is fetched again"


def read_certificate(home: SiteHome) -> x509.Certificate:
    """The site's certificate, checked except for its period of validity.

    Raises:
        DeploymentError: there is none, the study's authority did not issue it, or it is of another site or key.
    """
    path, kit = home.certificate, home.kit()
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        authority = x509.load_pem_x509_certificate((home.kit_folder / AUTHORITY).read_bytes())
        certificate.verify_directly_issued_by(authority)
    except OSError as error:
        raise DeploymentError(f"cannot read the site's certificate '{path}': {error.strerror or error}") from error
    except (ValueError, TypeError, InvalidSignature) as error:
        raise DeploymentError(f"'{path}' is not a certificate of this study: {REFETCH}") from error
    names = [str(name.value) for name in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if names != [kit.site]:
        raise DeploymentError(f"'{path}' is the certificate of '{', '.join(names)}', but the kit is for '{kit.site}'")
    if certificate.public_key() != home.key("certificate").public_key():
        raise DeploymentError(f"'{path}' does not belong to '{home.key_file('certificate')}': {REFETCH}")
    return certificate


def check_valid_now(home: SiteHome, certificate: x509.Certificate) -> None:
    """Raise `DeploymentError` outside the certificate's period of validity."""
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if not begin <= datetime.now(UTC) <= end:
        raise DeploymentError(
            f"the site's certificate '{home.certificate}' is valid from {begin:%Y-%m-%d} to {end:%Y-%m-%d}, not now: "
            "ask the study for a new one"
        )


def ensure_certificate(home: SiteHome) -> None:
    """Fetch the certificate unless the home has one that stays valid for `RENEWAL`.

    Raises:
        DeploymentError: as `fetch_certificate`.
    """
    with contextlib.suppress(DeploymentError):
        if read_certificate(home).not_valid_after_utc >= datetime.now(UTC) + RENEWAL:
            return
    fetch_certificate(home)


def fetch_certificate(home: SiteHome) -> None:
    """Fetch the site's certificate from the study's fleet proxy, which has it after `ld-server admit`.

    Raises:
        DeploymentError: the server cannot be reached, or the site is not admitted, revoked or has another key.
    """
    kit = home.kit()
    authority = ssl.create_default_context(cafile=str(home.kit_folder / AUTHORITY))
    url = f"https://{kit.server}/certificates/{kit.site}"
    try:
        answer = httpx.get(url, verify=authority, timeout=TIMEOUT_SECONDS)
    except httpx.HTTPError as error:
        raise DeploymentError(f"the study's server {kit.server} cannot be reached: {error}") from error
    if answer.status_code == 410:
        raise DeploymentError(
            f"the study has revoked site '{kit.site}': ask the study; for new keys, remove '{home.keys}' and run "
            "ld-client init"
        )
    if answer.status_code == 404:
        raise DeploymentError(
            f"site '{kit.site}' is not admitted yet: send the study the line that ld-client enroll prints"
        )
    try:
        certificate = x509.load_pem_x509_certificate(answer.content)
    except ValueError as error:
        raise DeploymentError(f"the study's server {kit.server} sent no certificate") from error
    if certificate.public_key() != home.key("certificate").public_key():
        raise DeploymentError(
            "the study admitted another key for this site: send it the line that ld-client enroll prints"
        )
    write_bytes(home.certificate, answer.content)
