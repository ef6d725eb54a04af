"""Checks that a site's machine reaches the study's server, its certificate and the clocks; each within seconds."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TypeVar

import httpx
from cryptography import x509

from ld_client.deployment.check_result import CheckResult, failed, good, warning

T = TypeVar("T")
STEP_SECONDS = 5.0
AHEAD_SECONDS, BEHIND_SECONDS = 5.0, 305.0
"""Largest differences of a node's clock from the server's that Flower accepts."""
NEAR = 0.5
"""Share of those differences that gives a warning."""
SOON_DAYS = 30
NOT_YET, EXPIRED, OTHER_HOST, OTHER_ADDRESS = 9, 10, 62, 64
"""OpenSSL's numbers."""
RENEW = "ask the study to renew it"


def check_server(address: str, authority: Path) -> list[CheckResult]:
    """Connect to the server, check its certificate and compare the clocks.

    Args:
        address: `host:port`.
        authority: the kit's `authority.crt`.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")  # of an IPv6 address
    try:
        within(lambda: socket.create_connection((host, int(port)), STEP_SECONDS).close())
    except (OSError, ValueError) as error:
        remedy = "ask the study whether its server runs, and your network team whether this port is open to it"
        return [failed("server", f"{address} cannot be reached: {_message(error)}", remedy)]
    reached = good("server", f"{address} answers")
    try:
        context = ssl.create_default_context(cafile=str(authority))
        certificate = within(lambda: _certificate(host, int(port), context))
    except ssl.SSLCertVerificationError as error:
        return [reached, _refused(error, host, int(port))]
    except (OSError, ValueError) as error:
        remedy = "ask the study whether another service uses this address"
        return [reached, failed("server certificate", f"no TLS at {address}: {_message(error)}", remedy)]
    return [reached, dated("server certificate", certificate, f"for {host}", RENEW), _clock(address, context)]


def dated(name: str, certificate: x509.Certificate, detail: str, remedy: str) -> CheckResult:
    """Check a certificate's period of validity."""
    end, days = certificate.not_valid_after_utc, (certificate.not_valid_after_utc - datetime.now(UTC)).days
    if datetime.now(UTC) >= end:
        return failed(name, f"it expired on {end:%Y-%m-%d}", remedy)
    if datetime.now(UTC) < certificate.not_valid_before_utc:
        begin = certificate.not_valid_before_utc
        return failed(
            name, f"it is valid from {begin:%Y-%m-%d %H:%M} UTC, later than this machine's time", "set the clock"
        )
    if days < SOON_DAYS:
        return warning(name, f"{detail}, but it expires in {days} days", remedy)
    return good(name, f"{detail}, until {end:%Y-%m-%d}")


def within(step: Callable[[], T], seconds: float = STEP_SECONDS) -> T:
    """Run a step that may hang for at most some seconds; raises `TimeoutError`, or what the step raises.

    A socket's own timeout restarts with each byte and does not cover name resolution.
    """
    results: list[T] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            results.append(step())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    if not results:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return results[0]


def _certificate(host: str, port: int, context: ssl.SSLContext) -> x509.Certificate:
    with (
        socket.create_connection((host, port), STEP_SECONDS) as plain,
        context.wrap_socket(plain, server_hostname=host) as secured,
    ):
        return x509.load_der_x509_certificate(secured.getpeercert(binary_form=True) or b"")


def _refused(error: ssl.SSLCertVerificationError, host: str, port: int) -> CheckResult:
    """The reason why the server's certificate was not accepted."""
    name = "server certificate"
    unverified = ssl.create_default_context()  # to read the certificate, nothing is sent
    unverified.check_hostname, unverified.verify_mode = False, ssl.CERT_NONE
    try:
        certificate = within(lambda: _certificate(host, port, unverified))
    except (OSError, ValueError):
        return failed(name, str(error.verify_message), "ask the study for help")
    if error.verify_code == EXPIRED:
        return failed(name, f"it expired on {certificate.not_valid_after_utc:%Y-%m-%d}", RENEW)
    if error.verify_code == NOT_YET:
        detail = (
            f"it is valid from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC, later than this machine's time"
        )
        return failed(name, detail, "set this machine's clock")
    if error.verify_code in (OTHER_HOST, OTHER_ADDRESS):
        detail = f"it is for {', '.join(_names(certificate)) or 'no host'}, not for {host}"
        return failed(name, detail, "ask the study to add this host to its server's certificate")
    detail = f"the study's authority did not issue it ({error.verify_message})"
    return failed(name, detail, "another server answers there, or the kit is old: ask the study before you continue")


def _names(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]


def _clock(address: str, context: ssl.SSLContext) -> CheckResult:
    """This machine's clock minus the server's, from the `Date` header, which is truncated to seconds."""
    try:
        before = time.time()
        answer = within(lambda: httpx.get(f"https://{address}/health", verify=context, timeout=STEP_SECONDS))
        now = (before + time.time()) / 2
        ahead = now - (parsedate_to_datetime(answer.headers["date"]).timestamp() + 0.5)
    except (httpx.HTTPError, OSError, KeyError, ValueError) as error:
        detail = f"the server did not send its time: {_message(error)}"
        return warning("clock", detail, "compare this machine's clock with a time server")
    detail = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the server's"
    remedy = "synchronise this machine's clock (NTP)"
    if ahead > AHEAD_SECONDS or -ahead > BEHIND_SECONDS:
        limits = f"at most {AHEAD_SECONDS:g} s ahead or {BEHIND_SECONDS:g} s behind is accepted"
        return failed("clock", f"{detail}: {limits}", remedy)
    if ahead > NEAR * AHEAD_SECONDS or -ahead > NEAR * BEHIND_SECONDS:
        return warning("clock", detail, remedy)
    return good("clock", detail)


def _message(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error) or type(error).__name__
