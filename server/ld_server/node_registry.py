"""Maps connected nodes to sites, and holds who may take part.

A simulation asks its nodes for their names and trusts the answers. A deployment identifies each site by the key that
its node has proved to Flower's SuperLink.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from ld_common.protocol import messages
from ld_common.protocol.keys import PublicKey, fingerprint, public_line, read_public_line
from ld_common.protocol.messages import TrainResult, TrainTask

JOIN_TIMEOUT_SECONDS = 60.0
AUDIT_HEAD = "audit_head"


@dataclass(frozen=True)
class PresentNodes:
    """The connected nodes."""

    nodes: dict[str, int]
    """Site -> node."""
    unknown_nodes: list[str] = field(default_factory=list)
    """Fingerprints of the keys of other nodes, sorted."""


Identify = Callable[[Grid], PresentNodes]
Allowed = Callable[[], Mapping[str, str]]
"""Returns the present list of admitted sites: site -> its node's public key, one line of OpenSSH's format."""
SigningKeys = Callable[[], Mapping[str, PublicKey]]
"""Returns the present list of admitted sites with the keys of their signatures."""
Entry = Mapping[str, Any]
"""What a round's record keeps of a site's result."""
Prepare = Callable[[str, TrainTask, Entry | None], TrainTask]
"""Completes a site's task, given its last entry; None where it has no result yet."""
Check = Callable[[str, TrainTask, TrainResult], Entry]
"""Checks a site's result for its task; returns more for the record, raises `LdError` to leave the site out."""


class AskedNames:
    """Asks each node for its name, once while it is connected; for simulations only."""

    def __init__(self) -> None:
        self._names: dict[int, str] = {}

    def __call__(self, grid: Grid) -> PresentNodes:
        """Ask the new nodes; of two nodes with one name, the first counts."""
        nodes = set(grid.get_node_ids())
        self._names = {node: name for node, name in self._names.items() if node in nodes}
        new = sorted(nodes - set(self._names))
        queries = [Message(RecordDict(), dst_node_id=node, message_type=f"query.{messages.JOIN}") for node in new]
        for reply in grid.send_and_receive(queries, timeout=JOIN_TIMEOUT_SECONDS) if queries else []:
            name = messages.unpack_name(reply.content) if reply.has_content() else None
            if name is not None:
                self._names[reply.metadata.src_node_id] = name
        sites: dict[str, int] = {}
        for node, name in self._names.items():
            sites.setdefault(name, node)
        return PresentNodes(sites)


class AllowedKeys:
    """Identifies each node by the key that it has proved; the list is read again at every call."""

    def __init__(self, allowed: Allowed) -> None:
        self.allowed = allowed

    def __call__(self, grid: Grid) -> PresentNodes:
        """Look up every node's key.

        Raises:
            LdError: the list cannot be read.
        """
        names = {public_line(read_public_line(line)): name for name, line in self.allowed().items()}
        nodes: dict[str, int] = {}
        unknown_nodes: set[str] = set()
        for node in grid.get_nodes():
            key = _node_key(bytes(node.public_key))
            name = None if key is None else names.get(public_line(key))
            if name is not None:
                nodes[name] = node.node_id
            else:
                unknown_nodes.add("a node without a key" if key is None else fingerprint(key))
        return PresentNodes(nodes, sorted(unknown_nodes))


@dataclass(frozen=True)
class Admission:
    """Who takes part, what is added to their tasks, and further checks of their results."""

    identify: Identify = field(default_factory=AskedNames)
    prepare: Prepare = lambda site, task, last: task
    checks: Sequence[Check] = ()
    signing_keys: SigningKeys | None = None
    """None where sites have no keys: their messages of secure aggregation are then not signed."""


def _node_key(pem: bytes) -> EllipticCurvePublicKey | None:
    """A node's key from Flower, PEM of SubjectPublicKeyInfo; None where it has no elliptic-curve key."""
    try:
        key = serialization.load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        return None
    return key if isinstance(key, EllipticCurvePublicKey) else None
