"""The privacy ledger of a data set: an append-only list of charges, each written before its round trains.

A charge is committed to disk first. If a process is killed afterwards, the ledger may count a round whose result never
left, but it never misses one that did. A round that runs again is charged again.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
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
    CREATE TABLE IF NOT EXISTS tasks (
        study_digest TEXT NOT NULL, round INTEGER NOT NULL, task TEXT NOT NULL, PRIMARY KEY (study_digest, round)
    );
    CREATE TABLE IF NOT EXISTS cohorts (
        study_digest TEXT PRIMARY KEY, study TEXT NOT NULL, time TEXT NOT NULL, cohort TEXT NOT NULL
    );
    CREATE TABLE IF NOT EXISTS kept (key TEXT PRIMARY KEY, charge INTEGER NOT NULL REFERENCES charges(id), value BLOB)
"""
WAIT_SECONDS = 120.0
TRAINING, DRIFT, VALIDATION = "training", "drift", "validation"


@dataclass(frozen=True)
class LedgerEntry:
    """One row of the ledger."""

    time: str
    """UTC, ISO 8601."""
    study: str
    study_digest: str
    round: int
    purpose: str
    """`training`, `drift` or `validation`."""
    charge: Charge | None
    """None for a use without differential privacy, which has no ε."""


@dataclass(frozen=True)
class NoisedRelease:
    """A noised value that is computed and charged once, and may then leave any number of times."""

    key: str
    """Its name in the ledger."""
    charge: Charge
    make: Callable[[], bytes]
    """Computes and noises it; called inside the transaction that charges it, unless the ledger holds it."""


@dataclass(frozen=True)
class Use:
    """The use of the data set by one round."""

    study: str
    study_digest: str
    round: int
    charges: dict[str, Charge | None]
    """Purpose -> charge, None without differential privacy."""
    drift: NoisedRelease | None = None
    """The study's noised drift, charged as `drift` unless the ledger holds it."""
    plan: Sequence[Charge] = ()
    """All charges of the study, which is refused at its first round if they exceed the limit."""
    task: str = ""
    """Hash of what the round starts from; a round that runs again must start from the same."""
    cohort: str = ""
    """Hash of the data; all rounds of a study must train on the same."""


@dataclass(frozen=True)
class LedgerMark:
    """How far a ledger had come: a copy that is older does not hold these entries."""

    entries: int
    digest: str
    """SHA-256 of these entries, hex."""


@dataclass(frozen=True)
class FrozenStudy:
    """The data that a study is bound to since its first round."""

    study: str
    study_digest: str
    time: str


@dataclass(frozen=True)
class RoundLimit:
    """Largest number of rounds of one study, and the setting that it comes from."""

    rounds: int
    source: str


class Ledger:
    """The ledger of one data set, across studies; several processes may use it at once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def entries(self) -> list[LedgerEntry]:
        """All charges in their order; raises `PrivacyError` when the file is not a ledger."""
        if not self.path.exists():
            return []
        with self._open() as database:
            return _entries(database)

    def mark(self) -> LedgerMark:
        """The mark of all present entries; raises `PrivacyError`."""
        return _mark(self.entries())

    def check_mark(self, mark: LedgerMark) -> None:
        """Raise `PrivacyError` unless the ledger begins with the entries of a mark."""
        if _mark(self.entries()[: mark.entries]) != mark:
            raise PrivacyError(
                f"the ledger '{self.path}' lacks charges that the site's audit log holds: it was put back from an "
                "older copy, or replaced. Restore the newest copy; nothing trains until then"
            )

    def cohorts(self) -> list[FrozenStudy]:
        """The studies whose data are frozen, by the time of their first round; raises `PrivacyError`."""
        if not self.path.exists():
            return []
        with self._open() as database:
            rows = database.execute("SELECT study, study_digest, time FROM cohorts ORDER BY time").fetchall()
        return [FrozenStudy(*row) for row in rows]

    def release_cohort(self, study_digest: str) -> None:
        """Let a study's next round train on changed data, which is then frozen; raises `PrivacyError`."""
        with self._open() as database:
            database.execute("DELETE FROM cohorts WHERE study_digest = ?", (study_digest,))

    def noised_release(self, key: str) -> bytes | None:
        """The noised value that was charged under a key, or None."""
        if not self.path.exists():
            return None
        with self._open() as database:
            row = database.execute("SELECT value FROM kept WHERE key = ?", (key,)).fetchone()
        return None if row is None else bytes(row[0])

    def charge(self, use: Use, limit: float, delta: float, max_rounds: RoundLimit | None = None) -> float:
        """Commit the charges of a use; returns ε at δ of all charges in the ledger.

        The check and the entry are one transaction under the file's write lock, so only one of two concurrent runs can
        spend the rest of a budget.

        Args:
            use: of the data set.
            limit: largest ε at `delta` of the data set over its lifetime.
            delta: the site's δ.
            max_rounds: of one study; None for any number.

        Raises:
            PolicyError: the study has used all its rounds, trained on other data, or this round started from other
                weights before; nothing is written.
            PrivacyError: the charges exceed the limit, and nothing is written; or the ledger cannot be used.
        """
        if not self.path.parent.is_dir():
            raise PrivacyError(f"the ledger's folder '{self.path.parent}' does not exist: mount it, or make it")
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
        """Copy the ledger into a new file; raises `PrivacyError`."""
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
                f"the ledger '{self.path}' cannot be used ({error}), and nothing trains without it: restore it from "
                "a backup, and never start an empty one for data that were used before"
            ) from error


