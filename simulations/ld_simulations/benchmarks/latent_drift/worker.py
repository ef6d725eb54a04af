"""One process of the latent drift benchmark: trains adapters, draws samples and measures them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

import ld_common.core.offline  # noqa: F401  (before any model library)
from ld_client.train import train_round
from ld_common.adapters.base import AdaptedModel, inject
from ld_common.adapters.prior_preservation import draw_prior
from ld_common.adapters.registry import read_adapter
from ld_common.adapters.state_dict import read_tensors, write_tensors
from ld_common.core.config import from_mapping
from ld_common.core.seeding import torch_generator
from ld_common.diffusion.base_model import BaseModel, load_base
from ld_common.diffusion.drift import (
    ConditionalDrift,
    LatentDrift,
    drift_from_attributes,
    drift_from_moments,
    drift_from_shift,
    shift_of,
)
from ld_common.diffusion.sampling import make_sampler, sample
from ld_common.diffusion.training import TrainingData
from ld_common.metrics.histogram import match_grey_levels
from ld_common.protocol.study_config import StudyConfig
from ld_simulations.benchmarks.harness import ResultStore
from ld_simulations.benchmarks.latent_drift.judge import SampleJudge
from ld_simulations.benchmarks.latent_drift.pictures import (
    OTHERS,
    TEST,
    TRAINING,
    PictureSet,
    draw_pictures,
    encode,
)
from ld_simulations.benchmarks.latent_drift.plan import (
    CONDITIONAL,
    HISTOGRAM,
    LOCAL,
    OFFSET_NOISE,
    PRIOR,
    STRIP,
    ZERO_SNR,
    Benchmark,
    DriftDrawing,
    DriftTraining,
    adopted_results,
)
from ld_simulations.phantoms.registry import find_phantom

SHOWN = 12
"""Samples of the first seed on the sheet."""
SAMPLED_TOGETHER = {"cpu": 32, "cuda": 512}


class DriftWorker:
    """Runs trainings; images and the features of real ones are loaded once for each modality."""

    def __init__(self, benchmark: Benchmark) -> None:
        self.benchmark, self.config = benchmark, benchmark.config
        self.output = Path(self.config.output)
        self.store = ResultStore(self.output, adopted_results(benchmark))
        self._loaded: dict[str, Any] = {}
        self._last: tuple[DriftTraining, AdaptedModel[BaseModel]] | None = None

    def run(self, training: DriftTraining) -> None:
        """Train, and draw and measure what has no result yet; each result is kept as soon as it is there."""
        for drawing in self.benchmark.drawings(training):
            if self.store.read(drawing.name) is None:
                self._measure(drawing, self._samples(drawing))

    def _samples(self, drawing: DriftDrawing) -> Tensor:
        """Samples `(N,1,S,S)` before histogram matching, drawn once and kept."""
        file = self.output / "samples" / f"{drawing.training.name}-{drawing.formulation}.safetensors"
        if not file.exists():
            adapted, hospitals = self._trained(drawing.training), self._hospitals(drawing.training.modality)
            images = self._drawn(adapted, drawing.training, self._drifts(drawing, hospitals))
            write_tensors(file, {"images": images.half()}, {})
        return read_tensors(file)[0]["images"].float()

    def prepare(self, modality: str) -> None:
        """Draw and encode a modality's images and train the classifiers, for all processes."""
        for training in self.benchmark.trainings:
            if training.modality == modality:
                self._latents(training)
                self._judge(modality).prepare(training.seed)

    def reference(self, modality: str) -> list[dict[str, Any]]:
        """Metrics of real images of other patients, and of the test images before the VAE, as if they were samples."""
        judge, first = self._judge(modality), self.config.seeds[0]
        self._keep_for_sheet(f"{modality}-real", judge.test.images[self._rows(judge)[:SHOWN]])
        return [
            {"modality": modality, "what": what, "seed": first, "metrics": judge.measure(pictures, first)}
            for what, pictures in (("real", self._autoencoded(modality)[2]), ("raw", self._pictures(modality)[1]))
        ]

    def _trained(self, training: DriftTraining) -> AdaptedModel[BaseModel]:
        """The trained model; the last one stays loaded."""
        if self._last is None or self._last[0] != training:
            self._last = training, self._train(training)
        return self._last[1]

    def _train(self, training: DriftTraining) -> AdaptedModel[BaseModel]:
        study, base = self._study(training), self._base(training)
        adapter = read_adapter(study.adapter)
        adapted = inject(base, adapter, study.seed)
        file = self.output / "states" / f"{training.name}.safetensors"
        if file.exists():
            adapted.load(read_tensors(file)[0])
        else:
            # an untrained adapter leaves the output of `base` unchanged
            prior = None if adapter.prior is None else draw_prior(base, adapter.prior, study.seed)
            train, _, _ = self._pictures(training.modality)
            data = TrainingData(self._latents(training), self._prompts(training.modality, train), None, prior)
            if training.variant in ("centred", "noise"):
                data = replace(data, drift=LatentDrift(self._mean(training, "channel"), training.variant))
            losses = train_round(adapted, data, study, 1, "benchmark")
            write_tensors(file, adapted.state(), {"losses": json.dumps([losses.first, losses.last])})
        for parameter in adapted.parameters.values():
            parameter.requires_grad_(False)
        return adapted

    def _study(self, training: DriftTraining) -> StudyConfig:
        plan = self.config.adapters[training.adapter]
        offset = self.config.noise_offset if training.variant == OFFSET_NOISE else 0.0
        return from_mapping(
            StudyConfig,
            {
                "seed": training.seed,
                "adapter": plan.adapter,
                "training": {**vars(plan.training), "noise_offset": offset},
                "federation": {"rounds": 1},
            },
        )

    @torch.no_grad()
    def _drawn(
        self,
        adapted: AdaptedModel[BaseModel],
        training: DriftTraining,
        drifts: Sequence[tuple[LatentDrift | None, list[int]]],
    ) -> Tensor:
        """Samples `(N,1,S,S)` of a trained model; each drift has the indices of the samples drawn under it."""
        model, count = adapted.model, self.config.samples
        judge = self._judge(training.modality)
        rows = self._rows(judge)
        prompts = self._prompts(training.modality, judge.test)
        distinct = sorted(set(prompts))
        embedded = torch.cat([model.embed(distinct[first : first + 64]) for first in range(0, len(distinct), 64)])
        context = embedded[[distinct.index(prompts[row]) for row in rows]]
        noise = torch.randn((count, *model.latent_shape), generator=torch_generator(training.seed, "benchmark-samples"))
        sampler = make_sampler(model.scheduler, self.config.sampler, self.config.sampler_steps)
        size, parts = SAMPLED_TOGETHER[self.config.device], []
        for drift, numbers in drifts:
            parts.append((numbers, sample(model, context[numbers], noise[numbers], sampler, drift, size)))
        latents = torch.empty((count, *model.latent_shape))
        for numbers, drawn in parts:
            latents[numbers] = drawn.float().cpu()
        return torch.cat([model.decode(chunk) for chunk in latents.split(size)])

    def _drifts(self, drawing: DriftDrawing, hospitals: list[int]) -> list[tuple[LatentDrift | None, list[int]]]:
        """Each drift with the indices of the samples that are drawn under it."""
        everything = list(range(len(hospitals)))
        if not drawing.drift:
            return [(None, everything)]
        training = drawing.training
        if drawing.formulation == CONDITIONAL:
            return [(self._conditional(training), everything)]
        if drawing.formulation == LOCAL:
            return [
                (
                    LatentDrift(self._mean(training, "channel", hospital), PRIOR),
                    [number for number in everything if hospitals[number] == hospital],
                )
                for hospital in sorted(set(hospitals))
            ]
        if drawing.formulation.startswith(PRIOR):
            shape = drawing.formulation.removeprefix(PRIOR).removeprefix("-") or "channel"
            return [(LatentDrift(self._mean(training, shape), PRIOR), everything)]
        return [(LatentDrift(self._mean(training, "channel"), drawing.formulation), everything)]

    def strip(self) -> dict[str, Any]:
        """Draw and measure the strip: the plain training's samples under each δ, all from the same noise."""
        plan, training = self.config.strip, self.benchmark.strip_training
        judge, adapted = self._judge(training.modality), self._trained(training)
        mean = self._mean(training, "channel")
        direction = mean / mean.square().mean().sqrt()
        alphas = adapted.model.scheduler.alphas_cumprod
        everything = list(range(self.config.samples))
        columns: list[tuple[float | None, Tensor]] = []
        for delta in plan.deltas:
            drift = LatentDrift(drift_from_shift(delta, alphas) * direction, PRIOR)
            columns.append((delta, self._drawn(adapted, training, [(drift, everything)])))
        others = self._autoencoded(training.modality)[2].images
        columns.append((None, others))  # the distance of real images of other patients
        for number, (_, images) in enumerate(columns):
            self._keep_for_sheet(f"{STRIP}-{number}", images[: plan.rows])
        return {
            "modality": training.modality,
            "adapter": training.adapter,
            "seed": training.seed,
            "samples": self.config.samples,
            "delta_of_moments": float(shift_of(LatentDrift(mean, PRIOR), alphas).square().mean().sqrt()),
            "columns": [{"delta": delta, **judge.brightness_and_distances(images)} for delta, images in columns],
        }

    def _measure(self, drawing: DriftDrawing, images: Tensor) -> None:
        training = drawing.training
        judge = self._judge(training.modality)
        if drawing.control == HISTOGRAM:
            images = match_grey_levels(images, judge.train.images)
        rows = self._rows(judge)
        samples = PictureSet(
            images,
            [judge.test.attributes[row] for row in rows],
            self._hospitals(training.modality),
        )
        if training.seed == self.config.seeds[0]:
            self._keep_for_sheet(drawing.name, images[:SHOWN])
        result = {
            "modality": training.modality,
            "adapter": training.adapter,
            "drift": drawing.drift,
            "formulation": drawing.formulation,
            "control": drawing.control,
            "seed": training.seed,
            "device": self.config.device,
            "torch": torch.__version__,
            "metrics": judge.measure(samples, training.seed),
        }
        self.store.write(drawing.name, result)

    def _hospitals(self, modality: str) -> list[int]:
        """The hospital whose patients' attributes each sample has."""
        judge = self._judge(modality)
        return [judge.test.hospitals[row] for row in self._rows(judge)]

    def _rows(self, judge: SampleJudge) -> list[int]:
        """Rows of the test images whose attributes the samples have, the same for every seed."""
        order = torch.randperm(len(judge.test.images), generator=torch_generator(0, "benchmark-conditions")).tolist()
        return [order[number % len(order)] for number in range(self.config.samples)]

    def _keep_for_sheet(self, name: str, images: Tensor) -> None:
        write_tensors(self.output / "sheets" / f"{name}.safetensors", {"images": images.contiguous()}, {})

    def _base(self, training: DriftTraining) -> BaseModel:
        """A fresh base: injecting an adapter changes it."""
        name = self.config.zero_snr_base if training.variant == ZERO_SNR else self.config.base_model
        return load_base(name, self.config.device)

    def _latents(self, training: DriftTraining) -> Tensor:
        """Latents of all training images under the training's base."""
        base = ZERO_SNR if training.variant == ZERO_SNR else "plain"
        file = self.output / f"latents-{training.modality}-{base}.safetensors"
        if not file.exists():
            train, _, _ = self._pictures(training.modality)
            write_tensors(file, {"latents": encode(self._base(training), train.images)}, {})
        return read_tensors(file)[0]["latents"]

    def _mean(self, training: DriftTraining, shape: str, hospital: int | None = None) -> Tensor:
        latents = self._latents(training)
        if hospital is not None:
            train, _, _ = self._pictures(training.modality)
            latents = latents[[number == hospital for number in train.hospitals]]
        return cast(Tensor, drift_from_moments(latents, self._base_mean(), shape))

    def _conditional(self, training: DriftTraining) -> LatentDrift:
        """One μ for each sample, by the attributes in its prompt."""
        modality, judge = self.benchmark.modalities[training.modality], self._judge(training.modality)
        train, _, _ = self._pictures(training.modality)
        design = [modality.design_vector(attributes) for attributes in train.attributes]
        fitted = ConditionalDrift(drift_from_attributes(self._latents(training), self._base_mean(), design))
        return fitted.at([modality.design_vector(judge.test.attributes[row]) for row in self._rows(judge)])

    def _base_mean(self) -> Tensor:
        if "mean" not in self._loaded:
            self._loaded["mean"] = load_base(self.config.base_model).latent_mean
        return self._loaded["mean"]

    def _pictures(self, modality: str) -> tuple[PictureSet, PictureSet, PictureSet]:
        """Images for training, for testing, and as many of other patients as for testing."""
        key = f"pictures-{modality}"
        if key not in self._loaded:
            resolution = load_base(self.config.base_model).resolution
            common = self.benchmark.hospitals[modality], self.benchmark.modalities[modality], resolution
            folder, processes = self.output / "pictures", os.cpu_count() or 1
            self._loaded[key] = (
                draw_pictures(*common, self.config.patients, TRAINING, processes, folder),
                draw_pictures(*common, self.config.test_patients, TEST, processes, folder),
                draw_pictures(*common, self.config.test_patients, OTHERS, processes, folder),
            )
        return self._loaded[key]

    def _autoencoded(self, modality: str) -> list[PictureSet]:
        """The same three after the VAE."""
        key, names = f"seen-{modality}", ("train", "test", "others")
        if key not in self._loaded:
            pictures, file = self._pictures(modality), self.output / "pictures" / f"{key}.safetensors"
            if not file.exists():
                base = load_base(self.config.base_model, self.config.device)
                images = {name: base.autoencode(part.images) for name, part in zip(names, pictures, strict=True)}
                write_tensors(file, images, {})
            images = read_tensors(file)[0]
            self._loaded[key] = [replace(part, images=images[name]) for name, part in zip(names, pictures, strict=True)]
        return self._loaded[key]

    def _prompts(self, modality: str, pictures: PictureSet) -> list[str]:
        return [self.benchmark.modalities[modality].prompt(attributes) for attributes in pictures.attributes]

    def _judge(self, modality: str) -> SampleJudge:
        key = f"judge-{modality}"
        if key not in self._loaded:
            config = self.config
            phantom = find_phantom(self.benchmark.hospitals[modality].phantom)
            train, test, _ = self._autoencoded(modality)
            folder = self.output / "real" / modality
            self._loaded[key] = SampleJudge(self.benchmark.modalities[modality], phantom, train, test, config, folder)
        return self._loaded[key]
