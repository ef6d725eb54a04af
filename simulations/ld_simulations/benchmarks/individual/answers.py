"""Every rule's answers to the questions of simulated patients, written in the scan's pixels, and their worth."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from ld_simulations.benchmarks.individual.closed_form import DriftAnswers, drift_editor, fit_drift
from ld_simulations.benchmarks.individual.people import EXTRA, People, Person, Question, ScannedVisit
from ld_simulations.benchmarks.individual.plan import IndividualConfig
from ld_simulations.benchmarks.individual.ridge import RidgeRules, area_slope, as_latents, own_slope
from ld_simulations.hospitals_config import HospitalsConfig

COPY, CROSS, LONG, OWN = "copy", "cross-sectional ridge", "longitudinal ridge", "own history"
PERFECT, PERFECT_DECODED = "perfect answer", "perfect answer, decoded"
SAME, LINE, RELEASE = "same change for all", "own line of areas", "release"
ATTRIBUTES = "age, sex and diagnosis alone"
DRIFT, DRIFT_HISTORY = "editor drift", "editor drift, history"
RULES = (CROSS, LONG)
NEAR_DB = 0.1
"""Gains that differ by less are equal: less than the interval of any of them."""
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
    """Factor of the ridges' change by kind of question."""
    own: tuple[float, float]
    """Factor of the ridge's change and share of the patient's own slope, where there is a history."""
    drift_rendering: str
    drift: dict[str, float]
    """Options of editor `drift`."""


def kind_of(question: str) -> str:
    """The kind of a question by its name."""
    if question.startswith("history"):
        return HISTORY
    return AGE if question.startswith(("age", "follow_up")) else OTHER


