"""The demo's hospitals: simulated patients as DICOM series with tables of visits, and held-out ones with known truth.

    python -m ld_simulations.hospitals --config configs/hospitals.yaml output=runs/hospitals

Below `output`:

    <hospital>/visits.csv                                  one row a visit, in the hospital's own words
    <hospital>/dicom/<patient>/<visit date>/IM000N.dcm     the phantom's views; position, not name, orders slices
    scans.csv                                              all of these visits in the modality's words, for judges alone
    held_out/held_out.json                                 who is held out, their edits, and where the truth is
    held_out/scans.csv                                     their scans: the first visit and the last
    held_out/<hospital>/<patient>/series/IM000N.dcm        the first visit of a patient whom no table names
    held_out/<hospital>/<patient>/follow_up/IM000N.dcm     the last one, up to six years later
    held_out/<hospital>/<patient>/truth/<edit>.npz         the true counterfactual of the view that models see

What is scanned follows from `phantom`, and so does the structure that disease and age change (`phantoms.base`). A
truth holds `pixels` (H,W), float32 device values as after the rescale, brighter is higher whatever the files'
photometric interpretation; `structure` (H,W), the structure's share in each; and `area_mm2`, its area. `factual.npz` is
the first scan itself. Paths in a manifest or table are relative to its folder.
"""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import dataclass, field, replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import typer
from rich.progress import track

from ld_common.core.command import run_cli
from ld_common.core.config import from_mapping, load_config, require
from ld_common.core.errors import ConfigError
from ld_common.core.seeding import numpy_generator
from ld_common.imaging.modality import Attributes
from ld_simulations.phantoms.base import HEALTHY, Patient, Phantom, Population, Rendering
from ld_simulations.phantoms.device import Array, DeviceConfig
from ld_simulations.phantoms.registry import find_phantom
from ld_simulations.phantoms.study_metadata import StudyMetadata

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

DAYS_PER_YEAR = 365.25
VISITS = (2, 4)
YEARS_BETWEEN_VISITS = (0.8, 2.0)
FIRST_DAY, ENROLMENT_DAYS = date(2011, 1, 3), 1800
OLDEST_HELD_OUT_YEARS = 79.0
"""At the first visit: twenty years later is still within the modality's limits."""
SCANS, ATTRIBUTES = "scans.csv", ("age", "sex", "diagnosis")
FAMILY_NAMES = ("Abend", "Brandt", "Castel", "Dorn", "Ekholm", "Farkas", "Gallo", "Hansen", "Ivanov", "Jonas")
GIVEN_NAMES = {"F": ("Ada", "Birgit", "Clara", "Dora", "Elin"), "M": ("Anton", "Bruno", "Carl", "David", "Emil")}


@dataclass
class TableConfig:
    """What a hospital calls things in its table of visits."""

    patient: str = "PTID"
    date: str = "EXAMDATE"
    age: str = "AGE"
    sex: str = "PTGENDER"
    diagnosis: str = "DX"
    sex_words: dict[str, str] = field(default_factory=lambda: {"F": "F", "M": "M"})
    diagnosis_words: dict[str, str] = field(default_factory=dict)
    """Empty takes the phantom's own."""

    def __post_init__(self) -> None:
        require(set(self.sex_words) == {"F", "M"}, "sex_words needs the keys F and M")


@dataclass
class HospitalConfig:
    """One hospital: whom it sees, how it scans, what its table says."""

    name: str = "aster"
    patients: int = 48
    held_out: int = 8
    """Further patients, kept for judging counterfactuals."""
    population: Population = field(default_factory=Population)
    scanner: Any = field(default_factory=dict)
    """Settings of the phantom's device: a `ScannerConfig` for a brain, a `DetectorConfig` for a chest."""
    table: TableConfig = field(default_factory=TableConfig)

    def __post_init__(self) -> None:
        require(self.name.isidentifier() and self.name != "held_out", f"'{self.name}' cannot name a hospital's folder")
        require(self.patients >= 0 and self.held_out >= 0, f"{self.name}: patients and held_out must not be negative")


@dataclass
class HospitalsConfig:
    """All hospitals of a demo."""

    phantom: str = "brain"
    """What the hospitals scan: a name in `ld_simulations.phantoms.registry`."""
    seed: int = 0
    output: str = "runs/hospitals"
    patients: int | None = None
    held_out: int | None = None
    """In place of every hospital's own number, for a smaller or larger demo."""
    hospitals: list[HospitalConfig] = field(default_factory=list)

    def __post_init__(self) -> None:
        names = [hospital.name for hospital in self.hospitals]
        require(bool(names), "no hospitals: name at least one under `hospitals`")
        require(len(set(names)) == len(names), f"two hospitals have the same name: {', '.join(names)}")
        phantom = find_phantom(self.phantom)
        for hospital in self.hospitals:
            _complete(hospital, phantom)
            hospital.patients = hospital.patients if self.patients is None else self.patients
            hospital.held_out = hospital.held_out if self.held_out is None else self.held_out
            hospital.__post_init__()


