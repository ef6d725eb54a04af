"""Flower's grid with replies pulled one by one, so that a malformed reply affects its sender only.

`HttpGrid.pull_messages` decodes the replies of all nodes and holds them in memory; one with a valid head and a
malformed body would lose all of them and end the run.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import httpx
from flwr.app import Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullAppMessagesResponse
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.superlink.grid.http_grid import HttpGrid
from google.protobuf.message import DecodeError

POLL_SECONDS = 1.0
PUSHED_AT_ONCE = 32
"""Messages of one request: for hundreds, the SuperLink takes longer than the 30 s after which Flower's client asks
again, and then knows the first push no more."""
MALFORMED = (ValueError, TypeError, LookupError, AttributeError, RecursionError, MemoryError, DecodeError)
"""What decoding raises; an error of the connection to the SuperLink is different, and ends the run."""


class ResilientGrid(Grid):
    """A grid that treats a reply that cannot be decoded as missing."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    @property
    def sends_bytes(self) -> bool:
        """Whether a pushed message is no longer needed; a grid in memory, as of a simulation, gives it to the node."""
        return isinstance(self._grid, HttpGrid)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Send messages, and give each reply that can be decoded as it comes, until the deadline."""
        waiting = {message_id for message_id in self.push_messages(list(messages)) if message_id}
        return self._receive(waiting, None if timeout is None else time.monotonic() + timeout)

    def _receive(self, waiting: set[str], deadline: float | None) -> Iterator[Message]:
        arrived: dict[str, Grid] = {}
        while waiting:
            try:
                arrived |= self._arrived(waiting - arrived.keys())
                for message_id in [one for one in arrived if one in waiting]:
                    reply = _pulled(arrived[message_id], message_id)
                    grid = arrived.pop(message_id)
                    if reply is not None or grid is not self._grid:  # the SuperLink does not give it again
                        waiting.discard(message_id)
                    if isinstance(reply, Message):
                        yield reply
                    del reply  # else two of them are in memory
            except httpx.HTTPStatusError as error:
                # its database is locked briefly when many sites push at once
                if not error.response.is_server_error or deadline is None:
                    raise
            if not waiting or (deadline is not None and time.monotonic() >= deadline):
                return
            time.sleep(POLL_SECONDS)

    def _arrived(self, waiting: Collection[str]) -> dict[str, Grid]:
        """Messages whose replies may have come, and a grid that pulls each: of Flower's own, found by one request.

        The SuperLink gives each reply once. Flower's grid would then hold all of them in memory, so each is pulled by a
        copy of it that was answered with this one alone.
        """
        if not isinstance(self._grid, HttpGrid):
            return dict.fromkeys(sorted(waiting), self._grid)
        if not waiting:
            return {}
        client = self._grid._runtime_client
        found = client.PullMessages(PullAppMessagesRequest(message_ids=sorted(waiting)))
        arrived: dict[str, Grid] = {}
        for message, tree in zip(found.messages_list, found.message_object_trees, strict=True):
            one = copy.copy(self._grid)
            answer = PullAppMessagesResponse(messages_list=[message], message_object_trees=[tree])
            one._client = cast(Any, _Answered(client, answer))
            arrived.setdefault(message.metadata.reply_to_message_id, one)
        return arrived

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push messages, `PUSHED_AT_ONCE` in a request; returns their ids."""
        left, pushed = list(messages), list[str]()
        while left:
            pushed += self._grid.push_messages(left[:PUSHED_AT_ONCE])
            left = left[PUSHED_AT_ONCE:]
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self._grid.pull_messages(message_ids)

    def get_node_ids(self) -> Iterable[int]:
        return self._grid.get_node_ids()

    def get_nodes(self) -> Iterable[NodeInfo]:
        return self._grid.get_nodes()

    def set_run(self, run: Run) -> None:
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)


@dataclass(frozen=True)
class _Answered:
    """A client of the SuperLink that knows the answer to `PullMessages`."""

    client: Any
    answer: PullAppMessagesResponse

    def PullMessages(self, _: PullAppMessagesRequest) -> PullAppMessagesResponse:
        return self.answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.client, name)


def _pulled(grid: Grid, message_id: str) -> Message | Literal[False] | None:
    """The reply to a message; None before it came, False for one that cannot be decoded."""
    try:
        pulled = list(grid.pull_messages([message_id]))
    except MALFORMED:
        return False
    # a sender can claim to reply to any message: a reply counts only for the message it was pulled for
    return next((reply for reply in pulled if _replies_to(reply, message_id)), None)


def _replies_to(reply: Message, message_id: str) -> bool:
    return isinstance(reply, Message) and reply.metadata.reply_to_message_id == message_id
