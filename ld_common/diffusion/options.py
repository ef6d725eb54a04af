"""Options of drift and training, checked, as studies and Python callers give them. Importing this imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from ld_common.core.config import require

FORMULATIONS = ("prior", "centred", "noise", "per-step", "per-step-literal")
SHAPES = ("none", "scalar", "channel", "map", "conditional", "longitudinal")
ESTIMATORS = ("moments", "grid")
LR_SCHEDULERS = ("cosine", "linear", "constant")
LARGEST_DRIFT = 20.0
"""Largest accepted drift, in scaled latents, whose own standard deviation is about 1."""
LARGEST_SUM = 2.0**16
"""Largest accepted sum of a longitudinal drift, whose parts have about unit variance: that of some 5,000 visits."""
MAX_TRIALS = 1000


def largest_drift(shape: str) -> float:
    """Largest number that a site may send for a drift of this shape."""
    return LARGEST_SUM if shape == "longitudinal" else LARGEST_DRIFT


@dataclass
class SearchConfig:
    """The grid of δ that a search tries, and how it judges each. The default is the paper's grid."""

    lowest: float = -0.2
    """First δ of the grid."""
    highest: float = 0.2
    """Last δ of the grid."""
    spacing: float = 0.05
    """Distance between two δ."""
    images: int = 64
    """Largest number of images that are compared."""
    steps: int = 25
    """Sampler steps for each image."""
    weight: float = 1.0
    """λ of the `counterfactual` objective, the weight of reaching the target; 0 only keeps the patient unchanged."""
    targets: list[str] = field(default_factory=list)
    """Targets of the `counterfactual` objective, such as `diagnosis=AD`. Scans that have the attribute are skipped."""

    def __post_init__(self) -> None:
        finite = all(map(math.isfinite, (self.lowest, self.highest, self.spacing)))
        require(finite, "drift.search.lowest, highest and spacing must be numbers")
        require(self.lowest <= self.highest, "drift.search.lowest must not be above drift.search.highest")
        require(self.spacing > 0, f"drift.search.spacing is {self.spacing}: it must be above 0")
        require(self.count <= MAX_TRIALS, f"drift.search has {self.count} δ, at most {MAX_TRIALS}: widen spacing")
        require(self.images > 1 and self.steps > 0, "drift.search needs images above 1 and steps above 0")
        require(self.weight >= 0, f"drift.search.weight is {self.weight}: it must not be negative")

    @property
    def count(self) -> int:
        """How many δ are tried."""
        return int((self.highest - self.lowest) / self.spacing + 1e-6) + 1

    @property
    def deltas(self) -> list[float]:
        """The grid, rounded to six digits."""
        return [round(self.lowest + index * self.spacing, 6) for index in range(self.count)]


@dataclass
class DriftConfig:
    """How a site's latent drift μ is estimated, and where it enters the diffusion."""

    RENAMED: ClassVar[dict[str, str]] = {"mean": "shape", "choice": "estimator"}

    formulation: str = "prior"
    """`prior`, `centred`, `noise`, `per-step` or `per-step-literal`: see `ld_common.diffusion.drift`."""
    estimator: str = "moments"
    """`moments` takes the mean of the site's latents; `grid` searches `search` for a scalar δ, as the paper does."""
    shape: str = "channel"
    """Shape of μ: `none`, `scalar`, `channel` (C,1,1), `map` (C,h,w), `conditional`, a map that depends on the
    modality's attributes, or `longitudinal`, which also holds a patient's change with the years
    (`ld_common.diffusion.longitudinal`). `grid` needs `scalar`."""
    search: SearchConfig = field(default_factory=SearchConfig)

    def __post_init__(self) -> None:
        for key, value, known in (
            ("shape", self.shape, SHAPES),
            ("formulation", self.formulation, FORMULATIONS),
            ("estimator", self.estimator, ESTIMATORS),
        ):
            require(value in known, f"drift.{key} is '{value}': known: {', '.join(known)}")
        fits = self.shape not in ("conditional", "longitudinal") or self.formulation == "prior"
        require(fits, f"drift.shape {self.shape} says where sampling starts: set drift.formulation to prior")
        fits = self.estimator == "moments" or self.shape == "scalar"
        require(fits, f"drift.estimator {self.estimator} finds a scalar: set drift.shape to scalar")


@dataclass
class TrainingConfig:
    """Training of one round at one site."""

    RENAMED: ClassVar[dict[str, str]] = {"offset_noise": "noise_offset", "prompt_dropout": "conditioning_dropout_prob"}

    steps: int = 100
    """Optimizer steps in a round."""
    batch_size: int = 16
    """Visits in a step. With `privacy.enabled`, `privacy.expected_batch_size` and `privacy.augmentation_multiplicity`
    set the size of a step, and this is the number of examples that pass the network at once, limited by memory."""
    gradient_accumulation: int = 1
    """Batches whose mean gradient makes one step, where memory has no room for a larger `batch_size`."""
    learning_rate: float = 2e-3
    """Learning rate at the first step of the study."""
    lr_scheduler: str = "cosine"
    """How it falls over all rounds: `cosine`, half a wave to a twentieth, `linear`, to a twentieth, or `constant`. Each
    round begins with five steps of warm-up, as its optimizer is new."""
    ema: float = 0.0
    """Decay of the exponential average of a round's weights, which is sent in their place; 0 sends the last weights."""
    noise_offset: float = 0.1
    """Standard deviation of noise that is constant over each latent channel, added to the noise; 0 is off."""
    conditioning_dropout_prob: float = 0.1
    """Share of visits that are trained without their prompt."""
    timestep_power: float = 1.0
    """1 draws timesteps uniformly; above 1 favours noisy ones, where the prompt matters most (T2I-Adapter uses 3)."""
    min_snr_gamma: float = 0.0
    """γ of Min-SNR weighting (arXiv 2303.09556, which uses 5): timesteps whose signal-to-noise ratio is above γ weigh
    less, as their loss moves the weights most and the picture least; 0 is off."""
    proximal_mu: float = 0.0
    """μ of FedProx (arXiv 1812.06127): the loss of a site grows by μ/2 times the squared distance of its weights from
    the round's first ones, so that sites of different patients move less far apart; 0 is off."""

    def __post_init__(self) -> None:
        require(self.min_snr_gamma >= 0, f"training.min_snr_gamma is {self.min_snr_gamma}: use 0 or more")
        few = self.gradient_accumulation
        require(few > 0, f"training.gradient_accumulation is {few}: it must be above 0")
        require(self.proximal_mu >= 0, f"training.proximal_mu is {self.proximal_mu}: use 0 or more")
        require(self.steps > 0 and self.batch_size > 0, "training.steps and training.batch_size must be above 0")
        known = self.lr_scheduler in LR_SCHEDULERS
        require(known, f"training.lr_scheduler is '{self.lr_scheduler}': known: {', '.join(LR_SCHEDULERS)}")
        require(0 <= self.ema < 1, f"training.ema is {self.ema}: it must lie in [0, 1)")
        require(self.learning_rate > 0, f"training.learning_rate is {self.learning_rate}: it must be above 0")
        require(self.noise_offset >= 0, "training.noise_offset must not be negative")
        require(0 <= self.conditioning_dropout_prob < 1, "training.conditioning_dropout_prob must lie in [0, 1)")
        require(self.timestep_power > 0, f"training.timestep_power is {self.timestep_power}: it must be above 0")

    @property
    def visits_in_a_step(self) -> int:
        """Visits whose gradients make one step without differential privacy."""
        return self.batch_size * self.gradient_accumulation
