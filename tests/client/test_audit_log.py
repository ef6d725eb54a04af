"""The audit log: whatever is killed, changed, cut, moved or added is found, and nothing that was confirmed is lost."""

from __future__ import annotations

import json
import multiprocessing
import random
import signal
import time
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ld_client.cli import app as client
from ld_client.deployment.audit_log import AuditLog, entry_hash, head_file, make_entry, parse_line, read_head
from ld_client.deployment.audit_verify import LogOwner, Verdict, verify_home, verify_log
from ld_client.deployment.site_home import SiteHome
from ld_common.core.errors import DeploymentError
from ld_common.protocol.attestation import AuditHead, head_record
from ld_common.protocol.keys import new_signing_key, write_private_key
from tests.support.deployed_study import DeployedStudy

KEY = new_signing_key()


def log_at(folder: Path) -> AuditLog:
    return AuditLog(folder / "audit.jsonl", "aster", "study", KEY)


def verify(log: AuditLog, content: bytes | None = None, kept: AuditHead | None = None) -> Verdict:
    content = log.path.read_bytes() if content is None else content
    owner = LogOwner(log.key.public_key(), log.site, log.study)
    return verify_log(content, kept or read_head(log.path), owner)


def write_rounds(log: AuditLog, rounds: int) -> list[AuditHead]:
    """What some rounds leave in a log; returns the heads that were sent."""
    heads: list[AuditHead] = []
    for number in range(1, rounds + 1):
        if heads:
            log.append("acknowledged", head_record(heads[-1]))
        heads.append(
            log.append("left", {"round": number, "tensors": [{"name": "a", "bytes": 4}], "loss": 0.1 * number})
        )
        log.append("head", head_record(heads[-1]))
    return heads


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> AuditLog:
    log = log_at(tmp_path_factory.mktemp("log"))
    write_rounds(log, 2)
    assert verify(log).problems == []
    return log


def test_a_log_says_what_was_done_in_order_and_is_its_owners_alone(tmp_path: Path) -> None:
    log = log_at(tmp_path)
    first, second = log.append("asked", {"kind": "train"}), log.append("asked", {"kind": "train"})
    entries = [parse_line(line) for line in log.path.read_bytes().splitlines()]
    assert [(entry.sequence, entry.event) for entry in entries] == [(1, "opened"), (2, "asked"), (3, "asked")]
    assert (entries[1].hash, entries[2].hash) == (first.hash, second.hash)
    assert entries[2].previous == first.hash
    assert entries[1].details["salt"] != entries[2].details["salt"]  # else a hash would tell the server what it says
    assert log.path.stat().st_mode & 0o077 == 0
    verdict = verify(log)
    assert (verdict.entries, verdict.problems, verdict.notes) == (3, [], [])


