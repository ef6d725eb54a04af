"""The token of the page (`ld_common.page.token`) as middleware of its web framework."""

from __future__ import annotations

from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from ld_common.page.token import FOREIGN_REFUSAL, PARAMETER, PageToken, RequestFacts, RequestVerdict, refusal

OPEN_PATH = "/gradio_api/startup-events"
"""Asked by Gradio itself when it starts; it tells nothing."""
REFUSAL = refusal("ld-generate serve")


class TokenGate:
    """ASGI middleware that answers requests with the token alone, as `PageToken` judges them."""

    def __init__(self, app: ASGIApp, token: str, port: int) -> None:
        self.app, self.token = app, PageToken(token, port)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it with status 401 or 403."""
        refused = self._refusal(HTTPConnection(scope)) if scope["type"] in ("http", "websocket") else None
        await (refused or self.app)(scope, receive, send)

    def _refusal(self, asked: HTTPConnection) -> Response | None:
        headers = asked.headers
        verdict = self.token.verdict(
            RequestFacts(
                host=headers.get("host"),
                origin=headers.get("origin"),
                authorization=headers.get("authorization"),
                cookies=asked.cookies,
                token=asked.query_params.get(PARAMETER, ""),
            )
        )
        if verdict is RequestVerdict.FOREIGN:
            return PlainTextResponse(FOREIGN_REFUSAL, 403)
        if verdict is RequestVerdict.GRANTED or asked.url.path == OPEN_PATH:
            return None
        if verdict is RequestVerdict.UNKNOWN:
            return PlainTextResponse(REFUSAL, 401)
        entered = RedirectResponse(asked.url.path, 303)  # so that the token does not stay in the browser's address line
        entered.set_cookie(self.token.cookie, self.token.token, httponly=True, samesite="strict")
        return entered
