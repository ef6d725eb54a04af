"""Who is who: nodes known by their keys, a list that is read anew, and a grid that one ill reply does not stop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
import yaml
from flwr.app import Context, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, validate_object_content
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.task_identity import TaskIdentity

from ld_common.core.config import to_mapping
from ld_common.core.errors import AdapterError, ConfigError, DeploymentError, FederationError
from ld_common.protocol import messages as wire
from ld_common.protocol.attestation import AuditHead, Statement, attest, head_record, sign_head
from ld_common.protocol.keys import fingerprint, new_signing_key, public_line
from ld_common.protocol.messages import TrainResult, TrainTask
from ld_common.protocol.site_keys import new_site_keys, public_keys
from ld_common.protocol.study_config import study_from_json
from ld_common.release.release import read_release
from ld_server.deployment.admission import deployed_admission
from ld_server.deployment.study_home import AdmittedSite, StudyHome
from ld_server.node_registry import AUDIT_HEAD, Admission, AllowedKeys, AskedNames
from ld_server.resilient_grid import ResilientGrid
from ld_server.server_app import main, run_study
from tests.server.test_strategy import MODALITY, Behaviour, LocalGrid, honest, load_channels, study

PRIVATE_KEYS = {name: new_site_keys() for name in ("p", "q", "r", "stranger")}
SITE_KEYS = {name: public_keys(keys) for name, keys in PRIVATE_KEYS.items()}
KEYS = {name: keys.node_key for name, keys in SITE_KEYS.items()}
SITES = ["p", "q", "r"]


@pytest.fixture(autouse=True)
def task_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


class KeyedGrid(LocalGrid):
    """Nodes that have proved a key each, and whose replies are pulled as those of Flower's `HttpGrid`.

    A node's own word of its name is a lie: only its key tells. Each site signs what it answers, before `behave`.
    """

    def __init__(self, sites: dict[str, Behaviour], channels: int = 4) -> None:
        super().__init__(sites, channels)
        self.stored: dict[str, Message] = {}
        self.pulls: list[list[str]] = []
        self.tasks: dict[tuple[str, int], TrainTask] = {}

    def get_nodes(self) -> Iterator[NodeInfo]:
        for node, (name, _) in self.sites.items():
            yield NodeInfo(node_id=node, name="p", public_key=public_key_to_bytes(KEYS[name]))

    def _good(self, name: str, task: TrainTask) -> TrainResult:
        result = super()._good(name, task)
        if not task.nonce:
            return result
        self.tasks[name, task.round] = task
        entry = 1 if task.audit_head is None else task.audit_head.sequence + 1
        return signed(result, task, name, entry)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        for message in messages:
            assert not message.metadata.message_type.startswith("query"), "nobody is asked for a name"
            message.metadata.__dict__["_message_id"] = str(uuid4())
            reply = self._reply(message)
            if reply is not None:
                self.stored[message.metadata.message_id] = reply
            yield message.metadata.message_id

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self.pulls.append(list(message_ids))
        return [self.stored.pop(one) for one in self.pulls[-1] if one in self.stored]


def signed(result: TrainResult, task: TrainTask, name: str, entry: int = 1) -> TrainResult:
    """The result with the attestation of the site of this name."""
    own = study_from_json(task.study)
    key, content = PRIVATE_KEYS[name]["signing"], result.content_digest()
    head = sign_head(key, AuditHead(name, own.name, entry, f"{entry:064x}", "2026-01-01T00:00:00+00:00"))
    statement = Statement(own.digest(), result.site, result.round, task.nonce, content)
    return replace(result, attestation=attest(key, statement, head))


def lines(*names: str) -> dict[str, str]:
    return {name: public_line(KEYS[name]) + " a comment" for name in names}


@pytest.mark.attack
def test_a_node_is_the_site_of_its_key_and_a_stranger_is_noted() -> None:
    grid = KeyedGrid(dict.fromkeys(["q", "stranger", "p"], honest))
    found = AllowedKeys(lambda: lines("p", "q", "r"))(grid)
    assert found.nodes == {"q": 11, "p": 13}
    assert found.unknown_nodes == [fingerprint(KEYS["stranger"])]


@pytest.mark.attack
def test_a_node_without_a_key_or_with_one_of_another_kind_is_nobody() -> None:
    class Odd(LocalGrid):
        def get_nodes(self) -> Iterator[NodeInfo]:
            yield NodeInfo(node_id=1)
            yield NodeInfo(node_id=2, public_key=b"no key")

    ed25519 = public_line(new_signing_key().public_key())
    found = AllowedKeys(lambda: lines("p") | {"q": ed25519})(Odd({}, 4))
    assert found.nodes == {}
    assert found.unknown_nodes == ["a node without a key"]


def test_a_name_is_asked_for_once(tiny_base: Path) -> None:
    class Counting(LocalGrid):
        asked = 0

        def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
            asked = list(messages)
            self.asked += len(asked)
            return super().send_and_receive(asked, timeout=timeout)

    grid, identify = Counting(dict.fromkeys(["p", "q", "other"], honest), 4), AskedNames()
    for _ in range(3):
        assert identify(grid).nodes == {"p": 11, "q": 12, "other": 13}
    assert grid.asked == 3
    del grid.sites[11]
    assert identify(grid).nodes == {"q": 12, "other": 13}


@pytest.fixture
def home(tiny_base: Path, tmp_path: Path) -> StudyHome:
    """A deployed study's folder, all its sites admitted."""
    home = StudyHome(tmp_path / "home")
    home.path.mkdir()
    content = to_mapping(study(tiny_base, tmp_path / "elsewhere", SITES)) | {"modality": "modality.yaml"}
    (home.path / "study.yaml").write_text(yaml.safe_dump(content))
    (home.path / "modality.yaml").write_text(yaml.safe_dump(to_mapping(MODALITY)))
    home.write_sites({name: AdmittedSite(name, SITE_KEYS[name], "2026-01-01") for name in SITES})
    return home


