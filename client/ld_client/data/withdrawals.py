"""Patients who withdrew consent, as pseudonyms: no store that holds them is opened, and no index takes them again.

The list `withdrawals.json` lies beside the store's key, readable by its owner only, and only grows. It cannot be
smaller: without the pseudonym, the next index would take the patient's scans again.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from ld_common.core.atomic_files import write_bytes
from ld_common.core.errors import StoreError

WITHDRAWALS = "withdrawals.json"


@dataclass(frozen=True)
class Withdrawal:
    """One patient who withdrew consent."""

    pseudonym: str
    time: str
    """UTC, ISO 8601."""
    was_in_store: bool
    """Whether the store held visits of the patient. Such a patient still counts when the share of held-out patients is
    met, so that nobody else changes sides."""


def read_withdrawals(store: Path) -> list[Withdrawal]:
    """The withdrawals of a store in their order; raises `StoreError` for a list that cannot be read."""
    path = store / WITHDRAWALS
    try:
        return [Withdrawal(**entry) for entry in json.loads(path.read_bytes())["withdrawals"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise StoreError(
            f"the list of withdrawals '{path}' cannot be read, and nothing trains without it: restore it from a backup"
        ) from error


def withdrawn(store: Path) -> frozenset[str]:
    """Pseudonyms of the patients who withdrew consent; raises `StoreError`."""
    return frozenset(entry.pseudonym for entry in read_withdrawals(store))


def former_patients(store: Path) -> frozenset[str]:
    """Those of `withdrawn` who were in the store; raises `StoreError`."""
    return frozenset(entry.pseudonym for entry in read_withdrawals(store) if entry.was_in_store)


def add_withdrawal(store: Path, pseudonym: str, was_in_store: bool) -> bool:
    """Add a patient to the list, safe on disk; returns whether the patient is new to it.

    Raises:
        StoreError: the list cannot be read.
        CheckpointError: it cannot be written; the old one is intact.
    """
    entries = read_withdrawals(store)
    if any(entry.pseudonym == pseudonym for entry in entries):
        return False
    entries.append(Withdrawal(pseudonym, datetime.now(UTC).isoformat(timespec="seconds"), was_in_store))
    content = {"withdrawals": [asdict(entry) for entry in entries]}
    write_bytes(store / WITHDRAWALS, (json.dumps(content, indent=1) + "\n").encode(), mode=0o600)
    return True


def check_consent(store: Path, pseudonyms: Collection[str]) -> None:
    """Raise `StoreError` if one of these patients withdrew consent."""
    if not withdrawn(store).isdisjoint(pseudonyms):
        raise StoreError(
            f"a patient in the store '{store}' withdrew consent, so nothing trains on it and no result leaves: run "
            "ld-client withdraw --finish, which removes the patient"
        )
