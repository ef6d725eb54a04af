"""`ld-server status`: the state of a study's run, read from its folder, whether or not it is running."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ld_common.core.errors import CheckpointError
from ld_common.protocol.attestation import head_from_record, shrinkages
from ld_common.protocol.study_config import StudyConfig
from ld_common.release.release import MANIFEST
from ld_server.checkpoint import find_checkpoint
from ld_server.deployment.study_home import AdmittedSite
from ld_server.node_registry import AUDIT_HEAD
from ld_server.round_log import FAILURE, RELEASE, RoundRecord, is_locked, read_rounds

RUNNING, ENDED, ADMITTED, SIMULATED = "running", "ended", "admitted", "simulated"
AGAIN = "by the command that began it"
"""How a run without a home goes on."""


@dataclass(frozen=True)
class SiteStatus:
    """A site's last accepted result, and its admission."""

    name: str
    admission: str
    """`admitted`, `not admitted yet` or `revoked TIME`; `simulated` in a run without a list of sites."""
    last_round: int | None
    """Round of its last accepted result; None, like all below, where it has none."""
    ended: str | None
    """End of that round; ISO 8601, UTC."""
    uplink_bytes: int | None
    update_norm: float | None
    """None under secure aggregation, too."""
    clipped: bool
    visits: int | None
    """None where the study withholds counts, too."""
    patients: int | None
    log_problems: list[str]
    """Signs that the site's audit log was cut short or rewritten."""

    def lines(self) -> list[str]:
        """The site as text."""
        admission = "" if self.admission in (ADMITTED, SIMULATED) else f"; {self.admission}"
        problems = [f"    {problem}" for problem in self.log_problems]
        if self.last_round is None:
            return [f"  {self.name}: no accepted result yet{admission}", *problems]
        facts = [f"{self.uplink_bytes:,} bytes"]
        norm = self.update_norm
        facts.append("update hidden in the sum" if norm is None else f"update norm {norm:.3g}")
        facts += ["clipped"] if self.clipped else []
        facts.append("counts withheld" if self.visits is None else f"{self.visits} visits of {self.patients} patients")
        return [
            f"  {self.name}: last in round {self.last_round}, {self.ended}: {', '.join(facts)}{admission}",
            *problems,
        ]


@dataclass(frozen=True)
class LeftOut:
    """A site that was left out of rounds, with the reason."""

    site: str
    rounds: list[int]
    reason: str


@dataclass(frozen=True)
class RunStatus:
    """How far a study's run is."""

    study: str
    rounds_done: int
    rounds: int
    state: str
    """`running`, `not running`, `failed: ...`, or how it ended."""
    notes: list[str]
    """Problems of the checkpoint."""
    last_round: RoundRecord | None
    sites: list[SiteStatus]
    left_out: list[LeftOut]

    @property
    def ended(self) -> bool:
        """Whether the study's release is written."""
        return self.state.startswith(ENDED)

    def lines(self) -> list[str]:
        """The status as text."""
        lines = [f"study {self.study}: round {self.rounds_done} of {self.rounds}, {self.state}", *self.notes]
        last = self.last_round
        if last is not None:
            counted = "counted" if last.counted else f"did not count: {last.failure}"
            lines.append(f"round {last.round} ended {last.ended}, after {last.seconds:.0f} s, and {counted}")
            if last.unknown_nodes:
                lines.append(f"connected nodes that belong to no admitted site: {', '.join(last.unknown_nodes)}")
        for site in self.sites:
            lines += site.lines()
        entries = [f"  {entry.site}, round {ranges(entry.rounds)}: {entry.reason}" for entry in self.left_out]
        return [*lines, "left out:", *entries] if entries else lines


def read_status(folder: Path, study: StudyConfig, admitted: Mapping[str, AdmittedSite] | None) -> RunStatus:
    """The status of the run in `folder`.

    Args:
        folder: the run's folder, the study's output.
        study: the study that runs there.
        admitted: the study's list of sites; None for a run that has none.

    Raises:
        CheckpointError: neither a checkpoint nor the log of the rounds can be read.
    """
    records, notes = _read_records(folder, study)
    return run_status(folder, study, admitted, records, notes)


