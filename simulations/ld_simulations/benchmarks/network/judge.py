"""Pictures from noise and answers to single patients, by the trained network and by the closed form beside it.

Both know the same training patients. What the closed form draws from noise is a Gaussian: the longitudinal drift's mean
for the attributes, its covariance of parts within sites, and outside of them equal noise.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ld_common.core.config import load_config
from ld_common.core.seeding import torch_generator
from ld_common.diffusion.base_model import BaseModel, load_base
from ld_common.diffusion.drift import LatentDrift
from ld_common.diffusion.longitudinal import LongitudinalDrift
from ld_common.diffusion.sampling import make_sampler, sample
from ld_common.editing.base import Editor
from ld_common.editing.counterfactuals import draw_several, edit_to, past_of
from ld_common.editing.history import ScanHistory, writing
from ld_common.editing.registry import read_editor
from ld_common.imaging.modality import Modality
from ld_common.imaging.rendering import render
from ld_common.imaging.scan_table import load_modality
from ld_common.metrics.features import extract_features, load_extractor
from ld_common.metrics.frechet import frechet_distance, kernel_distance
from ld_common.metrics.histogram import condition_regression, sharpness, size_slope
from ld_common.protocol.study_config import load_study
from ld_simulations.benchmarks.individual.answers import Record, gain_db
from ld_simulations.benchmarks.individual.closed_form import fit_drift
from ld_simulations.benchmarks.individual.people import People, Person, Question, ScannedVisit
from ld_simulations.benchmarks.individual.plan import PatientsConfig
from ld_simulations.benchmarks.individual.report import EDITS
from ld_simulations.benchmarks.network.plan import CENTRED, PLAIN, NetworkConfig
from ld_simulations.benchmarks.network.refined import RefinedDrift
from ld_simulations.benchmarks.network.trained import load, means, save, train
from ld_simulations.hospitals_config import HospitalsConfig

EXTRACTORS = ("efficientnet_lite0", "gabor")
OTHERS, GAUSSIAN, UNTRAINED = "other patients", "closed form (Gaussian)", "base, not trained"
COPY, TRUE, CLOSED, NETWORK = "copy", "true answer", "closed form", "network"
SEED = 0


@dataclass(frozen=True)
class NetworkTask:
    """A row of one of the tables, or a training."""

    kind: str
    row: str

    @property
    def name(self) -> str:
        """Name of its result."""
        return f"{self.kind}/{self.row}"


@dataclass(frozen=True, eq=False)
class Answers:
    """A patient's answers, one a question."""

    decoded: Tensor
    """`(M,1,S,S)`."""
    written: list[np.ndarray]
    """In the pixels of the scan's file."""


