"""Scans that a release is judged on: a folder with a table, follow-up scans, and for rendered patients the truth.

`scans.csv` has a row a scan: `patient`, `input` (a path, relative to the table), and every attribute of the modality.
A patient's rows are in the order of the visits: the first is the baseline, the last of several the follow-up. A
folder of rendered patients also has `held_out.json` (`ld_simulations.hospitals`), whose true counterfactuals then
take the place of edits made up here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ld_common.core.errors import RequestError
from ld_common.imaging.modality import Attributes, Modality
from ld_common.imaging.scan_table import ScanTable, read_scan_table
from ld_simulations.evaluation import HELD_OUT, HeldOut, read_held_out, read_phantom
from ld_simulations.hospitals import SCANS
from ld_simulations.phantoms.base import Phantom

YEARS_LATER = (10.0, 20.0)
"""Made-up edits of a number, as far as the modality's bounds allow them."""


@dataclass(frozen=True)
class Asked:
    """One question about a baseline."""

    scan: int
    name: str
    target: Attributes
    """What is changed."""


@dataclass(frozen=True, eq=False)
class EvaluationData:
    """What a release is asked, and what is known of the answers."""

    modality: Modality
    baselines: ScanTable
    follow_ups: ScanTable
    """Later scans of the same patients."""
    owners: list[int]
    """The baseline of each follow-up."""
    asked: list[Asked]
    truths: list[HeldOut]
    """One for each question, or none at all."""
    phantom: Phantom[Any, Any] | None
    """What rendered the patients, or None."""


def read_data(folder: Path, modality: Modality, side: int) -> EvaluationData:
    """Read a folder of scans.

    Args:
        folder: has `scans.csv`, and for rendered patients `held_out.json`.
        modality: the release's.
        side: of the model's pictures, in pixels.

    Raises:
        RequestError: no such table, or one that lacks a column, a value or a patient, contradicts its files, or is not
            in the order of the visits.
        ScanError: a scan that cannot be used.
    """
    scans = read_scan_table(folder / SCANS, modality, side)
    rows: dict[str, list[int]] = {}
    for row, patient in enumerate(scans.patients):
        rows.setdefault(patient, []).append(row)
    firsts, later = [own[0] for own in rows.values()], [own for own in rows.values() if len(own) > 1]
    baselines, follow_ups = scans.rows(firsts), scans.rows([own[-1] for own in later])
    for own in later:
        ages = [float(scans.attributes[row].get("age", 0)) for row in own]
        if ages != sorted(ages):
            raise RequestError(
                f"'{folder / SCANS}': the rows of patient {scans.patients[own[0]]} are not in the order of the visits"
            )
    owners, phantom = [firsts.index(own[0]) for own in later], None
    truths: list[HeldOut] = []
    if (folder / HELD_OUT).exists():
        images, truths = read_held_out(folder, modality, side)
        _check_baselines(folder, baselines, images)
        phantom = read_phantom(folder)
    asked = [Asked(truth.scan, truth.edit, truth.target) for truth in truths]
    if not truths:
        asked = [one for row, own in enumerate(baselines.attributes) for one in _edits_of(modality, row, own)]
    return EvaluationData(modality, baselines, follow_ups, owners, asked, truths, phantom)


def _check_baselines(folder: Path, baselines: ScanTable, images: Tensor) -> None:
    """Raise `RequestError` where a table's baselines are not those whose truth is known, `(N,1,S,S)`."""
    names = f"'{folder / SCANS}' and '{folder / HELD_OUT}'"
    if len(images) != len(baselines.images):
        raise RequestError(f"{names} have {len(baselines.images)} and {len(images)} patients: keep both as they were")
    for patient, own, other in zip(baselines.patients, baselines.images, images, strict=True):
        if not torch.equal(own, other):
            raise RequestError(f"{names} have other first scans of patient {patient}: keep both as they were")


def _edits_of(modality: Modality, scan: int, attributes: Attributes) -> Iterator[Asked]:
    """Every other word, and numbers some years on."""
    for name, known in modality.attributes.items():
        if known.categories:
            yield from (
                Asked(scan, f"{name}_{word}", {name: word}) for word in known.categories if word != attributes[name]
            )
            continue
        for more in YEARS_LATER:
            value = float(attributes[name]) + more
            if value <= known.maximum:
                yield Asked(scan, f"{name}_plus_{more:g}", {name: value})
