"""Serves a read-only page on this machine, behind a token.

Python's own HTTP server is enough: it answers one address, to the people of this machine, and takes no input. The
hospital's wheel then needs no web framework, and the page is the same code at the server and at a site.
"""

from __future__ import annotations

import hashlib
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from urllib.parse import parse_qs, urlsplit

from ld_common.core.command import print_lines
from ld_common.core.errors import ConfigError, LdError
from ld_common.page.document import POLICY
from ld_common.page.token import (
    FOREIGN_REFUSAL,
    LOOPBACK_NAMES,
    PARAMETER,
    PageToken,
    RequestFacts,
    RequestVerdict,
    is_loopback,
    new_token,
    refusal,
    warning_beyond_loopback,
)

CLIENT_SECONDS = 10.0
"""How long a client may take to send its request."""
PLAIN, HTML = "text/plain; charset=utf-8", "text/html; charset=utf-8"


class PageServer(ThreadingHTTPServer):
    """Answers `/` with what `render` gives at that moment."""

    daemon_threads = True

    def __init__(self, render: Callable[[], str], host: str, port: int, command: str) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host.strip("[]"), port), PageHandler)
        self.render, self.token = render, PageToken(new_token(), port)
        self.loopback, self.refusal = is_loopback(host), refusal(command)
        self.rendering = threading.Lock()

    def server_bind(self) -> None:
        """Bind without the look-up of a host name, which takes seconds on a machine without a network."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of a client that went away."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class PageHandler(BaseHTTPRequestHandler):
    """One request; only GET and HEAD of `/` are answered."""

    protocol_version = "HTTP/1.1"
    timeout = CLIENT_SECONDS
    server: PageServer

    def do_GET(self) -> None:
        """Answer a request for the page."""
        self._answer()

    def do_HEAD(self) -> None:
        """The head of the same answer."""
        self._answer()

    def do_POST(self) -> None:
        """Refuse whatever would change something."""
        self._answer()

    do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_POST

    def _answer(self) -> None:
        if self.server.loopback and self._host_name() not in LOOPBACK_NAMES:
            return self._reply(HTTPStatus.BAD_REQUEST, "This page has another address.\n")
        place = urlsplit(self.path)
        verdict = self.server.token.verdict(self._facts(place.query))
        if verdict is RequestVerdict.FOREIGN:
            return self._reply(HTTPStatus.FORBIDDEN, FOREIGN_REFUSAL)
        if verdict is RequestVerdict.UNKNOWN:
            return self._reply(HTTPStatus.UNAUTHORIZED, self.server.refusal)
        if self.command not in ("GET", "HEAD"):
            return self._reply(
                HTTPStatus.METHOD_NOT_ALLOWED, "This page can only be read.\n", headers={"Allow": "GET, HEAD"}
            )
        if place.path != "/":
            return self._reply(HTTPStatus.NOT_FOUND, "There is one page here, at /.\n")
        if verdict is RequestVerdict.ENTERED:  # so that the token does not stay in the browser's address line
            cookie = f"{self.server.token.cookie}={self.server.token.token}; Path=/; HttpOnly; SameSite=Strict"
            return self._reply(HTTPStatus.SEE_OTHER, "", headers={"Location": "/", "Set-Cookie": cookie})
        return self._page()

    def _page(self) -> None:
        try:
            with self.server.rendering:
                text = self.server.render()
        except LdError as error:
            return self._reply(HTTPStatus.SERVICE_UNAVAILABLE, f"{error}\n")
        tag = f'"{hashlib.sha256(text.encode()).hexdigest()[:32]}"'
        if self.headers.get("If-None-Match") == tag:
            return self._reply(HTTPStatus.NOT_MODIFIED, "", headers={"ETag": tag})
        return self._reply(HTTPStatus.OK, text, HTML, {"ETag": tag})

    def _reply(self, status: HTTPStatus, text: str, kind: str = PLAIN, headers: dict[str, str] | None = None) -> None:
        content = text.encode()
        self.close_connection = True  # a body that came with the request is not read
        self.send_response(status)
        always = {
            "Content-Type": kind,
            "Content-Length": str(len(content)),
            "Content-Security-Policy": POLICY,
            "Cache-Control": "no-store",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "Connection": "close",
        }
        for name, value in (always | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD" and status is not HTTPStatus.NOT_MODIFIED:
            self.wfile.write(content)

    def _facts(self, query: str) -> RequestFacts:
        cookies: SimpleCookie = SimpleCookie()
        with suppress(CookieError):
            cookies.load(self.headers.get("Cookie", ""))
        return RequestFacts(
            host=self.headers.get("Host"),
            origin=self.headers.get("Origin"),
            authorization=self.headers.get("Authorization"),
            cookies={name: morsel.value for name, morsel in cookies.items()},
            token=parse_qs(query, max_num_fields=8).get(PARAMETER, [""])[0] if query.count("&") < 8 else "",
        )

    def _host_name(self) -> str | None:
        with suppress(ValueError):
            return urlsplit(f"//{self.headers.get('Host', '')}").hostname
        return None

    def version_string(self) -> str:
        """Not the versions of Python and its server."""
        return "latent-drift"

    def log_message(self, format: str, *arguments: object) -> None:
        """Log nothing: an address could hold the token."""


@contextmanager
def serving_page(render: Callable[[], str], host: str, port: int, command: str) -> Iterator[str]:
    """Serve a page and yield its address with a fresh token.

    Args:
        render: the page's HTML; its `LdError` is shown in place of it.
        host: address to listen on.
        port: a free one.
        command: what prints the address.

    Raises:
        ConfigError: the address is in use, or not one of this machine.
    """
    try:
        server = PageServer(render, host, port, command)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot listen on {host}:{port}: choose another --port, or --host") from error
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    shown = f"[{host.strip('[]')}]" if ":" in host else host
    try:
        yield f"http://{shown}:{port}/?{PARAMETER}={server.token.token}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def serve_page(render: Callable[[], str], host: str, port: int, command: str, secret: str) -> None:
    """Serve a page until Ctrl-C and print its address; arguments as `serving_page`.

    Raises:
        ConfigError: the address is in use, or not one of this machine.
        LdError: the page cannot be made now.
    """
    render()
    if not is_loopback(host):
        print_lines(warning_beyond_loopback(host, secret))
    with serving_page(render, host, port, command) as address, suppress(KeyboardInterrupt):
        print(f"the page is at {address} until Ctrl-C; its token lets nobody else in", flush=True)
        threading.Event().wait()
