"""Makes a store: reads a site's scans and table, encodes them once, and replaces the index in one step."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import save

import ld_common.core.offline  # noqa: F401  (before any model library)
from ld_client.data.contradictions import Doubt
from ld_client.data.encoded_scans import EncodedScan, EncodedScans
from ld_client.data.exclusions import Exclusion
from ld_client.data.faces import FaceCount, count_faces, meta_of
from ld_client.data.held_out import Split, held_out_patients
from ld_client.data.ingest import Progress, Survey, read_visits, survey
from ld_client.data.memory import FileMemory
from ld_client.data.site_base import SiteBase
from ld_client.data.store_index import INDEX, LATENT_MEAN, LATENTS, MIRRORED, SCHEMA_VERSION, SIZES
from ld_client.data.store_key import load_key
from ld_client.data.withdrawals import former_patients
from ld_client.site_config import SiteConfig, load_modality
from ld_common.core.errors import StoreError
from ld_common.imaging.modality import Attributes

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA = """
    CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
    CREATE TABLE visits (
        row INTEGER PRIMARY KEY, pseudonym TEXT NOT NULL, day INTEGER NOT NULL,
        attributes TEXT NOT NULL, prompt TEXT NOT NULL, source TEXT NOT NULL
    );
    CREATE TABLE exclusions (name TEXT NOT NULL, files INTEGER NOT NULL, reason TEXT NOT NULL, detail TEXT NOT NULL);
"""


ACCEPTED, DOUBTS = "accepted", "doubts"
"""Keys of the counts of accepted contradictions and of doubts, by kind, in the index."""


@dataclass(frozen=True)
class IndexSummary:
    """What an index run made."""

    patients: int
    split: Split
    visits: int
    pairs: int
    """Ordered pairs of visits of one patient at different dates."""
    exclusions: list[Exclusion]
    faces: FaceCount
    doubts: list[Doubt]
    """Of scans that are kept."""
    accepted: dict[str, int]
    """Kind of contradiction -> scans or patients that are kept because the site accepts it."""
    unchanged: int = 0
    """Visits whose scan was not read again, as its files are those of the last index."""


@dataclass(frozen=True)
class _Entry:
    """One row of the index."""

    pseudonym: str
    day: int
    attributes: Attributes
    prompt: str
    source: bytes | None
    """Key of the encoded scan."""


def build_store(site: SiteConfig, progress: Progress = lambda *_: None, anew: bool = False) -> IndexSummary:
    """Ingest the site's scans, encode them and their prompts once, and replace the store.

    Files that have not changed since the last index are not read again, nor are those that a stopped index had read. A
    first store without visits is written as well, so that its exclusions can be read; `open_store` refuses it.

    Args:
        site: the site.
        progress: called with a stage, the items done and all items.
        anew: read and encode every file again.

    Raises:
        LdError: the site's config, table, key, base model or store folder cannot be used, or a visit's prompt is longer
            than the base's text encoder reads.
        StoreError: no visit could be used, and there is a store that has some, which stays as it is.
    """
    modality = load_modality(site)
    key = load_key(site.store_path, site.ledger_path)
    memory = FileMemory.open(site.store_path, Path(site.data.root), key, anew)
    try:
        base = SiteBase.of(site.base_model, memory)
        digests = modality.digest(), base.facts.digest
        known = EncodedScans(memory, *digests) if anew else EncodedScans.of(site.store_path, memory, *digests)
        return _build(survey(site, modality, key, progress, memory), base, known, progress)
    finally:
        memory.close()


def _build(surveyed: Survey, base: SiteBase, known: EncodedScans, progress: Progress) -> IndexSummary:
    site, modality, memory = surveyed.site, surveyed.modality, known.memory
    base.check_prompts(_prompts(surveyed))
    entries, encoded, exclusions, unchanged = _encode_scans(surveyed, base, known, progress)
    faces = count_faces(surveyed, progress, memory)
    tensors = encoded | {LATENT_MEAN: np.array(base.facts.latent_mean, np.float32)}
    contradictions = surveyed.contradictions
    accepted = dict(sorted(contradictions.accepted.items()))
    meta = {"schema": SCHEMA_VERSION, "base": base.facts.digest, "modality": modality.digest()} | meta_of(faces)
    meta[ACCEPTED] = json.dumps(accepted)
    meta[DOUBTS] = json.dumps(Counter(doubt.kind for doubt in contradictions.doubts))
    if not entries and _has_visits(site.store_path):
        reasons = Counter(exclusion.reason.value for exclusion in exclusions).most_common(3)
        why = ", ".join(f"{count} {reason}" for reason, count in reasons) or "no scan found"
        raise StoreError(f"no visit could be used ({why}): the store '{site.store_path}' stays as it was")
    with _writing(site.store_path):
        meta["cache"] = _write_cache(site.store_path, tensors)
        _write_index(site.store_path, meta, entries, exclusions)
        for old in site.store_path.glob("cache-*.safetensors"):
            if old.name != meta["cache"]:
                old.unlink()
    memory.finish()
    visits = Counter(entry.pseudonym for entry in entries)
    hidden = len(held_out_patients(list(visits), site.held_out, former=former_patients(site.store_path)))
    pairs = sum(count * (count - 1) for count in visits.values())
    return IndexSummary(
        len(visits),
        Split(len(visits) - hidden, hidden),
        len(entries),
        pairs,
        exclusions,
        faces,
        contradictions.doubts,
        accepted,
        unchanged,
    )


def _has_visits(folder: Path) -> bool:
    from ld_client.data.store import open_store

    try:
        open_store(folder)
    except StoreError:
        return False
    return True


def _prompts(surveyed: Survey) -> set[str]:
    visits = (candidates for dates in surveyed.patients.values() for candidates in dates.values())
    return {surveyed.modality.prompt(candidate.attributes) for candidates in visits for candidate in candidates}


def _encode_scans(
    surveyed: Survey, base: SiteBase, known: EncodedScans, progress: Progress
) -> tuple[list[_Entry], dict[str, np.ndarray], list[Exclusion], int]:
    """Index rows, the store's tensors of the visits, all exclusions, and how many visits were known."""
    modality, exclusions = surveyed.modality, list(surveyed.exclusions)
    entries: list[_Entry] = []
    encoded: dict[int, EncodedScan] = {}
    waiting: dict[int, Tensor] = {}
    unchanged = 0

    def encode() -> None:
        for row, scan in zip(waiting, base.encode(list(waiting.values()), modality), strict=True):
            encoded[row] = scan
            known.put(entries[row].source, scan)
        waiting.clear()

    for visit in read_visits(surveyed, known):
        if isinstance(visit, Exclusion):
            exclusions.append(visit)
            continue
        row, prompt = len(entries), modality.prompt(visit.attributes)
        entries.append(_Entry(visit.pseudonym, visit.days_since_baseline, visit.attributes, prompt, visit.key))
        if isinstance(visit.scan, EncodedScan):
            encoded[row] = visit.scan
            unchanged += 1
        else:
            waiting[row] = base.picture(visit.scan, modality)
        if len(waiting) == surveyed.site.batch_size:
            encode()
        progress("encoding scans", len(entries), surveyed.scans)
    if waiting:
        encode()
    progress("encoding scans", surveyed.scans, surveyed.scans)
    tensors = _stacked([encoded[row] for row in range(len(entries))], base.facts.latent_shape)
    return entries, tensors, exclusions, unchanged


