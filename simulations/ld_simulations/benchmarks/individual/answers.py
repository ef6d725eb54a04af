"""Every rule's answers to the questions of simulated patients, written in the scan's pixels, and their worth."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ld_common.core.config import load_config
from ld_common.diffusion.base_model import load_base
from ld_common.editing.counterfactuals import draw_counterfactuals, edit_to
from ld_common.imaging.modality import DECODED
from ld_common.imaging.rendering import render
from ld_common.imaging.scan_table import load_modality
from ld_common.release.release import edit_drift, load_release_base, release_editor
from ld_common.release.trusted_keys import read_trusted_release
from ld_simulations.benchmarks.individual.people import People, Person, Question, ScannedVisit
from ld_simulations.benchmarks.individual.plan import IndividualConfig
from ld_simulations.benchmarks.individual.ridge import RidgeRules, area_slope, as_latents, own_slope
from ld_simulations.hospitals_config import HospitalsConfig

COPY, CROSS, LONG, OWN = "copy", "cross-sectional ridge", "longitudinal ridge", "own history"
PERFECT, PERFECT_DECODED = "perfect answer", "perfect answer, decoded"
SAME, LINE, RELEASE = "same change for all", "own line of areas", "release"
TUNE, TEST = "tune", "test"
AGE, OTHER, HISTORY = "age", "other", "history"
"""Kinds of question; each has a scale of its own."""
Record = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """Some patients of an anatomy who are tuned or tested on, or whose release is judged."""

    anatomy: str
    group: str
    """`tune`, `test` or `release`."""
    first: int
    last: int

    @property
    def name(self) -> str:
        """Name of its result."""
        return f"{self.group}/{self.anatomy}-{self.first:04d}"


@dataclass(frozen=True)
class Choice:
    """What was chosen on the tuning patients."""

    components: int
    rendering: str
    scales: dict[str, float]
    """Factor of the ridge's change by kind of question."""
    own_share: float
    """Share of the patient's own slope in questions with a history."""
    gain_db: float
    """On the tuning patients."""


def kind_of(question: str) -> str:
    """The kind of a question by its name."""
    return HISTORY if question.startswith("history") else AGE if question.startswith("age") else OTHER


