"""The cached latents that training reads, with an index that names no patient.

A store is a folder: `index.sqlite`, one safetensors file that the index names, and `pseudonyms.key`. It is written by
`ld_client.data.indexing`; replacing the index is what makes a new store valid, so a stopped run leaves the old one
whole. Only the table `exclusions` names files.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

import ld_common.core.offline  # noqa: F401  (before any model library)
from ld_client.data.held_out import Split, held_out_patients
from ld_client.data.store_index import LATENT_MEAN, LATENTS, MIRRORED, SCHEMA_VERSION, SIZES, open_index
from ld_client.data.withdrawals import check_consent, former_patients
from ld_common.core.errors import StoreError
from ld_common.diffusion.longitudinal_sums import StructureSizes
from ld_common.imaging.modality import Attributes, Modality


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
    sizes: Tensor = field(default_factory=lambda: torch.empty(2, 0, dtype=torch.float64))
    """Areas and edges of the structure that the modality measures, as `structure_sizes`; `(2,0)` without one."""

    mirrored: Tensor = field(default_factory=lambda: torch.empty(0))
    """Latents of the mirror images, like `latents`; empty where left and right are not alike."""
    former: frozenset[str] = frozenset()
    """Patients who withdrew consent. They have no visit here, and count in `held_out_patients`."""

    @property
    def structure(self) -> StructureSizes | None:
        """The sizes by name; None where nothing was measured."""
        return StructureSizes(*self.sizes) if self.sizes.shape[1] else None

    @property
    def patients(self) -> int:
        """Number of patients."""
        return len(set(self.pseudonyms))

    def digest(self) -> str:
        """SHA-256 of the visits, hex: of patients, days, attributes, prompts and latents."""
        rows = [self.pseudonyms, self.days, self.attributes, self.prompts]
        whole = hashlib.sha256(json.dumps(rows, sort_keys=True).encode())
        whole.update(self.latents.contiguous().numpy().tobytes())
        return whole.hexdigest()

    def condition_vectors(self, modality: Modality) -> Tensor:
        """`Modality.condition_vector` of each visit, `(N,k)`."""
        return torch.tensor([modality.condition_vector(attributes) for attributes in self.attributes])


def open_store(folder: Path, *, base_digest: str | None = None, modality_digest: str | None = None) -> Store:
    """Load a store, checking the digests that are given.

    Raises:
        StoreError: absent, empty, damaged, of another version, base model or modality, or with a patient who withdrew
            consent.
    """
    with open_index(folder) as index:
        meta = dict(index.execute("SELECT key, value FROM meta"))
        rows = index.execute("SELECT pseudonym, day, attributes, prompt FROM visits ORDER BY row").fetchall()
        for what, expected in (("base", base_digest), ("modality", modality_digest), ("schema", SCHEMA_VERSION)):
            if expected is not None and meta.get(what) != expected:
                raise StoreError(f"the store '{folder}' was made with another {what}: run ld-client index again")
        if not rows:
            raise StoreError(f"the store '{folder}' holds no visit: ld-client exclusions lists why")
        check_consent(folder, {row[0] for row in rows})
        tensors = load_file(folder / meta["cache"])
        latents = tensors[LATENTS]
        sizes, mirrored = tensors[SIZES], tensors[MIRRORED]
        if len(latents) != len(rows) or {sizes.shape[1], len(mirrored)} - {0, len(rows)}:
            raise StoreError(f"the store '{folder}' is damaged: run ld-client index again")
        return Store(
            base_digest=meta["base"],
            modality_digest=meta["modality"],
            latents=latents,
            prompts=[row[3] for row in rows],
            base_latent_mean=tensors[LATENT_MEAN],
            pseudonyms=[row[0] for row in rows],
            attributes=[json.loads(row[2]) for row in rows],
            days=[row[1] for row in rows],
            sizes=sizes,
            mirrored=mirrored,
            former=former_patients(folder),
        )


def split_store(store: Store, held_out: float, independent: bool = False) -> tuple[Store, Store]:
    """A store's visits of the patients who are trained on, and of those who are held out.

    Args:
        store: the store.
        held_out: share of the patients, from 0 to below 1.
        independent: as for `held_out_patients`; set for studies with differential privacy.
    """
    hidden = held_out_patients(store.pseudonyms, held_out, independent, store.former)
    trained, others = (
        [row for row, name in enumerate(store.pseudonyms) if (name in hidden) == side] for side in (False, True)
    )
    return _rows(store, trained), _rows(store, others)


def count_split(store: Store, held_out: float, independent: bool = False) -> Split:
    """The number of patients on each side of `split_store`."""
    hidden = len(held_out_patients(store.pseudonyms, held_out, independent, store.former))
    return Split(store.patients - hidden, hidden)


def _rows(store: Store, rows: list[int]) -> Store:
    return replace(
        store,
        latents=store.latents[rows],
        prompts=[store.prompts[row] for row in rows],
        pseudonyms=[store.pseudonyms[row] for row in rows],
        attributes=[store.attributes[row] for row in rows],
        days=[store.days[row] for row in rows],
        sizes=store.sizes[:, rows] if store.sizes.shape[1] else store.sizes,
        mirrored=store.mirrored[rows] if len(store.mirrored) else store.mirrored,
    )
