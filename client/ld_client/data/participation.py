"""Which patients the rounds of each study trained on, as pseudonyms: the answer to "was this patient part of it?".

Each file in `participation/`, beside the ledger, is of one study and one set of patients: a study whose data were
renewed has several. It is written after a round was charged and before it trains, is readable by its owner only, and
never leaves the site. A patient who withdraws consent stays in it as a pseudonym, because it is what shows which
releases the patient was part of.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ld_common.core.atomic_files import write_bytes
from ld_common.core.errors import StoreError

if TYPE_CHECKING:
    from ld_common.protocol.study_config import StudyConfig

PARTICIPATION = "participation"
"""Folder beside the ledger."""


@dataclass(frozen=True)
class Participation:
    """Rounds of one study that trained on one set of patients."""

    study: str
    study_digest: str
    rounds: list[int]
    """Rounds that trained, ascending."""
    planned_rounds: int
    steps: int
    """Training steps of a site in a round."""
    sites: list[str]
    drift: str
    """Shape of the study's drift."""
    epsilon: float | None
    """The study's target; None, like `delta`, without differential privacy."""
    delta: float | None
    pseudonyms: list[str]
    """Patients that could be drawn, sorted."""


def record_participation(ledger: Path, study: StudyConfig, round_number: int, pseudonyms: Collection[str]) -> None:
    """Record that a round trains on these patients.

    Raises:
        StoreError: the study's record cannot be read.
        CheckpointError: it cannot be written.
    """
    patients, digest = sorted(set(pseudonyms)), study.digest()
    members = hashlib.sha256(json.dumps(patients).encode()).hexdigest()
    path = ledger.parent / PARTICIPATION / f"{digest[:32]}-{members[:32]}.json"
    private = study.privacy.enabled
    record = Participation(
        study=study.name,
        study_digest=digest,
        rounds=[round_number],
        planned_rounds=study.federation.rounds,
        steps=study.training.steps,
        sites=study.federation.sites,
        drift=study.drift.shape,
        epsilon=study.privacy.target_epsilon if private else None,
        delta=study.privacy.target_delta if private else None,
        pseudonyms=patients,
    )
    if path.exists():
        earlier = _read(path)
        if round_number in earlier.rounds:
            return
        record = replace(record, rounds=sorted({*earlier.rounds, round_number}))
    path.parent.mkdir(mode=0o700, exist_ok=True)
    write_bytes(path, (json.dumps(asdict(record)) + "\n").encode(), mode=0o600)


def read_participations(ledger: Path) -> list[Participation]:
    """All records beside a ledger, by study and first round; raises `StoreError`."""
    records = [_read(path) for path in (ledger.parent / PARTICIPATION).glob("*.json")]
    return sorted(records, key=lambda record: (record.study, record.study_digest, record.rounds))


def _read(path: Path) -> Participation:
    try:
        return Participation(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise StoreError(f"the record of participation '{path}' cannot be read: restore it from a backup") from error