class Answerer:
    """Fits the rules of each anatomy once a process, and answers."""

    def __init__(self, config: IndividualConfig) -> None:
        self.config, self.base = config, load_base(config.base_model)
        self.people = functools.cache(self._people)
        self.training = functools.cache(self._training)
        self.rules = functools.cache(self._rules)

    def tune(self, part: Part) -> list[Record]:
        """Gain of every combination of options, for each question; a combination is its options in order."""
        config = self.config
        records = []
        for person in self._patients(part, config.tuning.seed, config.tuning.patients):
            for question in person.questions:
                visit = person.visits[question.visit]
                for components in config.components:
                    options, changes = zip(*self._options(part.anatomy, person, question, components), strict=True)
                    pictures = self._decoded(visit, changes)
                    for rendering in config.renderings:
                        for option, answer in zip(options, pictures[1:], strict=True):
                            written = render(visit.scan.pixels, visit.frame, pictures[0], answer, rendering)
                            gain = gain_db(written, visit, question)
                            tried = [components, rendering, *option]
                            records.append({"question": question.name, "options": tried, "gain_db": gain})
        return records

    def test(self, part: Part, choice: Choice) -> list[Record]:
        """What every rule's answers are worth, and the numbers of the rules without a picture."""
        records: list[Record] = []
        for person in self._patients(part, self.config.test.seed, self.config.test.patients):
            for question in person.questions:
                visit, history = person.visits[question.visit], person.visits[: question.visit + 1]
                rules = self.rules(part.anatomy, choice.components)
                kind = kind_of(question.name)
                scale = choice.scales.get(kind, 1.0)
                changes = {
                    CROSS: scale * rules.cross_sectional(visit.attributes, question.target),
                    LONG: rules.longitudinal(visit, question.target, scale),
                }
                if kind == HISTORY:
                    years = float(question.target["age"]) - float(visit.attributes["age"])
                    changes[OWN] = _blended(choice.own_share, own_slope(history) * years, changes[LONG])
                pictures = dict(
                    zip(changes, self._written(visit, list(changes.values()), choice.rendering), strict=True)
                )
                truth = self._truth(part.anatomy, question, visit)
                pictures |= {COPY: visit.scan.pixels, PERFECT: self._rendered(visit, truth, choice.rendering)}
                pictures[PERFECT_DECODED] = self._rendered(visit, truth, DECODED)
                records += [
                    self._judged(part.anatomy, person, question, row, values) for row, values in pictures.items()
                ]
                if kind == HISTORY:
                    growth = area_slope(history) * (float(question.target["age"]) - float(visit.attributes["age"]))
                    records.append(_record(person, question, LINE, None, growth))
        return records

    def release(self, part: Part) -> list[Record]:
        """The same of a release's recommended editor."""
        anatomy = self.config.anatomies[part.anatomy]
        release, _ = read_trusted_release(Path(anatomy.release), allow_unsigned=True)
        model, editor = load_release_base(release, self.config.base_model), release_editor(release)
        people, modality = self.people(part.anatomy), release.modality
        records: list[Record] = []
        for person in self._patients(part, self.config.test.seed, self.config.test.patients):
            for index, asked in itertools.groupby(person.questions, key=lambda question: question.visit):
                questions, visit = list(asked), person.visits[index]
                edits = [edit_to(modality, 0, visit.attributes, question.target) for question in questions]
                image = people.picture(visit.scan.pixels, visit)[None]
                prompts = [modality.prompt(visit.attributes)]
                drawn = draw_counterfactuals(model, image, prompts, edits, editor, drift=edit_drift(release))
                for question, answer in zip(questions, drawn.images, strict=True):
                    for name, rendering in ((RELEASE, modality.image.rendering), (f"{RELEASE}, decoded", DECODED)):
                        values = render(visit.scan.pixels, visit.frame, drawn.reconstructions[0], answer, rendering)
                        records.append(self._judged(part.anatomy, person, question, name, values))
        return records

    def _options(
        self, anatomy: str, person: Person, question: Question, components: int
    ) -> Iterator[tuple[tuple[float, float], np.ndarray]]:
        """Each scale, and each share of the own slope where there is a history, with the change of the latent."""
        visit, config = person.visits[question.visit], self.config
        rules = self.rules(anatomy, components)
        for scale in config.scales:
            if kind_of(question.name) != OTHER:
                change = rules.longitudinal(visit, question.target, scale)
            else:
                change = scale * rules.cross_sectional(visit.attributes, question.target)
            yield (scale, 0.0), change
            if kind_of(question.name) == HISTORY:
                years = float(question.target["age"]) - float(visit.attributes["age"])
                own = own_slope(person.visits[: question.visit + 1]) * years
                for share in config.own_shares:
                    yield (scale, share), _blended(share, own, change)

    def _judged(self, anatomy: str, person: Person, question: Question, row: str, values: np.ndarray) -> Record:
        visit, people = person.visits[question.visit], self.people(anatomy)
        growth = people.measure(people.picture(values, visit), visit.frame) - visit.measured_mm2
        return _record(person, question, row, gain_db(values, visit, question), growth)

    def _written(self, visit: ScannedVisit, changes: Sequence[np.ndarray], rendering: str) -> list[np.ndarray]:
        pictures = self._decoded(visit, changes)
        return [render(visit.scan.pixels, visit.frame, pictures[0], answer, rendering) for answer in pictures[1:]]

    def _decoded(self, visit: ScannedVisit, changes: Sequence[np.ndarray]) -> Tensor:
        """The visit's picture after the VAE and that under each change, `(1+M,1,S,S)`."""
        return self.base.decode(torch.cat([visit.latent[None], as_latents(changes, visit)]))

    def _truth(self, anatomy: str, question: Question, visit: ScannedVisit) -> Tensor:
        """The scan and the true counterfactual after the VAE, `(2,1,S,S)`."""
        people = self.people(anatomy)
        images = [people.picture(values, visit) for values in (visit.scan.pixels, question.pixels)]
        return self.base.autoencode(torch.stack(images))

    @staticmethod
    def _rendered(visit: ScannedVisit, pictures: Tensor, rendering: str) -> np.ndarray:
        return render(visit.scan.pixels, visit.frame, pictures[0], pictures[1], rendering)

    def _patients(self, part: Part, seed: int, patients: int) -> Iterator[Person]:
        return self.people(part.anatomy).draw(seed, patients, part.first, part.last, questions=True)

    def _people(self, anatomy: str) -> People:
        chosen = self.config.anatomies[anatomy]
        hospitals = load_config(HospitalsConfig, Path(chosen.hospitals))
        return People(hospitals, load_modality(chosen.modality), self.base)

    def _training(self, anatomy: str) -> list[Person]:
        group = self.config.training
        return list(self.people(anatomy).draw(group.seed, group.patients, 0, group.patients, questions=False))

    def _rules(self, anatomy: str, components: int) -> RidgeRules:
        return RidgeRules.fit(self.training(anatomy), self.people(anatomy).modality, components)


def gain_db(values: np.ndarray, visit: ScannedVisit, question: Question) -> float:
    """How much nearer written values are to the true ones than the scan is, in raw pixels."""
    errors = [float(np.mean((picture - question.pixels) ** 2)) for picture in (values, visit.scan.pixels)]
    return 10 * float(np.log10(errors[1] / errors[0]))


def choose(records: Sequence[Mapping[str, Any]]) -> Choice:
    """The options of the largest mean gain over the tuning patients' questions: scales by kind, the rest for all."""
    gains: dict[tuple[int, str], dict[str, dict[tuple[float, float], list[float]]]] = {}
    for record in records:
        components, rendering, scale, share = record["options"]
        kinds = gains.setdefault((components, rendering), {})
        kinds.setdefault(kind_of(record["question"]), {}).setdefault((scale, share), []).append(record["gain_db"])
    choices = []
    for (components, rendering), kinds in gains.items():
        chosen: dict[str, tuple[float, float]] = {}
        best_gains = []
        for kind, tried in kinds.items():
            mean, chosen[kind] = max((float(np.mean(values)), options) for options, values in tried.items())
            best_gains.append(mean)
        gain = float(np.mean(best_gains))
        share = chosen[HISTORY][1] if HISTORY in chosen else 0.0
        scales = {kind: options[0] for kind, options in chosen.items()}
        choices.append(Choice(components, rendering, scales, share, gain))
    return max(choices, key=lambda choice: choice.gain_db)


def _blended(share: float, own: np.ndarray, ridge: np.ndarray) -> np.ndarray:
    blended: np.ndarray = share * own + (1 - share) * ridge
    return blended


def _record(person: Person, question: Question, row: str, gain: float | None, growth: float) -> Record:
    return {
        "patient": f"{person.hospital}/{person.identity}",
        "question": question.name,
        "row": row,
        "gain_db": gain,
        "growth_mm2": growth,
        "true_growth_mm2": question.growth_mm2,
    }