@pytest.mark.parametrize("step", [11, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.attack
def test_any_changed_byte_is_found(tmp_path: Path, step: int) -> None:
    log, chance = log_at(tmp_path), random.Random(0)
    log.append("acknowledged", head_record(*write_rounds(log, 1)))
    content = log.path.read_bytes()
    for place in range(0, len(content), step):
        byte = content[place] ^ chance.choice([1, 2, 32, 128])
        assert verify(log, content[:place] + bytes([byte]) + content[place + 1 :]).problems, (place, byte)
        if place % 4 == 0:
            assert verify(log, content[:place] + content[place + 1 :]).problems, place
            assert verify(log, content[:place] + b" " + content[place:]).problems, place


@pytest.mark.attack
def test_any_cut_moved_or_doubled_line_is_found_and_named(whole: AuditLog) -> None:
    lines = whole.path.read_bytes().splitlines(keepends=True)
    count = len(lines)
    for place in range(count):
        (problem, *_) = verify(whole, b"".join(lines[:place] + lines[place + 1 :])).problems
        assert problem.startswith(f"line {place + 1}:")
        assert any(word in problem for word in ("removed", "opened", "cut"))
        for other in range(count + 1):
            doubled = verify(whole, b"".join([*lines[:other], lines[place], *lines[other:]])).problems
            assert any(f"line {max(other, place + (other <= place)) + 1}: a duplicate" in text for text in doubled)
        for other in range(place + 1, count):
            swapped = list(lines)
            swapped[place], swapped[other] = lines[other], lines[place]
            assert any(f"line {place + 1}:" in text for text in verify(whole, b"".join(swapped)).problems)
    for place in range(count):
        cut = verify(whole, b"".join(lines[:place])).problems
        assert any(f"line {place + 1}: the log was cut short or rewritten" in text for text in cut)


@pytest.mark.attack
def test_inserted_entries_are_found_even_with_a_chain_that_holds(whole: AuditLog) -> None:
    lines = whole.path.read_bytes().splitlines()
    entries = [parse_line(line) for line in lines]
    for place in range(1, len(entries)):
        chain = entries[:place]
        chain.append(make_entry(chain[-1], "left", {}))
        for entry in entries[place:]:  # everything after it anew, as someone without the key can
            chain.append(make_entry(chain[-1], entry.event, entry.details))
        forged = b"".join(entry.line() + b"\n" for entry in chain)
        assert any("rewritten" in problem for problem in verify(whole, forged).problems)
    added = [*entries, make_entry(entries[-1], "left", {})]
    added.append(make_entry(added[-1], "left", {}))
    problems = verify(whole, b"".join(entry.line() + b"\n" for entry in added)).problems
    (problem,) = problems
    assert f"2 entries after {len(entries)}" in problem


@pytest.mark.attack
def test_another_sites_log_or_head_is_not_taken_for_this_one(whole: AuditLog, tmp_path: Path) -> None:
    other = AuditLog(tmp_path / "audit.jsonl", "aster", "study", new_signing_key())
    write_rounds(other, 2)
    problems = verify(whole, other.path.read_bytes(), read_head(other.path)).problems
    assert any(problem.startswith("line 1: ") for problem in problems)
    assert any(problem.startswith("line 3: a head that was sent") for problem in problems)
    assert any(problem.startswith("audit.head: ") for problem in problems)


@pytest.mark.attack
def test_a_log_made_anew_with_the_sites_own_key_lacks_what_the_server_has_seen(tmp_path: Path) -> None:
    old = log_at(tmp_path / "old")
    old.path.parent.mkdir()
    seen = write_rounds(old, 3)
    new = log_at(tmp_path)
    write_rounds(new, 3)
    assert verify(new).problems == []  # by itself it is perfect
    new.append("acknowledged", head_record(seen[-1]))
    (problem,) = verify(new).problems
    assert f"of entry {seen[-1].sequence}, is not in the log" in problem
    assert verify(old).acknowledged == seen[-2].sequence


@pytest.mark.parametrize("lost", ["last", "all", "head"])
@pytest.mark.attack
def test_a_log_that_was_cut_before_it_went_on_says_so_ever_after(tmp_path: Path, lost: str) -> None:
    log = log_at(tmp_path)
    write_rounds(log, 2)
    lines = log.path.read_bytes().splitlines(keepends=True)
    if lost == "head":
        head_file(log.path).unlink()
    else:
        log.path.write_bytes(b"".join(lines[:-1]) if lost == "last" else b"")
    for _ in range(3):
        log.append("asked", {})
    (problem,) = [text for text in verify(log).problems if "had been cut short" in text]
    assert f"it ended at entry {({'last': len(lines) - 1, 'all': 0, 'head': len(lines)})[lost]}" in problem


def test_an_unfinished_line_is_dropped_wherever_it_ends_and_the_next_entry_says_so(tmp_path: Path) -> None:
    log = log_at(tmp_path)
    write_rounds(log, 1)
    content, head = log.path.read_bytes(), head_file(log.path).read_bytes()
    unfinished = make_entry(parse_line(content.splitlines()[-1]), "left", {"salt": "0"}).line()
    for length in [*range(1, len(unfinished), 7), len(unfinished)]:
        log.path.write_bytes(content + unfinished[:length])
        head_file(log.path).write_bytes(head)
        verdict = verify(log)
        assert verdict.problems == []
        assert f"unfinished, {length} bytes" in verdict.notes[0]
        log.append("asked", {})
        *_, recovered, last = [parse_line(line) for line in log.path.read_bytes().splitlines()]
        assert (recovered.event, recovered.details["dropped_bytes"], last.event) == ("recovered", length, "asked")
        assert verify(log).problems == []


def test_an_entry_whose_head_was_not_yet_written_is_whole(tmp_path: Path) -> None:
    log = log_at(tmp_path)
    write_rounds(log, 1)
    before = head_file(log.path).read_bytes()
    for _ in range(2):  # killed right after an entry, again and again
        log.append("asked", {})
        head_file(log.path).write_bytes(before)
        verdict = verify(log)
        assert verdict.problems == []
        assert "not signed" in verdict.notes[0]
        log.append("asked", {})
        before = head_file(log.path).read_bytes()
        assert (verify(log).problems, verify(log).notes) == ([], [])


@pytest.mark.attack
def test_nothing_is_added_to_a_log_whose_last_line_was_altered(tmp_path: Path) -> None:
    log = log_at(tmp_path)
    write_rounds(log, 1)
    altered = log.path.read_bytes().replace(b'"round":1', b'"round":2')
    log.path.write_bytes(altered)
    log.append("asked", {})  # the altered line is not the last
    lines = log.path.read_bytes().splitlines()
    last = json.loads(lines[-1]) | {"event": "left"}
    log.path.write_bytes(b"\n".join([*lines[:-1], json.dumps(last).encode()]) + b"\n")
    with pytest.raises(DeploymentError, match=r"the last line of the audit log .* was altered"):
        log.append("asked", {})
    log.path.unlink()
    log.path.mkdir()
    with pytest.raises(DeploymentError, match="cannot write the audit log"):
        log.append("asked", {})


def _append_for_ever(folder: Path, sender: Connection) -> None:
    log = log_at(folder)
    while True:
        sender.send(log.append("left", {"tensors": ["x" * 200] * 20}).sequence)


@pytest.mark.slow
def test_whenever_a_writer_is_killed_the_log_is_whole_and_holds_all_it_confirmed(tmp_path: Path) -> None:
    context, chance, confirmed = multiprocessing.get_context("fork"), random.Random(0), 0
    log = log_at(tmp_path)
    for _ in range(40):
        receiver, sender = context.Pipe(duplex=False)
        run = context.Process(target=_append_for_ever, args=(tmp_path, sender))
        run.start()
        sender.close()
        confirmed = receiver.recv()
        time.sleep(chance.uniform(0, 0.03))
        run.kill()
        run.join()
        assert run.exitcode == -signal.SIGKILL
        try:
            while True:
                confirmed = receiver.recv()
        except EOFError:
            pass
        verdict = verify(log)
        assert verdict.problems == []
        assert verdict.entries >= confirmed
    assert confirmed > 40
    log.append("asked", {})
    assert verify(log).problems == []


def _append_some(folder: Path, count: int) -> None:
    for _ in range(count):
        log_at(folder).append("asked", {})


def test_writers_at_the_same_time_make_one_chain(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    runs = [context.Process(target=_append_some, args=(tmp_path, 20)) for _ in range(3)]
    for run in runs:
        run.start()
    for run in runs:
        run.join(60)
        assert run.exitcode == 0
    verdict = verify(log_at(tmp_path))
    assert (verdict.entries, verdict.problems, verdict.notes) == (61, [], [])


def test_an_entrys_hash_is_over_all_of_it(whole: AuditLog) -> None:
    entry = parse_line(whole.path.read_bytes().splitlines()[1])
    said = asdict(entry)
    for name in set(said) - {"hash"}:
        assert entry_hash(said | {name: "other"}) != entry.hash


def test_the_command_ends_with_0_for_a_whole_log_and_2_for_an_altered_one(tmp_path: Path) -> None:
    modality = Path(__file__).parents[2] / "configs/modalities/brain_mri.yaml"
    home: SiteHome = DeployedStudy(tmp_path, "demo", modality).admit("aster")
    runner = CliRunner()
    empty = runner.invoke(client, ["audit", "verify", "--home", str(home.path)])
    assert (empty.exit_code, empty.output.strip()) == (0, "0 entries")
    log = AuditLog.of(home)
    write_rounds(log, 2)
    found = runner.invoke(client, ["audit", "verify", "--home", str(home.path)])
    assert found.exit_code == 0
    assert "6 entries, the server has seen the log up to entry 2" in found.output
    home.audit_log.write_bytes(home.audit_log.read_bytes().replace(b'"loss":0.1', b'"loss":0.3', 1))
    with pytest.raises(DeploymentError, match="1 problems"):
        runner.invoke(client, ["audit", "verify", "--home", str(home.path)], catch_exceptions=False)
    (problem,) = verify_home(home).problems
    assert problem.startswith("line 2: altered")
    head = home.audit_log.with_suffix(".head")
    kept = head.read_bytes()
    head.write_bytes(b"{")
    with pytest.raises(DeploymentError, match="cannot be read"):
        verify_home(home)
    head.write_bytes(kept)
    home.key_file("signing").unlink()
    write_private_key(home.key_file("signing"), new_signing_key())
    assert any("not signed by this site" in problem for problem in verify_home(home).problems)
