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

import torch
from safetensors.torch import save
from torch import Tensor

import ld_common.core.offline  # noqa: F401  (before any model library)
from ld_client.data.contradictions import Doubt
from ld_client.data.encoded_scans import EncodedScan, EncodedScans
from ld_client.data.exclusions import Exclusion
from ld_client.data.faces import FaceCount, count_faces, meta_of
from ld_client.data.ingest import Progress, Survey, read_visits, survey
from ld_client.data.memory import FileMemory
from ld_client.data.store import MIRRORED, SIZES, Split, held_out_patients, open_store
from ld_client.data.store_index import INDEX, SCHEMA_VERSION
from ld_client.data.store_key import load_key
from ld_client.data.withdrawals import former_patients
from ld_client.site_config import SiteConfig, load_modality
from ld_common.core.errors import StoreError
from ld_common.diffusion.base_model import BaseModel, load_base
from ld_common.imaging.geometry import to_model
from ld_common.imaging.modality import Attributes, Modality
from ld_common.metrics.structure import structure_sizes

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
    modality, base = load_modality(site), load_base(site.base_model)
    key = load_key(site.store_path, site.ledger_path)
    memory = FileMemory.open(site.store_path, Path(site.data.root), key, anew)
    try:
        digests = modality.digest(), base.digest
        known = EncodedScans(memory, *digests) if anew else EncodedScans.of(site.store_path, memory, *digests)
        return _build(survey(site, modality, key, progress, memory), base, known, progress)
    finally:
        memory.close()


def _build(surveyed: Survey, base: BaseModel, known: EncodedScans, progress: Progress) -> IndexSummary:
    site, modality, memory = surveyed.site, surveyed.modality, known.memory
    base.tokens(_long_prompts(surveyed, base))
    entries, encoded, exclusions, unchanged = _encode_scans(surveyed, base, known, progress)
    faces = count_faces(surveyed, progress, memory)
    tensors = encoded | {"base_latent_mean": base.latent_mean.float().contiguous()}
    contradictions = surveyed.contradictions
    accepted = dict(sorted(contradictions.accepted.items()))
    meta = {"schema": SCHEMA_VERSION, "base": base.digest, "modality": modality.digest()} | meta_of(faces)
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
    try:
        open_store(folder)
    except StoreError:
        return False
    return True


def _long_prompts(surveyed: Survey, base: BaseModel) -> list[str]:
    """Prompts that may have more tokens than the base reads; a token has a character at least."""
    visits = (candidates for dates in surveyed.patients.values() for candidates in dates.values())
    prompts = {surveyed.modality.prompt(one.attributes) for candidates in visits for one in candidates}
    room = int(base.text_encoder.config.max_position_embeddings) - 2  # beginning and end are tokens
    return sorted(prompt for prompt in prompts if len(base.transform_prompt(prompt).encode()) > room)


def _encode_scans(
    surveyed: Survey, base: BaseModel, known: EncodedScans, progress: Progress
) -> tuple[list[_Entry], dict[str, Tensor], list[Exclusion], int]:
    """Index rows, the store's tensors of the visits, all exclusions, and how many visits were known."""
    modality, exclusions = surveyed.modality, list(surveyed.exclusions)
    entries: list[_Entry] = []
    encoded: dict[int, EncodedScan] = {}
    waiting: dict[int, Tensor] = {}
    unchanged = 0

    def encode() -> None:
        for row, scan in zip(waiting, _encoded(modality, base, torch.stack(list(waiting.values()))), strict=True):
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
            waiting[row] = to_model(visit.scan, base.resolution, modality.image)[0]
        if len(waiting) == surveyed.site.batch_size:
            encode()
        progress("encoding scans", len(entries), surveyed.scans)
    if waiting:
        encode()
    progress("encoding scans", surveyed.scans, surveyed.scans)
    rows = [encoded[row] for row in range(len(entries))]
    latents, mirrored = [torch.empty(0, *base.latent_shape)], [torch.empty(0, *base.latent_shape)]
    latents += [scan.latents[None] for scan in rows]
    mirrored += [scan.mirrored[None] for scan in rows if len(scan.mirrored)]
    sizes = [torch.empty(2, 0, dtype=torch.float64), *(scan.sizes[:, None] for scan in rows if len(scan.sizes))]
    tensors = {"latents": torch.cat(latents), SIZES: torch.cat(sizes, 1), MIRRORED: torch.cat(mirrored)}
    return entries, tensors, exclusions, unchanged


def _encoded(modality: Modality, base: BaseModel, pictures: Tensor) -> list[EncodedScan]:
    """What the store holds of pictures `(B,C,H,W)`."""
    latents = base.encode(pictures)
    mirrored = base.encode(pictures.flip(-1)) if modality.image.symmetric else torch.empty(len(pictures), 0)
    measured = structure_sizes(modality, pictures)
    sizes = torch.empty(0, len(pictures), dtype=torch.float64) if measured is None else measured
    return [EncodedScan(*parts) for parts in zip(latents, mirrored, sizes.T, strict=True)]


def _write_cache(folder: Path, tensors: dict[str, Tensor]) -> str:
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