def _complete(hospital: HospitalConfig, phantom: Phantom[Any, Any]) -> None:
    """Give a hospital's scanner and table the meaning that its phantom has for them; raises `ConfigError`."""
    if not isinstance(hospital.scanner, DeviceConfig):
        hospital.scanner = from_mapping(phantom.device, hospital.scanner)
    known = (HEALTHY, phantom.disease)
    words = hospital.table.diagnosis_words or {value: value for value in known}
    require(set(words) == set(known), f"{hospital.name}: diagnosis_words needs the keys {' and '.join(known)}")
    hospital.table.diagnosis_words = words


@dataclass(frozen=True)
class SimulatedVisit:
    """A patient's visit, counted from 0."""

    patient: Patient[Any]
    index: int
    examination: StudyMetadata

    @property
    def attributes(self) -> Attributes:
        """Age, sex and diagnosis at the visit."""
        return {**self.patient.attributes(), "age": self.examination.age_years}


def held_out_population(population: Population) -> Population:
    """The part of a population that is young enough to be held out."""
    mean = min(population.age_mean_years, OLDEST_HELD_OUT_YEARS - 1)
    return replace(population, age_mean_years=mean, oldest_years=min(population.oldest_years, OLDEST_HELD_OUT_YEARS))


def draw_visits(
    phantom: Phantom[Any, Any], seed: int, hospital: HospitalConfig, held_out: bool
) -> list[list[SimulatedVisit]]:
    """A hospital's patients, each as its visits in order."""
    group, count = ("held-out", hospital.held_out) if held_out else ("patients", hospital.patients)
    population = held_out_population(hospital.population) if held_out else hospital.population
    diseased = round(population.disease_share * count)
    order = numpy_generator(seed, hospital.name, group, "diagnoses").permutation(count)
    patients = []
    for index in range(count):
        rng = numpy_generator(seed, hospital.name, group, index)
        identity = f"{hospital.name[0].upper()}{'H' if held_out else 'P'}{index + 1:04d}"
        patient = phantom.draw_patient(
            rng, identity, population, phantom.disease if order[index] < diseased else HEALTHY
        )
        patients.append(_visits_of(patient, hospital.name, seed, rng))
    return patients


def scan(
    phantom: Phantom[Any, Any], visit: SimulatedVisit, attributes: Attributes, view: int, device: DeviceConfig
) -> tuple[Array, Rendering]:
    """Device values (H,W) of one view of a visit had `attributes` been the patient's, and what was scanned.

    The device's noise is that of the visit, whatever the attributes.
    """
    noise = visit.patient.noise
    rendering = phantom.render(visit.patient, attributes, device, view)
    rng = numpy_generator(noise.scanner_seed, "scanner", visit.index, view)
    return phantom.acquire(rendering, device, noise, rng), rendering


def write_visit(folder: Path, phantom: Phantom[Any, Any], visit: SimulatedVisit, device: DeviceConfig) -> None:
    """Scan a visit as it was and write its files into `folder`."""
    pictures = [scan(phantom, visit, visit.attributes, view, device)[0] for view in range(phantom.views)]
    phantom.write(folder, visit.examination, pictures, device, visit.patient.noise)


