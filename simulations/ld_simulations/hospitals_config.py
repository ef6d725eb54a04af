"""Config of simulated hospitals: whom each sees, how it scans and what its table of visits calls things."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from ld_common.core.config import from_mapping, require
from ld_simulations.phantoms.base import HEALTHY, Phantom, Population
from ld_simulations.phantoms.device import DeviceConfig
from ld_simulations.phantoms.registry import find_phantom


@dataclass
class TableConfig:
    """Column names and values of a hospital's table of visits."""

    RENAMED: ClassVar[dict[str, str]] = {"sex_words": "sex_labels", "diagnosis_words": "diagnosis_labels"}

    patient: str = "PTID"
    date: str = "EXAMDATE"
    age: str = "AGE"
    sex: str = "PTGENDER"
    diagnosis: str = "DX"
    sex_labels: dict[str, str] = field(default_factory=lambda: {"F": "F", "M": "M"})
    diagnosis_labels: dict[str, str] = field(default_factory=dict)
    """Label of each diagnosis; empty for the phantom's own."""

    def __post_init__(self) -> None:
        require(set(self.sex_labels) == {"F", "M"}, "sex_labels needs the keys F and M")


@dataclass
class HospitalConfig:
    """One hospital."""

    RENAMED: ClassVar[dict[str, str]] = {"held_out": "test_patients"}

    name: str = "aster"
    patients: int = 48
    test_patients: int = 8
    """Further patients in no table of visits, whose true counterfactuals judge a release."""
    population: Population = field(default_factory=Population)
    scanner: Any = field(default_factory=dict)
    """Options of the phantom's device: a `ScannerConfig` for a brain, a `DetectorConfig` for a chest."""
    table: TableConfig = field(default_factory=TableConfig)

    def __post_init__(self) -> None:
        require(self.name.isidentifier() and self.name != "held_out", f"'{self.name}' cannot name a hospital's folder")
        require(
            self.patients >= 0 and self.test_patients >= 0,
            f"{self.name}: patients and test_patients must not be negative",
        )


@dataclass
class HospitalsConfig:
    """All hospitals of a demo."""

    RENAMED: ClassVar[dict[str, str]] = {"held_out": "test_patients"}

    phantom: str = "brain"
    """What the hospitals scan: `brain` or `chest`."""
    seed: int = 0
    test_seed: int | None = None
    """Draws the test patients; None for `seed`. A seed of their own keeps them apart from those on whom options were
    chosen."""
    output: str = "runs/hospitals"
    patients: int | None = None
    """In place of every hospital's own number."""
    test_patients: int | None = None
    """In place of every hospital's own number."""
    hospitals: list[HospitalConfig] = field(default_factory=list)

    def __post_init__(self) -> None:
        names = [hospital.name for hospital in self.hospitals]
        require(bool(names), "no hospitals: name at least one under `hospitals`")
        require(len(set(names)) == len(names), f"two hospitals have the same name: {', '.join(names)}")
        phantom = find_phantom(self.phantom)
        for hospital in self.hospitals:
            _complete(hospital, phantom)
            if self.patients is not None:
                hospital.patients = self.patients
            if self.test_patients is not None:
                hospital.test_patients = self.test_patients
            hospital.__post_init__()


def _complete(hospital: HospitalConfig, phantom: Phantom[Any, Any]) -> None:
    """Read a hospital's scanner and diagnosis labels as its phantom defines them; raises `ConfigError`."""
    if not isinstance(hospital.scanner, DeviceConfig):
        hospital.scanner = from_mapping(phantom.device, hospital.scanner)
    diagnoses = (HEALTHY, phantom.disease)
    labels = hospital.table.diagnosis_labels or {diagnosis: diagnosis for diagnosis in diagnoses}
    require(
        set(labels) == set(diagnoses), f"{hospital.name}: diagnosis_labels needs the keys {' and '.join(diagnoses)}"
    )
    hospital.table.diagnosis_labels = labels
