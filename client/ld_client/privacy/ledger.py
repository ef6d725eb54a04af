"""What a data set's privacy has been spent on: a list that only grows, written before anything is computed.

A charge is committed to disk before its round trains. Whatever is killed afterwards, the ledger may count a round that
never left, never leave out one that did; a round that is run again is charged again.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from ld_common.errors import PolicyError, PrivacyError
from ld_common.privacy import Charge, epsilon

SCHEMA = """
    CREATE TABLE IF NOT EXISTS charges (
        id INTEGER PRIMARY KEY, time TEXT NOT NULL, study TEXT NOT NULL, study_digest TEXT NOT NULL,
        round INTEGER NOT NULL, purpose TEXT NOT NULL,
        noise_multiplier REAL, sampling_rate REAL NOT NULL, steps INTEGER NOT NULL
    )
"""
WAIT_SECONDS = 120.0
TRAINING, DRIFT = "training", "drift"


@dataclass(frozen=True)
class Entry:
    """One row of the ledger."""

    time: str
    """UTC, ISO 8601."""
    study: str
    study_digest: str
    round: int
    purpose: str
    """`training` or `drift`."""
    charge: Charge | None
    """None for a use without differential privacy, of which no ε can be said."""


@dataclass(frozen=True)
class Use:
    """What a round is about to do with the data set."""

    study: str
    study_digest: str
    round: int
    charges: dict[str, Charge | None]
    """Purpose -> charge, None without differential privacy."""


class Ledger:
    """The ledger of one data set, across studies; several processes may hold it at once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def entries(self) -> list[Entry]:
        """All charges in their order; raises `PrivacyError` when the file is no ledger."""
        if not self.path.exists():
            return []
        with self._open() as database:
            return _entries(database)

    def charge(self, use: Use, limit: float, delta: float, max_rounds: int | None = None) -> float:
        """Commit a use's charges; returns ε at δ of everything that the ledger then holds.

        The check and the entry are one transaction under the file's write lock, so of two runs that ask for the last
        of a budget one is refused.

        Args:
            use: what is about to be done.
            limit: the most ε at `delta` that the data set may lose over its lifetime.
            delta: the site's δ.
            max_rounds: the most rounds of one study, None for any number.

        Raises:
            PolicyError: one round too many; nothing is written.
            PrivacyError: it would pass the limit; nothing is written. Or the ledger cannot be read or written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._open() as database:
            database.execute("BEGIN IMMEDIATE")
            entries = _entries(database)
            done = sum((one.study_digest, one.purpose) == (use.study_digest, TRAINING) for one in entries)
            if max_rounds is not None and done >= max_rounds:
                database.execute("ROLLBACK")
                raise PolicyError(
                    f"study '{use.study}' has trained {done} rounds here, this site allows {max_rounds} "
                    "(policy.max_rounds)"
                )
            held = [entry.charge for entry in entries if entry.charge]
            asked = [charge for charge in use.charges.values() if charge]
            total = epsilon([*held, *asked], delta)
            if asked and total > limit:
                database.execute("ROLLBACK")
                raise PrivacyError(
                    f"round {use.round} of study '{use.study}' would bring this data set's ε from "
                    f"{epsilon(held, delta):.3g} to {total:.3g} at δ {delta:g}, above this site's limit {limit:g} "
                    "(policy.max_epsilon)"
                )
            now = datetime.now(UTC).isoformat(timespec="seconds")
            for purpose, charge in use.charges.items():
                numbers = (charge.noise_multiplier, charge.sampling_rate, charge.steps) if charge else (None, 1.0, 0)
                row = (now, use.study, use.study_digest, use.round, purpose, *numbers)
                database.execute(
                    "INSERT INTO charges (time, study, study_digest, round, purpose, noise_multiplier, sampling_rate, "
                    "steps) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    row,
                )
            database.execute("COMMIT")
            return total

    def copy(self, path: Path) -> None:
        """Write what the ledger holds now into a new file; raises `PrivacyError`."""
        with self._open() as database, closing(sqlite3.connect(path)) as other:
            database.backup(other)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(self.path, timeout=WAIT_SECONDS, isolation_level=None)) as database:
                self.path.chmod(0o600)
                database.execute("PRAGMA synchronous = FULL")
                database.execute(SCHEMA)
                yield database
        except (sqlite3.Error, OSError) as error:
            raise PrivacyError(
                f"the ledger '{self.path}' cannot be used ({error}): without it nothing is trained; restore it from a "
                "backup, and never start an empty one for data that were used before"
            ) from error


def _entries(database: sqlite3.Connection) -> list[Entry]:
    rows = database.execute(
        "SELECT time, study, study_digest, round, purpose, noise_multiplier, sampling_rate, steps FROM charges "
        "ORDER BY id"
    )
    return [
        Entry(time, study, digest, number, purpose, None if noise is None else Charge(noise, rate, steps))
        for time, study, digest, number, purpose, noise, rate, steps in rows
    ]


def private_charges(entries: Sequence[Entry]) -> list[Charge]:
    """Those of which an ε can be said."""
    return [entry.charge for entry in entries if entry.charge]


def by_study(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    """Entries by their study's digest, in the order of its first charge."""
    studies: dict[str, list[Entry]] = {}
    for entry in entries:
        studies.setdefault(entry.study_digest, []).append(entry)
    return studies
