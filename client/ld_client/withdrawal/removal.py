"""Removes the patients who withdrew consent from a store: new files take the place of the old ones.

The order makes a removal that stops at any point safe. The list of withdrawals is written first, and from then on
`open_store` refuses an index that still holds the patient. Then come the new cache, the new index, and the end of the
old files. A second run finishes what the first left.

The blocks of a deleted file stay on the disk until they are written again, and backups keep what they have.
"""

from __future__ import annotations

import os
import secrets
import sqlite3
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ld_client.data.memory import MEMORY
from ld_client.data.store_index import INDEX, open_index
from ld_client.data.store_key import KEY_FILE, load_key
from ld_client.data.withdrawals import WITHDRAWALS, withdrawn
from ld_client.site_config import LEDGER
from ld_client.withdrawal.quarantine import QuarantinedSeries, find_series, remove_series
from ld_common.core.atomic_files import file_digest
from ld_common.core.errors import StoreError

LOCK = "withdrawals.lock"
VISIT_AXIS = {"latents": 0, "mirrored": 0, "sizes": 1, "base_latent_mean": None}
"""Tensor of the cache -> its axis of visits, None where it has none."""
DERIVED = ("cache-*.safetensors", "drift-*.safetensors", f"{MEMORY}*", "*.part", "*.part-journal")
"""Files that may hold something of a patient, except the cache that the index names."""
KEPT = (INDEX, KEY_FILE, WITHDRAWALS, LOCK, f"{LEDGER}*", "prior-*.safetensors")
"""Files that hold no scan and nothing computed from one; a prior is drawn by the base alone."""
NAME, DETAIL = "(name removed)", "a patient withdrew consent; ld-client index lists the names again"
"""In place of the text of exclusions."""


@dataclass(frozen=True)
class HeldData:
    """What a store's index holds of some patients."""

    visits: int = 0
    pairs: int = 0
    """Ordered pairs of visits of one patient."""
    exclusions: int = 0
    """Exclusions with a name, of any patient: whose they are, the index does not say."""


@dataclass
class Removal:
    """What was removed from a store; it names nobody."""

    held: HeldData = field(default_factory=HeldData)
    written: list[str] = field(default_factory=list)
    """Files written anew."""
    deleted: list[str] = field(default_factory=list)
    series: int = 0
    """Series removed from the quarantine."""
    unreadable_series: list[str] = field(default_factory=list)
    """Folders of the quarantine whose files do not say of whom they are."""
    unknown: list[str] = field(default_factory=list)
    """Files in the store's folder that this version does not know."""


@dataclass(frozen=True)
class _IndexTable:
    """A table of the index, in memory."""

    statement: str
    """The SQL that makes it."""
    columns: list[str]
    rows: list[dict[str, Any]]


def held_data(store: Path, pseudonyms: frozenset[str]) -> HeldData:
    """What the index holds of these patients; nothing without an index. Raises `StoreError`."""
    return _held(_read_index(store), pseudonyms) if (store / INDEX).exists() else HeldData()


def stored_patients(store: Path) -> frozenset[str]:
    """Pseudonyms in the index; none without one. Raises `StoreError`."""
    if not (store / INDEX).exists():
        return frozenset()
    with open_index(store) as index:
        return frozenset(name for (name,) in index.execute("SELECT pseudonym FROM visits"))


def remove_withdrawn(store: Path) -> Removal:
    """Remove the patients of the list of withdrawals from index, cache and quarantine, and names of exclusions.

    What was derived from all scans together, such as a drift, is removed as well; a round computes it again.

    Raises:
        StoreError: the store is damaged, of another version, or cannot be written.
    """
    removal, gone = Removal(), withdrawn(store)
    tables = _read_index(store) if (store / INDEX).exists() else {}
    try:
        cache = _replace(store, tables, gone, removal) if tables else ""
        for path in sorted(path for pattern in DERIVED for path in store.glob(pattern)):
            if path.name != cache:
                path.unlink()
                removal.deleted.append(path.name)
        quarantined = find_series(store, load_key(store), gone) if gone else QuarantinedSeries()
        for folder in quarantined.withdrawn:
            remove_series(folder, store)
        removal.series = len(quarantined.withdrawn)
        removal.unreadable_series = [folder.name for folder in quarantined.unreadable]
        _flush(store)
        known = {cache, *(path.name for pattern in KEPT for path in store.glob(pattern))}
        removal.unknown = sorted(path.name for path in store.iterdir() if path.is_file() and path.name not in known)
    except (OSError, sqlite3.Error) as error:
        raise StoreError(
            f"cannot write the store '{store}' ({error}), from which nothing trains now: mend that, then run "
            "ld-client withdraw --finish"
        ) from error
    return removal


