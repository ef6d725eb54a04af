"""Quality of a generator trained on N patients with a given ε: counterfactuals against the truth, and samples."""

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
from ld_evaluate.judge import TRUTH_METRICS
from ld_simulations.benchmarks.latent_drift.pictures import OTHERS, TRAINING, PictureSet, draw_pictures, encode
from ld_simulations.benchmarks.privacy.plan import PrivacyBenchmark, PrivacySetting, PrivacyTraining
from ld_simulations.evaluation import TestPatients, evaluate
from ld_simulations.hospitals import HELD_OUT, write_hospitals
from ld_simulations.hospitals_config import HospitalConfig, HospitalsConfig

SAMPLER, SAMPLER_STEPS = "dpm-solver++", 15
DRAWN_TOGETHER = {"cpu": 32, "cuda": 512}
FEATURES = "efficientnet_lite0"

PublicStart = tuple[int, int, str]
"""Its rank and seed, and the name of another anatomy or nothing."""


def first_patients(data: TrainingData, count: int) -> TrainingData:
    """The scans of the first `count` patients."""
    chosen = set(list(dict.fromkeys(data.patients))[:count])
    rows = [row for row, patient in enumerate(data.patients) if patient in chosen]
    prompts, patients = [data.prompts[row] for row in rows], [data.patients[row] for row in rows]
    return TrainingData(data.latents[rows], prompts, patients=patients)


