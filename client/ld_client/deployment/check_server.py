"""Whether a site's machine reaches the study's server and may believe it; each step ends after a few seconds."""

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
"""How far a node's clock may be from the server's: Flower refuses more."""
NEAR = 0.5
"""Share of that at which it is worth a warning."""
SOON_DAYS = 30
NOT_YET, EXPIRED, OTHER_HOST, OTHER_ADDRESS = 9, 10, 62, 64
"""OpenSSL's numbers."""
RENEW = "the study must renew it: ask its people"


def check_server(address: str, authority: Path) -> list[CheckResult]:
    """Reach the server, check its certificate, compare clocks.

    Args:
        address: `host:port`.
        authority: the kit's `authority.crt`.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")  # of an IPv6 address
    try:
        within(lambda: socket.create_connection((host, int(port)), STEP_SECONDS).close())
    except (OSError, ValueError) as error:
        remedy = "ask the study whether its server runs; ask your network whether this port is open to it"
        return [failed("server", f"{address} cannot be reached: {_said(error)}", remedy)]
    reached = good("server", f"{address} answers")
    try:
        context = ssl.create_default_context(cafile=str(authority))
        certificate = within(lambda: _certificate(host, int(port), context))
    except ssl.SSLCertVerificationError as error:
        return [reached, _refused(error, host, int(port))]
    except (OSError, ValueError) as error:
        remedy = "ask the study whether another service listens there"
        return [reached, failed("server certificate", f"no TLS at {address}: {_said(error)}", remedy)]
    return [reached, dated("server certificate", certificate, f"for {host}", RENEW), _clock(address, context)]


def dated(name: str, certificate: x509.Certificate, said: str, remedy: str) -> CheckResult:
    """Whether a certificate is valid today, and for how long."""
    end, days = certificate.not_valid_after_utc, (certificate.not_valid_after_utc - datetime.now(UTC)).days
    if datetime.now(UTC) >= end:
        return failed(name, f"it ran out on {end:%Y-%m-%d}", remedy)
    if datetime.now(UTC) < certificate.not_valid_before_utc:
        begin = certificate.not_valid_before_utc
        return failed(name, f"it holds from {begin:%Y-%m-%d %H:%M} UTC on, which is later than now", "set the clock")
    if days < SOON_DAYS:
        return warning(name, f"{said}, but it runs out in {days} days", remedy)
    return good(name, f"{said}, until {end:%Y-%m-%d}")


def within(step: Callable[[], T], seconds: float = STEP_SECONDS) -> T:
    """Run a step that may hang, and give it up after some seconds; raises `TimeoutError`, or what the step raises.

    A socket's own timeout begins anew with each byte and does not cover the look-up of a name.
    """
    found: list[T] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            found.append(step())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    if not found:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return found[0]


def _certificate(host: str, port: int, context: ssl.SSLContext) -> x509.Certificate:
    with (
        socket.create_connection((host, port), STEP_SECONDS) as plain,
        context.wrap_socket(plain, server_hostname=host) as secured,
    ):
        return x509.load_der_x509_certificate(secured.getpeercert(binary_form=True) or b"")


def _refused(error: ssl.SSLCertVerificationError, host: str, port: int) -> CheckResult:
    """Why the server's certificate is not believed."""
    name = "server certificate"
    anything = ssl.create_default_context()
    anything.check_hostname, anything.verify_mode = False, ssl.CERT_NONE
    try:
        certificate = within(lambda: _certificate(host, port, anything))
    except (OSError, ValueError):
        return failed(name, str(error.verify_message), "ask the study for help")
    if error.verify_code == EXPIRED:
        said = f"it ran out on {certificate.not_valid_after_utc:%Y-%m-%d}"
        return failed(name, said, RENEW)
    if error.verify_code == NOT_YET:
        said = f"it holds from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC on, which is later than now"
        return failed(name, said, "set this machine's clock")
    if error.verify_code in (OTHER_HOST, OTHER_ADDRESS):
        said = f"it is for {', '.join(_names(certificate)) or 'nobody'}, not for {host}"
        return failed(name, said, "the study must name this host in its server's certificate: ask its people")
    said = f"it was not issued by the study's authority ({error.verify_message})"
    return failed(name, said, "something else answers there, or the kit is old: ask the study before you go on")


def _names(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]


def _clock(address: str, context: ssl.SSLContext) -> CheckResult:
    """This machine's clock less the server's, from the `Date` of an answer, which is cut to whole seconds."""
    try:
        before = time.time()
        answer = within(lambda: httpx.get(f"https://{address}/health", verify=context, timeout=STEP_SECONDS))
        now = (before + time.time()) / 2
        ahead = now - (parsedate_to_datetime(answer.headers["date"]).timestamp() + 0.5)
    except (httpx.HTTPError, OSError, KeyError, ValueError) as error:
        said = f"the server did not say its time: {_said(error)}"
        return warning("clock", said, "compare this machine's clock with a time server")
    said = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the server's"
    remedy = "synchronise this machine's clock (NTP)"
    if ahead > AHEAD_SECONDS or -ahead > BEHIND_SECONDS:
        most = f"at most {AHEAD_SECONDS:g} s ahead or {BEHIND_SECONDS:g} s behind is accepted"
        return failed("clock", f"{said}: {most}", remedy)
    if ahead > NEAR * AHEAD_SECONDS or -ahead > NEAR * BEHIND_SECONDS:
        return warning("clock", said, remedy)
    return good("clock", said)


def _said(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error) or type(error).__name__
