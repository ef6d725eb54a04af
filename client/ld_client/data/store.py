"""What training reads: cached latents and what each shows, with an index that names no patient.

A store is a folder: `index.sqlite`, one safetensors file that the index names, and `site.key`. Replacing the index
is what makes a new store valid, so a stopped run leaves the old one whole. Only the table `left_out` names files.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

import ld_common.core.offline  # noqa: F401  (before any model library)
from ld_client.data.exclusions import Exclusion, Reason
from ld_client.data.ingest import Progress, Survey, read_visits, survey
from ld_client.data.pseudonyms import load_key
from ld_client.site_config import SiteConfig, load_modality
from ld_common.core.errors import StoreError
from ld_common.diffusion.base_model import BaseModel, load_base
from ld_common.imaging.geometry import to_model
from ld_common.imaging.modality import Attributes, Modality

INDEX = "index.sqlite"
SCHEMA_VERSION = "2"
SCHEMA = """
    CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
    CREATE TABLE visits (
        row INTEGER PRIMARY KEY, pseudonym TEXT NOT NULL, day INTEGER NOT NULL,
        attributes TEXT NOT NULL, prompt TEXT NOT NULL
    );
    CREATE TABLE left_out (name TEXT NOT NULL, files INTEGER NOT NULL, reason TEXT NOT NULL, detail TEXT NOT NULL);
"""


@dataclass(frozen=True)
class IndexSummary:
    """What an index run made."""

    patients: int
    visits: int
    pairs: int
    """Ordered pairs of visits of one patient at different dates."""
    left_out: list[Exclusion]


@dataclass(frozen=True, eq=False)
class Store:
    """A site's visits in the order (pseudonym, day), N in all."""

    base_digest: str
    modality_digest: str
    latents: Tensor
    """`(N,C,h,w)` float32, scaled."""
    prompts: list[str]
    """What each visit shows, in the modality's words."""
    base_latent_mean: Tensor
    """`(C,)`: mean of the base's own training latents."""
    pseudonyms: list[str]
    attributes: list[Attributes]
    days: list[int]
    """Days since the patient's first visit."""

    def condition_vectors(self, modality: Modality) -> Tensor:
        """`Modality.condition_vector` of each visit, `(N,k)`."""
        return torch.tensor([modality.condition_vector(attributes) for attributes in self.attributes])


@dataclass(frozen=True)
class _Entry:
    """One row of the index."""

    pseudonym: str
    day: int
    attributes: Attributes
    prompt: str


def build_store(site: SiteConfig, progress: Progress = lambda *_: None) -> IndexSummary:
    """Ingest the site's scans, encode them and their prompts once, and replace the store.

    A first store without visits is written as well, so that what was left out can be read; `open_store` refuses it.

    Raises:
        LdError: the site's config, table, key, base model or store folder cannot be used.
        StoreError: no visit could be used, and there is a store that has some, which stays as it is.
    """
    modality, base = load_modality(site), load_base(site.base_model)
    found = survey(site, modality, load_key(site.store_path), progress)
    entries, latents, left_out = _encode_scans(found, base, progress)
    tensors = {"latents": latents, "base_latent_mean": base.latent_mean.float().contiguous()}
    meta = {"schema": SCHEMA_VERSION, "base": base.digest, "modality": modality.digest()}
    if not entries and _has_visits(site.store_path):
        reasons = Counter(one.reason.value for one in left_out).most_common(3)
        why = ", ".join(f"{count} {reason}" for reason, count in reasons) or "no scan found"
        raise StoreError(f"no visit could be used ({why}): the store '{site.store_path}' stays as it was")
    with _writing(site.store_path):
        meta["cache"] = _write_cache(site.store_path, tensors)
        _write_index(site.store_path, meta, entries, left_out)
        for old in site.store_path.glob("cache-*.safetensors"):
            if old.name != meta["cache"]:
                old.unlink()
    patients = Counter(entry.pseudonym for entry in entries)
    pairs = sum(count * (count - 1) for count in patients.values())
    return IndexSummary(len(patients), len(entries), pairs, left_out)


def _has_visits(folder: Path) -> bool:
    try:
        open_store(folder)
    except StoreError:
        return False
    return True


