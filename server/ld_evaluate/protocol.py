"""What one patient's answer is worth, in the pixels of the file that is written, beside rules that need no network.

    copy                             the unedited scan
    same change for all              the other patients' mean true growth, without a picture: growth alone
    ridges                           regressions on other patients' visits (`ridge_rules`)
    perfect answer through the VAE   the true counterfactual or follow-up, autoencoded and written like the others

All numbers are within one kind of edit: over several kinds together, growth is told by the kind alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ld_common.imaging.modality import Modality
from ld_evaluate.answers import Answers
from ld_evaluate.bootstrap import bootstrap_interval, correlation_interval
from ld_evaluate.edits import EvaluationEdit, TrueAnswer, growth_mm2
from ld_evaluate.files import SAME

Numbers = dict[str, float]
SMALLEST_SPREAD = 0.01
"""Least spread of drawn over that of true growth with which an r is given: rounding alone has one too."""
SMALLEST_ERROR = 1e-6
"""Least error that is told apart from none, as a share of the grey range."""


@dataclass(frozen=True)
class PatientAnswer:
    """One answer to one edit of one patient, beside the truth."""

    answer: str
    """What gave it: a rule, an editor or another method."""
    patient: str
    edit: str
    direction: str
    gain_db: float | None
    """How much nearer to the truth than the unedited scan is; None without a picture."""
    raw_pixels: bool
    """Whether the gain is of the file's pixels, not of the model's picture."""
    growth_mm2: dict[str, float]
    """By biomarker; empty where the spacing is not known."""
    true_growth_mm2: dict[str, float]

    def error_mm2(self, biomarker: str) -> float:
        """Absolute error of the growth."""
        return abs(self.growth_mm2[biomarker] - self.true_growth_mm2[biomarker])

    def row(self) -> dict[str, Any]:
        """Flat, as a table has it."""
        values = {key: value for key, value in asdict(self).items() if not key.endswith("growth_mm2")}
        for name in self.growth_mm2:
            values |= {
                f"{name}_growth_mm2": self.growth_mm2[name],
                f"{name}_true_growth_mm2": self.true_growth_mm2[name],
                f"{name}_error_mm2": self.error_mm2(name),
            }
        return values


def compare(answer: str, modality: Modality, edits: Sequence[EvaluationEdit], written: Answers) -> list[PatientAnswer]:
    """Written answers beside the truth, of the edits that have one."""
    answers = []
    for edit, pixels in zip(edits, written, strict=True):
        if edit.truth is not None and pixels is not None:
            growth = growth_mm2(modality, edit.scanned, edit.scanned.picture_of(pixels, modality))
            gain = gain_db(modality, edit, edit.truth, pixels)
            answers.append(_answer(answer, edit, edit.truth, gain, growth))
    return answers


def same_change(edits: Sequence[EvaluationEdit]) -> list[PatientAnswer]:
    """The mean true growth of the other patients under the same edit; to follow-ups, their growth a year times years.

    Patients who are asked for opposite categories, for example for the other sex, are no others of each other. A
    patient without others has no such answer.
    """
    groups: dict[tuple[str, str], list[tuple[EvaluationEdit, TrueAnswer]]] = {}
    for edit in edits:
        if edit.truth is not None and edit.truth.growth_mm2:
            groups.setdefault((edit.name, edit.direction), []).append((edit, edit.truth))
    answers = []
    for group in groups.values():
        years = sum(edit.years for edit, _ in group)
        for edit, truth in group:
            if len(group) < 2 or years - edit.years <= 0:
                continue
            growth = {
                name: (sum(other.growth_mm2[name] for _, other in group) - own) / (years - edit.years) * edit.years
                for name, own in truth.growth_mm2.items()
            }
            answers.append(_answer(SAME, edit, truth, None, growth))
    return answers


def gain_db(modality: Modality, edit: EvaluationEdit, truth: TrueAnswer, pixels: np.ndarray) -> float:
    """How much nearer than the unedited scan an answer `(H,W)` is to the truth: in the file's pixels if it has them."""
    scan = edit.scanned
    if truth.pixels is None:
        written, copied, true = scan.picture_of(pixels, modality).numpy(), scan.picture.numpy(), truth.picture.numpy()
        white = 2.0
    else:
        written, copied, true, white = pixels, scan.pixels, truth.pixels, scan.frame.high - scan.frame.low
    errors = [np.mean((picture.astype(np.float64) - true) ** 2) for picture in (written, copied)]
    least = (SMALLEST_ERROR * white) ** 2
    return float(10 * np.log10(max(errors[1], least) / max(errors[0], least)))


