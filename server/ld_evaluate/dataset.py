"""Scans that a release is judged on: baselines, follow-ups, edits, and for simulated patients the true counterfactuals.

A folder holds `scans.csv` with a row for each scan: `patient`, `input` (a path relative to the table) and every
attribute of the modality. A patient's rows are in the order of the visits: the first is the baseline, the last of
several the follow-up. A folder of simulated patients also holds `held_out.json`; its edits and truths then replace the
edits generated here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ld_common.core.errors import RequestError
from ld_common.imaging.modality import Attributes, Modality
from ld_common.imaging.scan_table import ScanTable, read_scan_table
from ld_evaluate.files import SCANS, TRUTH
from ld_evaluate.truth import TrueCounterfactual, read_truths

YEARS_LATER = (10.0, 20.0)
"""Generated edits of a numeric attribute, where the modality's bounds allow them."""


@dataclass(frozen=True)
class EvaluationEdit:
    """One edit of a baseline."""

    scan: int
    """Row of the baseline."""
    name: str
    target: Attributes
    """The attributes that change."""


@dataclass(frozen=True, eq=False)
class EvaluationData:
    """The scans, the edits of each baseline, and what is known of the results."""

    modality: Modality
    baselines: ScanTable
    follow_ups: ScanTable
    """The last scan of each patient with several."""
    owners: list[int]
    """Row of the baseline of each follow-up."""
    edits: list[EvaluationEdit]
    truths: list[TrueCounterfactual]
    """One for each edit, or none at all."""


def read_data(folder: Path, modality: Modality, resolution: int) -> EvaluationData:
    """Read a folder of scans.

    Args:
        folder: has `scans.csv`, and for simulated patients `held_out.json`.
        modality: the release's.
        resolution: of the model's images, in pixels.

    Raises:
        RequestError: the table is absent, lacks a column, a value or a patient, contradicts its files, or is not in
            the order of the visits.
        ScanError: a scan cannot be used.
    """
    scans = read_scan_table(folder / SCANS, modality, resolution)
    rows_by_patient: dict[str, list[int]] = {}
    for row, patient in enumerate(scans.patients):
        rows_by_patient.setdefault(patient, []).append(row)
    for patient, rows in rows_by_patient.items():
        ages = [float(scans.attributes[row].get("age", 0)) for row in rows]
        if ages != sorted(ages):
            raise RequestError(
                f"'{folder / SCANS}': the rows of patient {patient} are not in the order of the visits: sort them"
            )
    first_rows = [rows[0] for rows in rows_by_patient.values()]
    repeated = [rows for rows in rows_by_patient.values() if len(rows) > 1]
    baselines, follow_ups = scans.rows(first_rows), scans.rows([rows[-1] for rows in repeated])
    owners = [first_rows.index(rows[0]) for rows in repeated]
    truths: list[TrueCounterfactual] = []
    if (folder / TRUTH).exists():
        if not (modality.biomarkers and modality.image.field_of_view_mm):
            raise RequestError(f"'{folder / TRUTH}' has areas, and modality '{modality.name}' measures none: remove it")
        images, truths = read_truths(folder, modality, resolution)
        _check_baselines(folder, baselines, images)
        edits = [EvaluationEdit(truth.scan, truth.edit, truth.target) for truth in truths]
    else:
        edits = [
            edit
            for row, attributes in enumerate(baselines.attributes)
            for edit in _generated_edits(modality, row, attributes)
        ]
    return EvaluationData(modality, baselines, follow_ups, owners, edits, truths)


def _check_baselines(folder: Path, baselines: ScanTable, images: Tensor) -> None:
    """Raise `RequestError` where a table's baselines are not those whose truth is known, `(N,1,S,S)`."""
    names = f"'{folder / SCANS}' and '{folder / TRUTH}'"
    if len(images) != len(baselines.images):
        raise RequestError(f"{names} have {len(baselines.images)} and {len(images)} patients: restore both files")
    for patient, baseline, image in zip(baselines.patients, baselines.images, images, strict=True):
        if not torch.equal(baseline, image):
            raise RequestError(f"{names} have different first scans of patient {patient}: restore both files")


def _generated_edits(modality: Modality, scan: int, attributes: Attributes) -> Iterator[EvaluationEdit]:
    """Every other category, and numbers some years later."""
    for name, attribute in modality.attributes.items():
        if attribute.categories:
            for category in attribute.categories:
                if category != attributes[name]:
                    yield EvaluationEdit(scan, f"{name}_{category}", {name: category})
            continue
        for years in YEARS_LATER:
            value = float(attributes[name]) + years
            if value <= attribute.maximum:
                yield EvaluationEdit(scan, f"{name}_plus_{years:g}", {name: value})
