"""The fleet proxy, which hospitals connect to. It forwards Flower's fleet API and no other.

Flower 1.41 serves all its APIs on one port, and its control API has no authentication: it must stay on loopback.
"""

from __future__ import annotations

import contextlib
import functools
import re
import socket
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

from ld_common.core.errors import DeploymentError
from ld_server.deployment.connection_limits import LimitedHttp, LimitedListener, Slots, steady
from ld_server.deployment.study_home import StudyHome, address
from ld_server.deployment.superlink import LOOPBACK, link_address

FLEET = re.compile(r"/v1/fleet/[a-z0-9-]{1,64}")
MAX_REQUEST_BYTES = 128 << 20
"""The largest request of a site is its masked vector in secure aggregation: four bytes a parameter, up to 33 million
parameters (the largest adapter of Stable Diffusion, custom_diffusion, has 19.2 million). Flower cuts arrays into chunks
of 5 MiB (`FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE`)."""
SMALL_REQUEST_BYTES = 6 << 20
MAX_LARGE_REQUESTS = 8
"""Concurrent requests larger than a chunk: Flower reads a whole request before it authenticates the sender."""
MAX_LARGE_REQUESTS_PER_ADDRESS = 2
LARGE_WAIT_SECONDS = 20.0
"""For one of these to be free. Flower's nodes wait 30 s, then try again."""
MAX_CONNECTIONS = 256
MAX_CONNECTIONS_PER_ADDRESS = 32
"""A site's node has about four connections; several sites may share an address."""
ANSWER_SECONDS = 300.0
"""For Flower to answer a request."""
PER_HOP = {"connection", "keep-alive", "transfer-encoding", "upgrade", "te", "trailer", "host", "content-length"}
OWN = PER_HOP | {"date", "server"}
CLOSE = {"connection": "close"}
"""Headers of a response to a request that was not read completely."""


def proxy_app(home: StudyHome) -> Starlette:
    """The proxy as an ASGI app: `POST /v1/fleet/*`, `GET /health`, `GET /certificates/SITE`; 404 for the rest."""
    upstream = f"https://{link_address(home)}"
    context = ssl.create_default_context(cafile=str(home.certificate("authority")))
    limits = httpx.Limits(max_connections=MAX_CONNECTIONS)
    large = Slots(MAX_LARGE_REQUESTS, MAX_LARGE_REQUESTS_PER_ADDRESS)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[dict[str, httpx.AsyncClient]]:
        async with httpx.AsyncClient(trust_env=False, verify=context, timeout=ANSWER_SECONDS, limits=limits) as client:
            yield {"client": client}

    async def fleet(request: Request) -> Response:
        """Forward a call, streaming its body."""
        if not FLEET.fullmatch(request.scope["raw_path"].decode()) or request.url.query:
            return PlainTextResponse("not found", 404)
        length = int(request.headers.get("content-length", MAX_REQUEST_BYTES + 1))
        if "transfer-encoding" in request.headers and "content-length" in request.headers:
            return PlainTextResponse("two lengths", 400, CLOSE)
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
            content=steady(request.stream()),  # streamed; httpx checks it against the announced length
        )
        try:
            async with contextlib.AsyncExitStack() as slot:
                if length > SMALL_REQUEST_BYTES:
                    try:
                        await slot.enter_async_context(large.take(request.scope["client"][0], LARGE_WAIT_SECONDS))
                    except TimeoutError:
                        return PlainTextResponse("too many large requests", 503, CLOSE)
                answer = await client.send(outgoing, stream=True)
        except httpx.LocalProtocolError:
            return PlainTextResponse("more or less than the announced length", 400, CLOSE)
        except httpx.RequestError:
            return PlainTextResponse("the study's server is not running", 503, CLOSE)
        except TimeoutError:
            return PlainTextResponse("too slow", 408, CLOSE)
        except ClientDisconnect:
            return Response(status_code=400)  # the client is gone
        headers = {name: value for name, value in answer.headers.items() if name not in OWN}
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

    app = Starlette(
        routes=[
            Route("/v1/fleet/{call}", fleet, methods=["POST"]),
            Route("/health", health),
            Route("/certificates/{site}", certificate),
        ],
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    return app


class ProxyServer(uvicorn.Server):
    """uvicorn with a listener of our own; `run()` serves until terminated."""

    def __init__(self, config: uvicorn.Config, listener: LimitedListener) -> None:
        super().__init__(config)
        self._listener = listener

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve on the listener."""
        await super().serve([self._listener])


def proxy_server(home: StudyHome) -> ProxyServer:
    """The proxy on its port, with the server's certificate; behind nginx on loopback.

    Raises:
        DeploymentError: nobody can listen there.
    """
    server = home.server()
    host, port, per_address = server.bind, server.gate_port, MAX_CONNECTIONS_PER_ADDRESS
    if server.proxy_port:
        host, port, per_address = LOOPBACK, server.proxy_port, MAX_CONNECTIONS  # nginx counts per address
    try:
        listener = LimitedListener(host, port, MAX_CONNECTIONS, per_address)
    except OSError as error:
        raise DeploymentError(
            f"cannot listen on {address(host, port)} ({error.strerror}): set another port in server.yaml"
        ) from error
    config = uvicorn.Config(
        proxy_app(home),
        http=functools.partial(LimitedHttp, listener),  # type: ignore[arg-type]
        ws="none",
        loop="asyncio",  # uvloop does not ask the listener for its connections
        ssl_certfile=home.certificate("server"),
        ssl_keyfile=home.keys / "server.key",
        log_level="warning",
        server_header=False,
        proxy_headers=False,
    )
    return ProxyServer(config, listener)
