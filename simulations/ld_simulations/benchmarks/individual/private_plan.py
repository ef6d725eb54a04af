"""What is measured of private longitudinal drifts: patients, budgets, noise draws and public starts."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

from scipy.optimize import brentq

from ld_common.core.config import require
from ld_common.protocol.dp_accounting import LEAST_NOISE, MOST_NOISE, Charge, epsilon

DELTA_PATIENTS = 10
"""δ is 1 / (this · patients of a site)."""
NO_NOISE = 0.0
"""Stands for ε where vectors are clipped and added without noise."""
NOISE_STEP = 1e-3
"""Noise multipliers are rounded up to it."""


@dataclass
class PublicPatientsConfig:
    """Public patients whose drift a private study starts from."""

    hospitals: str = "configs/public_hospitals.yaml"
    modality: str = "configs/modalities/brain_mri.yaml"
    seed: int = 910
    patients: int = 60
    """In each hospital."""


@dataclass
class PrivateDriftConfig:
    """Private longitudinal drifts of the first anatomy's hospitals, at several budgets."""

    patients: list[int] = field(default_factory=list)
    """Numbers of patients of a site; empty to measure none."""
    epsilons: list[float] = field(default_factory=lambda: [8.0, 3.0, 1.0])
    draws: int = 5
    """Draws of the noise at each setting."""
    training_seed: int = 707
    drawn_patients: int = 3000
    """Patients of each hospital that are drawn; a site of fewer has the first of them."""
    test_seed: int = 808
    test_patients: int = 10
    """In each hospital."""
    starts: dict[str, PublicPatientsConfig] = field(default_factory=lambda: {"other hospitals": PublicPatientsConfig()})
    """By name; the first is measured at every number of patients and every ε, the others at `first_settings`."""
    first_settings: list[list[float]] = field(default_factory=lambda: [[300, 8], [1000, 3], [1000, 1]])
    """Pairs of patients and ε, measured before the rest."""
    other_draws: int = 2
    """Draws of the noise with the other starts."""
    adopt: str = ""
    """individual.json of an earlier run, whose rows count as done; empty to run all."""

    def __post_init__(self) -> None:
        counts = [*self.patients, self.draws, self.other_draws, self.test_patients]
        require(min(counts) > 0, "private: patients, draws, other_draws and test_patients must be above 0")
        require(
            max(self.patients, default=0) <= self.drawn_patients,
            f"private.patients has more than the {self.drawn_patients} of private.drawn_patients",
        )
        require(min(self.epsilons, default=1.0) > 0, "private.epsilons must be above 0")
        require(bool(self.starts), "private.starts: name at least one public start")
        require(all(len(pair) == 2 for pair in self.first_settings), "private.first_settings: use [patients, epsilon]")

    @property
    def seeds(self) -> list[int]:
        """All seeds, which must differ."""
        return [self.training_seed, self.test_seed, *(start.seed for start in self.starts.values())]


@dataclass(frozen=True)
class PrivateSetting:
    """One drift that is fitted and judged."""

    start: str
    """Name of the public start; empty for the sites' exact sums in a basis of their own, without privacy."""
    patients: int
    """Of a site; 0 for the public patients' drift as it is."""
    epsilon: float = NO_NOISE
    draw: int = 0

    @property
    def name(self) -> str:
        """Name of its result."""
        start = self.start.replace(" ", "-") or "no-privacy"
        noise = f"-eps{self.epsilon:g}-{self.draw}" if self.epsilon else ""
        return f"drift/{start}/{self.patients or 'alone'}{noise}"

    @property
    def row(self) -> tuple[str, str]:
        """Keys of its numbers, over all draws, in the table."""
        name = f"{self.patients or 'alone'}" + (f"-eps{self.epsilon:g}" if self.epsilon else "")
        return self.start or "no privacy", name


def settings(config: PrivateDriftConfig) -> list[PrivateSetting]:
    """All drifts, those that the aims need first."""
    main, *others = config.starts
    asked = [(int(patients), epsilon) for patients, epsilon in config.first_settings if patients in config.patients]
    found = [PrivateSetting(main, 0), *(PrivateSetting("", patients) for patients in config.patients)]
    found += [PrivateSetting(start, 0) for start in others]
    found += [PrivateSetting(main, *pair, draw) for pair in asked for draw in range(config.draws)]
    found += [PrivateSetting(main, patients) for patients in config.patients]
    for draw in range(config.draws):
        found += [
            PrivateSetting(main, patients, epsilon, draw) for patients in config.patients for epsilon in config.epsilons
        ]
        if draw < config.other_draws:
            found += [PrivateSetting(start, *pair, draw) for start in others for pair in asked]
    found += [PrivateSetting(start, patients) for start in others for patients in dict.fromkeys(dict(asked))]
    return list(dict.fromkeys(found))


@functools.lru_cache
def noise_multiplier(target_epsilon: float, patients: int) -> float:
    """The least noise multiplier with which one vector a site, and nothing else, costs at most ε at δ."""
    delta = 1 / (DELTA_PATIENTS * patients)

    def excess(noise: float) -> float:
        return epsilon([Charge(round(noise, 6), 1.0, 1)], delta) - target_epsilon

    found = brentq(excess, LEAST_NOISE, min(MOST_NOISE, 100.0), xtol=NOISE_STEP / 2)
    steps = int(found / NOISE_STEP)
    while excess(steps * NOISE_STEP) > 0:
        steps += 1
    return steps * NOISE_STEP