class Answerer:
    """Fits the rules of each anatomy once a process, and answers."""

    def __init__(self, config: IndividualConfig) -> None:
        self.config, self.base = config, load_base(config.base_model)
        self.people = functools.cache(self._people)
        self.training = functools.cache(self._training)
        self.rules = functools.cache(self._rules)
        self.drift = functools.cache(self._drift)

    def tune(self, part: Part) -> list[Record]:
        """Gain of every combination of options, for each question; a combination is its options in order."""
        records = []
        for person in self._patients(part, self.config.tuning.seed, self.config.tuning.patients):
            for question in person.questions:
                if question.name in EXTRA:
                    continue
                records += self._tuned_ridges(part.anatomy, person, question)
                records += self._tuned_drift(part.anatomy, person, question)
        return records

    def _tuned_ridges(self, anatomy: str, person: Person, question: Question) -> list[Record]:
        records, visit = [], person.visits[question.visit]
        for components in self.config.components:
            options, changes = zip(*self._options(anatomy, person, question, components), strict=True)
            pictures = self._decoded(visit, changes)
            for rendering in self._renderings(anatomy):
                for option, answer in zip(options, pictures[1:], strict=True):
                    written = render(visit.scan.pixels, visit.frame, pictures[0], answer, rendering)
                    tried = [components, rendering, *option]
                    records.append(_tried("ridge", question, tried, gain_db(written, visit, question)))
        return records

    def _tuned_drift(self, anatomy: str, person: Person, question: Question) -> list[Record]:
        records, visit, drift = [], person.visits[question.visit], self.drift(anatomy)
        history = kind_of(question.name) == HISTORY
        for options in drift_options(self.config, anatomy, kind_of(question.name)):
            for rendering in self._renderings(anatomy):
                asked = person, question.visit, [question.target], drift_editor(options)
                drawn = drift.draw(*asked, rendering, history)
                written = render(visit.scan.pixels, visit.frame, drawn[0], drawn[1][0], rendering)
                judged = self._judged(anatomy, person, question, DRIFT, written)
                error = abs(judged["growth_mm2"] - judged["true_growth_mm2"])
                records.append(_tried(DRIFT, question, [rendering, options], judged["gain_db"]) | {"error_mm2": error})
        return records

    def _renderings(self, anatomy: str) -> list[str]:
        return self.config.anatomies[anatomy].renderings

    def test(self, part: Part, choice: Choice) -> list[Record]:
        """What every rule's and editor `drift`'s answers are worth, and the numbers of the rules without a picture."""
        records: list[Record] = []
        for person in self._patients(part, self.config.test.seed, self.config.test.patients):
            for question in person.questions:
                visit, history = person.visits[question.visit], person.visits[: question.visit + 1]
                pictures = self._drawn(part.anatomy, person, question, choice) | {COPY: visit.scan.pixels}
                if question.name not in EXTRA:
                    pictures |= self._of_rules(part.anatomy, person, question, choice)
                records += [
                    self._judged(part.anatomy, person, question, row, values) for row, values in pictures.items()
                ]
                if kind_of(question.name) == HISTORY:
                    growth = area_slope(history) * (float(question.target["age"]) - float(visit.attributes["age"]))
                    records.append(_record(person, question, LINE, None, growth))
        return records

    def _of_rules(self, anatomy: str, person: Person, question: Question, choice: Choice) -> dict[str, np.ndarray]:
        """What the ridges and the truth itself write."""
        visit = person.visits[question.visit]
        changes = self._changes(anatomy, person, question, choice)
        pictures = dict(zip(changes, self._written(visit, list(changes.values()), choice.rendering), strict=True))
        truth = self._truth(anatomy, question, visit)
        pictures[PERFECT] = self._rendered(visit, truth, choice.drift_rendering)
        return pictures | {PERFECT_DECODED: self._rendered(visit, truth, DECODED)}

    def _changes(self, anatomy: str, person: Person, question: Question, choice: Choice) -> dict[str, np.ndarray]:
        """The ridges' changes of the visit's latent, and with a history the own slope's."""
        visit, rules, kind = (
            person.visits[question.visit],
            self.rules(anatomy, choice.components),
            kind_of(question.name),
        )
        scale = choice.scales.get(kind, 1.0)
        changes = {LONG: rules.longitudinal(visit, question.target, scale)}
        if kind != HISTORY:
            changes[CROSS] = scale * rules.cross_sectional(visit.attributes, question.target)
        else:
            years = float(question.target["age"]) - float(visit.attributes["age"])
            own = own_slope(person.visits[: question.visit + 1]) * years
            changes[OWN] = _blended(choice.own[1], own, rules.longitudinal(visit, question.target, choice.own[0]))
        return changes

    def _drawn(self, anatomy: str, person: Person, question: Question, choice: Choice) -> dict[str, np.ndarray]:
        """What editor `drift` writes, from the scan alone and with the visits before it."""
        visit, editor, written = person.visits[question.visit], drift_editor(choice.drift), {}
        rows = {DRIFT: False} | ({DRIFT_HISTORY: True} if kind_of(question.name) == HISTORY else {})
        rendering = choice.drift_rendering
        for row, history in rows.items():
            drawn = self.drift(anatomy).draw(person, question.visit, [question.target], editor, rendering, history)
            written[row] = render(visit.scan.pixels, visit.frame, drawn[0], drawn[1][0], rendering)
        return written

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

    def _drift(self, anatomy: str) -> DriftAnswers:
        people = self.people(anatomy)
        return DriftAnswers(people, fit_drift(self.training(anatomy), people.modality, self.base))


def drift_options(config: IndividualConfig, anatomy: str, kind: str) -> list[dict[str, float]]:
    """The options of editor `drift` that are tried for a kind of question."""
    edge_shares = config.anatomies[anatomy].edge_shares
    if kind == AGE:
        return [
            {"time_scale": scale, "edge_share": share}
            for scale, share in itertools.product(config.time_scales, edge_shares)
        ]
    if kind == OTHER:
        return [{"effect_scale": scale} for scale in config.effect_scales]
    return [
        {"time_scale": config.time_scales[0], "edge_share": share, "own_slope_half": slope, "own_growth_half": growth}
        for share, slope, growth in itertools.product(edge_shares, config.own_slope_halves, config.own_growth_halves)
    ]


def gain_db(values: np.ndarray, visit: ScannedVisit, question: Question) -> float:
    """How much nearer written values are to the true ones than the scan is, in raw pixels."""
    errors = [float(np.mean((picture - question.pixels) ** 2)) for picture in (values, visit.scan.pixels)]
    return 10 * float(np.log10(errors[1] / errors[0]))


