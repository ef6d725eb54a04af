"""Who is who: which connected node is which site, and who may take part.

A simulation asks its nodes for their names and believes them. A deployment knows each site by the key with which its
node has proved itself to Flower's SuperLink, and asks nobody.
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
from ld_common.protocol.keys import fingerprint, public_line, read_public_line
from ld_common.protocol.messages import TrainResult, TrainTask

JOIN_TIMEOUT_SECONDS = 60.0
AUDIT_HEAD = "audit_head"


@dataclass(frozen=True)
class PresentNodes:
    """The nodes that are connected now."""

    nodes: dict[str, int]
    """Site -> node, for the sites that are known."""
    unknown_nodes: list[str] = field(default_factory=list)
    """Fingerprints of the keys of nodes that are none of them, sorted."""


Identify = Callable[[Grid], PresentNodes]
Allowed = Callable[[], Mapping[str, str]]
"""The list of who may take part as it is now: site -> its public key, one line of OpenSSH's format."""
Entry = Mapping[str, Any]
"""What a round's record keeps of a site's answer."""
Prepare = Callable[[str, TrainTask, Entry | None], TrainTask]
"""Completes a site's task of a round, given its last entry; None where it has not answered yet."""
Check = Callable[[str, TrainTask, TrainResult], Entry]
"""Judges a site's answer to its task; returns what the record shall keep besides, raises `LdError` to leave it out."""


class AskedNames:
    """Each node is what it says it is, asked once as long as it is connected: for simulations only."""

    def __init__(self) -> None:
        self._names: dict[int, str] = {}

    def __call__(self, grid: Grid) -> PresentNodes:
        """Ask the new nodes; of two with one name the first to say it stays."""
        nodes = set(grid.get_node_ids())
        self._names = {node: name for node, name in self._names.items() if node in nodes}
        new = sorted(nodes - set(self._names))
        asked = [Message(RecordDict(), dst_node_id=node, message_type=f"query.{messages.JOIN}") for node in new]
        for reply in grid.send_and_receive(asked, timeout=JOIN_TIMEOUT_SECONDS) if asked else []:
            name = messages.unpack_name(reply.content) if reply.has_content() else None
            if name is not None:
                self._names[reply.metadata.src_node_id] = name
        found: dict[str, int] = {}
        for node, name in self._names.items():
            found.setdefault(name, node)
        return PresentNodes(found)


class AllowedKeys:
    """Each node is the site whose key it has proved; the list is read anew at every call."""

    def __init__(self, allowed: Allowed) -> None:
        self.allowed = allowed

    def __call__(self, grid: Grid) -> PresentNodes:
        """Look every node's key up.

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
    """Who takes part, what is added to their tasks, and what is asked of their answers beyond the study's checks."""

    identify: Identify = field(default_factory=AskedNames)
    prepare: Prepare = lambda site, task, last: task
    checks: Sequence[Check] = ()


def _node_key(pem: bytes) -> EllipticCurvePublicKey | None:
    """A node's key as Flower has it, PEM of SubjectPublicKeyInfo; None where it has none of our kind."""
    try:
        key = serialization.load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        return None
    return key if isinstance(key, EllipticCurvePublicKey) else None
