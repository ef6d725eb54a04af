"""The plan of the latent drift benchmark: what is trained, and what is drawn from each training."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ld_common.adapters.registry import complete_adapter
from ld_common.core.config import load_config, require, to_mapping
from ld_common.diffusion.options import TrainingConfig
from ld_common.imaging.modality import Modality
from ld_simulations.benchmarks.harness import read_table
from ld_simulations.hospitals_config import HospitalsConfig

OFFSET_NOISE, ZERO_SNR, HISTOGRAM = "offset_noise", "zero_terminal_snr", "histogram_matching"
PRIOR, MAP, CONDITIONAL, LOCAL = "prior", "prior-map", "prior-conditional", "prior-local"
FORMS = (MAP, CONDITIONAL, "prior-scalar", LOCAL)
"""Forms of the drift beside μ by channel; they are drawn from the plain training."""
VARIANTS = ("plain", OFFSET_NOISE, ZERO_SNR, "centred", "noise")
"""A training differs from the plain one in its noise, its base, or the drift that it is trained under."""
STRIP = "strip"
"""Name of the strip's result."""


@dataclass
class ModalityPlan:
    """One modality; both files are relative to the benchmark's."""

    modality: str = ""
    hospitals: str = ""


@dataclass
class AdapterPlan:
    """One adapter and its training options."""

    adapter: dict[str, Any] = field(default_factory=dict)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        self.adapter = complete_adapter(self.adapter)


@dataclass
class StripPlan:
    """Samples of one training under several δ from the same noise, as on the paper's page."""

    modality: str = ""
    """Empty: no strip."""
    adapter: str = ""
    deltas: list[float] = field(default_factory=lambda: [-0.1, -0.05, 0.0, 0.05, 0.1])
    """Shifts of z_T in units of its noise, root mean square over the channels, along the latent mean of the scans less
    that of the base; above 0 is towards the scans."""
    rows: int = 4
    """Samples shown of each δ; all are measured."""


@dataclass
class BenchmarkConfig:
    """The whole benchmark."""

    output: str = "runs/benchmark_latent_drift"
    """Folder of every training and result; a stopped run resumes from it."""
    results: str = "docs/benchmarks"
    """Folder of the page, its numbers and the sheets of samples."""
    adopt: str = ""
    """A `latent_drift.json` of an earlier run, perhaps of another machine; its results count as done, and so do those
    of the `latent_drift_reference.json` beside it."""
    base_model: str = "simulations/tiny_base"
    zero_snr_base: str = "simulations/zero_snr_base"
    """The same base with zero terminal SNR; empty leaves that control out."""
    device: str = "cpu"
    workers: int = 1
    """Processes that train at the same time."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    patients: int = 80
    """Patients of each hospital that are trained on, with two to four visits each."""
    test_patients: int = 350
    """Further patients of each hospital, one image each, that samples are compared with."""
    samples: int = 1024
    sampler: str = "ddim"
    sampler_steps: int = 30
    classifier_steps: int = 300
    features: list[str] = field(default_factory=lambda: ["efficientnet_lite0", "gabor"])
    inception: str = ""
    """TorchScript file of the Inception network of FID; empty leaves its features out."""
    noise_offset: float = 0.1
    variants: dict[str, list[str]] = field(default_factory=dict)
    """Variant of the training -> adapters that are also trained this way."""
    first_seed_only: list[str] = field(default_factory=list)
    """Variants that are trained with the first seed only."""
    forms: dict[str, list[str]] = field(default_factory=dict)
    """Adapter -> further formulations that are drawn from its plain training, beside `prior`."""
    modalities: dict[str, ModalityPlan] = field(default_factory=dict)
    adapters: dict[str, AdapterPlan] = field(default_factory=dict)
    strip: StripPlan = field(default_factory=StripPlan)

    def __post_init__(self) -> None:
        counts = ("workers", "patients", "test_patients", "samples", "sampler_steps", "classifier_steps")
        for name in counts:
            require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}: it must be above 0")
        require(self.device in ("cpu", "cuda"), f"device is '{self.device}': use cpu or cuda")
        require(bool(self.seeds and self.modalities and self.adapters), "name seeds, modalities and adapters")
        for variant, names in self.variants.items():
            require(variant in VARIANTS[1:], f"variants: '{variant}' is not one of {', '.join(VARIANTS[1:])}")
            unknown = sorted(set(names) - set(self.adapters))
            require(not unknown, f"variants.{variant}: adapters has no {', '.join(unknown)}")
        for variant in self.first_seed_only:
            require(variant in self.variants, f"first_seed_only: variants has no '{variant}'")
        for adapter, forms in self.forms.items():
            require(adapter in self.adapters, f"forms: adapters has no '{adapter}'")
            unknown = sorted(set(forms) - set(FORMS))
            require(not unknown, f"forms.{adapter}: {', '.join(unknown)}: use {', '.join(FORMS)}")
        strip = self.strip
        if strip.modality:
            require(strip.modality in self.modalities, f"strip: modalities has no '{strip.modality}'")
            require(strip.adapter in self.adapters, f"strip: adapters has no '{strip.adapter}'")
            require(len(set(strip.deltas)) > 1, "strip.deltas: name at least two")
            require(0 < strip.rows <= self.samples, f"strip.rows is {strip.rows}: use 1 to {self.samples}")


@dataclass(frozen=True)
class DriftTraining:
    """One training of one adapter."""

    modality: str
    adapter: str
    variant: str
    seed: int

    @property
    def name(self) -> str:
        """Name of its files."""
        return f"{self.modality}-{self.adapter}-{self.variant}-{self.seed}"


@dataclass(frozen=True)
class DriftDrawing:
    """One set of samples drawn from a training."""

    training: DriftTraining
    drift: bool
    formulation: str
    """How the drift enters; `none` without one. By default μ has a value for each latent channel and is estimated from
    all hospitals' scans; `prior-map` and `prior-scalar` have another shape, `prior-conditional` is a map that follows
    the prompt, and `prior-local` is estimated from each hospital's scans alone."""
    control: str | None

    @property
    def name(self) -> str:
        """Name of its result."""
        return f"{self.training.name}-{self.formulation}-{self.control or 'none'}"