def choose(records: Sequence[Mapping[str, Any]]) -> Choice:
    """The options of the largest mean gain over the tuning patients' questions.

    Components and rendering are chosen for all kinds of question, the rest by kind. Of editor `drift`'s options for
    what the years change, those within `NEAR_DB` of the best are as good; of these the least error of growth decides.
    """
    ridges = [record for record in records if record["row"] == "ridge"]
    drifts = [record for record in records if record["row"] == DRIFT]
    (components, rendering), scales = _best(ridges, 2, lambda options: options[3] == 0)
    history = [
        record
        for record in ridges
        if record["options"][:2] == [components, rendering] and kind_of(record["question"]) == HISTORY
    ]
    own = _best(history, 2, lambda options: True)[1].get(HISTORY, [1.0, 0.0])
    (drift_rendering,), chosen = _best(drifts, 1, lambda options: True)
    options: dict[str, float] = dict(chosen[OTHER][0]) if OTHER in chosen else {}
    options |= _least_error(drifts, drift_rendering, AGE, {})
    shared = {name: options[name] for name in ("edge_share",) if name in options}
    options = _least_error(drifts, drift_rendering, HISTORY, shared) | options
    return Choice(
        components,
        rendering,
        {kind: values[0] for kind, values in scales.items()},
        (own[0], own[1]),
        drift_rendering,
        options,
    )


def _least_error(
    drifts: Sequence[Mapping[str, Any]], rendering: str, kind: str, shared: Mapping[str, float]
) -> dict[str, float]:
    """Editor `drift`'s options for a kind of question, among those that agree with the `shared` ones."""
    tried: dict[str, list[Mapping[str, Any]]] = {}
    for record in drifts:
        written_as, options = record["options"][:2]
        if written_as == rendering and kind_of(record["question"]) == kind and options.items() >= shared.items():
            tried.setdefault(json.dumps(options), []).append(record)
    if not tried:
        return {}
    means = {
        options: [float(np.mean([record[key] for record in found])) for key in ("gain_db", "error_mm2")]
        for options, found in tried.items()
    }
    best = max(gain for gain, _ in means.values())
    near = {options: error for options, (gain, error) in means.items() if gain >= best - NEAR_DB}
    chosen: dict[str, float] = json.loads(min(near, key=lambda options: near[options]))
    return chosen


def _best(
    records: Sequence[Mapping[str, Any]], shared: int, counts: Callable[[list[Any]], bool]
) -> tuple[list[Any], dict[str, list[Any]]]:
    """The first `shared` options that are best for all kinds together, and the rest for each kind."""
    gains: dict[str, dict[str, dict[str, list[float]]]] = {}
    for record in records:
        if counts(record["options"]):
            first, rest = (json.dumps(part) for part in (record["options"][:shared], record["options"][shared:]))
            of_kind = gains.setdefault(first, {}).setdefault(kind_of(record["question"]), {})
            of_kind.setdefault(rest, []).append(record["gain_db"])
    tried = []
    for first, kinds in gains.items():
        best = {
            kind: max((float(np.mean(values)), rest) for rest, values in of_kind.items())
            for kind, of_kind in kinds.items()
        }
        mean = float(np.mean([gain for gain, _ in best.values()]))
        tried.append((mean, first, {kind: json.loads(rest) for kind, (_, rest) in best.items()}))
    if not tried:
        return [], {}
    _, first, rests = max(tried, key=lambda each: each[0])
    return json.loads(first), rests


def _tried(row: str, question: Question, options: list[Any], gain: float) -> Record:
    return {"row": row, "question": question.name, "options": options, "gain_db": gain}


def _blended(share: float, own: np.ndarray, ridge: np.ndarray) -> np.ndarray:
    blended: np.ndarray = share * own + (1 - share) * ridge
    return blended


def _record(person: Person, question: Question, row: str, gain: float | None, growth: float) -> Record:
    age = float(person.visits[question.visit].attributes["age"])
    return {
        "patient": f"{person.hospital}/{person.identity}",
        "question": question.name,
        "years": float(question.target["age"]) - age,
        "row": row,
        "gain_db": gain,
        "growth_mm2": growth,
        "true_growth_mm2": question.growth_mm2,
    }