def context(home: StudyHome, **config: str | bool) -> Context:
    study_key = {"study": "nowhere.yaml", "overrides": "", "home": str(home.path), "resume": False}
    return Context(1, 1, {}, RecordDict(), {**study_key, **config})


def test_a_deployed_study_runs_with_the_keys_of_its_home(home: StudyHome, tiny_base: Path) -> None:
    grid = KeyedGrid(dict.fromkeys([*SITES, "stranger"], honest), load_channels(tiny_base))
    main(grid, context(home))
    rounds = read_release(home.run / "release").manifest["rounds"]
    assert [sorted(record["sites"]) for record in rounds] == [SITES, SITES]
    assert [record["unknown_nodes"] for record in rounds] == [[fingerprint(KEYS["stranger"])]] * 2
    with pytest.raises(FederationError, match="--resume"):
        main(KeyedGrid({}), context(home))
    assert "--resume" in (home.run / "failure.txt").read_text()
    main(KeyedGrid({}), context(home, resume=True))  # ended: its release is written again
    assert not (home.run / "failure.txt").exists()
    with pytest.raises(ConfigError, match="approved study"):
        main(grid, context(home, overrides="seed=1"))
    with pytest.raises(DeploymentError, match="ld-server provision"):
        main(grid, context(StudyHome(home.path / "none")))


@pytest.mark.attack
def test_a_revocation_holds_at_once(home: StudyHome, tiny_base: Path) -> None:
    def revoked_while_it_trains(result: TrainResult) -> RecordDict:
        with home.editing() as sites:
            sites["r"] = replace(sites["r"], revoked="2026-01-02")
        return wire.pack_result(result)

    grid = KeyedGrid({"p": honest, "q": honest, "r": revoked_while_it_trains}, load_channels(tiny_base))
    main(grid, context(home))
    first, second = read_release(home.run / "release").manifest["rounds"]
    assert first["left_out"] == {"r": "it was revoked during the round"}
    assert second["left_out"] == {"r": "it was not connected"}
    assert second["unknown_nodes"] == [fingerprint(KEYS["r"])]
    assert [sorted(record["sites"]) for record in (first, second)] == [["p", "q"]] * 2


