"""What a server does once for each of its sites does not read or ask for all of them each time."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from pathlib import Path

import httpx
import pytest
from flwr.proto.control_pb2 import ListNodesResponse, RegisterNodeRequest
from flwr.proto.node_pb2 import NodeInfo

from ld_common.protocol.site_keys import new_site_keys, public_keys
from ld_server.deployment import superlink
from ld_server.deployment.provision import synchronize
from ld_server.deployment.study_home import AdmittedSite, StudyHome, now
from ld_simulations.benchmarks.performance.stub_nodes import run


class CountingLink:
    """A SuperLink that counts how often its list is asked for."""

    def __init__(self, failures: list[int] | None = None) -> None:
        self.nodes: list[NodeInfo] = []
        self.asked = 0
        self.failures = failures or []

    def ListNodes(self, request: object) -> ListNodesResponse:
        self.asked += 1
        if self.failures:
            response = httpx.Response(self.failures.pop(0), request=httpx.Request("POST", "https://localhost"))
            response.raise_for_status()
        return ListNodesResponse(nodes_info=self.nodes)

    def RegisterNode(self, request: RegisterNodeRequest) -> None:
        self.nodes.append(NodeInfo(node_id=len(self.nodes), public_key=request.public_key, status="registered"))


@pytest.fixture
def home(tmp_path: Path) -> StudyHome:
    """A home with three admitted sites."""
    made = StudyHome(tmp_path)
    made.write_sites({name: AdmittedSite(name, public_keys(new_site_keys()), now()) for name in ("a", "b", "c")})
    return made


def test_a_list_that_did_not_change_is_not_read_again(home: StudyHome) -> None:
    first = home.sites()
    assert home.sites()["a"] is first["a"]
    first.clear()  # a caller's copy
    with home.editing() as sites:
        sites["b"] = dataclasses.replace(sites["b"], revoked=now())
    assert [site.revoked is None for site in home.sites().values()] == [True, False, True]


def test_a_start_registers_all_sites_and_asks_for_the_list_once(
    home: StudyHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = CountingLink()
    monkeypatch.setattr(superlink, "control", lambda home: nullcontext(link))
    synchronize(home)
    assert (len(link.nodes), link.asked) == (3, 1)
    synchronize(home)
    assert (len(link.nodes), link.asked) == (3, 2)


@pytest.mark.parametrize(("failures", "asked"), [([], 1), ([500, 503], 3)])
def test_a_busy_superlink_is_asked_again(failures: list[int], asked: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(superlink, "POLL_SECONDS", 0.0)
    link = CountingLink(failures)
    assert superlink.nodes(link) == []  # type: ignore[arg-type]
    assert link.asked == asked


@pytest.mark.parametrize("patience", [0.0, 120.0])
def test_a_refusal_or_a_dead_superlink_is_an_error(patience: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(superlink, "BUSY_SECONDS", patience)
    link = CountingLink([403 if patience else 500])
    with pytest.raises(httpx.HTTPStatusError):
        superlink.nodes(link)  # type: ignore[arg-type]


@pytest.mark.slow
def test_stub_nodes_answer_a_real_superlink(tmp_path: Path) -> None:
    measured = run(tmp_path, nodes=6, rounds=2)
    assert {name: measured[name] for name in ("nodes", "replies", "left_out", "failed_calls")} == {
        "nodes": 6,
        "replies": 6,
        "left_out": 0,
        "failed_calls": 0,
    }
    assert measured["superlink_peak_mb"] > 0 and measured["server_app_peak_mb"] > 0
    assert measured["received_bytes"] > measured["sent_bytes"] > 0
