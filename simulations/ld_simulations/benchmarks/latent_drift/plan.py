"""What the benchmark trains and what it draws from each training: a plan that can be stopped and gone on with."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ld_common.adapters.registry import complete_adapter
from ld_common.core.config import load_config, require, to_mapping
from ld_common.core.errors import ConfigError
from ld_common.diffusion.base_model import base_digest
from ld_common.diffusion.options import TrainingConfig
from ld_common.imaging.modality import Modality
from ld_simulations.hospitals import HospitalsConfig

OFFSET_NOISE, ZERO_SNR, HISTOGRAM = "offset_noise", "zero_terminal_snr", "histogram_matching"
PRIOR, MAP, CONDITIONAL, LOCAL = "prior", "prior-map", "prior-conditional", "prior-local"
FORMS = (MAP, CONDITIONAL, "prior-scalar", LOCAL)
"""Drifts that need no training of their own, beside μ by channel."""
VARIANTS = ("plain", OFFSET_NOISE, ZERO_SNR, "centred", "noise")
"""How a training may differ from the plain one: by its noise, its base, or the drift it learns under."""


@dataclass
class ModalityPlan:
    """One kind of scan: both files relative to the benchmark's."""

    modality: str = ""
    hospitals: str = ""


@dataclass
class AdapterPlan:
    """One adapter and how it trains."""

    adapter: dict[str, Any] = field(default_factory=dict)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        self.adapter = complete_adapter(self.adapter)


@dataclass
class BenchmarkConfig:
    """The whole table."""

    output: str = "runs/benchmark_ld"
    """Where every training and result is kept; a stopped run goes on from here."""
    results: str = "docs/benchmarks"
    """Where the table goes, as Markdown, JSON and sheets of samples."""
    base_model: str = "simulations/tiny_base"
    zero_snr_base: str = "simulations/zero_snr_base"
    """The base's twin whose schedule ends without signal; empty leaves that control out."""
    device: str = "cpu"
    workers: int = 1
    """Trainings at the same time, each a process."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    patients: int = 80
    """DriftTraining patients of each hospital, with two to four visits."""
    test_patients: int = 350
    """Further patients of each hospital, one picture each: what samples are compared with."""
    samples: int = 1024
    sampler: str = "ddim"
    sampler_steps: int = 30
    classifier_steps: int = 300
    features: list[str] = field(default_factory=lambda: ["efficientnet_lite0", "gabor"])
    inception: str = ""
    """TorchScript file of the Inception of FID; when given, its features are measured as well."""
    noise_offset: float = 0.1
    variants: dict[str, list[str]] = field(default_factory=dict)
    """Variant of training -> the adapters that are trained so, beside the plain one of each."""
    first_seed_only: list[str] = field(default_factory=list)
    """Variants that are trained with the first seed alone."""
    forms: dict[str, list[str]] = field(default_factory=dict)
    """Adapter -> further formulations of the drift that are drawn from its plain training, beside `prior`."""
    modalities: dict[str, ModalityPlan] = field(default_factory=dict)
    adapters: dict[str, AdapterPlan] = field(default_factory=dict)

    def __post_init__(self) -> None:
        counts = ("workers", "patients", "test_patients", "samples", "sampler_steps", "classifier_steps")
        for name in counts:
            require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}: it must be above 0")
        require(self.device in ("cpu", "cuda"), f"device is '{self.device}': use cpu or cuda")
        require(bool(self.seeds and self.modalities and self.adapters), "name seeds, modalities and adapters")
        for variant, names in self.variants.items():
            require(variant in VARIANTS[1:], f"variants: '{variant}' is none of {', '.join(VARIANTS[1:])}")
            unknown = sorted(set(names) - set(self.adapters))
            require(not unknown, f"variants.{variant} names {', '.join(unknown)}, which adapters lacks")
        for variant in self.first_seed_only:
            require(variant in self.variants, f"first_seed_only: variants lacks '{variant}'")
        for adapter, forms in self.forms.items():
            require(adapter in self.adapters, f"forms: adapters lacks '{adapter}'")
            unknown = sorted(set(forms) - set(FORMS))
            require(not unknown, f"forms.{adapter}: {', '.join(unknown)}: choose of {', '.join(FORMS)}")


@dataclass(frozen=True)
class DriftTraining:
    """One training."""

    modality: str
    adapter: str
    variant: str
    seed: int

    @property
    def name(self) -> str:
        """Its file's name."""
        return f"{self.modality}-{self.adapter}-{self.variant}-{self.seed}"


