"""How good a generator is that learned from N patients with a given ε: counterfactuals against truth, and samples."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ld_common.core.offline  # noqa: F401  (before any model library)
from ld_client.privacy.dp_sgd import train_round_privately
from ld_client.train import train_round
from ld_common.adapters.base import AdaptedModel, inject
from ld_common.adapters.registry import read_adapter
from ld_common.adapters.state_dict import read_tensors, write_tensors
from ld_common.core.seeding import torch_generator
from ld_common.core.state import State
from ld_common.diffusion.base_model import BaseModel, base_digest, load_base
from ld_common.diffusion.sampling import make_sampler, sample
from ld_common.diffusion.training import TrainingData
from ld_common.editing.registry import read_editor
from ld_common.metrics.features import extract_features, load_extractor
from ld_common.metrics.frechet import frechet_distance
from ld_common.protocol.dp_accounting import noise_over_signal
from ld_common.protocol.study_config import StudyConfig
from ld_simulations.benchmarks.latent_drift.pictures import OTHERS, TRAINING, PictureSet, decode, draw_pictures, encode
from ld_simulations.benchmarks.privacy.plan import PrivacyBenchmark, PrivacySetting, PrivacyTraining
from ld_simulations.evaluation import evaluate
from ld_simulations.hospitals import HospitalConfig, HospitalsConfig, write_hospitals

SAMPLER, SAMPLER_STEPS = "dpm-solver++", 15
DRAWN_TOGETHER = {"cpu": 32, "cuda": 512}
FEATURES = "efficientnet_lite0"

PublicStart = tuple[int, int]
"""Its rank and seed."""


def first_patients(lesson: TrainingData, count: int) -> TrainingData:
    """The scans of the first `count` patients."""
    known = set(list(dict.fromkeys(lesson.patients))[:count])
    return lesson_of(lesson, [row for row, name in enumerate(lesson.patients) if name in known])


def lesson_of(lesson: TrainingData, rows: list[int]) -> TrainingData:
    """Some of its scans."""
    prompts, patients = ([words[row] for row in rows] for words in (lesson.prompts, lesson.patients))
    return TrainingData(lesson.latents[rows], prompts, patients=patients)


class QualityRuns:
    """Trains and judges settings; patients, the public start and real features are made once and kept."""

    def __init__(self, benchmark: PrivacyBenchmark) -> None:
        self.benchmark, self.config = benchmark, benchmark.config
        self.private, self.public = benchmark.hospitals.hospitals[0], benchmark.hospitals.hospitals[-1]
        self._lessons: dict[str, TrainingData] = {}

    def prepare(self) -> None:
        """Make once what several processes would make twice: patients and real features."""
        self._held_out()
        self._real()
        self._all_private()
        self.lesson(self.public, self.config.public_patients)

    def run(self, training: PrivacyTraining) -> dict[str, Any]:
        """What was trained, and all its metrics."""
        setting, seed = training.setting, training.seed
        study, adapted = self.trained(setting, seed)
        base = adapted.model
        parameters = sum(value.numel() for value in adapted.trainable.values())
        metrics: dict[str, Any] = {"setting": asdict(setting), "seed": seed, "parameters": parameters}
        if setting.epsilon:
            planned = study.privacy_plan()
            noise, delta = planned.step.noise_multiplier, study.privacy.target_delta
            ratio = noise_over_signal(noise, parameters, study.privacy.expected_batch_size)
            metrics |= {
                "epsilon": planned.epsilon,
                "delta": delta,
                "noise_multiplier": noise,
                "noise_over_signal": ratio,
            }
        for parameter in adapted.parameters.values():
            parameter.requires_grad_(False)
        judged = evaluate(
            base, self.benchmark.modality, self._held_out(), read_editor(self.benchmark.study.edit), 1.0
        ).summary
        kept = ("copy_gain_db", "growth_correlation", "growth_ratio", "edit_direction_rate", "identity_ratio")
        return metrics | {key: judged[key] for key in kept} | {"frechet": self._frechet(base, seed)}

    def trained(self, setting: PrivacySetting, seed: int) -> tuple[StudyConfig, AdaptedModel[BaseModel]]:
        """A setting's study and its trained model."""
        study = self.benchmark.study_of(setting, seed)
        base = load_base(self.benchmark.study.base_model, self.config.device)
        adapted = inject(base, read_adapter(study.adapter), study.seed)
        if setting.warm_start:
            adapted.load(self.public_start((setting.rank, seed)))
        if not setting.steps:
            return study, adapted
        lesson = first_patients(self._all_private(), setting.patients)
        if setting.epsilon:
            noise = study.privacy_plan().step.noise_multiplier
            train_round_privately(adapted, lesson, study, 1, noise)
        else:
            train_round(adapted, lesson, study, 1, "benchmark")
        return study, adapted

    def _all_private(self) -> TrainingData:
        """The private hospital at its largest; a smaller one is its first patients."""
        most = max([*self.config.patients, self.config.base_setting().patients])
        return self.lesson(self.private, most)

    def lesson(self, hospital: HospitalConfig, count: int) -> TrainingData:
        """All visits of a hospital's patients, encoded."""
        key = f"{hospital.name}-{count}"
        if key not in self._lessons:
            file = self.benchmark.output / f"lesson-{key}.safetensors"
            if not file.exists():
                pictures = self._pictures(hospital, count, TRAINING)
                base = load_base(self.benchmark.study.base_model, self.config.device)
                prompts = [self.benchmark.modality.prompt(own) for own in pictures.attributes]
                names = [f"{hospital.name}-{number}" for number in pictures.patients]
                words = {"prompts": json.dumps(prompts), "patients": json.dumps(names)}
                write_tensors(file, {"latents": encode(base, pictures.images)}, words)
            tensors, held = read_tensors(file)
            self._lessons[key] = TrainingData(
                tensors["latents"], json.loads(held["prompts"]), patients=json.loads(held["patients"])
            )
        return self._lessons[key]

    def _pictures(self, hospital: HospitalConfig, count: int, part: int) -> PictureSet:
        config = HospitalsConfig(
            phantom=self.benchmark.hospitals.phantom, seed=self.benchmark.hospitals.seed, hospitals=[replace(hospital)]
        )
        side = load_base(self.benchmark.study.base_model).resolution
        folder = self.benchmark.output / "pictures"
        return draw_pictures(config, self.benchmark.modality, side, count, part, os.cpu_count() or 1, folder)

    def public_start(self, start: PublicStart) -> State:
        """An adapter of that rank, both A and B, that learned from the public hospital, without noise."""
        rank, seed = start
        digest = base_digest(self.benchmark.study.base_model)[:8]
        steps, rate = self.config.public_steps, self.config.public_learning_rate
        name = f"public-{digest}-{rank}-{steps}-{rate:g}-{seed}.safetensors"
        file = self.benchmark.output / name
        if not file.exists():
            own = PrivacySetting(epsilon=0.0, rank=rank, steps=steps, learning_rate=rate, freeze_a=False)
            study = self.benchmark.study_of(own, seed)
            study.training.batch_size = self.benchmark.study.training.batch_size
            base = load_base(self.benchmark.study.base_model, self.config.device)
            adapted = inject(base, read_adapter(study.adapter), study.seed)
            lesson = self.lesson(self.public, self.config.public_patients)
            train_round(adapted, lesson, study, 1, "public")
            write_tensors(file, adapted.state(), {})
        return read_tensors(file)[0]

    def _held_out(self) -> Path:
        """Held-out patients of the private hospital, with their true counterfactuals."""
        folder = self.benchmark.output / f"hospitals-{self.config.held_out}"
        if not (folder / "held_out" / "held_out.json").exists():
            own = replace(self.private, patients=1, held_out=self.config.held_out)
            hospitals = replace(self.benchmark.hospitals, output=str(folder), hospitals=[own])
            write_hospitals(hospitals)
        return folder / "held_out"

    @torch.no_grad()
    def _frechet(self, base: BaseModel, seed: int) -> float:
        """Fréchet distance of samples to pictures of other patients of the hospital as the VAE returns them."""
        real, features = self._real()
        count, extractor = self.config.samples, load_extractor(FEATURES, self.config.device)
        prompts = [self.benchmark.modality.prompt(own) for own in real.attributes]
        known = sorted(set(prompts))
        context = torch.cat([base.embed(known[start : start + 64]) for start in range(0, len(known), 64)])
        context = context[[known.index(prompt) for prompt in prompts]]
        noise = torch.randn((count, *base.latent_shape), generator=torch_generator(seed, "privacy benchmark"))
        sampler, size = make_sampler(base.scheduler, SAMPLER, SAMPLER_STEPS), DRAWN_TOGETHER[self.config.device]
        latents = sample(base, context, noise, sampler, None, size)
        images = torch.cat([base.decode(chunk) for chunk in latents.split(64)])
        return frechet_distance(extract_features(extractor, images), features)

    def _real(self) -> tuple[PictureSet, Tensor]:
        """PictureSet of other patients of the private hospital, and their features as the VAE returns them."""
        real = self._pictures(self.private, self.config.samples, OTHERS)
        file = self.benchmark.output / f"real-{self.config.samples}.safetensors"
        if not file.exists():
            base, extractor = load_base(self.benchmark.study.base_model), load_extractor(FEATURES, "cpu")
            write_tensors(file, {"features": extract_features(extractor, decode(base, real.images))}, {})
        return real, read_tensors(file)[0]["features"]
