"""Methods beside the rules that they must beat, on one set of edits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ld_common.diffusion.base_model import BaseModel
from ld_common.imaging.modality import Modality
from ld_evaluate.answers import Answers, copies, perfect
from ld_evaluate.bootstrap import bootstrap_interval
from ld_evaluate.edits import EvaluationEdit
from ld_evaluate.files import COPY, FOLLOW_UP, PERFECT, RULES, SAME
from ld_evaluate.protocol import Numbers, PatientAnswer, compare, same_change, summarize


@dataclass(frozen=True)
class ComparedMethod:
    """What a method's answers are worth."""

    patients: list[PatientAnswer]
    """Each answer whose truth is known."""
    by_edit: dict[str, Numbers]
    """`protocol.summarize` of them."""


class Comparison:
    """Compares methods on edits; the rules without a network are judged once."""

    def __init__(
        self,
        base: BaseModel,
        modality: Modality,
        edits: Sequence[EvaluationEdit],
        ridges: Mapping[str, Answers] | None = None,
    ) -> None:
        """Judge the rules; `base` is needed for its VAE, `ridges` are the answers of `ridge_rules`."""
        self.modality, self.edits = modality, edits
        self.same = same_change(edits)
        self.rules: dict[str, ComparedMethod] = {}
        if any(edit.truth is not None for edit in edits):
            self.rules[COPY] = self.of(COPY, copies(edits))
            self.rules[SAME] = ComparedMethod(self.same, summarize(self.same, self.same))
            self.rules |= {name: self.of(name, written) for name, written in (ridges or {}).items()}
            self.rules[PERFECT] = self.of(PERFECT, perfect(base, modality, edits))

    def of(self, name: str, written: Answers) -> ComparedMethod:
        """A method's written answers, in the order of the edits."""
        patients = compare(name, self.modality, self.edits, written)
        return ComparedMethod(patients, summarize(patients, self.same))

    def rule_numbers(self) -> dict[str, dict[str, Numbers]]:
        """The rules' numbers by kind of edit."""
        return {name: method.by_edit for name, method in self.rules.items()}

    def headline(self, method: ComparedMethod, follow_ups: bool = False) -> Numbers:
        """A method's numbers over all kinds of edit, or of the real follow-ups.

        `raw_gain_db` is the mean over the answers; the others are means over the kinds of edit, of the modality's first
        biomarker.
        """
        numbers: Numbers = {}
        answers = [answer for answer in method.patients if (answer.edit == FOLLOW_UP) == follow_ups]
        drawn = [answer for answer in answers if answer.gain_db is not None]
        if drawn:
            gains, patients = np.array([answer.gain_db for answer in drawn], float), [a.patient for a in drawn]
            numbers["raw_gain_db"] = float(gains.mean())
            numbers |= bootstrap_interval("raw_gain_db", np.array(patients), gains)
        by_edit = {edit: values for edit, values in method.by_edit.items() if (edit == FOLLOW_UP) == follow_ups}
        for biomarker in self.modality.biomarkers[:1]:
            numbers |= _growth(biomarker, by_edit, self.rule_numbers())
        return numbers


def r_over_ceiling(biomarker: str, by_edit: Mapping[str, Numbers], ceilings: Mapping[str, float]) -> float:
    """r over its own ceiling, mean over the edits that have one; growth that does not vary has r = 0."""
    rates = [
        numbers.get(f"{biomarker}_r", 0.0) / ceilings[edit] for edit, numbers in by_edit.items() if edit in ceilings
    ]
    return float(np.mean(rates)) if rates else 0.0


def _growth(
    biomarker: str, by_edit: Mapping[str, Numbers], rules: Mapping[str, Mapping[str, Numbers]]
) -> dict[str, float]:
    """Right direction, growth over the true one, and error over that of the best rule: means over the kinds of edit."""
    values: dict[str, list[float]] = {"edit_direction_rate": [], "growth_ratio": [], "error_over_best_rule": []}
    for edit, numbers in by_edit.items():
        for title, name in (("edit_direction_rate", "direction_rate"), ("growth_ratio", "growth_ratio")):
            if f"{biomarker}_{name}" in numbers:
                values[title].append(numbers[f"{biomarker}_{name}"])
        key = f"{biomarker}_error_mm2"
        errors = [rules[rule][edit][key] for rule in RULES if key in rules.get(rule, {}).get(edit, {})]
        if key in numbers and errors and min(errors) > 0:
            values["error_over_best_rule"].append(numbers[key] / min(errors))
    return {name: float(np.mean(found)) for name, found in values.items() if found}
