"""Patients with three visits or more: what comes after a visit is asked with the visits before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ld_common.editing.history import ScanHistory, writing
from ld_common.imaging.geometry import Scan
from ld_common.imaging.modality import AGE, Attributes, Modality
from ld_common.imaging.scan_table import ScanTable
from ld_evaluate.edits import EvaluationEdit, ScanPixels, later_scan
from ld_evaluate.files import FOLLOW_UP, LAST_VISITS, TRUTH
from ld_evaluate.truth import read_earlier, read_truths


@dataclass(frozen=True, eq=False)
class HistoryData:
    """Scans with their histories, and what is asked of them."""

    pictures: Tensor
    """Of the scans, `(N,1,S,S)` in [-1, 1]."""
    attributes: list[Attributes]
    histories: list[ScanHistory]
    edits: list[EvaluationEdit]
    """Their scans are rows of `pictures`."""


def read_history_data(
    folder: Path, modality: Modality, table: ScanTable, visits: Sequence[Sequence[int]], read: Callable[[int], Scan]
) -> HistoryData:
    """The last visit of a patient is asked of the one before it; for simulated patients, also what truly comes later.

    Args:
        folder: of the scans, with `held_out.json` for simulated patients.
        modality: the release's.
        table: the folder's.
        visits: rows of each patient, in order.
        read: a row's scan.

    Raises:
        RequestError, ScanError: a file that cannot be used.
    """
    pictures: list[Tensor] = []
    attributes: list[Attributes] = []
    histories: list[ScanHistory] = []
    edits: list[EvaluationEdit] = []
    side = table.images.shape[-1]
    for rows in visits if AGE in modality.attributes else ():
        if len(rows) < 3:
            continue
        *before, now, last = rows
        age, later_age = (float(table.attributes[row][AGE]) for row in (now, last))
        earlier = [row for row in before if float(table.attributes[row][AGE]) < age]
        if not earlier or later_age <= age:
            continue
        scan, source, target = read(now), table.attributes[now], table.attributes[last]
        scanned = ScanPixels.of(scan, modality, side)
        changed = {name: value for name, value in target.items() if value != source[name]}
        truth = later_scan(scanned, read(last), modality)
        edits.append(
            EvaluationEdit(
                table.patients[now], len(pictures), FOLLOW_UP, source, changed, scanned, truth, later_age - age
            )
        )
        write = writing(scan, scanned.frame, modality.image.rendering, side, modality.image)
        years = [age - float(table.attributes[row][AGE]) for row in earlier]
        histories.append(ScanHistory(table.images[earlier], years, write))
        pictures.append(scanned.picture)
        attributes.append(source)
    if (folder / TRUTH).exists():
        scans, truths = read_truths(folder, modality, side, LAST_VISITS)
        by_scan = {truth.scan: truth.attributes for truth in truths}
        edits += [truth.question(modality, len(pictures)) for truth in truths]
        histories += read_earlier(folder, modality, side)
        attributes += [by_scan[row] for row in range(len(scans))]
        pictures += list(scans)
    return HistoryData(
        torch.stack(pictures) if pictures else torch.empty((0, 1, side, side)), attributes, histories, edits
    )
