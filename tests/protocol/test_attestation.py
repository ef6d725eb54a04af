"""Signed answers: what was altered, replayed or signed by another is refused; an honest one passes over the wire."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flwr.supercore.task_identity import TaskIdentity

from ld_client.client_app import app
from ld_client.deployment.approve import approve
from ld_client.deployment.audit_log import parse_line
from ld_client.deployment.audit_verify import verify_home
from ld_client.deployment.site_home import SiteHome
from ld_client.privacy.ledger import Ledger
from ld_common.core.config import from_mapping
from ld_common.core.errors import SignatureError
from ld_common.protocol import messages
from ld_common.protocol.attestation import (
    AuditHead,
    Statement,
    attest,
    check_attestation,
    head_from_record,
    head_record,
    new_nonce,
    shrinkages,
    sign_head,
)
from ld_common.protocol.keys import new_signing_key
from ld_common.protocol.messages import TrainNumbers, TrainResult
from ld_common.protocol.study_config import StudyConfig
from tests.support.site_homes import approved, asked, make_home, node_of, task_of

KEY, OTHER_KEY = new_signing_key(), new_signing_key()
STUDY, NONCE = "f" * 64, "0123456789abcdef"
HEAD = sign_head(KEY, AuditHead("aster", "demo", 12, "a" * 64, "2026-01-01T00:00:00+00:00"))
RESULT = TrainResult(
    "aster",
    3,
    {"unet.a": torch.arange(6.0).reshape(2, 3), "unet.b": torch.zeros(())},
    torch.ones(4, 1, 1),
    TrainNumbers(9, 4, 1.5, 0.5, 12.0),
    {"session": b"s", "vector": b"v" * 8, "names": ["p", "q"]},
)


@pytest.fixture(autouse=True)
def task_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def statement(result: TrainResult, nonce: str = NONCE) -> Statement:
    return Statement(STUDY, "aster", 3, nonce, result.content_digest())


def signed(result: TrainResult = RESULT) -> TrainResult:
    return replace(result, attestation=attest(KEY, statement(result), HEAD))


def check(result: TrainResult, nonce: str = NONCE) -> AuditHead:
    """What the server does with an answer."""
    return check_attestation(KEY.public_key(), statement(result, nonce), result.attestation, "demo")


def test_an_honest_answer_passes_over_the_wire_and_brings_its_head() -> None:
    arrived = messages.unpack_result(messages.pack_result(signed()))
    assert check(arrived) == HEAD
    assert arrived.content_digest() == RESULT.content_digest()
    unsigned = messages.unpack_result(messages.pack_result(RESULT))
    assert unsigned.attestation is None
    with pytest.raises(SignatureError, match="not signed"):
        check(unsigned)


def with_tensor(change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, object]:
    return {"state": RESULT.state | {"unet.a": change(RESULT.state["unet.a"])}}


ALTERED: dict[str, dict[str, object]] = {
    "a value": with_tensor(lambda tensor: tensor + torch.tensor([[0.0, 0, 0], [0, 0, 1e-6]])),
    "a zero's sign": with_tensor(lambda tensor: torch.where(tensor == 0, -0.0, tensor)),
    "a shape": with_tensor(lambda tensor: tensor.reshape(3, 2)),
    "a type": with_tensor(lambda tensor: tensor.view(torch.int32)),
    "a name": {"state": {"unet.c": RESULT.state["unet.a"], "unet.b": RESULT.state["unet.b"]}},
    "two names swapped": {"state": {"unet.a": RESULT.state["unet.b"], "unet.b": RESULT.state["unet.a"]}},
    "a tensor less": {"state": {"unet.a": RESULT.state["unet.a"]}},
    "a tensor more": {"state": RESULT.state | {"unet.c": torch.zeros(1)}},
    "the drift": {"drift": torch.full((4, 1, 1), 1.0001)},
    "no drift": {"drift": None},
    "the visits": {"numbers": TrainNumbers(10, 4, 1.5, 0.5, 12.0)},
    "no numbers": {"numbers": None},
    "a masked vector": {"secure": {**(RESULT.secure or {}), "vector": b"v" * 7 + b"w"}},
    "a text for bytes": {"secure": {**(RESULT.secure or {}), "session": "s"}},
    "no masked vector": {"secure": None},
    "the site": {"site": "birch"},
    "the round": {"round": 4},
}


@pytest.mark.parametrize("kind", ALTERED)
@pytest.mark.attack
def test_whatever_is_altered_on_its_way_is_refused(kind: str) -> None:
    with pytest.raises(SignatureError, match="does not hold"):
        check(replace(signed(), **ALTERED[kind]))  # type: ignore[arg-type]


@pytest.mark.attack
def test_an_answer_of_another_round_site_study_or_key_is_refused() -> None:
    with pytest.raises(SignatureError, match="does not hold"):
        check(signed(), nonce=new_nonce())
    said = statement(RESULT)
    for other in (replace(said, site="birch"), replace(said, study="0" * 64), replace(said, round=2)):
        with pytest.raises(SignatureError, match="does not hold"):
            check_attestation(KEY.public_key(), other, signed().attestation, "demo")
    with pytest.raises(SignatureError, match="does not hold"):
        check_attestation(OTHER_KEY.public_key(), said, signed().attestation, "demo")


@pytest.mark.attack
def test_the_head_belongs_to_the_answer_and_to_the_site() -> None:
    attestation = signed().attestation
    assert attestation is not None
    later = sign_head(KEY, replace(HEAD, sequence=13))
    with pytest.raises(SignatureError, match="does not hold"):
        check(replace(signed(), attestation=replace(attestation, head=later)))
    foreign = sign_head(OTHER_KEY, HEAD)
    with pytest.raises(SignatureError, match="audit-head does not hold"):
        check(replace(RESULT, attestation=attest(KEY, statement(RESULT), foreign)))
    elsewhere = sign_head(KEY, replace(HEAD, study="another"))
    with pytest.raises(SignatureError, match="study 'another'"):
        check(replace(RESULT, attestation=attest(KEY, statement(RESULT), elsewhere)))


HOSTILE: dict[str, list[object]] = {
    "site": ["", "a\nb", "a" * 201, 7, None, "\x1b[31m"],
    "study": ["", "a\nb", "a" * 201, 7, None],
    "sequence": [0, -1, 2**53, True, 1.0, "1"],
    "hash": ["<script>alert(1)</script>", "a" * 63, "A" * 64, "a" * 64 + "\n", "a" * 65, b"a" * 64],
    "time": ["9" * 6_000_000, "today", "", "2026-13-01", "2026-01-01<00:00", "2026-01-01T00:00:00+00:00\n", 2026],
    "signature": ["", "no base64!", "A" * 201, "AAA", "ä", 7, "QUFB" * 1_000_000],
}


@pytest.mark.attack
def test_a_head_is_read_only_as_our_software_writes_it() -> None:
    record = head_record(HEAD)
    assert head_from_record(record) == HEAD
    assert head_from_record(record | {"sequence": 2**53 - 1, "salt": "of a log's entry"}).sequence == 2**53 - 1
    for name, values in HOSTILE.items():
        for value in values:
            with pytest.raises(ValueError, match="not the head"):
                head_from_record(record | {name: value})
        with pytest.raises(KeyError):
            head_from_record({key: value for key, value in record.items() if key != name})


@pytest.mark.attack
def test_an_answer_with_a_hostile_head_is_no_answer() -> None:
    attestation = attest(KEY, statement(RESULT), sign_head(KEY, replace(HEAD, time="9" * 1000)))
    with pytest.raises(ValueError, match="not the head"):
        messages.unpack_result(messages.pack_result(replace(RESULT, attestation=attestation)))


@pytest.mark.attack
def test_a_number_that_is_not_finite_cannot_be_signed() -> None:
    with pytest.raises(SignatureError, match="not finite"):
        replace(RESULT, numbers=TrainNumbers(9, 4, float("nan"), 0.5, 12.0)).content_digest()


@pytest.mark.attack
def test_the_server_sees_a_log_that_went_back() -> None:
    heads = [replace(HEAD, sequence=number) for number in (3, 7, 7, 12, 5)]
    assert shrinkages([heads[0], heads[1], heads[3]]) == []
    assert [line.split(":")[0].split(" had ")[1][:10] for line in shrinkages(heads)] == ["7 entries ", "12 entries"]


@pytest.fixture
def home(site_yaml: Path, tmp_path: Path) -> SiteHome:
    study = from_mapping(
        StudyConfig,
        {
            "name": "demo",
            "adapter": {"rank": 1, "targets": ["to_k"]},
            "training": {"steps": 1, "batch_size": 2},
            "federation": {"rounds": 3, "sites": ["aster", "birch"]},
        },
    )
    return approved(make_home(tmp_path, site_yaml, study))


@pytest.mark.slow
def test_a_deployed_site_signs_its_rounds_and_both_sides_hold_its_log(home: SiteHome) -> None:
    node, key, study, head = node_of(home), home.signing_key().public_key(), home.study(), None
    seen: list[AuditHead] = []
    for number in (1, 2, 3):
        task = task_of(home, round=number, audit_head=head)
        reply = app(asked(messages.pack_task(task), "train"), node)
        result = messages.unpack_result(reply.content)
        expected = Statement(study.digest(), "aster", number, task.nonce, result.content_digest())
        head = check_attestation(key, expected, result.attestation, "demo")
        seen.append(head)
        with pytest.raises(SignatureError):
            check_attestation(key, replace(expected, nonce=new_nonce()), result.attestation, "demo")
    assert shrinkages(seen) == []
    verdict = verify_home(home)
    assert (verdict.problems, verdict.notes) == ([], [])
    assert verdict.acknowledged == seen[-2].sequence
    entries = [parse_line(line) for line in home.audit_log.read_bytes().splitlines()]
    (left, *_) = [entry for entry in entries if entry.event == "left"]
    assert left.hash == seen[0].hash
    assert left.details["drift"]["bytes"] == 16
    assert left.details["numbers"]["patients"] == 3
    (used, *_) = [entry.details for entry in entries if entry.event == "training"]
    assert (used["patients"], used["visits"], used["round"], used["run"]) == (3, 6, 1, "7")
    (task_entry, *_) = [entry.details for entry in entries if entry.event == "task"]
    assert (task_entry["study"], task_entry["study_digest"]) == ("demo", study.digest())
    assert b"PLANTED" not in home.audit_log.read_bytes()


@pytest.mark.slow
def test_the_log_says_byte_for_byte_what_left(home: SiteHome) -> None:
    result = messages.unpack_result(app(asked(messages.pack_task(task_of(home)), "train"), node_of(home)).content)
    entries = [parse_line(line) for line in home.audit_log.read_bytes().splitlines()]
    (left,) = [entry.details for entry in entries if entry.event == "left"]
    assert left["tensors"] == [messages.tensor_record(name, result.state[name]) for name in sorted(result.state)]
    assert left["content"] == result.content_digest()


@pytest.mark.slow
@pytest.mark.attack
def test_a_cut_log_is_found_by_the_next_task(home: SiteHome) -> None:
    node = node_of(home)
    result = messages.unpack_result(app(asked(messages.pack_task(task_of(home)), "train"), node).content)
    assert result.attestation is not None
    for file in (home.audit_log, home.audit_log.with_suffix(".head")):
        file.unlink()
    approve(home)  # else the new log, which holds no approval, is noticed here
    assert verify_home(home).problems == []  # nothing here can tell
    app(asked(messages.pack_task(task_of(home, round=2, audit_head=result.attestation.head)), "train"), node)
    (problem,) = verify_home(home).problems
    assert f"of entry {result.attestation.head.sequence}, is not in the log" in problem


@pytest.mark.attack
def test_a_head_that_the_site_never_signed_is_refused(home: SiteHome) -> None:
    forged = sign_head(OTHER_KEY, replace(HEAD, study="demo"))
    reply = app(asked(messages.pack_task(task_of(home, audit_head=forged)), "train"), node_of(home))
    assert messages.unpack_error(reply.content) == messages.ERROR_SENTENCES["signature"]
    assert verify_home(home).problems == []
    assert Ledger(home.site().ledger_path).entries() == []