@dataclass(frozen=True)
class DriftDrawing:
    """One set of samples from a training."""

    training: DriftTraining
    drift: bool
    formulation: str
    """How the drift enters, `none` without one. μ has a value for each latent channel and is that of the pooled scans;
    a suffix says otherwise: `prior-map`, `prior-conditional` (a map that follows the prompt), `prior-scalar`, or
    `prior-local`, each hospital's own."""
    control: str | None

    @property
    def name(self) -> str:
        """Its result's name."""
        return f"{self.training.name}-{self.formulation}-{self.control or 'none'}"


FREE = ("output", "results", "device", "workers", "seeds", "variants", "first_seed_only", "forms")
"""What may change between two runs into one output: it decides which results there are, not what they are."""


@dataclass(frozen=True)
class Benchmark:
    """The config with the files that it names read."""

    config: BenchmarkConfig
    modalities: dict[str, Modality]
    hospitals: dict[str, HospitalsConfig]

    def claim_output(self) -> None:
        """Make the output folder this plan's own; raises `ConfigError` where another plan's results lie in it."""
        plan = {key: value for key, value in to_mapping(self.config).items() if key not in FREE}
        bases = [name for name in (self.config.base_model, self.config.zero_snr_base) if name]
        plan["base_digests"] = [base_digest(name) for name in bases]
        plan["patients_and_prompts"] = {
            name: [to_mapping(modality), str(self.hospitals[name])] for name, modality in self.modalities.items()
        }
        own, file = json.dumps(plan, indent=1, sort_keys=True), Path(self.config.output) / "plan.json"
        if not file.exists() and (file.parent / "runs").exists():
            raise ConfigError(f"'{file.parent}' holds results of an unknown plan: choose another output")
        if file.exists() and file.read_text() != own:
            old = json.loads(file.read_text())
            other = [key for key in plan if plan[key] != old.get(key)]
            raise ConfigError(f"'{file.parent}' holds results of another {', '.join(other)}: choose another output")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(own)

    @property
    def trainings(self) -> list[DriftTraining]:
        """All of them: the table proper, seed by seed, before the controls; a run may be stopped early."""
        config = self.config
        found = []
        for seed, modality, adapter in itertools.product(config.seeds, config.modalities, config.adapters):
            own = [name for name in VARIANTS if name == "plain" or adapter in config.variants.get(name, [])]
            found += [
                DriftTraining(modality, adapter, variant, seed) for variant in own if self._possible(variant, seed)
            ]
        return sorted(found, key=lambda training: VARIANTS.index(training.variant))

    def _possible(self, variant: str, seed: int) -> bool:
        later = variant in self.config.first_seed_only and seed != self.config.seeds[0]
        return not later and (variant != ZERO_SNR or bool(self.config.zero_snr_base))

    def drawings(self, training: DriftTraining) -> Iterator[DriftDrawing]:
        """What is drawn from a training."""
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
    def all_drawings(self) -> list[DriftDrawing]:
        """Every result of the plan, in its order."""
        return [drawing for training in self.trainings for drawing in self.drawings(training)]


def load_benchmark(path: Path, overrides: list[str]) -> Benchmark:
    """Read the benchmark's config and the files that it names; raises `ConfigError`."""
    config = load_config(BenchmarkConfig, path, overrides)
    modalities = {name: load_config(Modality, path.parent / plan.modality) for name, plan in config.modalities.items()}
    hospitals = {
        name: load_config(HospitalsConfig, path.parent / plan.hospitals) for name, plan in config.modalities.items()
    }
    return Benchmark(config, modalities, hospitals)
