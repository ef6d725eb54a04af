"""Flower's grid with replies pulled one by one, so that a malformed reply affects its sender only.

`HttpGrid.pull_messages` decodes the replies of all nodes; one with a valid head and a malformed body would lose all of
them and end the run.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

import httpx
from flwr.app import Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from google.protobuf.message import DecodeError

POLL_SECONDS = 1.0
MALFORMED = (ValueError, TypeError, LookupError, AttributeError, RecursionError, MemoryError, DecodeError)
"""What decoding raises; an error of the connection to the SuperLink is different, and ends the run."""


class ResilientGrid(Grid):
    """A grid that treats a reply that cannot be decoded as missing."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send messages and return the replies that came by the deadline and can be decoded."""
        waiting = [message_id for message_id in self.push_messages(list(messages)) if message_id]
        deadline = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while waiting:
            for message_id in list(waiting):
                try:
                    pulled = list(self.pull_messages([message_id]))
                except MALFORMED:
                    waiting.remove(message_id)
                    continue
                except httpx.HTTPStatusError as error:
                    # its database is locked briefly when many sites push at once
                    if not error.response.is_server_error or deadline is None:
                        raise
                    continue
                # a sender can claim to reply to any message: a reply counts only for the message it was pulled for
                matching = [reply for reply in pulled if _replies_to(reply, message_id)]
                if matching:
                    replies.append(matching[0])
                    waiting.remove(message_id)
            if not waiting or (deadline is not None and time.monotonic() >= deadline):
                break
            time.sleep(POLL_SECONDS)
        return replies

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self._grid.push_messages(messages)

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


def _replies_to(reply: Message, message_id: str) -> bool:
    return isinstance(reply, Message) and reply.metadata.reply_to_message_id == message_id
