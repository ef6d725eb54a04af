"""A server that asks one stage of secure aggregation twice: at once, after a restart, and in another run."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from ld_client import client_app as app
from ld_client.deployment.site_home import SiteHome
from ld_common.core.config import from_mapping
from ld_common.protocol import messages
from ld_common.protocol.secagg.messages import Payload, SecaggSetting, Stage, UnmaskRequest, fewest_summed, pack
from ld_common.protocol.study_config import StudyConfig
from ld_server.secagg import SecureAggregation
from tests.support.site_homes import approved, asked, make_home, node_of, task_of

SITES = ["aster", "birch", "cedar"]
OPTIONS: dict[str, Any] = {
    "name": "demo",
    "adapter": {"name": "lora", "rank": 1, "targets": ["to_k"]},
    "training": {"steps": 1, "batch_size": 2},
    "drift": {"shape": "none"},
    "federation": {"rounds": 3, "sites": SITES, "weighting": "equal", "secure_aggregation": True},
}


@pytest.fixture(autouse=True)
def task_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.fixture
def homes(site_yaml: Path) -> dict[str, SiteHome]:
    """Three deployed sites of a study with secure aggregation."""
    made = {}
    for name in SITES:
        folder = site_yaml.parent / name
        folder.mkdir()
        file = site_yaml.with_name(f"{name}.yaml")
        text = site_yaml.read_text().replace("store: store", f"store: {name}-store")
        file.write_text(text.replace("site: aster", f"site: {name}"))
        made[name] = approved(make_home(folder, file, from_mapping(StudyConfig, OPTIONS)))
    return made


def ask(home: SiteHome, kind: str, content: RecordDict, node: Context | None = None) -> Message:
    """The answer of a node that knows nothing of earlier messages, as in a new run."""
    return app.app(asked(content, kind), node_of(home) if node is None else node)


def payload(reply: Message) -> Payload | None:
    found = messages.unpack_secure(reply.content)
    return None if found is None else dict(found)  # type: ignore[arg-type]


def refused(reply: Message) -> bool:
    return messages.unpack_error(reply.content) is not None


def at_once(calls: list[Callable[[], Message]]) -> list[Message]:
    """Answers of calls that begin together."""
    barrier, answers = threading.Barrier(len(calls)), {}

    def run(number: int, call: Callable[[], Message]) -> None:
        barrier.wait()
        answers[number] = call()

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [answers[number] for number in range(len(calls))]


class Server:
    """A server of one round, which keeps what it sent for another try."""

    def __init__(self, homes: dict[str, SiteHome], round_number: int = 1) -> None:
        self.homes, self.round = homes, round_number
        self.study = homes["aster"].study()
        self.length = sum(value.numel() for value in task_of(homes["aster"]).state.values())
        self.setting = setting_of(self.study, self.length, round_number)
        self.aggregation = SecureAggregation(self.setting, SITES)
        self.sent: dict[Stage, dict[str, Payload]] = {}
        self.tasks: dict[str, Payload] = {}

    def agree(self) -> None:
        """Stages `keys` and `shares`."""
        self.tasks = self.aggregation.agree(self.exchange)

    def exchange(self, stage: Stage, requests: dict[str, Payload]) -> dict[str, Any]:
        self.sent[stage] = requests
        answers = {site: payload(self.stage(site, stage, request)) for site, request in requests.items()}
        return {site: answer for site, answer in answers.items() if answer is not None}

    def stage(self, site: str, stage: Stage, request: Payload) -> Message:
        return ask(self.homes[site], f"query.{stage.value}", messages.pack_secure(request))

    def task(self, site: str, zero: bool = False) -> RecordDict:
        """Request of stage `vector`, with the adapter of the study or one of zeros."""
        task = replace(task_of(self.homes[site], round=self.round), secure=self.tasks[site])
        if zero:
            task = replace(task, state={name: torch.zeros_like(value) for name, value in task.state.items()})
        return messages.pack_task(task)

    def train(self, site: str) -> Message:
        return ask(self.homes[site], "train", self.task(site))


def setting_of(study: StudyConfig, length: int, round_number: int = 1) -> SecaggSetting:
    federation = study.federation
    return SecaggSetting(
        study.digest(), round_number, len(SITES), fewest_summed(len(SITES), federation), length, federation.secure_clip
    )


def vectors(replies: list[Message]) -> list[bytes]:
    results = [messages.unpack_result(reply.content) for reply in replies if not refused(reply)]
    return [bytes(result.secure["vector"]) for result in results if result.secure is not None]  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.attack
def test_two_tasks_of_one_round_give_one_vector(homes: dict[str, SiteHome], zero: bool) -> None:
    """The difference of two vectors under the same masks is the site's own update."""
    server = Server(homes)
    server.agree()
    tasks = [server.task("aster"), server.task("aster", zero)]
    replies = at_once([lambda task=task: ask(homes["aster"], "train", task) for task in tasks])  # type: ignore[misc]
    assert len(vectors(replies)) == 1
    assert sum(map(refused, replies)) == 1