def _read_index(store: Path) -> dict[str, _IndexTable]:
    """The index's tables by name; raises `StoreError`."""
    tables = {}
    with open_index(store) as index:
        made = "SELECT name, sql FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite_%' ORDER BY rowid"
        for name, statement in index.execute(made).fetchall():
            cursor = index.execute(f'SELECT * FROM "{name}" ORDER BY rowid')
            columns = [column[0] for column in cursor.description]
            tables[name] = _IndexTable(statement, columns, [dict(zip(columns, row, strict=True)) for row in cursor])
    return tables


def _held(tables: dict[str, _IndexTable], pseudonyms: frozenset[str]) -> HeldData:
    visits = Counter(row["pseudonym"] for row in tables["visits"].rows if row["pseudonym"] in pseudonyms)
    named = sum(row["name"] != NAME for row in tables["exclusions"].rows)
    return HeldData(visits.total(), sum(count * (count - 1) for count in visits.values()), named)


def _replace(store: Path, tables: dict[str, _IndexTable], gone: frozenset[str], removal: Removal) -> str:
    """Replace cache and index where they hold something to remove; returns the name of the present cache."""
    held = _held(tables, gone)
    (entry,) = (row for row in tables["meta"].rows if row["key"] == "cache")
    if not gone or not (held.visits or held.exclusions):
        return str(entry["value"])
    if held.visits:
        owners = [row["pseudonym"] for row in tables["visits"].rows]
        kept = [number for number, name in enumerate(owners) if name not in gone]
        entry["value"] = _write_cache(store, entry["value"], len(owners), kept)
        removal.written.append(entry["value"])
    _write_index(store, tables, gone)
    removal.written.append(INDEX)
    removal.held = held
    return str(entry["value"])


def _write_cache(store: Path, former: str, visits: int, kept: Sequence[int]) -> str:
    """Write a cache of the kept rows under a name made of its content, and return it."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file, save_file

    try:
        tensors = load_file(store / former)
    except (OSError, SafetensorError) as error:
        raise StoreError(f"the store '{store}' is damaged: run ld-client index again") from error
    if tensors.keys() != VISIT_AXIS.keys():
        raise StoreError(
            f"the store '{store}' is of another version: run ld-client index, which leaves the patient out"
        )
    chosen = {}
    for name, axis in VISIT_AXIS.items():
        # a tensor of nothing that was measured has no visits
        by_visit = axis is not None and tensors[name].shape[axis] == visits
        chosen[name] = tensors[name].take(kept, axis) if by_visit else tensors[name]
    partial = store / f"cache-{secrets.token_hex(8)}.part"
    save_file(chosen, partial)
    name = f"cache-{file_digest(partial)[:16]}.safetensors"
    _finish(partial, store / name)
    return name


def _write_index(store: Path, tables: dict[str, _IndexTable], gone: frozenset[str]) -> None:
    """Write the index into a new file, which holds no page of the old one."""
    partial = store / f"{INDEX}.{secrets.token_hex(8)}.part"
    partial.touch(0o600)
    with closing(sqlite3.connect(partial)) as index, index:
        for name, table in tables.items():
            index.execute(table.statement)
            places = ", ".join("?" * len(table.columns))
            rows = [list(row.values()) for row in _remaining(name, table, gone)]
            index.executemany(f'INSERT INTO "{name}" VALUES ({places})', rows)
    _finish(partial, store / INDEX)


def _remaining(name: str, table: _IndexTable, gone: frozenset[str]) -> list[dict[str, Any]]:
    """A table's rows without the withdrawn patients. Of a table that this version does not know, none remain."""
    if name == "meta":
        return table.rows
    if name == "exclusions":
        # the table of visits may have changed since, so `row 12` of the list may be another patient's by now
        return [row | {"name": NAME, "detail": DETAIL} for row in table.rows]
    kept = [row for row in table.rows if row.get("pseudonym") not in gone and "pseudonym" in row]
    return [row | {"row": number} for number, row in enumerate(kept)] if name == "visits" else kept


def _finish(partial: Path, final: Path) -> None:
    """Put a whole file, safe on disk and readable by its owner alone, in its place."""
    partial.chmod(0o600)
    with partial.open("rb+") as stream:
        os.fsync(stream.fileno())
    partial.replace(final)


def _flush(folder: Path) -> None:
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