def run_status(
    folder: Path,
    study: StudyConfig,
    admitted: Mapping[str, AdmittedSite] | None,
    records: Sequence[RoundRecord],
    notes: list[str],
) -> RunStatus:
    """The status of a run with these rounds and notes; arguments as `read_status`."""
    return RunStatus(
        study=study.name,
        rounds_done=len(records),
        rounds=study.federation.rounds,
        state=_state(folder, records, study.federation.rounds, "with --resume" if admitted is not None else AGAIN),
        notes=notes,
        last_round=records[-1] if records else None,
        sites=[_site_status(name, records, _admission(name, admitted)) for name in study.federation.sites],
        left_out=_left_out(records),
    )


def _read_records(folder: Path, study: StudyConfig) -> tuple[list[RoundRecord], list[str]]:
    """The rounds so far, and problems of the checkpoint."""
    try:
        newest = find_checkpoint(folder)
    except CheckpointError as error:
        return read_rounds(folder), [str(error)]
    if newest is None:
        return read_rounds(folder), []
    notes = [newest.damage] if newest.damage else []
    if newest.checkpoint.study_digest != study.digest():
        notes.append("the checkpoint belongs to another study: study.yaml was edited since")
    return [RoundRecord(**record) for record in newest.checkpoint.records], notes


def _state(folder: Path, records: Sequence[RoundRecord], rounds: int, how: str) -> str:
    if is_locked(folder):
        return RUNNING
    if (folder / FAILURE).exists():
        return f"failed: {(folder / FAILURE).read_text()}"
    if _is_released(folder, records):
        early = f" after {len(records)} of {rounds} rounds" if len(records) < rounds else ""
        return f"{ENDED}{early}, its release is {folder / RELEASE}"
    return f"stopped before its end: continue {how}" if records else "not running"


def _is_released(folder: Path, records: Sequence[RoundRecord]) -> bool:
    """Whether the release is of exactly these rounds; a study may end before its last one (`federation.patience`)."""
    try:
        released = json.loads((folder / RELEASE / MANIFEST).read_text())["rounds"]
    except (OSError, ValueError, LookupError, TypeError):
        return False
    return [entry["ended"] for entry in released] == [record.ended for record in records] != []


def _admission(name: str, admitted: Mapping[str, AdmittedSite] | None) -> str:
    if admitted is None:
        return SIMULATED
    site = admitted.get(name)
    return "not admitted yet" if site is None else f"revoked {site.revoked}" if site.revoked else ADMITTED


def _site_status(name: str, records: Sequence[RoundRecord], admission: str) -> SiteStatus:
    accepted = [record for record in records if name in record.sites]
    last = accepted[-1] if accepted else None
    result = {} if last is None else last.sites[name]
    return SiteStatus(
        name=name,
        admission=admission,
        last_round=None if last is None else last.round,
        ended=None if last is None else last.ended,
        uplink_bytes=result.get("uplink_bytes"),
        update_norm=result.get("update_norm"),
        clipped=bool(result.get("clipped")),
        visits=result.get("visits"),
        patients=result.get("patients"),
        log_problems=_log_problems(name, accepted),
    )


def _log_problems(name: str, accepted: Sequence[RoundRecord]) -> list[str]:
    """What the heads of a site's audit log, which came with its results, show."""
    heads = [record.sites[name].get(AUDIT_HEAD) for record in accepted]
    return shrinkages([head_from_record(head) for head in heads if head is not None])


def _left_out(records: Sequence[RoundRecord]) -> list[LeftOut]:
    """One entry for each site and reason."""
    rounds: dict[tuple[str, str], list[int]] = {}
    for record in records:
        for name, reason in record.left_out.items():
            rounds.setdefault((name, reason), []).append(record.round)
    return [LeftOut(name, numbers, reason) for (name, reason), numbers in sorted(rounds.items())]


def ranges(numbers: Sequence[int]) -> str:
    """1, 2, 3, 7 as `1-3, 7`."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
