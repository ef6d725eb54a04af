"""The fleet proxy, which hospitals connect to. It forwards Flower's fleet API and no other.

Flower 1.41 serves all its APIs on one port, and its control API has no authentication: it must stay on loopback.
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
"""The largest request of a site is its masked vector in secure aggregation: four bytes a parameter, up to 33 million
parameters (the largest adapter of Stable Diffusion, custom_diffusion, has 19.2 million). Flower cuts arrays into chunks
of 5 MiB (`FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE`)."""
SMALL_REQUEST_BYTES = 6 << 20
MAX_LARGE_REQUESTS = 8
"""Concurrent requests larger than a chunk: Flower reads a whole request before it authenticates the sender."""
MAX_CONNECTIONS = 256
"""A site's node has about four connections."""
TIMEOUT_SECONDS = 300.0
"""For a request to arrive and its response to begin: `MAX_REQUEST_BYTES` at 4 Mbit/s."""
SILENT_SECONDS = 30.0
"""An idle connection is closed after one to two times this period, so that idle ones cannot exhaust the proxy."""
PER_HOP = {"connection", "keep-alive", "transfer-encoding", "upgrade", "te", "trailer", "host", "content-length"}
CLOSE = {"connection": "close"}
"""Headers of a response to a request that was not read completely."""
NOTHING = contextlib.nullcontext()


def proxy_app(home: StudyHome) -> Starlette:
    """The proxy as an ASGI app: `POST /v1/fleet/*`, `GET /health`, `GET /certificates/SITE`; 404 for the rest."""
    upstream = f"https://{link_address(home)}"
    context = ssl.create_default_context(cafile=str(home.certificate("authority")))
    limits, large = httpx.Limits(max_connections=MAX_CONNECTIONS), asyncio.Semaphore(MAX_LARGE_REQUESTS)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[dict[str, httpx.AsyncClient]]:
        async with httpx.AsyncClient(trust_env=False, verify=context, timeout=TIMEOUT_SECONDS, limits=limits) as client:
            yield {"client": client}

    async def fleet(request: Request) -> Response:
        """Forward a call, streaming its body."""
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
            content=request.stream(),  # streamed; httpx checks it against the announced length
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
            return Response(status_code=400)  # the client is gone
        headers = {name: value for name, value in answer.headers.items() if name not in PER_HOP}
        return StreamingResponse(
            answer.aiter_raw(), answer.status_code, headers, background=BackgroundTask(answer.aclose)
        )

    async def health(request: Request) -> Response:
        return PlainTextResponse("ok")

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


class _IdleTimeout(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 with a timeout for the first request and for the rest of a request's head."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._look_again(None)

    def _look_again(self, before: object) -> None:
        self._watch = self.loop.call_later(SILENT_SECONDS, self._look, before)

    def _look(self, before: object) -> None:
        """Close the connection unless a request is under way, or began since the last check."""
        under_way = self.cycle is not None and not self.cycle.response_complete
        if not under_way and (self.cycle is None or self.cycle is before):
            self.transport.close()
        else:
            self._look_again(self.cycle)

    def connection_lost(self, exc: Exception | None) -> None:
        self._watch.cancel()
        super().connection_lost(exc)


def proxy_server(home: StudyHome) -> uvicorn.Server:
    """The proxy on its port, with the server's certificate; `run()` serves until terminated."""
    server = home.server()
    return uvicorn.Server(
        uvicorn.Config(
            proxy_app(home),
            host=server.bind,
            port=server.gate_port,
            http=_IdleTimeout,
            ssl_certfile=home.certificate("server"),
            ssl_keyfile=home.keys / "server.key",
            log_level="warning",
            server_header=False,
            limit_concurrency=MAX_CONNECTIONS,
        )
    )