@pytest.mark.slow
@pytest.mark.attack
def test_two_requests_of_one_stage_give_one_answer(homes: dict[str, SiteHome]) -> None:
    server = Server(homes)
    server.agree()
    shares = server.sent[Stage.SHARES]["birch"]
    assert refused(server.stage("birch", Stage.SHARES, shares))
    assert len(vectors([server.train(site) for site in ("aster", "birch")])) == 2
    session = server.tasks["aster"]["session"]
    lists = [(["aster", "birch", "cedar"], []), (["aster", "birch"], ["cedar"])]
    requests = [pack(UnmaskRequest(session, *both)) for both in lists]  # type: ignore[arg-type]
    replies = at_once([lambda asks=asks: server.stage("aster", Stage.UNMASK, asks) for asks in requests])  # type: ignore[misc]
    assert sum(map(refused, replies)) >= 1
    assert all(refused(server.stage("aster", Stage.UNMASK, request)) for request in requests)


@pytest.mark.attack
def test_shares_are_dealt_once_however_often_they_are_asked_for(homes: dict[str, SiteHome]) -> None:
    server = Server(homes)
    keys = server.exchange(Stage.KEYS, {site: pack(server.setting) for site in SITES})
    roster: Payload = {
        "sites": SITES,
        "sealing_keys": [keys[site]["sealing_key"] for site in SITES],
        "masking_keys": [keys[site]["masking_key"] for site in SITES],
        "signatures": [keys[site]["signature"] for site in SITES],
    }
    replies = at_once([lambda: server.stage("aster", Stage.SHARES, roster) for _ in range(4)])
    assert sorted(map(refused, replies)) == [False, True, True, True]


@pytest.mark.slow
@pytest.mark.attack
def test_a_round_whose_vector_left_is_over_also_in_another_run(homes: dict[str, SiteHome]) -> None:
    server = Server(homes)
    server.agree()
    assert len(vectors([server.train("aster")])) == 1
    again = Server(homes)
    offers = again.exchange(Stage.KEYS, {site: pack(again.setting) for site in SITES})
    assert "aster" not in offers
    assert {"birch", "cedar"} <= set(offers)
    following = Server(homes, round_number=2)
    following.agree()
    assert len(vectors([following.train("aster")])) == 1


@pytest.mark.slow
@pytest.mark.attack
def test_a_task_that_was_killed_while_it_trained_is_not_begun_again(
    homes: dict[str, SiteHome], monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(BaseException):
        """Ends a task where a kill could."""

    def killed(*_: object) -> None:
        raise KilledError

    server = Server(homes)
    server.agree()
    with monkeypatch.context() as patched:
        patched.setattr("ld_client.round.train_round", killed)
        assert messages.unpack_error(server.train("aster").content) is not None
    assert refused(server.train("aster"))


@pytest.mark.attack
def test_a_setting_that_is_not_the_approved_study_s_is_refused(homes: dict[str, SiteHome]) -> None:
    server = Server(homes)
    wrong: list[dict[str, Any]] = [{"study": "another"}, {"round": 4}, {"round": 0}, {"sites": 4}, {"threshold": 2}]
    wrong += [{"clip": 1e-6}, {"clip": 100.0}, {"levels": 2}]
    for changes in wrong:
        assert refused(server.stage("aster", Stage.KEYS, pack(replace(server.setting, **changes)))), changes
    assert not refused(server.stage("aster", Stage.KEYS, pack(server.setting)))


@pytest.mark.attack
def test_a_study_without_secure_aggregation_offers_no_keys(site_yaml: Path) -> None:
    options = OPTIONS | {"federation": {**OPTIONS["federation"], "secure_aggregation": False}}
    home = approved(make_home(site_yaml.parent, site_yaml, from_mapping(StudyConfig, options)))
    assert refused(ask(home, "query.keys", messages.pack_secure(pack(setting_of(home.study(), 10)))))


@pytest.mark.slow
@pytest.mark.attack
def test_the_state_is_the_site_s_alone(homes: dict[str, SiteHome]) -> None:
    home, server = homes["aster"], Server(homes)
    server.agree()
    (state,) = home.secure_rounds.glob("*.json")
    assert state.stat().st_mode & 0o777 == 0o600
    assert home.secure_rounds.stat().st_mode & 0o777 == 0o700
    shutil.rmtree(home.secure_rounds)
    assert refused(server.train("aster"))  # without its secrets a site begins nothing anew