class QualityRuns:
    """Trains and judges settings; images, public starts and features of real images are made once and kept."""

    def __init__(self, benchmark: PrivacyBenchmark) -> None:
        self.benchmark, self.config = benchmark, benchmark.config
        self.private, self.public = benchmark.hospitals.hospitals[0], benchmark.hospitals.hospitals[-1]
        self._training_data: dict[tuple[str, str, int], TrainingData] = {}

    def prepare(self) -> None:
        """Make the images and features that all processes share."""
        self._test_patients()
        self._real()
        self._all_private()
        self.training_data(self.public, self.config.public_patients)

    def run(self, training: PrivacyTraining) -> dict[str, Any]:
        """Train a setting and measure it."""
        setting, seed = training.setting, training.seed
        study, adapted = self.trained(setting, seed, training.start)
        base = adapted.model
        parameters = sum(value.numel() for value in adapted.trainable.values())
        metrics: dict[str, Any] = {"setting": asdict(setting), "seed": seed, "parameters": parameters}
        if training.start:
            metrics["start"] = training.start
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
        editor = read_editor(self.benchmark.study.edit)
        tests = TestPatients(base, self.benchmark.modality, self._test_patients())
        summary = evaluate(tests, editor).summary
        return metrics | {key: summary[key] for key in TRUTH_METRICS} | {"frechet": self._frechet(base, seed)}

    def trained(
        self, setting: PrivacySetting, seed: int, start: str = ""
    ) -> tuple[StudyConfig, AdaptedModel[BaseModel]]:
        """A setting's study and its trained model; `start` names a public start of another anatomy."""
        study = self.benchmark.study_of(setting, seed)
        base = load_base(self.benchmark.study.base_model, self.config.device)
        adapted = inject(base, read_adapter(study.adapter), study.seed)
        if setting.warm_start:
            adapted.load(self.public_start((setting.rank, seed, start)))
        if not setting.steps:
            return study, adapted
        data = first_patients(self._all_private(), setting.patients)
        if setting.epsilon:
            noise = study.privacy_plan().step.noise_multiplier
            train_round_privately(adapted, data, study, 1, noise)
        else:
            train_round(adapted, data, study, 1, "benchmark")
        return study, adapted

    def _all_private(self) -> TrainingData:
        """The largest private hospital; a smaller one is its first patients."""
        most = max([*self.config.patients, self.config.base_setting().patients])
        return self.training_data(self.private, most)

    def training_data(self, hospital: HospitalConfig, count: int, start: str = "") -> TrainingData:
        """All visits of a hospital's patients as latents; `start` names another anatomy's hospitals."""
        key = start, hospital.name, count
        if key not in self._training_data:
            name = "-".join(str(part) for part in key if part)
            file = self.benchmark.output / f"lesson-{name}.safetensors"
            if not file.exists():
                pictures = self._pictures(hospital, count, TRAINING, start)
                base = load_base(self.benchmark.study.base_model, self.config.device)
                modality = self.benchmark.anatomy(start)[1]
                prompts = [modality.prompt(attributes) for attributes in pictures.attributes]
                names = [f"{hospital.name}-{number}" for number in pictures.patients]
                metadata = {"prompts": json.dumps(prompts), "patients": json.dumps(names)}
                write_tensors(file, {"latents": encode(base, pictures.images)}, metadata)
            tensors, metadata = read_tensors(file)
            self._training_data[key] = TrainingData(
                tensors["latents"], json.loads(metadata["prompts"]), patients=json.loads(metadata["patients"])
            )
        return self._training_data[key]

    def _pictures(self, hospital: HospitalConfig, count: int, part: int, start: str = "") -> PictureSet:
        hospitals, modality = self.benchmark.anatomy(start)
        config = HospitalsConfig(phantom=hospitals.phantom, seed=hospitals.seed, hospitals=[replace(hospital)])
        side = load_base(self.benchmark.study.base_model).resolution
        folder = self.benchmark.output / "pictures"
        return draw_pictures(config, modality, side, count, part, os.cpu_count() or 1, folder)

    def public_start(self, start: PublicStart) -> State:
        """An adapter of that rank whose A and B were trained on the public hospital, without noise."""
        rank, seed, other = start
        digest = base_digest(self.benchmark.study.base_model)[:8]
        steps, rate = self.config.public_steps, self.config.public_learning_rate
        name = f"public-{digest}-{rank}-{steps}-{rate:g}-{seed}" + (f"-{other}" if other else "") + ".safetensors"
        file = self.benchmark.output / name
        if not file.exists():
            setting = PrivacySetting(epsilon=0.0, rank=rank, steps=steps, learning_rate=rate, freeze_a=False)
            study = self.benchmark.study_of(setting, seed)
            study.training.batch_size = self.benchmark.study.training.batch_size
            base = load_base(self.benchmark.study.base_model, self.config.device)
            adapted = inject(base, read_adapter(study.adapter), study.seed)
            public = self.benchmark.anatomy(other)[0].hospitals[-1]
            data = self.training_data(public, self.config.public_patients, other)
            train_round(adapted, data, study, 1, "public")
            write_tensors(file, adapted.state(), {})
        return read_tensors(file)[0]

    def _test_patients(self) -> Path:
        """Folder of test patients of the private hospital, with their true counterfactuals."""
        folder = self.benchmark.output / f"hospitals-{self.config.test_patients}"
        if not folder.exists():
            hospital = replace(self.private, patients=1, test_patients=self.config.test_patients)
            write_hospitals(replace(self.benchmark.hospitals, output=str(folder), hospitals=[hospital]))
        return folder / HELD_OUT

    @torch.no_grad()
    def _frechet(self, base: BaseModel, seed: int) -> float:
        """Fréchet distance of samples to images of other patients of the hospital after the VAE."""
        real, features = self._real()
        count, extractor = self.config.samples, load_extractor(FEATURES, self.config.device)
        prompts = [self.benchmark.modality.prompt(attributes) for attributes in real.attributes]
        distinct = sorted(set(prompts))
        embedded = torch.cat([base.embed(distinct[start : start + 64]) for start in range(0, len(distinct), 64)])
        context = embedded[[distinct.index(prompt) for prompt in prompts]]
        noise = torch.randn((count, *base.latent_shape), generator=torch_generator(seed, "privacy benchmark"))
        sampler, size = make_sampler(base.scheduler, SAMPLER, SAMPLER_STEPS), DRAWN_TOGETHER[self.config.device]
        latents = sample(base, context, noise, sampler, None, size)
        images = torch.cat([base.decode(chunk) for chunk in latents.split(64)])
        return frechet_distance(extract_features(extractor, images), features)

    def _real(self) -> tuple[PictureSet, Tensor]:
        """Images of other patients of the private hospital, and their features after the VAE."""
        real = self._pictures(self.private, self.config.samples, OTHERS)
        file = self.benchmark.output / f"real-{self.config.samples}.safetensors"
        if not file.exists():
            base, extractor = load_base(self.benchmark.study.base_model), load_extractor(FEATURES, "cpu")
            write_tensors(file, {"features": extract_features(extractor, base.autoencode(real.images))}, {})
        return real, read_tensors(file)[0]["features"]
