"""The study's gate: what hospitals reach. Flower's fleet API passes; its control and runtime APIs do not exist here.

Flower serves all its APIs on one port, and the control API knows no password (2026, 1.41): it must stay on loopback.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ld_server.deployment.study_home import StudyHome
from ld_server.deployment.superlink import link_address

FLEET = re.compile(r"/v1/fleet/[a-z0-9-]+")
MAX_REQUEST_BYTES = 128 << 20
"""The largest thing that a site sends in one piece: its masked vector in secure aggregation, four bytes a number, of up
to 33 million learned numbers (the largest adapter of Stable Diffusion, custom_diffusion, learns 19.2 million). Arrays
are smaller: Flower cuts them into chunks of 5 MiB (`FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE`)."""
SMALL_REQUEST_BYTES = 6 << 20
MAX_LARGE_REQUESTS = 8
"""As Flower holds a request whole before it asks who sent it: larger ones than a chunk wait for one another."""
MAX_CONNECTIONS = 256
"""A site's node holds about four."""
TIMEOUT_SECONDS = 300.0
"""For a request to come in and its answer to begin: `MAX_REQUEST_BYTES` at 4 Mbit/s."""
SILENT_SECONDS = 30.0
"""A connection with no request under way is closed after once to twice this time: silent ones do not fill the gate."""
PER_HOP = {"connection", "keep-alive", "transfer-encoding", "upgrade", "te", "trailer", "host", "content-length"}
CLOSE = {"connection": "close"}
"""For a request that was not read to its end."""
NOTHING = contextlib.nullcontext()


def gate_app(home: StudyHome) -> Starlette:
    """The gate as an ASGI app: `POST /v1/fleet/*`, `GET /health`, `GET /certificates/SITE`, and 404."""
    upstream = f"https://{link_address(home)}"
    context = ssl.create_default_context(cafile=str(home.certificate("authority")))
    limits, large = httpx.Limits(max_connections=MAX_CONNECTIONS), asyncio.Semaphore(MAX_LARGE_REQUESTS)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[dict[str, httpx.AsyncClient]]:
        async with httpx.AsyncClient(trust_env=False, verify=context, timeout=TIMEOUT_SECONDS, limits=limits) as client:
            yield {"client": client}

    async def fleet(request: Request) -> Response:
        """Pass a call on, its body as it comes in."""
        if not FLEET.fullmatch(request.url.path):
            return PlainTextResponse("not found", 404)
        length = int(request.headers.get("content-length", MAX_REQUEST_BYTES + 1))
        if length > MAX_REQUEST_BYTES:
            return PlainTextResponse("too large, or of unknown length", 413, CLOSE)
        client: httpx.AsyncClient = request.state.client
        outgoing = client.build_request(
            "POST",
            upstream + request.url.path,
            headers=[
                *((name, value) for name, value in request.headers.items() if name not in PER_HOP),
                ("content-length", str(length)),
            ],
            content=request.stream(),  # as it comes in; httpx counts it against the announced length
        )
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS), large if length > SMALL_REQUEST_BYTES else NOTHING:
                answer = await client.send(outgoing, stream=True)
        except httpx.LocalProtocolError:
            return PlainTextResponse("more or less than the announced length", 400, CLOSE)
        except httpx.RequestError:
            return PlainTextResponse("the study's server is not running", 503, CLOSE)
        except TimeoutError:
            return PlainTextResponse("too slow", 408, CLOSE)
        except ClientDisconnect:
            return Response(status_code=400)  # nobody is there to read it
        kept = {name: value for name, value in answer.headers.items() if name not in PER_HOP}
        return StreamingResponse(answer.aiter_raw(), answer.status_code, kept, background=BackgroundTask(answer.aclose))

    async def health(request: Request) -> Response:
        return PlainTextResponse("the gate is open")

    async def certificate(request: Request) -> Response:
        name, sites = request.path_params["site"], home.sites()
        if name not in sites or not home.site_certificate(name).exists():
            return Response(status_code=404)
        if sites[name].revoked is not None:
            return Response(status_code=410)
        return Response(home.site_certificate(name).read_bytes())

    return Starlette(
        routes=[
            Route("/v1/fleet/{call}", fleet, methods=["POST"]),
            Route("/health", health),
            Route("/certificates/{site}", certificate),
        ],
        lifespan=lifespan,
    )


class _Prompt(HttpToolsProtocol):
    """uvicorn's HTTP/1.1, which alone would wait without end for the first request, or for the rest of its head."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._look_again(None)

    def _look_again(self, before: object) -> None:
        self._watch = self.loop.call_later(SILENT_SECONDS, self._look, before)

    def _look(self, before: object) -> None:
        """Close unless a request is under way, or one began since the last look."""
        under_way = self.cycle is not None and not self.cycle.response_complete
        if not under_way and (self.cycle is None or self.cycle is before):
            self.transport.close()
        else:
            self._look_again(self.cycle)

    def connection_lost(self, exc: Exception | None) -> None:
        self._watch.cancel()
        super().connection_lost(exc)


def gate_server(home: StudyHome) -> uvicorn.Server:
    """The gate on its port, with the study's server certificate; `run()` serves until it is told to end."""
    server = home.server()
    return uvicorn.Server(
        uvicorn.Config(
            gate_app(home),
            host=server.bind,
            port=server.gate_port,
            http=_Prompt,
            ssl_certfile=home.certificate("server"),
            ssl_keyfile=home.keys / "server.key",
            log_level="warning",
            server_header=False,
            limit_concurrency=MAX_CONNECTIONS,
        )
    )
