"""What `ld-server status` says of a study's run, read from its folder, whether or not it is running."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ld_common.core.errors import CheckpointError
from ld_common.protocol.attestation import head_from_record, shrinkages
from ld_common.protocol.study_config import StudyConfig
from ld_common.release.release import MANIFEST
from ld_server.checkpoint import find_checkpoint
from ld_server.deployment.study_home import AdmittedSite
from ld_server.node_registry import AUDIT_HEAD
from ld_server.round_log import FAILURE, RELEASE, RoundRecord, is_locked, read_rounds


def status_lines(folder: Path, study: StudyConfig, admitted: Mapping[str, AdmittedSite]) -> list[str]:
    """The state of the run in `folder`, in lines: how far it is, each site's last answer, and who was left out why.

    Args:
        folder: the run's folder, the study's output.
        study: the study that is to run there.
        admitted: the study's list of sites.

    Raises:
        CheckpointError: neither a checkpoint nor the record of the rounds can be read.
    """
    records, notes = _read(folder, study)
    done, rounds = len(records), study.federation.rounds
    lines = [f"study {study.name}: round {done} of {rounds}, {_state(folder, done, rounds)}", *notes]
    if records:
        last = records[-1]
        counted = "counted" if last.counted else f"did not count: {last.failure}"
        lines.append(f"round {last.round} ended {last.ended}, after {last.seconds:.0f} s, and {counted}")
        if last.unknown_nodes:
            lines.append(f"nodes of no admitted site were there: {', '.join(last.unknown_nodes)}")
    for name in study.federation.sites:
        lines += [f"{_site_line(name, records)}{_standing(admitted.get(name))}"]
        lines += [*(f"    {doubt}" for doubt in _log_doubts(name, records))]
    refusals = _refusals(records)
    return [*lines, "left out:", *refusals] if refusals else lines


def _read(folder: Path, study: StudyConfig) -> tuple[list[RoundRecord], list[str]]:
    """The rounds so far, and what is wrong with the checkpoint."""
    try:
        found = find_checkpoint(folder)
    except CheckpointError as error:
        return read_rounds(folder), [str(error)]
    if found is None:
        return read_rounds(folder), []
    notes = [found.damage] if found.damage else []
    if found.checkpoint.study_digest != study.digest():
        notes.append("the checkpoint is of another study than this one: the study was edited since")
    return [RoundRecord(**record) for record in found.checkpoint.records], notes


def _state(folder: Path, done: int, rounds: int) -> str:
    if is_locked(folder):
        return "running"
    if (folder / FAILURE).exists():
        return f"failed: {(folder / FAILURE).read_text()}"
    if done == rounds and (folder / RELEASE / MANIFEST).exists():
        return f"ended, its release is {folder / RELEASE}"
    return "stopped before its end: go on with --resume" if done else "not running"


def _site_line(name: str, records: Sequence[RoundRecord]) -> str:
    seen = [record for record in records if name in record.sites]
    if not seen:
        return f"  {name}: no good answer yet"
    last, sent = seen[-1], seen[-1].sites[name]
    facts = [f"{sent['uplink_bytes']:,} bytes"]
    norm, visits, patients = sent["update_norm"], sent["visits"], sent["patients"]
    facts.append("update hidden in the sum" if norm is None else f"update norm {norm:.3g}")
    facts += ["clipped"] if sent.get("clipped") else []
    facts.append("counts withheld" if visits is None else f"{visits} visits of {patients} patients")
    return f"  {name}: last in round {last.round}, {last.ended}: {', '.join(facts)}"


def _standing(site: AdmittedSite | None) -> str:
    if site is None:
        return "; not admitted yet"
    return "" if site.revoked is None else f"; revoked {site.revoked}"


def _log_doubts(name: str, records: Sequence[RoundRecord]) -> list[str]:
    """What the heads of a site's audit log, which came with its answers, say against it."""
    heads = [record.sites[name].get(AUDIT_HEAD) for record in records if name in record.sites]
    return shrinkages([head_from_record(head) for head in heads if head is not None])


def _refusals(records: Sequence[RoundRecord]) -> list[str]:
    """One line for each site and reason, with the rounds of it."""
    rounds: dict[tuple[str, str], list[int]] = {}
    for record in records:
        for name, why in record.left_out.items():
            rounds.setdefault((name, why), []).append(record.round)
    return [f"  {name}, round {_ranges(numbers)}: {why}" for (name, why), numbers in sorted(rounds.items())]


def _ranges(numbers: Sequence[int]) -> str:
    """1, 2, 3, 7 as `1-3, 7`."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
