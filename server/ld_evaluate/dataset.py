"""Scans that a release is judged on: baselines, edits of each, and the true answers where they are known.

A folder holds `scans.csv` with a row for each scan: `patient`, `input` (a path relative to the table) and every
attribute of the modality. A patient's rows are in the order of the visits: the first is the baseline, the last of
several the follow-up, which is the true answer to the baseline edited to its attributes. A folder of simulated patients
also holds `held_out.json`; its edits and truths then replace the edits generated here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ld_common.core.errors import RequestError
from ld_common.core.tables import open_table
from ld_common.imaging.geometry import Scan
from ld_common.imaging.modality import AGE, Attributes, Modality
from ld_common.imaging.readers import read_scan
from ld_common.imaging.scan_table import ScanTable, read_scan_table
from ld_evaluate.edits import EvaluationEdit, ScanPixels, later_scan
from ld_evaluate.files import FOLLOW_UP, SCANS, TRUTH
from ld_evaluate.history_data import HistoryData, read_history_data
from ld_evaluate.truth import TrueCounterfactual, read_truths

YEARS_LATER = (10.0, 20.0)
"""Generated edits of a numeric attribute, where the modality's bounds allow them."""


@dataclass(frozen=True, eq=False)
class EvaluationData:
    """The scans, the edits of each baseline, and what is known of the results."""

    modality: Modality
    baselines: ScanTable
    edits: list[EvaluationEdit]
    truths: list[TrueCounterfactual]
    """Of simulated patients, one for each of `edits`; else none."""
    follow_ups: list[EvaluationEdit]
    """Each baseline of a patient with several scans, edited to the attributes of the last."""
    with_history: HistoryData | None = None
    """What is asked of later visits with the visits before them; None where nothing is."""

    visits: ScanTable | None = None
    """All scans of the patients, from whom rules learn to answer for others."""

    @property
    def asked(self) -> list[EvaluationEdit]:
        """All edits, those to follow-ups last."""
        return [*self.edits, *self.follow_ups]


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
    table = read_scan_table(folder / SCANS, modality, resolution)
    visits = _visits(folder, table)
    first_rows = [rows[0] for rows in visits]
    baselines, inputs = table.rows(first_rows), _inputs(folder / SCANS)
    scans = [ScanPixels.of(_read_again(inputs[row], modality), modality, resolution) for row in first_rows]
    follow_ups = [
        _follow_up(table, rows, number, scans[number], _read_again(inputs[rows[-1]], modality), modality)
        for number, rows in enumerate(visits)
        if len(rows) > 1
    ]
    truths: list[TrueCounterfactual] = []
    if (folder / TRUTH).exists():
        if not (modality.biomarkers and modality.image.field_of_view_mm):
            raise RequestError(f"'{folder / TRUTH}' has areas, and modality '{modality.name}' measures none: remove it")
        images, truths = read_truths(folder, modality, resolution)
        _check_baselines(folder, baselines, images)
        edits = [truth.question(modality) for truth in truths]
    else:
        edits = [
            EvaluationEdit(baselines.patients[row], row, name, attributes, target, scans[row])
            for row, attributes in enumerate(baselines.attributes)
            for name, target in _generated_targets(modality, attributes)
        ]
    with_history = read_history_data(folder, modality, table, visits, lambda row: _read_again(inputs[row], modality))
    later = with_history if with_history.edits else None
    return EvaluationData(modality, baselines, edits, truths, follow_ups, later, table)


def _visits(folder: Path, table: ScanTable) -> list[list[int]]:
    """The rows of each patient; raises `RequestError` where they are not in the order of the visits."""
    rows_by_patient: dict[str, list[int]] = {}
    for row, patient in enumerate(table.patients):
        rows_by_patient.setdefault(patient, []).append(row)
    for patient, rows in rows_by_patient.items():
        ages = [float(table.attributes[row].get(AGE, 0)) for row in rows]
        if ages != sorted(ages):
            raise RequestError(
                f"'{folder / SCANS}': the rows of patient {patient} are not in the order of the visits: sort them"
            )
    return list(rows_by_patient.values())


def _inputs(table: Path) -> list[Path]:
    """The files of a table that `read_scan_table` has checked."""
    with open_table(table, RequestError) as opened:
        return [table.parent / row.cells["input"] for row in opened.rows]


def _read_again(path: Path, modality: Modality) -> Scan:
    """A scan that `read_scan_table` has read, and searched for text."""
    return read_scan(path, modality, released=True)


def _follow_up(
    table: ScanTable, rows: list[int], number: int, scanned: ScanPixels, later: Scan, modality: Modality
) -> EvaluationEdit:
    source, target = table.attributes[rows[0]], table.attributes[rows[-1]]
    return EvaluationEdit(
        patient=table.patients[rows[0]],
        scan=number,
        name=FOLLOW_UP,
        source=source,
        target={name: value for name, value in target.items() if value != source[name]},
        scanned=scanned,
        truth=later_scan(scanned, later, modality),
        years=float(target[AGE]) - float(source[AGE]) if AGE in source else 1.0,
    )


def _check_baselines(folder: Path, baselines: ScanTable, images: Tensor) -> None:
    """Raise `RequestError` where a table's baselines are not those whose truth is known, `(N,1,S,S)`."""
    names = f"'{folder / SCANS}' and '{folder / TRUTH}'"
    if len(images) != len(baselines.images):
        raise RequestError(f"{names} have {len(baselines.images)} and {len(images)} patients: restore both files")
    for patient, baseline, image in zip(baselines.patients, baselines.images, images, strict=True):
        if not torch.equal(baseline, image):
            raise RequestError(f"{names} have different first scans of patient {patient}: restore both files")


def _generated_targets(modality: Modality, attributes: Attributes) -> Iterator[tuple[str, Attributes]]:
    """Every other category, and numbers some years later: name and target of each edit."""
    for name, attribute in modality.attributes.items():
        if attribute.categories:
            for category in attribute.categories:
                if category != attributes[name]:
                    yield f"{name}_{category}", {name: category}
            continue
        for years in YEARS_LATER:
            value = float(attributes[name]) + years
            if value <= attribute.maximum:
                yield f"{name}_plus_{years:g}", {name: value}