class NetworkJudge:
    """Trains, draws and measures; everything that is needed twice is kept in the process or below `output`."""

    def __init__(self, config: NetworkConfig, output: Path) -> None:
        self.config, self.output = config, output
        self.study = load_study(Path(config.study))[0]
        self.modality: Modality = load_modality(Path(config.study).parent / self.study.modality)
        self.base: BaseModel = load_base(self.study.base_model)
        self.people = People(load_config(HospitalsConfig, Path(config.hospitals)), self.modality, self.base)
        self.asked = functools.cache(self._asked)
        self.first_visits = functools.cache(self._first_visits)
        self.extractors = functools.cache(lambda: [load_extractor(name) for name in EXTRACTORS])
        self.features_of_others = functools.cache(lambda: self._features(self._first_pictures(self.config.others)))

    def train(self, task: NetworkTask) -> None:
        """Keep a trained adapter."""
        adapted = train(self.study, self.modality, self._training, self._drift, task.row)
        save(adapted, self.file(task.row))

    def file(self, training: str) -> Path:
        """Where a trained adapter is kept."""
        return self.output / "networks" / f"{training}.safetensors"

    def noise(self, task: NetworkTask) -> dict[str, float]:
        """How like other real patients a row's pictures are, drawn for the attributes of the test patients."""
        pictures = self._first_pictures(self.config.test) if task.row == OTHERS else self._from_noise(task.row)
        numbers: dict[str, float] = {}
        for extractor, real in zip(self.extractors(), self.features_of_others(), strict=True):
            features = extract_features(extractor, pictures)
            numbers[f"frechet_{extractor.name}"] = frechet_distance(features, real)
            numbers[f"kernel_{extractor.name}"] = kernel_distance(features, real)
        real = self._first_pictures(self.config.others)
        numbers["sharpness_ratio"] = float(sharpness(pictures).mean() / sharpness(real).mean())
        frame = self.first_visits(self.config.test.seed, self.config.test.patients)[0].frame
        sizes = torch.tensor([self.people.measure(picture, frame) for picture in pictures])
        of_real = torch.tensor([self.people.measure(picture, frame) for picture in real])
        expected = condition_regression(of_real, self._designs(self.config.others))
        numbers["size_slope"] = size_slope(sizes, expected.predict(self._designs(self.config.test)))
        return numbers

    def answers(self, task: NetworkTask) -> dict[str, Any]:
        """A row's answers to the asked patients: each record, and how like true answers of other patients they are."""
        records: list[Record] = []
        written, decoded = [], []
        for person in self.asked(self.config.asked_patients):
            visit, questions = person.visits[0], self._questions(person)
            answers = self._answers(task.row, person, questions)
            for question, values, picture in zip(questions, answers.written, answers.decoded, strict=True):
                shown = self.people.picture(values, visit)
                growth = self.people.measure(shown, visit.frame) - visit.measured_mm2
                records.append(self._record(person, question, growth, values))
                written.append(shown)
                decoded.append(picture)
        likeness = {
            f"{kind}_{name}": value
            for kind, pictures in (("written", written), ("decoded", decoded))
            for name, value in self._likeness(torch.stack(pictures)).items()
        }
        return {"records": records, "likeness": likeness}

    def draws(self, task: NetworkTask) -> list[Record]:
        """Growth of each of several answers to the questions of time, and of their mean, which is written as well."""
        records: list[Record] = []
        for person in self.asked(self.config.drawn_patients):
            visit = person.visits[0]
            questions = [question for question in self._questions(person) if question.name.startswith("age")]
            targets = [question.target for question in questions]
            editor, model, drift = self._editor(task.row)
            prompts = [self.modality.prompt(visit.attributes)]
            edits = [edit_to(self.modality, 0, visit.attributes, target) for target in targets]
            image = self.people.picture(visit.scan.pixels, visit)[None]
            seeds = range(self.config.draws)
            mean, several = draw_several(model, image, prompts, edits, editor, seeds, drift=drift)
            for number, question in enumerate(questions):
                drawn = [self._written(visit, mean.reconstructions[0], answer) for answer in several[number]]
                growths = [
                    self.people.measure(self.people.picture(values, visit), visit.frame) - visit.measured_mm2
                    for values in drawn
                ]
                of_mean = self._written(visit, mean.reconstructions[0], mean.images[number])
                growth = self.people.measure(self.people.picture(of_mean, visit), visit.frame) - visit.measured_mm2
                one = gain_db(drawn[0], visit, question)
                record = self._record(person, question, growth, of_mean)
                records.append(record | {"growths_mm2": growths, "one_gain_db": one})
        return records

    @functools.cached_property
    def _training(self) -> list[Person]:
        chosen = self.config.training
        return list(self.people.draw(chosen.seed, chosen.patients, 0, chosen.patients, questions=False))

    @functools.cached_property
    def _drift(self) -> LongitudinalDrift:
        return fit_drift(self._training, self.modality, self.base)

    def _asked(self, count: int) -> list[Person]:
        return list(self.people.draw(self.config.test.seed, self.config.test.patients, 0, count, questions=True))

    def _first_visits(self, seed: int, patients: int) -> list[ScannedVisit]:
        drawn = self.people.draw(seed, patients, 0, patients, questions=False)
        return [person.visits[0] for person in drawn]

    def _first_pictures(self, chosen: PatientsConfig) -> Tensor:
        """Of each patient's first visit, through the VAE."""
        latents = torch.stack([visit.latent for visit in self.first_visits(chosen.seed, chosen.patients)])
        return self._decoded(latents)

    def _designs(self, chosen: PatientsConfig) -> Tensor:
        visits = self.first_visits(chosen.seed, chosen.patients)
        return torch.tensor([self.modality.design_vector(visit.attributes) for visit in visits])

    def _decoded(self, latents: Tensor) -> Tensor:
        return torch.cat([self.base.decode(part) for part in latents.split(32)])

    def _features(self, pictures: Tensor) -> list[Tensor]:
        return [extract_features(extractor, pictures) for extractor in self.extractors()]

    def _from_noise(self, row: str) -> Tensor:
        chosen, drift = self.config.test, self._drift
        visits = self.first_visits(chosen.seed, chosen.patients)
        people = [Person("", str(number), [visit], []) for number, visit in enumerate(visits)]
        start = means(drift, self.modality, people, "centred" if row == CENTRED else "prior")
        generator = torch_generator(SEED, "pictures from noise")
        if row == GAUSSIAN:
            return self._decoded(gaussian_latents(drift, self.base, start, generator))
        noise = torch.randn(start.mean.shape, generator=generator)
        model = self.base if row == UNTRAINED else load(self.study, self.file(row)).model
        contexts = model.embed([self.modality.prompt(visit.attributes) for visit in visits])
        sampler = make_sampler(model.scheduler, "dpm-solver++", self.config.sampling_steps)
        return self._decoded(sample(model, contexts, noise, sampler, start))

    def _questions(self, person: Person) -> list[Question]:
        return [question for question in person.questions if question.name in EDITS]

    def _answers(self, row: str, person: Person, questions: Sequence[Question]) -> Answers:
        visit, targets = person.visits[0], [question.target for question in questions]
        image = self.people.picture(visit.scan.pixels, visit)[None]
        if row == COPY:
            shown = self._decoded(visit.latent[None]).expand(len(targets), -1, -1, -1)
            return Answers(shown, [visit.scan.pixels] * len(targets))
        if row == TRUE:
            pictures = torch.stack([self.people.picture(question.pixels, visit) for question in questions])
            return Answers(self._decoded(self.base.encode(pictures)), [question.pixels for question in questions])
        editor, model, drift = self._editor(row)
        edits = [edit_to(self.modality, 0, visit.attributes, target) for target in targets]
        write = writing(
            visit.scan, visit.frame, self.modality.image.rendering, self.base.resolution, self.modality.image
        )
        past = past_of(self.modality, {0: ScanHistory.without_visits(write)})
        prompts = [self.modality.prompt(visit.attributes)]
        drawn, _ = draw_several(model, image, prompts, edits, editor, [SEED], drift=drift, past=past)
        written = [self._written(visit, drawn.reconstructions[0], answer) for answer in drawn.images]
        return Answers(drawn.images, written)

    def _editor(self, row: str) -> tuple[Editor, BaseModel, LongitudinalDrift | LatentDrift | None]:
        if row == CLOSED:
            return read_editor(self.config.closed_form), self.base, self._drift
        model = load(self.study, self.file(PLAIN)).model
        if row == NETWORK:
            return read_editor(self.config.network), model, None
        return RefinedDrift(**self._refinements()[row]), model, self._drift

    def _refinements(self) -> dict[str, dict[str, Any]]:
        return {refinement_name(options): dict(options) for options in self.config.refinements}

    def _written(self, visit: ScannedVisit, reconstruction: Tensor, answer: Tensor) -> np.ndarray:
        return render(visit.scan.pixels, visit.frame, reconstruction, answer, self.modality.image.rendering)

    def _record(self, person: Person, question: Question, growth: float, values: np.ndarray) -> Record:
        same = np.array_equal(values, question.pixels)
        return {
            "patient": f"{person.hospital}/{person.identity}",
            "question": question.name,
            "gain_db": None if same else gain_db(values, person.visits[0], question),
            "growth_mm2": growth,
            "true_growth_mm2": question.growth_mm2,
        }

    def _likeness(self, pictures: Tensor) -> dict[str, float]:
        """Distances to true answers of as many other patients."""
        numbers = {}
        for extractor, real in zip(self.extractors(), self._features_of_true_answers, strict=True):
            numbers[f"kernel_{extractor.name}"] = kernel_distance(extract_features(extractor, pictures), real)
        return numbers

    @functools.cached_property
    def _features_of_true_answers(self) -> list[Tensor]:
        chosen, count = self.config.others, self.config.asked_patients
        people = self.people.draw(chosen.seed, chosen.patients, 0, count, questions=True)
        pictures = [
            self.people.picture(question.pixels, person.visits[0])
            for person in people
            for question in self._questions(person)
        ]
        return self._features(torch.stack(pictures))


def refinement_name(options: dict[str, Any]) -> str:
    """Row of a refinement."""
    return f"closed form, redrawn from noise {options['noise_fraction']:g}, guidance {options['guidance_scale']:g}"


def gaussian_latents(
    drift: LongitudinalDrift, base: BaseModel, start: LatentDrift, generator: torch.Generator
) -> Tensor:
    """Latents `(N,C,h,w)`: the mean for the attributes, parts of the drift's covariance, and equal noise outside."""
    count = len(start.mean)
    expected = (start.mean + base.latent_mean.view(-1, 1, 1)).flatten(1)
    units = drift.directions / drift.directions.norm(dim=1, keepdim=True)
    lift = units / drift.directions.norm(dim=1, keepdim=True)  # one unit of a part, in latents
    values, vectors = torch.linalg.eigh(drift.part_spread)
    parts = torch.randn((count, len(lift)), generator=generator) * values.clamp_min(0).sqrt() @ vectors.T
    rest = torch.randn(expected.shape, generator=generator) * float(drift.outside[0])
    rest = rest - rest @ units.T @ units
    return (expected + parts @ lift + rest).view_as(start.mean)
