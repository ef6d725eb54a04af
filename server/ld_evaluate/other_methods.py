"""Answers of other methods: a Python function that edits pixels, or a folder of finished answers."""

from __future__ import annotations

import csv
import importlib
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ld_common.core.atomic_files import write_bytes
from ld_common.core.config import nearest
from ld_common.core.errors import RequestError
from ld_common.core.tables import open_table
from ld_common.imaging.modality import Attributes, Modality
from ld_common.imaging.readers import read_scan
from ld_common.imaging.scan_table import parse_cell
from ld_evaluate.answers import Answers
from ld_evaluate.edits import EvaluationEdit
from ld_evaluate.files import ANSWERS

EditFunction = Callable[[np.ndarray, Attributes, Attributes], np.ndarray]
"""(pixels `(H,W)` float32, all source attributes, all target attributes) -> pixels `(H,W)`."""
SAME_NUMBER = 0.051
"""Largest difference of two numbers that count as the same: tables round ages to tenths."""


def load_function(name: str) -> EditFunction:
    """The function `package.module:function`, which may lie in the working directory; raises `RequestError`."""
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise RequestError(f"--callable: '{name}' is not of the form package.module:function")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever that module does
        raise RequestError(f"--callable: cannot import '{module_name}' ({type(error).__name__}: {error})") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        hint = nearest(function_name, names)
        raise RequestError(f"--callable: '{module_name}' has no function '{function_name}': {hint}")
    edit: EditFunction = function
    return edit


def ask_function(name: str, function: EditFunction, edits: Sequence[EvaluationEdit]) -> Answers:
    """A function's answer to each edit; raises `RequestError` where it fails or gives no image of the scan's shape."""
    written: list[np.ndarray] = []
    for edit in edits:
        where = f"--callable {name}, patient {edit.patient}, {edit.name}"
        try:
            answer = function(edit.scanned.pixels.copy(), dict(edit.source), edit.source | edit.target)
        except Exception as error:  # whatever that function does
            raise RequestError(f"{where}: it failed with {type(error).__name__}: {error}") from error
        written.append(_checked(answer, edit, where))
    return written


def read_answers(name: str, folder: Path, modality: Modality, edits: Sequence[EvaluationEdit]) -> Answers:
    """The answers in a folder, one for each edit.

    `answers.csv` has the columns `patient`, every attribute of the modality as the answer shall show it, and `file`:
    an `.npy` of `(H,W)` real values in the scan's grid, or anything that the modality's scans may be.

    Raises:
        RequestError: a table or file that cannot be used, or an edit without an answer.
        ScanError: an image that cannot be read.
    """
    table = folder / ANSWERS
    files = _files_of(table, modality)
    written: list[np.ndarray] = []
    missing = []
    for edit in edits:
        target = edit.source | edit.target
        file = next((file for patient, shown, file in files if patient == edit.patient and _agree(shown, target)), None)
        if file is None:
            missing.append(edit)
            continue
        written.append(_checked(_read_pixels(folder / file, modality), edit, f"--answers {name}: '{folder / file}'"))
    if missing:
        asked = ", ".join(f"{key} {value}" for key, value in (missing[0].source | missing[0].target).items())
        raise RequestError(
            f"--answers {name}: '{table}' lacks {len(missing)} of {len(edits)} answers, for example patient "
            f"{missing[0].patient} with {asked}: questions.csv in the output folder lists all"
        )
    return written


def write_questions(path: Path, modality: Modality, edits: Sequence[EvaluationEdit]) -> None:
    """Write every edit as a row of an `answers.csv` whose `file` is still empty."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["patient", *modality.attributes, "file"])
    for edit in edits:
        target = edit.source | edit.target
        writer.writerow([edit.patient, *(target[name] for name in modality.attributes), ""])
    write_bytes(path, table.getvalue().encode())


def _files_of(table: Path, modality: Modality) -> list[tuple[str, Attributes, str]]:
    columns, files = ["patient", *modality.attributes, "file"], []
    with open_table(table, RequestError, columns=columns) as opened:
        for row in opened.rows:
            missing = [name for name in columns if not row.cells.get(name)]
            problem = row.problem(columns) or (f"lacks {', '.join(missing)}" if missing else "")
            if problem:
                raise RequestError(f"--answers: '{table}', row {row.number - 1}, {problem}")
            cells, separator = row.cells, opened.separator
            shown = {name: parse_cell(modality, name, cells[name], separator) for name in modality.attributes}
            files.append((cells["patient"], shown, cells["file"]))
    return files


def _agree(shown: Mapping[str, float | str], target: Mapping[str, float | str]) -> bool:
    pairs = ((value, target[name]) for name, value in shown.items())
    return all(
        first == second if isinstance(first, str) or isinstance(second, str) else abs(first - second) < SAME_NUMBER
        for first, second in pairs
    )


def _read_pixels(path: Path, modality: Modality) -> np.ndarray:
    if path.suffix != ".npy":
        return read_scan(path, modality.as_in_files()).pixels
    try:
        values: np.ndarray = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise RequestError(f"--answers: cannot read '{path}': {error}") from error
    return values


def _checked(values: object, edit: EvaluationEdit, where: str) -> np.ndarray:
    """Values as float32 of the scan's shape; raises `RequestError` otherwise."""
    try:
        answer = np.asarray(values, np.float32)
    except (TypeError, ValueError) as error:
        raise RequestError(f"{where}: the answer is no array of numbers ({type(values).__name__})") from error
    shape = edit.scanned.pixels.shape
    if answer.shape != shape:
        raise RequestError(f"{where}: the answer has shape {answer.shape} and the scan {shape}: keep the scan's grid")
    if not np.isfinite(answer).all():
        raise RequestError(f"{where}: the answer has values that are not finite: write numbers only")
    return answer
