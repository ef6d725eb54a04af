"""Answers of other methods: what is taken, and what is refused with a sentence."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from ld_common.core.errors import RequestError
from ld_common.imaging.modality import Attributes
from ld_evaluate.dataset import EvaluationData
from ld_evaluate.other_methods import ask_function, load_function, read_answers, write_questions


@pytest.fixture
def answers(data: EvaluationData, tmp_path: Path) -> Path:
    """A folder that answers every edit with the scan plus the number of its row."""
    write_questions(tmp_path / "questions.csv", data.modality, data.asked)
    with (tmp_path / "questions.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == len(data.asked)
    for number, (row, edit) in enumerate(zip(rows, data.asked, strict=True)):
        row["file"] = f"{number}.npy"
        np.save(tmp_path / row["file"], edit.scanned.pixels + number)
    write_table(tmp_path, rows[::-1])
    return tmp_path


def write_table(folder: Path, rows: list[dict[str, str]]) -> None:
    with (folder / "answers.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def test_the_filled_questions_are_answers_in_any_order(data: EvaluationData, answers: Path) -> None:
    written = read_answers("mine", answers, data.modality, data.asked)
    for number, (pixels, edit) in enumerate(zip(written, data.asked, strict=True)):
        assert pixels is not None
        np.testing.assert_allclose(pixels - edit.scanned.pixels, number, atol=1e-2)


def test_answers_that_cannot_be_used_are_refused(data: EvaluationData, answers: Path) -> None:
    shape = data.asked[0].scanned.pixels.shape
    for wrong, message in (
        (np.zeros((3, 3)), r"shape \(3, 3\)"),
        (np.full(shape, np.nan), "not finite"),
        (np.full(shape, "a"), "no array of numbers"),
    ):
        np.save(answers / "0.npy", wrong)
        with pytest.raises(RequestError, match=f"--answers mine.*{message}"):
            read_answers("mine", answers, data.modality, data.asked)
    (answers / "0.npy").write_text("not numpy")
    with pytest.raises(RequestError, match=r"cannot read .*0\.npy"):
        read_answers("mine", answers, data.modality, data.asked)
    with (answers / "answers.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    write_table(answers, rows[:-1])
    with pytest.raises(RequestError, match=f"lacks 1 of {len(data.asked)} answers.*questions.csv"):
        read_answers("mine", answers, data.modality, data.asked)
    for column, message in (("file", "row 1, lacks file"), ("age", "row 1, lacks age")):
        write_table(answers, [row | {column: ""} for row in rows])
        with pytest.raises(RequestError, match=message):
            read_answers("mine", answers, data.modality, data.asked)


def test_a_function_is_asked_with_all_attributes_and_cannot_change_the_scan(data: EvaluationData) -> None:
    asked: list[tuple[Attributes, Attributes]] = []

    def function(pixels: np.ndarray, source: Attributes, target: Attributes) -> np.ndarray:
        asked.append((source, target))
        pixels += 5
        return pixels

    before = [edit.scanned.pixels.copy() for edit in data.asked]
    written = ask_function("mine", function, data.asked)
    for pixels, edit, kept, (source, target) in zip(written, data.asked, before, asked, strict=True):
        np.testing.assert_array_equal(edit.scanned.pixels, kept)
        np.testing.assert_array_equal(pixels, kept + 5)
        assert set(source) == set(target) == set(data.modality.attributes)
        assert {name for name in source if source[name] != target[name]} == set(edit.target)


def test_a_function_that_fails_or_is_not_there_is_refused(data: EvaluationData) -> None:
    def failing(pixels: np.ndarray, source: Attributes, target: Attributes) -> np.ndarray:
        raise ValueError("no model")

    with pytest.raises(RequestError, match=r"--callable mine, patient .*, age_plus_10: .*ValueError: no model"):
        ask_function("mine", failing, data.asked)
    for name, message in (
        ("numpy", "package.module:function"),
        ("numpy:arrray", "did you mean 'array'"),
        ("no_such_module:edit", "cannot import 'no_such_module'"),
    ):
        with pytest.raises(RequestError, match=message):
            load_function(name)
