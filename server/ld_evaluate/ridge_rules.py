"""Ridge regressions on other patients' visits: what a method must beat that learns from the same scans.

    cross-sectional ridge   the difference between patients of other attributes, whatever the scan
    longitudinal ridge      the change with the years as a function of the scan, from pairs of visits

Both are those of a longitudinal drift (`ld_common.diffusion.longitudinal`), without any option that could be tuned, and
move a scan's latents; what they decode to is written as an editor's answers are. They are fitted to the reference scans
where these have patients with two visits, otherwise to the other patients of the evaluation, fold by fold.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ld_common.core.errors import ConfigError, RequestError
from ld_common.diffusion.base_model import BaseModel
from ld_common.diffusion.longitudinal import LongitudinalDrift
from ld_common.editing.counterfactuals import attribute_change
from ld_common.editing.drift_fitting import fit_longitudinal_drift
from ld_common.imaging.modality import Modality
from ld_common.imaging.rendering import render
from ld_common.imaging.scan_table import ScanTable
from ld_evaluate.answers import Answers
from ld_evaluate.edits import EvaluationEdit
from ld_evaluate.files import CROSS_SECTIONAL, LONGITUDINAL

FOLDS = 5
ENCODED_TOGETHER = 16


def ridge_answers(
    base: BaseModel,
    modality: Modality,
    edits: Sequence[EvaluationEdit],
    visits: ScanTable,
    reference: ScanTable | None = None,
    drifts: Mapping[str, LongitudinalDrift | None] | None = None,
) -> dict[str, Answers]:
    """Both rules' answers, in the order of the edits; empty where nobody has two visits to learn from.

    Args:
        base: the base without an adapter.
        modality: what the attributes mean.
        edits: what is asked; those of a patient are answered by what others show.
        visits: of the patients who are asked.
        reference: scans of other patients.
        drifts: of `cross_fitted`, where they are known already; else they are fitted here.
    """
    if drifts is None and reference is not None and _has_pairs(reference):
        latents = torch.cat([base.encode(part).cpu() for part in reference.images.split(ENCODED_TOGETHER)])
        drifts = dict.fromkeys(visits.patients, _fitted(base, modality, reference, latents))
    elif drifts is None:
        drifts = cross_fitted(base, modality, visits)
    written: dict[str, list[np.ndarray | None]] = {CROSS_SECTIONAL: [], LONGITUDINAL: []}
    for edit in edits:
        drift = drifts[edit.patient]
        if drift is None:
            return {}
        for name, pixels in _answers(base, modality, drift, edit).items():
            written[name].append(pixels)
    return dict(written)


def cross_fitted(base: BaseModel, modality: Modality, visits: ScanTable) -> dict[str, LongitudinalDrift | None]:
    """For each patient a longitudinal drift of other patients, in `FOLDS` folds; None where nobody comes twice."""
    latents = torch.cat([base.encode(part).cpu() for part in visits.images.split(ENCODED_TOGETHER)])
    folds = {patient: fold_of(patient) for patient in visits.patients}
    drifts = {}
    for fold in sorted(set(folds.values())):
        rows = [row for row, patient in enumerate(visits.patients) if folds[patient] != fold]
        drifts[fold] = _fitted(base, modality, visits.rows(rows), latents[rows])
    return {patient: drifts[fold] for patient, fold in folds.items()}


def _has_pairs(table: ScanTable) -> bool:
    return len(set(table.patients)) < len(table.patients)


def fold_of(patient: str) -> int:
    """The fold of a patient, 0 to `FOLDS` - 1, by a hash of the name."""
    return int.from_bytes(hashlib.sha256(f"ridge/{patient}".encode()).digest()[:4]) % FOLDS


def _fitted(base: BaseModel, modality: Modality, table: ScanTable, latents: Tensor) -> LongitudinalDrift | None:
    try:
        return fit_longitudinal_drift(latents, table.attributes, table.patients, modality=modality, base=base)
    except (RequestError, ConfigError):  # no age, or nobody with two visits on different days
        return None


def _answers(
    base: BaseModel, modality: Modality, drift: LongitudinalDrift, edit: EvaluationEdit
) -> dict[str, np.ndarray]:
    """Both rules' answers to one edit, in the pixels of the scan's file."""
    latents = base.encode(edit.scanned.picture[None]).cpu()[0]
    asked = attribute_change(modality, edit.source, edit.source | edit.target)
    designs = torch.tensor([asked.source, asked.target])
    between = (drift.features(designs)[1] - drift.features(designs)[0]) @ drift.effect
    moves = {CROSS_SECTIONAL: between.view_as(latents), LONGITUDINAL: drift.change(latents, asked)}
    before, *pictures = base.decode(torch.stack([latents, *(latents + move for move in moves.values())]))
    scan, rendering = edit.scanned, modality.image.rendering
    return {
        name: render(scan.pixels, scan.frame, before, picture, rendering)
        for name, picture in zip(moves, pictures, strict=True)
    }