def _stacked(scans: list[EncodedScan], latent_shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """The store's tensors of its visits."""
    none = np.empty((0, *latent_shape), np.float32)
    mirrored = [scan.mirrored for scan in scans if len(scan.mirrored)]
    sizes = [scan.sizes for scan in scans if len(scan.sizes)]
    return {
        LATENTS: np.stack([scan.latents for scan in scans]) if scans else none,
        SIZES: np.stack(sizes, 1) if sizes else np.empty((2, 0), np.float64),
        MIRRORED: np.stack(mirrored) if mirrored else none,
    }


def _write_cache(folder: Path, tensors: dict[str, np.ndarray]) -> str:
    """Write the tensors under a name made of their content, and return it."""
    content = save(tensors)
    name = f"cache-{hashlib.sha256(content).hexdigest()[:16]}.safetensors"
    partial = folder / f"{name}.part"
    partial.write_bytes(content)
    _finish(partial, folder / name)
    return name


def _write_index(folder: Path, meta: dict[str, str], entries: list[_Entry], exclusions: list[Exclusion]) -> None:
    visits = [
        (
            *(row, entry.pseudonym, entry.day, json.dumps(entry.attributes, sort_keys=True), entry.prompt),
            "" if entry.source is None else entry.source.hex(),
        )
        for row, entry in enumerate(entries)
    ]
    partial = folder / f"{INDEX}.part"
    partial.unlink(missing_ok=True)
    with closing(sqlite3.connect(partial)) as index, index:
        index.executescript(SCHEMA)
        index.executemany("INSERT INTO meta VALUES (?, ?)", sorted(meta.items()))
        index.executemany("INSERT INTO visits VALUES (?, ?, ?, ?, ?, ?)", visits)
        lines = [(_storable(one.name), one.files, one.reason.value, _storable(one.detail)) for one in exclusions]
        index.executemany("INSERT INTO exclusions VALUES (?, ?, ?, ?)", lines)
    _finish(partial, folder / INDEX)


def _storable(text: str) -> str:
    """A text with the names of files, which may hold bytes that are no UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


def _finish(partial: Path, final: Path) -> None:
    """Put a whole file, safe on disk and readable by its owner alone, in its place."""
    partial.chmod(0o600)
    with partial.open("rb+") as stream:
        os.fsync(stream.fileno())
    partial.replace(final)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        raise StoreError(f"cannot write the store '{folder}': {error}") from error