FREE = ("output", "results", "adopt", "device", "workers", "seeds", "variants", "first_seed_only", "forms", "strip")
"""Options that decide which results there are, not what they are; they may change between two runs into one output."""


@dataclass(frozen=True)
class Benchmark:
    """The config with the files that it names read."""

    config: BenchmarkConfig
    modalities: dict[str, Modality]
    hospitals: dict[str, HospitalsConfig]

    def plan(self) -> dict[str, Any]:
        """What decides the results, beside the weights of the bases."""
        plan = {key: value for key, value in to_mapping(self.config).items() if key not in FREE}
        plan["patients_and_prompts"] = {
            name: [to_mapping(modality), str(self.hospitals[name])] for name, modality in self.modalities.items()
        }
        return plan

    @property
    def trainings(self) -> list[DriftTraining]:
        """All trainings: the plain ones, seed by seed, before the controls, so that a run may be stopped early."""
        config = self.config
        trainings = [
            DriftTraining(modality, adapter, variant, seed)
            for seed, modality, adapter in itertools.product(config.seeds, config.modalities, config.adapters)
            for variant in VARIANTS
            if variant == "plain" or adapter in config.variants.get(variant, [])
            if self._possible(variant, seed)
        ]
        return sorted(trainings, key=lambda training: VARIANTS.index(training.variant))

    def _possible(self, variant: str, seed: int) -> bool:
        later = variant in self.config.first_seed_only and seed != self.config.seeds[0]
        return not later and (variant != ZERO_SNR or bool(self.config.zero_snr_base))

    def drawings(self, training: DriftTraining) -> Iterator[DriftDrawing]:
        """The sets of samples that are drawn from a training."""
        if training.variant == "plain":
            yield DriftDrawing(training, False, "none", None)
            yield DriftDrawing(training, False, "none", HISTOGRAM)
            for form in (PRIOR, *self.config.forms.get(training.adapter, [])):
                yield DriftDrawing(training, True, form, None)
        elif training.variant == OFFSET_NOISE:
            yield DriftDrawing(training, False, "none", OFFSET_NOISE)
            yield from (DriftDrawing(training, True, form, OFFSET_NOISE) for form in (PRIOR, MAP, CONDITIONAL))
        elif training.variant == ZERO_SNR:
            yield DriftDrawing(training, False, "none", ZERO_SNR)
        elif training.variant == "centred":
            yield DriftDrawing(training, True, "centred", None)
        else:
            yield from (DriftDrawing(training, True, name, None) for name in ("noise", "per-step", "per-step-literal"))

    @property
    def strip_training(self) -> DriftTraining:
        """The training that the strip is drawn from."""
        return DriftTraining(self.config.strip.modality, self.config.strip.adapter, "plain", self.config.seeds[0])

    @property
    def all_drawings(self) -> list[DriftDrawing]:
        """Every planned set of samples, in the order of the trainings."""
        return [drawing for training in self.trainings for drawing in self.drawings(training)]


def load_benchmark(path: Path, overrides: list[str]) -> Benchmark:
    """Read the benchmark's config and the files that it names; raises `ConfigError`."""
    config = load_config(BenchmarkConfig, path, overrides)
    modalities = {name: load_config(Modality, path.parent / plan.modality) for name, plan in config.modalities.items()}
    hospitals = {
        name: load_config(HospitalsConfig, path.parent / plan.hospitals) for name, plan in config.modalities.items()
    }
    return Benchmark(config, modalities, hospitals)


def adopted_results(benchmark: Benchmark) -> dict[str, Any]:
    """Results of the table that the config adopts, by name; raises `ConfigError` where it cannot be read."""
    adopt = benchmark.config.adopt
    if not adopt:
        return {}
    runs = {
        (run["modality"], run["adapter"], run["drift"], run["formulation"], run["control"], run["seed"]): run
        for run in read_table(adopt, "latent drift")
    }
    results: dict[str, Any] = {}
    for drawing in benchmark.all_drawings:
        training = drawing.training
        key = training.modality, training.adapter, drawing.drift, drawing.formulation, drawing.control, training.seed
        if key in runs:
            results[drawing.name] = runs[key]
    reference = Path(adopt).with_name(f"{Path(adopt).stem}_reference.json")
    references = read_table(str(reference), "latent drift reference") if reference.exists() else []
    for modality in benchmark.modalities:
        of_modality = [row for row in references if row["modality"] == modality]
        if of_modality:
            results[f"reference-{modality}"] = of_modality
    strip = Path(adopt).with_name(f"{Path(adopt).stem}_strip.json")
    if strip.exists():
        results[STRIP] = read_table(str(strip), "latent drift strip", ("columns",))
    return results