def summarize(answers: Sequence[PatientAnswer], same: Sequence[PatientAnswer]) -> dict[str, Numbers]:
    """Numbers by kind of edit over patients, with 95 % intervals (`<key>_low`, `<key>_high`).

    `gain_db`, and of each biomarker `<name>_growth_ratio` (drawn over true, along the true direction), `<name>_r`,
    `<name>_error_mm2` and `<name>_error_over_same`.

    Args:
        answers: of one method, and of one seed.
        same: of `same_change`.
    """
    kinds = dict.fromkeys(answer.edit for answer in answers)
    return {edit: _of_edit([answer for answer in answers if answer.edit == edit], same) for edit in kinds}


def _of_edit(answers: Sequence[PatientAnswer], same: Sequence[PatientAnswer]) -> Numbers:
    numbers: Numbers = {"cases": len(answers)}
    drawn = [answer for answer in answers if answer.gain_db is not None]
    if drawn:
        gains, patients = np.array([answer.gain_db for answer in drawn], float), _patients(drawn)
        numbers |= {"gain_db": float(gains.mean()), **bootstrap_interval("gain_db", patients, gains)}
        numbers["raw_pixels"] = float(np.mean([answer.raw_pixels for answer in drawn]))
    for name in dict.fromkeys(name for answer in answers for name in answer.growth_mm2):
        measured = [answer for answer in answers if name in answer.growth_mm2]
        others = {answer.patient: answer.error_mm2(name) for answer in same if answer.edit == answers[0].edit}
        numbers |= {f"{name}_{key}": value for key, value in _of_biomarker(name, measured, others).items()}
    return numbers


def _of_biomarker(name: str, answers: Sequence[PatientAnswer], same_errors: Mapping[str, float]) -> Numbers:
    patients = _patients(answers)
    drawn = np.array([answer.growth_mm2[name] for answer in answers])
    true = np.array([answer.true_growth_mm2[name] for answer in answers])
    errors, signs = np.abs(drawn - true), np.sign(true)
    numbers: Numbers = {
        "growth_mm2": float(drawn.mean()),
        "true_growth_mm2": float(true.mean()),
        "direction_rate": float(np.mean(np.sign(drawn) == signs)),
        "error_mm2": float(errors.mean()),
        **bootstrap_interval("error_mm2", patients, errors),
    }
    if np.abs(true).sum() > 0:
        numbers["growth_ratio"] = float((drawn * signs).sum() / np.abs(true).sum())
        numbers |= bootstrap_interval("growth_ratio", patients, drawn * signs, np.abs(true))
    own_drawn, own_true = (_without_direction(answers, values) for values in (drawn, true))
    varies = own_drawn.std() > SMALLEST_SPREAD * own_true.std()
    if varies and answers[0].answer != SAME:  # a mean without the own value is anticorrelated with it by construction
        numbers |= correlation_interval("r", own_drawn, own_true)
    rows = [row for row, patient in enumerate(patients) if patient in same_errors]
    others = np.array([same_errors[patients[row]] for row in rows])
    if others.sum() > 0:
        numbers["error_over_same"] = float(errors[rows].sum() / others.sum())
        numbers |= bootstrap_interval("error_over_same", patients[rows], errors[rows], others)
    return numbers


def _patients(answers: Sequence[PatientAnswer]) -> np.ndarray:
    return np.array([answer.patient for answer in answers])


def _without_direction(answers: Sequence[PatientAnswer], values: np.ndarray) -> np.ndarray:
    """Values `(N,)` less the mean of the patients who are asked for the same categories."""
    directions = np.unique([answer.direction for answer in answers], return_inverse=True)[1]
    means = np.bincount(directions, values) / np.bincount(directions)
    centred: np.ndarray = values - means[directions]
    return centred


def _answer(
    answer: str, edit: EvaluationEdit, truth: TrueAnswer, gain: float | None, growth: dict[str, float]
) -> PatientAnswer:
    return PatientAnswer(
        answer=answer,
        patient=edit.patient,
        edit=edit.name,
        direction=edit.direction,
        gain_db=gain,
        raw_pixels=truth.pixels is not None,
        growth_mm2={name: growth[name] for name in truth.growth_mm2},
        true_growth_mm2=truth.growth_mm2,
    )
