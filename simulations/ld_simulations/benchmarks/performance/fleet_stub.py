"""Stub nodes: sites that speak Flower's Fleet API and train nothing, many in one process."""

from __future__ import annotations

import contextlib
import hashlib
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import httpx
import torch
from flwr.app.message import Message, remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest, PushMessagesRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

import ld_common.core.offline  # noqa: F401  (before any model library)
from ld_common.core.errors import FederationError
from ld_common.protocol import messages
from ld_common.protocol.attestation import AuditHead, Statement, attest, sign_head
from ld_common.protocol.messages import TrainNumbers, TrainResult, TrainTask
from ld_common.protocol.site_keys import new_site_keys
from ld_common.protocol.study_config import study_from_json
from ld_server.deployment import superlink
from ld_server.deployment.study_home import now

HEARTBEAT_SECONDS, PULL_SECONDS = 30.0, 3.0
"""As Flower's node has them; the second is the pause after an answer without a message."""
THREADS, RETRIES = 16, 8
REQUEST_SECONDS, POLL_SECONDS = 60.0, 0.5
CHANGE = 1e-4
"""Largest difference of a result from its task."""
Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


@dataclass
class Traffic:
    """What all nodes sent and received: bodies of HTTP, without heads and TLS."""

    sent_bytes: int = 0
    received_bytes: int = 0
    requests: int = 0
    retries: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        """Count a request of Flower's client, and its response."""
        response = call_next(context)
        with self.lock:
            self.requests += 1
            self.sent_bytes += len(context.request.content)
            self.received_bytes += len(response.content)
        return response


