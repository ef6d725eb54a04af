"""Scans listed in a CSV table, read as a model sees them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ld_common.core.config import load_config
from ld_common.core.errors import RequestError
from ld_common.core.tables import decimal_point, open_table
from ld_common.imaging.geometry import to_model
from ld_common.imaging.modality import Attributes, Modality, Value
from ld_common.imaging.readers import read_scan

CHECKED = "burned_in_text_checked"
"""Column of scans whose pixels a person has checked for text."""


@dataclass(frozen=True, eq=False)
class ScanTable:
    """Scans as a model sees them, a row a scan."""

    images: Tensor
    """`(N,1,S,S)` in [-1, 1]."""
    attributes: list[Attributes]
    patients: list[str]

    def rows(self, which: list[int]) -> ScanTable:
        """Some of the scans."""
        attributes, patients = [self.attributes[row] for row in which], [self.patients[row] for row in which]
        return ScanTable(self.images[which], attributes, patients)


def load_modality(modality: Modality | Path | str) -> Modality:
    """A modality, read from its YAML file if it is a path; raises `ConfigError`."""
    return modality if isinstance(modality, Modality) else load_config(Modality, Path(modality))


def read_scan_table(table: Path | str, modality: Modality, resolution: int) -> ScanTable:
    """Read the scans of a CSV table.

    Args:
        table: columns `patient`, `input` (path of a scan, relative to the table) and each attribute of the modality;
            `yes` in a column `burned_in_text_checked` says that a person has checked the scan's pixels for text.
        modality: which slice is taken, and which attributes there are.
        resolution: height and width of the model's pictures, in pixels.

    Raises:
        RequestError: a table that cannot be read, has no row, lacks a column or a value, or contradicts a file.
        ScanError: a scan that cannot be used.
    """
    table = Path(table)
    images, attributes, patients = [], [], []
    for patient, path, values, checked in _rows(table, modality):
        scan = read_scan(path, modality, released=checked)
        for name, value in scan.attributes_in_file.items():
            if not agree(value, values[name]):
                raise RequestError(f"{name} is {shown(value)} in '{path}' and {shown(values[name])} in '{table}'")
        images.append(to_model(scan, resolution, modality.image)[0])
        attributes.append(values)
        patients.append(patient)
    if not images:
        raise RequestError(f"'{table}' has no row")
    return ScanTable(torch.stack(images), attributes, patients)


def agree(in_file: Value, given: Value) -> bool:
    """Whether a file and a table give the same value: DICOM has whole years, a study's table often fractions."""
    if isinstance(in_file, str) or isinstance(given, str):
        return in_file == given
    return in_file in (given, math.floor(given))


def shown(value: Value) -> str:
    """An attribute's value as people write it."""
    return value if isinstance(value, str) else f"{value:g}"


def in_words(modality: Modality, attributes: Attributes) -> str:
    """Attributes as a reader says them: "72 years, female, Alzheimer's disease"."""
    words = []
    for name, value in attributes.items():
        attribute = modality.attributes[name]
        if attribute.categories:
            words.append(attribute.categories.get(str(value), str(value)))
        else:
            words.append(f"{shown(value)} {attribute.unit}".strip())
    return ", ".join(words)


def parse_cell(modality: Modality, name: str, cell: str, separator: str) -> Value:
    """An attribute's value from a cell of a table whose cells stand between separators.

    Raises:
        RequestError: as `Modality.parse`.
    """
    is_number = name in modality.attributes and not modality.attributes[name].categories
    return modality.parse(name, decimal_point(cell, separator) if is_number else cell)


def _rows(table: Path, modality: Modality) -> Iterator[tuple[str, Path, Attributes, bool]]:
    needed = ["patient", "input", *modality.attributes]
    with open_table(table, RequestError, columns=[*needed, CHECKED]) as opened:
        rows, separator = list(opened.rows), opened.separator
    for number, row in enumerate(rows, start=1):
        if problem := row.problem([*needed, CHECKED]):
            raise RequestError(f"'{table}', row {number}: {problem}")
        missing = [name for name in needed if not row.cells.get(name)]
        if missing:
            raise RequestError(f"'{table}', row {number}, lacks {', '.join(missing)}")
        attributes = {name: parse_cell(modality, name, row.cells[name], separator) for name in modality.attributes}
        checked = row.cells.get(CHECKED, "").lower() == "yes"
        yield row.cells["patient"], table.parent / row.cells["input"], attributes, checked
