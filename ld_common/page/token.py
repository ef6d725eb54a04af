"""Who may speak to a local page: whoever has the token of its address, and no other web page.

Loopback keeps other machines out, but not the other accounts of this one, nor a web page that its user has open. This
module knows no web framework: `ld_generate.web.access` and `ld_common.page.serve` ask it.
"""

from __future__ import annotations

import ipaddress
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from urllib.parse import urlsplit

PARAMETER = "token"
FOREIGN_REFUSAL = "A request of another web page is not answered.\n"
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
"""Names of a page on loopback; any other may be a web site's own that points there."""


class RequestVerdict(Enum):
    """What becomes of a request."""

    GRANTED = "answer it"
    ENTERED = "its address has the token: set the cookie, and lead to the address without it"
    UNKNOWN = "status 401"
    FOREIGN = "status 403"


@dataclass(frozen=True)
class RequestFacts:
    """What of a request decides."""

    host: str | None
    """Header `Host`, like the next two; None where it is absent."""
    origin: str | None
    authorization: str | None
    cookies: Mapping[str, str]
    token: str
    """The token in the address, or nothing."""


class PageToken:
    """The token of one page: in the address once, then in a cookie.

    A program sends it as `Authorization: Bearer TOKEN`. A request that another web page caused is refused even with the
    cookie: its `Origin` is not the page's own.
    """

    def __init__(self, token: str, port: int) -> None:
        self.token = token
        self.cookie = f"ld-page-{port}"  # cookies of a host are shared by its ports

    def verdict(self, request: RequestFacts) -> RequestVerdict:
        """Judge a request."""
        if request.origin is not None and urlsplit(request.origin).netloc != request.host:
            return RequestVerdict.FOREIGN
        scheme, _, bearer = (request.authorization or "").partition(" ")
        held = [request.cookies.get(self.cookie, ""), bearer if scheme.lower() == "bearer" else ""]
        if any(map(self._is_token, held)):
            return RequestVerdict.GRANTED
        return RequestVerdict.ENTERED if self._is_token(request.token) else RequestVerdict.UNKNOWN

    def _is_token(self, text: str) -> bool:
        return secrets.compare_digest(text.encode(), self.token.encode())


def new_token() -> str:
    """A fresh token that fits into an address."""
    return secrets.token_urlsafe(24)


def refusal(command: str) -> str:
    """What a request without the token reads."""
    return f"This page needs the token of its address: open the address that {command} printed.\n"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def warning_beyond_loopback(host: str, content: str) -> str:
    """What a page that other machines can reach says first."""
    return (
        f"warning: on {host} other machines can reach this page, which has no encryption: whoever reads the traffic "
        f"reads {content} and the token that opens the page"
    )