def _charge(database: sqlite3.Connection, use: Use, limit: float, delta: float, max_rounds: RoundLimit | None) -> float:
    """Check a use and write its rows inside an open transaction; returns the new ε."""
    entries = _entries(database)
    earlier = [entry for entry in entries if entry.study_digest == use.study_digest]
    purpose, did = (VALIDATION, "scored") if VALIDATION in use.charges else (TRAINING, "trained")
    done = sum(entry.purpose == purpose for entry in earlier)
    if max_rounds is not None and done >= max_rounds.rounds:
        raise PolicyError(
            f"study '{use.study}' has {did} {done} rounds here, this site allows {max_rounds.rounds} "
            f"({max_rounds.source})"
        )
    _same_task(database, use, purpose)
    _same_cohort(database, use)
    charges, drift = dict(use.charges), use.drift
    if drift is not None and not database.execute("SELECT 1 FROM kept WHERE key = ?", (drift.key,)).fetchone():
        charges[DRIFT] = drift.charge
    charged = private_charges(entries)
    added = [charge for charge in charges.values() if charge]
    total = epsilon([*charged, *added], delta)
    if added:
        _refuse_beyond(limit, delta, charged, total, f"round {use.round} of study '{use.study}'")
    if use.plan and not earlier:
        whole = epsilon([*charged, *use.plan], delta)
        _refuse_beyond(limit, delta, charged, whole, f"study '{use.study}', all rounds together,")
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
            noised = (drift.key, written.lastrowid, drift.make())
            database.execute("INSERT INTO kept (key, charge, value) VALUES (?, ?, ?)", noised)
    return total


def _same_task(database: sqlite3.Connection, use: Use, purpose: str) -> None:
    """Refuse a round that ran from other weights: the difference of two answers tells more than both."""
    place = (use.study_digest if purpose == TRAINING else f"{use.study_digest}/{purpose}", use.round)
    kept = database.execute("SELECT task FROM tasks WHERE study_digest = ? AND round = ?", place).fetchone()
    if kept is None:
        database.execute("INSERT INTO tasks (study_digest, round, task) VALUES (?, ?, ?)", (*place, use.task))
    elif kept[0] != use.task:
        raise PolicyError(
            f"round {use.round} of study '{use.study}' was {'trained' if purpose == TRAINING else 'scored'} here from "
            "other weights: it can be repeated from "
            "the same ones only"
        )


def _same_cohort(database: sqlite3.Connection, use: Use) -> None:
    """Refuse changed data: what two rounds of one study differ by would be the patients who came or went."""
    kept = database.execute("SELECT cohort FROM cohorts WHERE study_digest = ?", (use.study_digest,)).fetchone()
    if kept is None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        row = (use.study_digest, use.study, now, use.cohort)
        database.execute("INSERT INTO cohorts (study_digest, study, time, cohort) VALUES (?, ?, ?, ?)", row)
    elif kept[0] != use.cohort:
        raise PolicyError(
            f"the store changed since the first round of study '{use.study}': rounds before and after would show the "
            "server the patients who came or went. Restore the former store, or accept that with ld-client cohort "
            "--renew"
        )


def _mark(entries: Sequence[LedgerEntry]) -> LedgerMark:
    content = [asdict(entry) for entry in entries]
    return LedgerMark(len(entries), hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest())


def _refuse_beyond(limit: float, delta: float, charged: Sequence[Charge], total: float, what: str) -> None:
    if total > limit:
        raise PrivacyError(
            f"{what} would bring this data set's ε from {epsilon(charged, delta):.3g} to {total:.3g} at δ {delta:g}, "
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
    """The charges under differential privacy."""
    return [entry.charge for entry in entries if entry.charge]


def by_study(entries: Sequence[LedgerEntry]) -> dict[str, list[LedgerEntry]]:
    """Entries by their study's digest, in the order of its first charge."""
    studies: dict[str, list[LedgerEntry]] = {}
    for entry in entries:
        studies.setdefault(entry.study_digest, []).append(entry)
    return studies
