"""What a data set's privacy has been spent on: a list that only grows, written before anything is computed.

A charge is committed to disk before its round trains. Whatever is killed afterwards, the ledger may count a round that
never left, never leave out one that did; a round that is run again is charged again.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from ld_common.core.errors import PolicyError, PrivacyError
from ld_common.protocol.dp_accounting import Charge, epsilon

SCHEMA = """
    CREATE TABLE IF NOT EXISTS charges (
        id INTEGER PRIMARY KEY, time TEXT NOT NULL, study TEXT NOT NULL, study_digest TEXT NOT NULL,
        round INTEGER NOT NULL, purpose TEXT NOT NULL,
        noise_multiplier REAL, sampling_rate REAL NOT NULL, steps INTEGER NOT NULL
    );
    CREATE TABLE IF NOT EXISTS kept (key TEXT PRIMARY KEY, charge INTEGER NOT NULL REFERENCES charges(id), value BLOB)
"""
WAIT_SECONDS = 120.0
TRAINING, DRIFT = "training", "drift"


@dataclass(frozen=True)
class LedgerEntry:
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
class Once:
    """Something noised that is made once and may then leave as often as it is asked for."""

    key: str
    """Names it in the ledger."""
    charge: Charge
    make: Callable[[], bytes]
    """Computes and noises it; called when the ledger does not hold it, inside the transaction that charges it."""


@dataclass(frozen=True)
class Use:
    """What a round is about to do with the data set."""

    study: str
    study_digest: str
    round: int
    charges: dict[str, Charge | None]
    """Purpose -> charge, None without differential privacy."""
    drift: Once | None = None
    """The study's noised drift, charged as `drift` where the ledger does not hold it."""
    plan: Sequence[Charge] = ()
    """All that the study will charge; a study is refused at its first round if that passes the limit."""


@dataclass(frozen=True)
class RoundLimit:
    """The most rounds that a study may train here, and what sets it."""

    rounds: int
    source: str


class Ledger:
    """The ledger of one data set, across studies; several processes may hold it at once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def entries(self) -> list[LedgerEntry]:
        """All charges in their order; raises `PrivacyError` when the file is no ledger."""
        if not self.path.exists():
            return []
        with self._open() as database:
            return _entries(database)

    def kept(self, key: str) -> bytes | None:
        """What was made and charged under a key, or None."""
        if not self.path.exists():
            return None
        with self._open() as database:
            found = database.execute("SELECT value FROM kept WHERE key = ?", (key,)).fetchone()
        return None if found is None else bytes(found[0])

    def charge(self, use: Use, limit: float, delta: float, max_rounds: RoundLimit | None = None) -> float:
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
        if not self.path.parent.is_dir():
            raise PrivacyError(f"the ledger's folder '{self.path.parent}' is not there: mount it, or make it")
        with self._open() as database:
            database.execute("BEGIN IMMEDIATE")
            try:
                total = _charge(database, use, limit, delta, max_rounds)
            except BaseException:
                database.execute("ROLLBACK")
                raise
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
                database.execute("PRAGMA synchronous = EXTRA")  # a commit outlasts a loss of power
                for statement in SCHEMA.split(";"):
                    database.execute(statement)
                yield database
        except (sqlite3.Error, OSError) as error:
            raise PrivacyError(
                f"the ledger '{self.path}' cannot be used ({error}): without it nothing is trained; restore it from a "
                "backup, and never start an empty one for data that were used before"
            ) from error


def _charge(database: sqlite3.Connection, use: Use, limit: float, delta: float, max_rounds: RoundLimit | None) -> float:
    """Check a use and write its rows, inside an open transaction; returns the new ε."""
    entries = _entries(database)
    own = [entry for entry in entries if entry.study_digest == use.study_digest]
    done = sum(entry.purpose == TRAINING for entry in own)
    if max_rounds is not None and done >= max_rounds.rounds:
        raise PolicyError(
            f"study '{use.study}' has trained {done} rounds here, this site allows {max_rounds.rounds} "
            f"({max_rounds.source})"
        )
    charges, drift = dict(use.charges), use.drift
    if drift is not None and not database.execute("SELECT 1 FROM kept WHERE key = ?", (drift.key,)).fetchone():
        charges[DRIFT] = drift.charge
    held = private_charges(entries)
    asked = [charge for charge in charges.values() if charge]
    total = epsilon([*held, *asked], delta)
    if asked:
        _refuse_beyond(limit, delta, held, total, f"round {use.round} of study '{use.study}'")
    if use.plan and not own:
        whole = epsilon([*held, *use.plan], delta)
        _refuse_beyond(limit, delta, held, whole, f"study '{use.study}', all rounds together,")
    now = datetime.now(UTC).isoformat(timespec="seconds")
    for purpose, charge in charges.items():
        numbers = (charge.noise_multiplier, charge.sampling_rate, charge.steps) if charge else (None, 1.0, 0)
        row = (now, use.study, use.study_digest, use.round, purpose, *numbers)
        written = database.execute(
            "INSERT INTO charges (time, study, study_digest, round, purpose, noise_multiplier, sampling_rate, steps) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            row,
        )
        if purpose == DRIFT and drift is not None:
            made = (drift.key, written.lastrowid, drift.make())
            database.execute("INSERT INTO kept (key, charge, value) VALUES (?, ?, ?)", made)
    return total


def _refuse_beyond(limit: float, delta: float, held: Sequence[Charge], total: float, what: str) -> None:
    if total > limit:
        raise PrivacyError(
            f"{what} would bring this data set's ε from {epsilon(held, delta):.3g} to {total:.3g} at δ {delta:g}, "
            f"above this site's limit {limit:g} (policy.max_epsilon)"
        )


def _entries(database: sqlite3.Connection) -> list[LedgerEntry]:
    rows = database.execute(
        "SELECT time, study, study_digest, round, purpose, noise_multiplier, sampling_rate, steps FROM charges "
        "ORDER BY id"
    )
    return [
        LedgerEntry(time, study, digest, number, purpose, None if noise is None else Charge(noise, rate, steps))
        for time, study, digest, number, purpose, noise, rate, steps in rows
    ]


def private_charges(entries: Sequence[LedgerEntry]) -> list[Charge]:
    """Those of which an ε can be said."""
    return [entry.charge for entry in entries if entry.charge]


def by_study(entries: Sequence[LedgerEntry]) -> dict[str, list[LedgerEntry]]:
    """Entries by their study's digest, in the order of its first charge."""
    studies: dict[str, list[LedgerEntry]] = {}
    for entry in entries:
        studies.setdefault(entry.study_digest, []).append(entry)
    return studies