def write_hospitals(config: HospitalsConfig) -> Path:
    """Write every hospital and the held-out patients below `config.output`, which appears when all is written.

    Raises:
        ConfigError: `output` exists.
    """
    output = Path(config.output)
    if output.exists():
        raise ConfigError(f"output '{output}' exists: remove it, or choose another with output=FOLDER")
    part = output.with_name(f"{output.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    phantom, patients, scans, held_out_scans = find_phantom(config.phantom), [], [], []
    for hospital in config.hospitals:
        scans += _write_hospital(part, phantom, hospital, config.seed)
        visits = draw_visits(phantom, config.seed, hospital, held_out=True)
        for first, *_, last in track(visits, f"{hospital.name}, held out"):
            patients.append(_write_held_out(part / "held_out", phantom, hospital, first))
            place = Path(hospital.name) / first.patient.identity
            write_visit(part / "held_out" / place / "follow_up", phantom, last, hospital.scanner)
            held_out_scans += [_listed(place / "series", first), _listed(place / "follow_up", last)]
    manifest = {"phantom": phantom.name, "patients": patients}
    (part / "held_out").mkdir(exist_ok=True)
    (part / "held_out" / "held_out.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    _write_table(part / SCANS, scans)
    _write_table(part / "held_out" / SCANS, held_out_scans)
    part.rename(output)
    return output


def _write_hospital(output: Path, phantom: Phantom[Any, Any], hospital: HospitalConfig, seed: int) -> list[list[str]]:
    """Write a hospital's visits and its table; returns them as rows of `scans.csv`."""
    folder, table, scans = output / hospital.name, hospital.table, []
    rows = [[table.patient, table.date, table.age, table.sex, table.diagnosis]]
    for visits in track(draw_visits(phantom, seed, hospital, held_out=False), hospital.name):
        for visit in visits:
            day = visit.examination.day.isoformat()
            place = Path(hospital.name) / "dicom" / visit.patient.identity / day
            write_visit(output / place, phantom, visit, hospital.scanner)
            scans.append(_listed(place, visit))
            sex, diagnosis = table.sex_words[visit.patient.sex], table.diagnosis_words[visit.patient.diagnosis]
            rows.append([visit.patient.identity, day, f"{visit.examination.age_years:.1f}", sex, diagnosis])
    folder.mkdir(parents=True, exist_ok=True)
    _write_rows(folder / "visits.csv", rows)
    return scans


def _listed(place: Path, visit: SimulatedVisit) -> list[str]:
    """A visit as a row of `scans.csv`."""
    return [visit.patient.identity, place.as_posix(), *(str(visit.attributes[name]) for name in ATTRIBUTES)]


def _write_table(path: Path, scans: list[list[str]]) -> None:
    _write_rows(path, [["patient", "input", *ATTRIBUTES], *scans])


def _write_rows(path: Path, rows: list[list[str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def _write_held_out(
    folder: Path, phantom: Phantom[Any, Any], hospital: HospitalConfig, visit: SimulatedVisit
) -> dict[str, Any]:
    """Write a held-out visit and its true counterfactuals; returns its entry in the manifest, paths from `folder`."""
    place = Path(hospital.name) / visit.patient.identity
    write_visit(folder / place / "series", phantom, visit, hospital.scanner)
    (folder / place / "truth").mkdir()
    entry: dict[str, Any] = {"hospital": hospital.name, "patient": visit.patient.identity}
    entry |= {"series": (place / "series").as_posix(), "attributes": visit.attributes, "edits": []}
    for name, target in {"factual": {}, **phantom.edits_of(visit.attributes)}.items():
        values, rendering = scan(phantom, visit, {**visit.attributes, **target}, phantom.shown_view, hospital.scanner)
        area, truth = rendering.area_mm2, place / "truth" / f"{name}.npz"
        np.savez(folder / truth, pixels=values, structure=rendering.structure, area_mm2=area)
        known = {"truth": truth.as_posix(), "area_mm2": round(area, 2)}
        if name == "factual":
            entry |= known
        else:
            entry["edits"].append({"name": name, "target": target, **known})
    return entry


def _visits_of(patient: Patient[Any], hospital: str, seed: int, rng: np.random.Generator) -> list[SimulatedVisit]:
    count = int(rng.integers(VISITS[0], VISITS[1] + 1))
    gaps = rng.uniform(*YEARS_BETWEEN_VISITS, VISITS[1] - 1)[: count - 1] * DAYS_PER_YEAR
    first = FIRST_DAY + timedelta(days=int(rng.integers(ENROLMENT_DAYS)))
    born = first - timedelta(days=round(patient.age_years * DAYS_PER_YEAR))
    name = f"{rng.choice(FAMILY_NAMES)}^{rng.choice(GIVEN_NAMES[patient.sex])}"
    visits = []
    for index, days in enumerate(np.concatenate([[0.0], np.cumsum(gaps)])):
        day = first + timedelta(days=round(days))
        age = round((day - born).days / DAYS_PER_YEAR, 1)
        visits.append(
            SimulatedVisit(
                patient, index, StudyMetadata(patient.identity, name, born, patient.sex, age, day, hospital, seed)
            )
        )
    return visits


@app.command()
def main(
    config: Path = typer.Option(..., help="YAML of HospitalsConfig"),
    overrides: list[str] = typer.Argument(None, help="key=value"),
) -> None:
    """Write the demo's hospitals."""
    print(f"wrote {write_hospitals(load_config(HospitalsConfig, config, overrides or []))}")


if __name__ == "__main__":
    run_cli(app)
