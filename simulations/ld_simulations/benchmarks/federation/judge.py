"""Learns together, pooled and alone, and judges each on patients that nobody learned from.

Two things are learned. The longitudinal drift, which the recommended editor asks, is judged by its answers in raw
pixels. The network is judged by its loss on the test patients' scans at fixed timesteps and noise, as a share of the
improvement that pooled training brings.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ld_client.validation import validation_loss
from ld_common.adapters.base import inject
from ld_common.adapters.registry import read_adapter
from ld_common.core.config import from_mapping, load_config, to_mapping
from ld_common.diffusion.base_model import BaseModel, load_base, load_denoiser
from ld_common.diffusion.drift import LatentDrift, drift_from_moments
from ld_common.diffusion.training import TrainingData
from ld_common.editing.base import Editor
from ld_common.editing.registry import read_editor
from ld_common.imaging.modality import Modality
from ld_common.imaging.rendering import render
from ld_common.imaging.scan_table import load_modality
from ld_common.protocol.study_config import StudyConfig, load_study
from ld_simulations.benchmarks.counterfactuals.training import train_in_rounds
from ld_simulations.benchmarks.federation.plan import FEDPROX, FederationBenchmark
from ld_simulations.benchmarks.individual.answers import gain_db
from ld_simulations.benchmarks.individual.closed_form import DriftAnswers, fit_drift
from ld_simulations.benchmarks.individual.people import People, Person
from ld_simulations.benchmarks.individual.report import EDITS
from ld_simulations.hospitals_config import HospitalsConfig

POOLED, FEDERATED, ALONE, UNTRAINED = "pooled", "federated", "alone", "base, not trained"
LOCAL_DRIFT, GLOBAL_DRIFT = "each site's own drift", "one drift of all sites"
"""Rows of the network that are centred on a channel drift; the others have none."""
POOLED_STEPS, POOLED_BATCH = "pooled, more steps", "pooled, larger batch"
NOISE_SEED = 0


@dataclass(frozen=True)
class FederationTask:
    """One row for one split and seed, or a trial of a method's options."""

    kind: str
    """`answers`, `network` or `trial`."""
    split: str
    seed: int
    row: str
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """Name of its result."""
        chosen = "".join(f",{key}={value}" for key, value in self.options) if self.kind == "trial" else ""
        return f"{self.kind}/{self.split}/{self.seed}/{self.row}{chosen}"