def test_every_task_has_its_nonce_and_the_last_head_also_after_a_restart(home: StudyHome, tiny_base: Path) -> None:
    class Dying(KeyedGrid):
        def _good(self, name: str, task: TrainTask) -> TrainResult:
            if (name, task.round) == ("r", 2):
                raise KeyboardInterrupt
            return super()._good(name, task)

    sites, channels = dict.fromkeys(SITES, honest), load_channels(tiny_base)
    before, after = Dying(sites, channels), KeyedGrid(sites, channels)
    with pytest.raises(KeyboardInterrupt):
        main(before, context(home))
    main(after, context(home, resume=True))
    tasks = [*before.tasks.values(), *after.tasks.values()]
    assert len({task.nonce for task in tasks}) == len(tasks) == 3 + 2 + 3
    for name in SITES:
        assert before.tasks[name, 1].audit_head is None
        head = after.tasks[name, 2].audit_head
        assert head is not None
        assert (head.site, head.sequence) == (name, 1)
    records = read_release(home.run / "release").manifest["rounds"]
    assert [record["sites"]["p"]["audit_head"]["sequence"] for record in records] == [1, 2]


FORGED: dict[str, tuple[Callable[[TrainResult, TrainTask], TrainResult], str]] = {
    "unsigned": (lambda result, task: replace(result, attestation=None), "is not signed"),
    "altered": (lambda result, task: replace(result, drift=result.drift + 0.1), "does not hold"),  # type: ignore[operator]
    "another's key": (lambda result, task: signed(result, task, "stranger"), "does not hold"),
    "another task's": (lambda result, task: signed(result, replace(task, nonce="0" * 32), "r"), "does not hold"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORGED)
@pytest.mark.attack
def test_an_answer_counts_only_with_the_sites_signature_for_this_task(
    home: StudyHome, tiny_base: Path, kind: str
) -> None:
    forge, words = FORGED[kind]
    grid = KeyedGrid(
        {
            "p": honest,
            "q": honest,
            "r": lambda result: wire.pack_result(forge(result, grid.tasks["r", result.round])),
        },
        load_channels(tiny_base),
    )
    main(grid, context(home))
    for record in read_release(home.run / "release").manifest["rounds"]:
        assert sorted(record["sites"]) == ["p", "q"]
        assert words in record["left_out"]["r"]


def test_an_unreadable_list_lets_nobody_in_and_does_not_end_a_run(home: StudyHome, tiny_base: Path) -> None:
    def spoils_the_list(result: TrainResult) -> RecordDict:
        if result.round == 2:
            home.registry.write_text("{")
        return wire.pack_result(result)

    (home.path / "study.yaml").write_text((home.path / "study.yaml").read_text().replace("rounds: 2", "rounds: 3"))
    grid = KeyedGrid({"p": spoils_the_list, "q": honest}, load_channels(tiny_base))
    main(grid, context(home))
    rounds = read_release(home.run / "release").manifest["rounds"]
    assert [record["counted"] for record in rounds] == [True, False, False]
    assert all("cannot read the list of sites" in why for why in (rounds[1]["left_out"]["p"], rounds[2]["failure"]))


def test_tasks_are_prepared_and_answers_judged_site_by_site(tiny_base: Path, tmp_path: Path) -> None:
    given: dict[tuple[str, int], TrainTask] = {}

    lasts: dict[tuple[str, int], Mapping[str, Any] | None] = {}

    def prepare(site: str, task: TrainTask, last: Mapping[str, Any] | None) -> TrainTask:
        lasts[site, task.round] = last
        given[site, task.round] = replace(task, study=task.study + " " * len(given))
        return given[site, task.round]

    def check(site: str, task: TrainTask, result: TrainResult) -> Mapping[str, Any]:
        assert task is given[site, result.round]
        if site == "q":
            raise AdapterError("its attestation does not hold")
        if site == "r":
            raise KeyError("whatever a check stumbles over")
        return {"seen": result.round}

    seen: list[TrainTask] = []

    class Watched(LocalGrid):
        def _good(self, name: str, task: TrainTask) -> TrainResult:
            seen.append(task)
            return super()._good(name, task)

    grid = Watched(dict.fromkeys(SITES, honest), load_channels(tiny_base))
    own = study(tiny_base, tmp_path, SITES, min_train_nodes=1, validate_every=0)
    folder = run_study(grid, own, MODALITY, admission=Admission(prepare=prepare, checks=[check]))
    rounds = read_release(folder).manifest["rounds"]
    assert all(list(record["sites"]) == ["p"] for record in rounds)
    assert rounds[0]["left_out"] == {
        "q": "its attestation does not hold",
        "r": "its reply cannot be read (KeyError)",
    }
    assert len({task.study for task in seen}) == 6  # each site and round its own
    assert lasts["p", 1] is None
    assert lasts["p", 2] == rounds[0]["sites"]["p"]
    assert [record["sites"]["p"]["seen"] for record in rounds] == [1, 2]


def ill_reply(message_id: str) -> Message:
    """What Flower's grid does with an object of good head and ill body, as a hostile node may store it."""
    body = b"\xff not a message"
    content = b"Message  %d\x00" % len(body) + body
    validate_object_content(content)  # so the SuperLink takes it
    found = inflate_object_from_contents("0", {"0": content})
    assert isinstance(found, Message)
    return found


@pytest.mark.attack
def test_an_object_that_cannot_be_decoded_costs_its_sender_alone(home: StudyHome, tiny_base: Path) -> None:
    class Hostile(KeyedGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            asked = list(message_ids)
            for one in asked:
                if one in self.stored and self.stored[one].metadata.src_node_id == 13:
                    del self.stored[one]
                    return [ill_reply(one)]
            return super().pull_messages(asked)

    grid = Hostile(dict.fromkeys(SITES, honest), load_channels(tiny_base))
    main(grid, context(home))
    rounds = read_release(home.run / "release").manifest["rounds"]
    assert [sorted(record["sites"]) for record in rounds] == [["p", "q"]] * 2
    assert all("did not reply" in record["left_out"]["r"] for record in rounds)


@pytest.mark.attack
def test_a_reply_counts_only_for_the_message_that_it_was_pulled_for() -> None:
    class Forging(KeyedGrid):
        """q's reply says, in its own body, that it replies to p's message; p is silent."""

        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            ids = list(super().push_messages(messages))
            self.stored[ids[1]].metadata.__dict__["_reply_to_message_id"] = ids[0]
            return ids

    grid = Forging({"p": lambda result: None, "q": honest})  # type: ignore[dict-item,return-value]
    task = TrainTask({"a": torch.zeros(2)}, 1, "{}", "", "")
    asked = [Message(wire.pack_task(task), dst_node_id=node, message_type="train") for node in grid.sites]
    assert list(ResilientGrid(grid).send_and_receive(asked, timeout=0.5)) == []
    assert all(len(ids) == 1 for ids in grid.pulls)


def test_a_connection_that_fails_is_not_taken_for_a_silent_site() -> None:
    class Broken(KeyedGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            raise ConnectionError("the SuperLink is gone")

    grid = Broken({"p": honest})
    task = TrainTask({"a": torch.zeros(2)}, 1, "{}", "", "")
    with pytest.raises(ConnectionError):
        list(
            ResilientGrid(grid).send_and_receive(
                [Message(wire.pack_task(task), dst_node_id=11, message_type="train")], timeout=0.5
            )
        )


def test_a_site_is_told_the_head_of_its_present_log_alone(tmp_path: Path) -> None:
    home, own = StudyHome(tmp_path), study(tmp_path, tmp_path, SITES)
    home.write_sites({"p": AdmittedSite("p", SITE_KEYS["p"], "2026-01-01T00:00:00+00:00")})
    prepare = deployed_admission(home, own).prepare
    task = TrainTask(study="", round=2, state={}, base_digest="", modality_digest="")
    for signer, told in (("p", True), ("q", False)):  # q's stands for the key that p had before
        head = sign_head(
            PRIVATE_KEYS[signer]["signing"], AuditHead("p", own.name, 7, "0" * 64, "2026-01-01T00:00:00+00:00")
        )
        asked = prepare("p", task, {AUDIT_HEAD: head_record(head)})
        assert asked.audit_head == (head if told else None)
        assert asked.nonce
    assert prepare("p", task, None).audit_head is None
