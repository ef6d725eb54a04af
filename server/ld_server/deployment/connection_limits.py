"""Limits of the fleet proxy on connections, heads and bodies, none of which needs a key to be sent."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any
from weakref import WeakValueDictionary

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HANDSHAKE_SECONDS = 10.0
"""From a connection to the end of its TLS handshake."""
HEAD_SECONDS = 10.0
"""A connection without a request under way is closed after one to two times this period."""
MAX_HEAD_BYTES = 32 << 10
MAX_HEADERS = 100
WINDOW_SECONDS = 10.0
WINDOW_BYTES = 640 << 10
"""Least bytes of a body in each `WINDOW_SECONDS`: 0.5 Mbit/s. A shorter body has the same time in all."""
STALLED_SECONDS = 30.0
"""After this time a client that does not read its response is disconnected."""
RESET = struct.pack("ii", 1, 0)
"""SO_LINGER for an immediate reset: Flower's nodes try again after one, and give up after an error of TLS."""


class LimitedListener(socket.socket):
    """A TCP socket for asyncio that resets a connection as it arrives when there are too many of them.

    It counts connections before their TLS handshake, and closes those whose handshake does not end; uvicorn counts
    connections after it.

    Args:
        host: address to listen on.
        port: its port.
        most: connections in all.
        most_per_address: connections of one IPv4 address or one IPv6 network of 64 bits.

    Raises:
        OSError: nobody can listen there.
    """

    def __init__(self, host: str, port: int, most: int, most_per_address: int) -> None:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        super().__init__(family, kind, protocol)
        self.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self.bind(address)
        except OSError:
            self.close()
            raise
        self._most, self._most_per_address = most, most_per_address
        self._open: Counter[str] = Counter()
        self._handshakes: dict[tuple[str, int], asyncio.TimerHandle] = {}

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection; raises `ConnectionAbortedError`, which asyncio passes over, for one too many."""
        plain, peer = super().accept()
        connection = _Connection(self.family, self.type, self.proto, fileno=plain.detach())
        source = network(peer[0])
        if self._open.total() >= self._most or self._open[source] >= self._most_per_address:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            connection.close()
            raise ConnectionAbortedError
        self._open[source] += 1
        timer = asyncio.get_running_loop().call_later(HANDSHAKE_SECONDS, connection.end)
        self._handshakes[peer[:2]] = timer

        def ended() -> None:
            self._open -= Counter([source])
            self.greeted(peer[:2])

        connection.ended = ended
        return connection, peer

    def greeted(self, peer: tuple[str, int]) -> None:
        """Tell that the handshake with a peer has ended."""
        timer = self._handshakes.pop(peer, None)
        if timer is not None:
            timer.cancel()


class _Connection(socket.socket):
    """An accepted connection that tells its end."""

    ended: Callable[[], None] | None = None

    def end(self) -> None:
        """End the connection; asyncio, which owns the socket, then closes it."""
        with contextlib.suppress(OSError):  # the peer is gone
            self.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        super().close()
        ended, self.ended = self.ended, None
        if ended is not None:
            ended()


def network(host: str) -> str:
    """What counts as one address: an IPv4 address, or an IPv6 network of 64 bits."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is None:
            return str(ipaddress.IPv6Network((int(address), 64), strict=False))
        address = address.ipv4_mapped
    return str(address)


class LimitedHttp(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 with timeouts for the head of a request and for a client that does not read."""

    def __init__(self, listener: LimitedListener, **keywords: Any) -> None:
        super().__init__(**keywords)
        self._listener = listener
        self._stalled: asyncio.TimerHandle | None = None
        self._in_head = False
        self._head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self.client is not None:
            self._listener.greeted(self.client)
        self._look_again(None)

    def _look_again(self, before: object) -> None:
        self._watch = self.loop.call_later(HEAD_SECONDS, self._look, before)

    def _look(self, before: object) -> None:
        """Close the connection unless a request is under way, or began since the last check."""
        under_way = self.cycle is not None and not self.cycle.response_complete
        if not under_way and (self.cycle is None or self.cycle is before):
            self.transport.close()
        else:
            self._look_again(self.cycle)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._head_bytes = self._head_bytes + len(data) if self._in_head else 0
        if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("the request's head is too large")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True

    def on_url(self, url: bytes) -> None:
        """Raise `ValueError` for a fragment, which uvicorn would drop."""
        super().on_url(url)
        if b"#" in url:
            raise ValueError("a target has no fragment")

    def on_header(self, name: bytes, value: bytes) -> None:
        """Raise `ValueError`, which uvicorn answers with 400, for a head that is too large."""
        super().on_header(name, value)
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > MAX_HEAD_BYTES or len(self.headers) > MAX_HEADERS:
            raise ValueError("the request's head is too large")

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(STALLED_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        self._watch.cancel()
        if self._stalled is not None:
            self._stalled.cancel()
        super().connection_lost(exc)


class Slots:
    """Slots for large requests: some in all, fewer for one address."""

    def __init__(self, most: int, most_per_address: int) -> None:
        self._all = asyncio.Semaphore(most)
        self._most_per_address = most_per_address
        self._addresses: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    @contextlib.asynccontextmanager
    async def take(self, host: str, seconds: float) -> AsyncIterator[None]:
        """Hold a slot; raises `TimeoutError` when none is free within `seconds`."""
        of_address = self._addresses.setdefault(network(host), asyncio.Semaphore(self._most_per_address))
        async with contextlib.AsyncExitStack() as stack:
            async with asyncio.timeout(seconds):
                await stack.enter_async_context(of_address)
                await stack.enter_async_context(self._all)
            yield


async def steady(body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Pass a body on; raises `TimeoutError` when it takes longer than `WINDOW_SECONDS` for `WINDOW_BYTES`."""
    left, missing = WINDOW_SECONDS, WINDOW_BYTES
    loop = asyncio.get_running_loop()
    while True:
        begin = loop.time()
        async with asyncio.timeout(left):
            chunk = await anext(body, None)
        if chunk is None:
            return
        left, missing = left - (loop.time() - begin), missing - len(chunk)
        if missing <= 0:
            left, missing = WINDOW_SECONDS, WINDOW_BYTES
        yield chunk