class FederationJudge:
    """Draws patients, learns and measures; what is needed twice is kept in the process."""

    def __init__(self, config: FederationBenchmark) -> None:
        self.config = config
        self.study = load_study(Path(config.study))[0]
        self.modality: Modality = load_modality(Path(config.study).parent / self.study.modality)
        self.base: BaseModel = load_base(self.study.base_model)
        self.editor: Editor = read_editor(self.study.edit)
        self.people = functools.lru_cache(maxsize=2)(self._people)
        self.learners = functools.lru_cache(maxsize=2)(self._learners)
        self.asked = functools.lru_cache(maxsize=2)(self._asked)

    def answers(self, task: FederationTask) -> dict[str, list[float]]:
        """Raw gain of each answer to the five edits, in dB, by the test patients' hospital.

        Row `federated` has an intercept a site; `pooled` takes all scans for one site's; `alone` asks each site's own
        drift about its own patients.
        """
        learners, asked = self.learners(task.split, task.seed), self.asked(task.split, task.seed)
        hospitals = list(dict.fromkeys(person.hospital for person in learners))
        gains: dict[str, list[float]] = {}
        if task.row == ALONE:
            for name in hospitals:
                own = [[person for person in group if person.hospital == name] for group in (learners, asked)]
                gains |= self._gains(task.split, own[0], own[1])
            return gains
        if task.row == POOLED:
            learners = [
                replace(person, hospital=POOLED, identity=f"{person.hospital}/{person.identity}") for person in learners
            ]
        return self._gains(task.split, learners, asked)

    def network(self, task: FederationTask) -> dict[str, float]:
        """Loss on the test patients' visits, by their hospital; of row `alone`, each site's own network on its own.

        Where an aggregator leaves factors at the sites, each site's patients meet the network with its own.
        """
        data = self._training_data(self.learners(task.split, task.seed))
        tests = self._training_data(self.asked(task.split, task.seed))
        if task.row in (LOCAL_DRIFT, GLOBAL_DRIFT):
            drifts = self._drifts(data, task.row)
            data, tests = (
                {name: replace(visits, drift=drifts[name]) for name, visits in group.items()} for group in (data, tests)
            )
        study = self._study(task, list(data))
        if task.row == ALONE:
            losses: dict[str, float] = {}
            for name, visits in data.items():
                losses |= self._losses(self._of_sites(study, [name]), {name: visits}, {name: tests[name]})
            return losses
        if task.row in (POOLED_STEPS, POOLED_BATCH):
            data = {POOLED: _together(data)}
            study = self._of_sites(study, [POOLED])
        return self._losses(study, data if task.row != UNTRAINED else {}, tests)

    def _gains(self, split: str, learners: Sequence[Person], asked: Sequence[Person]) -> dict[str, list[float]]:
        people = self.people(split)
        drawn = DriftAnswers(people, fit_drift(learners, self.modality, self.base))
        rendering, gains = self.modality.image.rendering, dict[str, list[float]]()
        for person in asked:
            questions = [question for question in person.questions if question.name in EDITS]
            targets, visit = [question.target for question in questions], person.visits[0]
            reconstruction, answers = drawn.draw(person, 0, targets, self.editor, rendering)
            for question, answer in zip(questions, answers, strict=True):
                values = render(visit.scan.pixels, visit.frame, reconstruction, answer, rendering)
                gains.setdefault(person.hospital, []).append(gain_db(values, visit, question))
        return gains

    def _losses(
        self, study: StudyConfig, data: dict[str, TrainingData], tests: dict[str, TrainingData]
    ) -> dict[str, float]:
        model = load_denoiser(study.base_model)
        adapted = inject(model, read_adapter(study.adapter), study.seed)
        own = train_in_rounds(adapted, data, study).own_parts if data else {}
        scored = {}
        for name, visits in tests.items():
            adapted.load(own.get(name, {}))
            scored[name] = validation_loss(adapted.model, visits, NOISE_SEED)
        return scored

    def _drifts(self, data: dict[str, TrainingData], row: str) -> dict[str, LatentDrift]:
        """Each site's channel drift, or the mean of the sites' for all."""
        means = {
            name: drift_from_moments(visits.latents, self.base.latent_mean, "channel") for name, visits in data.items()
        }
        own = {name: mean for name, mean in means.items() if mean is not None}
        if row == GLOBAL_DRIFT:
            own = dict.fromkeys(own, torch.stack(list(own.values())).mean(0))
        return {name: LatentDrift(mean, "centred") for name, mean in own.items()}

    def _study(self, task: FederationTask, sites: list[str]) -> StudyConfig:
        """The study of a row: the same number of scans pass the network in every one but `alone`."""
        config, options, row = self.config, dict(task.options), task.row
        mapping = to_mapping(self.study)
        training = {**mapping["training"], "steps": config.steps}
        if row == POOLED_STEPS:
            training["steps"] *= len(sites)
        if row == POOLED_BATCH:
            training["batch_size"] *= len(sites)
        if row == FEDPROX:
            training["proximal_mu"] = options.pop("training.proximal_mu")
        named = row if row in config.methods and row != FEDPROX else "mean"
        federation = {**mapping["federation"], "rounds": config.rounds, "sites": sites, "weighting": "equal"}
        federation |= {"min_train_nodes": len(sites), "aggregation": {"name": named, **options}}
        adapter = {key: value for key, value in mapping["adapter"].items() if key != "freeze_a"}
        values = {**mapping, "adapter": adapter, "training": training, "federation": federation, "seed": task.seed}
        return from_mapping(StudyConfig, values | {"drift": {"shape": "none"}})

    def _of_sites(self, study: StudyConfig, sites: list[str]) -> StudyConfig:
        federation = replace(study.federation, sites=sites, min_train_nodes=1)
        return replace(study, federation=federation)

    def _training_data(self, people: Sequence[Person]) -> dict[str, TrainingData]:
        """The visits of each hospital's people."""
        data = {}
        for name in dict.fromkeys(person.hospital for person in people):
            rows = [(person, visit) for person in people if person.hospital == name for visit in person.visits]
            data[name] = TrainingData(
                torch.stack([visit.latent for _, visit in rows]),
                [self.modality.prompt(visit.attributes) for _, visit in rows],
                patients=[person.identity for person, _ in rows],
            )
        return data

    def _people(self, split: str) -> People:
        return People(load_config(HospitalsConfig, Path(self.config.hospitals[split])), self.modality, self.base)

    def _learners(self, split: str, seed: int) -> list[Person]:
        people = self.people(split)
        return [
            person
            for hospital in people.hospitals.hospitals
            for person in people.draw_of(hospital.name, seed, hospital.patients, 0, hospital.patients)
        ]

    def _asked(self, split: str, seed: int) -> list[Person]:
        count = self.config.test_patients
        return list(self.people(split).draw(seed + self.config.test_offset, count, 0, count, questions=True))


def _together(data: dict[str, TrainingData]) -> TrainingData:
    """All sites' scans as one site's."""
    return TrainingData(
        torch.cat([visits.latents for visits in data.values()]),
        [prompt for visits in data.values() for prompt in visits.prompts],
        patients=[f"{name}/{patient}" for name, visits in data.items() for patient in visits.patients],
    )