class StubNode:
    """A node of one site, which answers each task with what it was given."""

    def __init__(self, site: str, server: str, verify: ssl.SSLContext, traffic: Traffic, heartbeat: float) -> None:
        self.site, self.keys, self.traffic, self.heartbeat = site, new_site_keys(), traffic, heartbeat
        self.replies = 0
        self._next_pull, self._next_beat = 0.0, 0.0
        self._known_runs: set[int] = set()
        self._node = Node()
        private: Any = self.keys["node"]
        self._client = FleetHttpClient(
            f"https://{server}",
            interceptors=[
                traffic,
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                NodeAuthHttpInterceptor(private, private.public_key()),
            ],
            verify=verify,
            timeout=REQUEST_SECONDS,
        )

    def activate(self) -> None:
        """Register with the SuperLink, which gives the node's id and from then on expects signs of life."""
        request = ActivateNodeRequest(
            public_key=superlink.pem(self.keys["node"].public_key()), heartbeat_interval=self.heartbeat
        )
        self._node = Node(node_id=self._call(self._client.ActivateNode, request).node_id)
        self._next_beat = time.monotonic() + self.heartbeat

    def beat_if_due(self) -> None:
        """Send a heartbeat when it is time for one."""
        if self._next_beat <= time.monotonic():
            self._next_beat = time.monotonic() + self.heartbeat
            request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=self.heartbeat)
            self._call(self._client.SendNodeHeartbeat, request)

    def pull_if_due(self) -> None:
        """Ask for a message, and answer it where there is one, when it is time to ask."""
        if self._next_pull <= time.monotonic():
            self._pull()
            self._next_pull = time.monotonic() + PULL_SECONDS

    def _pull(self) -> None:
        """Ask for a message, and answer it where there is one."""
        found = self._call(self._client.PullMessages, PullMessagesRequest(node=self._node))
        for head, tree in zip(found.messages_list, found.message_object_trees, strict=True):
            run = head.metadata.run_id
            self._learn_run(run)
            contents = {part.object_id: self._object(run, part.object_id) for part in iterate_object_tree(tree)}
            confirmed = ConfirmMessageReceivedRequest(node=self._node, run_id=run, message_object_id=tree.object_id)
            self._call(self._client.ConfirmMessageReceived, confirmed)
            message = cast(Message, inflate_object_from_contents(tree.object_id, contents))
            message.metadata.__dict__["_message_id"] = tree.object_id
            result = self._result(messages.unpack_task(message.content))
            self._push(Message(messages.pack_result(result), reply_to=message), run)
            self.replies += 1

    def _learn_run(self, run: int) -> None:
        """Pull the run's code, as a node does with its first message."""
        if run not in self._known_runs:
            asked = GetRunRequest(node=self._node, run_id=run)
            digest = self._call(self._client.GetRun, asked).run.fab_hash
            code = GetFabRequest(node=self._node, hash_str=digest, run_id=run)
            self._call(self._client.GetFab, code)
            self._known_runs.add(run)

    def _object(self, run: int, name: str) -> bytes:
        request = PullObjectRequest(node=self._node, run_id=run, object_id=name)
        for _ in range(RETRIES):
            found = self._call(self._client.PullObject, request)
            if found.object_available:
                return bytes(found.object_content)
            time.sleep(POLL_SECONDS)
        raise FederationError(f"the SuperLink does not have an object of the message to '{self.site}'")

    def _result(self, task: TrainTask) -> TrainResult:
        study = study_from_json(task.study)
        key = self.keys["signing"]
        numbers = TrainNumbers(visits=10, patients=10, loss_first=1.0, loss_last=1.0, seconds=1.0)
        step = CHANGE * torch.rand(())  # the SuperLink takes the same bytes of two sites once
        state = {name: value + step for name, value in task.state.items()}
        result = TrainResult(self.site, task.round, state, None, numbers)
        content = result.content_digest()
        entry = hashlib.sha256(content.encode()).hexdigest()
        head = sign_head(key, AuditHead(self.site, study.name, task.round, entry, now()))
        statement = Statement(study.digest(), self.site, task.round, task.nonce, content)
        return replace(result, attestation=attest(key, statement, head))

    def _push(self, reply: Message, run: int) -> None:
        reply.metadata.__dict__["_message_id"] = reply.object_id
        parts = get_all_nested_objects(reply)
        request = PushMessagesRequest(
            node=self._node,
            messages_list=[message_to_proto(remove_content_from_message(reply))],
            message_object_trees=[get_object_tree(reply)],
            clientapp_runtime_list=[1.0],
        )
        pushed = self._call(self._client.PushMessages, request)
        for name in pushed.objects_to_push:
            one = PushObjectRequest(
                node=self._node,
                run_id=run,
                object_id=name,
                object_content=parts[name].deflate(),
                session_id=pushed.session_id,
            )
            self._call(self._client.PushObject, one)

    def _call(self, send: Callable[[Asked], Answer], request: Asked) -> Answer:
        """Send, again after an error of the connection or the server, as Flower's node does."""
        for attempt in range(RETRIES):
            try:
                return send(request)
            except httpx.HTTPError as error:
                refused = isinstance(error, httpx.HTTPStatusError) and not error.response.is_server_error
                if refused or attempt == RETRIES - 1:
                    raise
                with self.traffic.lock:
                    self.traffic.retries += 1
                time.sleep(min(0.1 * 2**attempt, 5.0))
        raise AssertionError


class StubNodes:
    """All nodes, driven by a few threads until the block ends."""

    def __init__(self, sites: list[str], server: str, authority: Path, heartbeat: float) -> None:
        verify = ssl.create_default_context(cafile=str(authority))
        self.traffic = Traffic()
        self.nodes = [StubNode(site, server, verify, self.traffic, heartbeat) for site in sites]
        self.failures: list[str] = []
        self._ended = threading.Event()

    def activate(self) -> None:
        """Log all of them in."""
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(StubNode.activate, self.nodes))

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Heartbeats and pulls, each node's at Flower's intervals or as fast as the machine answers."""
        shares = [self.nodes[number::THREADS] for number in range(THREADS)]
        threads = [threading.Thread(target=self._drive, args=(share,)) for share in shares if share]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._ended.set()
            for thread in threads:
                thread.join()

    def _drive(self, nodes: list[StubNode]) -> None:
        while not self._ended.wait(0.01):
            for node in nodes:
                if self._ended.is_set():
                    return
                try:
                    for other in nodes:  # an answer takes long where the SuperLink is busy
                        other.beat_if_due()
                    node.pull_if_due()
                except Exception as error:
                    self.failures.append(f"{node.site}: {type(error).__name__}: {error}"[:300])
