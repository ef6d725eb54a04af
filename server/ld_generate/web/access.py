"""Who may speak to the page: whoever has the token of its address, and no other web page.

Loopback keeps other machines out, but not the other accounts of this one, nor a web page that its user has open.
"""

from __future__ import annotations

import secrets
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

OPEN_PATH = "/gradio_api/startup-events"
"""Asked by Gradio itself when it starts; it tells nothing."""
PARAMETER = "token"
REFUSAL = "This page needs the token of its address: open the address that ld-generate serve printed.\n"


class TokenGate:
    """ASGI middleware that answers requests with the token alone: in the address once, then in a cookie.

    A program sends it as `Authorization: Bearer TOKEN`. A request that another web page caused is refused even with the
    cookie: its `Origin` is not the page's own.
    """

    def __init__(self, app: ASGIApp, token: str, port: int) -> None:
        self.app, self.token = app, token
        self.cookie = f"ld-page-{port}"  # cookies of a host are shared by its ports

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it with status 401 or 403."""
        refusal = self._refusal(HTTPConnection(scope)) if scope["type"] in ("http", "websocket") else None
        await (refusal or self.app)(scope, receive, send)

    def _refusal(self, asked: HTTPConnection) -> Response | None:
        origin = asked.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != asked.headers.get("host"):
            return PlainTextResponse("A request of another web page is not answered.\n", 403)
        scheme, _, bearer = asked.headers.get("authorization", "").partition(" ")
        held = [asked.cookies.get(self.cookie, ""), bearer if scheme.lower() == "bearer" else ""]
        if any(map(self._is_token, held)) or asked.url.path == OPEN_PATH:
            return None
        if not self._is_token(asked.query_params.get(PARAMETER, "")):
            return PlainTextResponse(REFUSAL, 401)
        entered = RedirectResponse(asked.url.path, 303)  # so that the token does not stay in the browser's address line
        entered.set_cookie(self.cookie, self.token, httponly=True, samesite="strict")
        return entered

    def _is_token(self, text: str) -> bool:
        return secrets.compare_digest(text.encode(), self.token.encode())