def open_store(folder: Path, *, base_digest: str | None = None, modality_digest: str | None = None) -> Store:
    """Load a store, checking the digests that are given.

    Raises:
        StoreError: absent, empty, damaged, of another version, base model or modality.
    """
    with _reading(folder) as index:
        meta = dict(index.execute("SELECT key, value FROM meta"))
        rows = index.execute("SELECT pseudonym, day, attributes, prompt FROM visits ORDER BY row").fetchall()
        for what, expected in (("base", base_digest), ("modality", modality_digest), ("schema", SCHEMA_VERSION)):
            if expected is not None and meta.get(what) != expected:
                raise StoreError(f"the store '{folder}' was made with another {what}: run ld-client index again")
        if not rows:
            raise StoreError(f"the store '{folder}' holds no visit: run ld-client left-out to see why")
        tensors = load_file(folder / meta["cache"])
        latents = tensors["latents"]
        if len(latents) != len(rows):
            raise StoreError(f"the store '{folder}' is damaged: run ld-client index again")
        return Store(
            base_digest=meta["base"],
            modality_digest=meta["modality"],
            latents=latents,
            prompts=[row[3] for row in rows],
            base_latent_mean=tensors["base_latent_mean"],
            pseudonyms=[row[0] for row in rows],
            attributes=[json.loads(row[2]) for row in rows],
            days=[row[1] for row in rows],
        )


def split_store(store: Store, held_out: float) -> tuple[Store, Store]:
    """A store's patients who are trained on, and the share `held_out` who are not.

    A patient's side follows from the pseudonym alone, whose key is the site's: others may come or go.
    """
    apart = {name: hashlib.sha256(f"held out/{name}".encode()).digest() for name in store.pseudonyms}
    out = [int.from_bytes(apart[name][:8]) < held_out * 2**64 for name in store.pseudonyms]
    trained, others = ([row for row, own in enumerate(out) if own == side] for side in (False, True))
    return _rows(store, trained), _rows(store, others)


def _rows(store: Store, rows: list[int]) -> Store:
    return replace(
        store,
        latents=store.latents[rows],
        prompts=[store.prompts[row] for row in rows],
        pseudonyms=[store.pseudonyms[row] for row in rows],
        attributes=[store.attributes[row] for row in rows],
        days=[store.days[row] for row in rows],
    )


def read_exclusions(folder: Path) -> list[Exclusion]:
    """What the last index run left out; raises `StoreError` without a store."""
    with _reading(folder) as index:
        rows = index.execute("SELECT name, files, reason, detail FROM left_out ORDER BY rowid").fetchall()
        return [Exclusion(name, files, Reason(reason), detail) for name, files, reason, detail in rows]


def _encode_scans(found: Survey, base: BaseModel, progress: Progress) -> tuple[list[_Entry], Tensor, list[Exclusion]]:
    """Index rows, latents `(N,C,h,w)` and everything that was left out."""
    modality, left_out = found.modality, list(found.left_out)
    entries: list[_Entry] = []
    waiting: list[Tensor] = []
    latents = [torch.empty(0, *base.latent_shape)]
    for visit in read_visits(found):
        if isinstance(visit, Exclusion):
            left_out.append(visit)
            continue
        prompt = modality.prompt(visit.attributes)
        entries.append(_Entry(visit.pseudonym, visit.days_since_baseline, visit.attributes, prompt))
        waiting.append(to_model(visit.scan, base.resolution, modality.image)[0])
        if len(waiting) == found.site.batch_size:
            latents.append(base.encode(torch.stack(waiting)))
            waiting.clear()
        progress("encoding scans", len(entries), found.scans)
    if waiting:
        latents.append(base.encode(torch.stack(waiting)))
    progress("encoding scans", found.scans, found.scans)
    return entries, torch.cat(latents), left_out


def _write_cache(folder: Path, tensors: dict[str, Tensor]) -> str:
    """Write the tensors under a name made of their content, and return it."""
    content = save(tensors)
    name = f"cache-{hashlib.sha256(content).hexdigest()[:16]}.safetensors"
    partial = folder / f"{name}.part"
    partial.write_bytes(content)
    _finish(partial, folder / name)
    return name


def _write_index(folder: Path, meta: dict[str, str], entries: list[_Entry], left_out: list[Exclusion]) -> None:
    visits = [
        (row, entry.pseudonym, entry.day, json.dumps(entry.attributes, sort_keys=True), entry.prompt)
        for row, entry in enumerate(entries)
    ]
    partial = folder / f"{INDEX}.part"
    partial.unlink(missing_ok=True)
    with closing(sqlite3.connect(partial)) as index, index:
        index.executescript(SCHEMA)
        index.executemany("INSERT INTO meta VALUES (?, ?)", sorted(meta.items()))
        index.executemany("INSERT INTO visits VALUES (?, ?, ?, ?, ?)", visits)
        lines = [(one.name, one.files, one.reason.value, one.detail) for one in left_out]
        index.executemany("INSERT INTO left_out VALUES (?, ?, ?, ?)", lines)
    _finish(partial, folder / INDEX)


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


@contextmanager
def _reading(folder: Path) -> Iterator[sqlite3.Connection]:
    path = folder / INDEX
    if not path.is_file():
        raise StoreError(f"there is no store in '{folder}': run ld-client index --config SITE.yaml")
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as index:
            yield index
    except (OSError, sqlite3.Error, SafetensorError, LookupError, ValueError) as error:
        raise StoreError(f"the store '{folder}' is damaged: run ld-client index again") from error
