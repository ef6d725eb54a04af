"""Simulated hospitals: DICOM series with tables of visits, and test patients with their true counterfactuals.

    python -m ld_simulations.hospitals --config configs/hospitals.yaml output=runs/hospitals

Below `output`:

    <hospital>/visits.csv                                  a row for each visit, in the hospital's own labels
    <hospital>/dicom/<patient>/<visit date>/IM000N.dcm     the phantom's views; position, not name, orders the slices
    scans.csv                                              all of these visits in the modality's categories
    held_out/held_out.json                                 test patients, their edits and truths (`ld_evaluate.truth`)
    held_out/scans.csv                                     their scans: the first visit and the last
    held_out/<hospital>/<patient>/series/IM000N.dcm        the first visit
    held_out/<hospital>/<patient>/visit_N/IM000N.dcm       visits in between
    held_out/<hospital>/<patient>/follow_up/IM000N.dcm     the last visit, up to six years later
    held_out/<hospital>/<patient>/truth/<edit>.npz         the true counterfactual of the view that models see
    held_out/<hospital>/<patient>/truth_after_last/        the same for the last visit of three or four

A truth holds `pixels` (H,W), float32 device values after the rescale, where brighter is higher whatever the files'
photometric interpretation; `structure` (H,W), the share of the structure that disease and age change in each pixel; and
`area_mm2`, its area. `factual.npz` is the first scan itself.
"""

from __future__ import annotations

import csv
import functools
import itertools
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import typer
from rich.console import Console

from ld_common.core.command import VERSION, run_cli
from ld_common.core.config import load_config
from ld_common.core.errors import ConfigError
from ld_common.core.seeding import numpy_generator
from ld_common.imaging.modality import Attributes
from ld_evaluate.files import FIRST_VISITS, LAST_VISITS, SCANS, TRUTH
from ld_simulations.hospitals_config import HospitalConfig, HospitalsConfig
from ld_simulations.phantoms.base import HEALTHY, Patient, Phantom, Population, Rendering
from ld_simulations.phantoms.device import Array, DeviceConfig
from ld_simulations.phantoms.registry import find_phantom
from ld_simulations.phantoms.study_metadata import StudyMetadata
from ld_simulations.side_by_side import side_by_side

cli = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, the number done and the total."""
DAYS_PER_YEAR = 365.25
VISITS = (2, 4)
YEARS_BETWEEN_VISITS = (0.8, 2.0)
YEARS_AFTER_LAST = (5, 10)
"""Of the truths that follow the last visit of test patients with three or more."""
FIRST_DAY, ENROLMENT_DAYS = date(2011, 1, 3), 1800
OLDEST_HELD_OUT_YEARS = 79.0
"""At the first visit: twenty years later is still within the modality's limits."""
ATTRIBUTES = ("age", "sex", "diagnosis")
HELD_OUT = "held_out"
"""Folder of the test patients."""
FAMILY_NAMES = ("Abend", "Brandt", "Castel", "Dorn", "Ekholm", "Farkas", "Gallo", "Hansen", "Ivanov", "Jonas")
GIVEN_NAMES = {"F": ("Ada", "Birgit", "Clara", "Dora", "Elin"), "M": ("Anton", "Bruno", "Carl", "David", "Emil")}


@dataclass(frozen=True)
class SimulatedVisit:
    """A patient's visit, counted from 0."""

    patient: Patient[Any]
    index: int
    metadata: StudyMetadata

    @property
    def attributes(self) -> Attributes:
        """Age, sex and diagnosis at the visit."""
        return {**self.patient.attributes(), "age": self.metadata.age_years}


def held_out_population(population: Population) -> Population:
    """The part of a population that is young enough for test patients."""
    mean = min(population.age_mean_years, OLDEST_HELD_OUT_YEARS - 1)
    return replace(population, age_mean_years=mean, oldest_years=min(population.oldest_years, OLDEST_HELD_OUT_YEARS))


def draw_visits(
    phantom: Phantom[Any, Any], seed: int, hospital: HospitalConfig, held_out: bool
) -> list[list[SimulatedVisit]]:
    """A hospital's patients, each as its visits in order."""
    group, count = ("held-out", hospital.test_patients) if held_out else ("patients", hospital.patients)
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
    """Device values (H,W) of one view of a visit under the given attributes, and the rendering before the device.

    The device's noise is that of the visit, whatever the attributes.
    """
    noise = visit.patient.noise
    rendering = phantom.render(visit.patient, attributes, device, view)
    rng = numpy_generator(noise.scanner_seed, "scanner", visit.index, view)
    return phantom.acquire(rendering, device, noise, rng), rendering


def write_visit(folder: Path, phantom: Phantom[Any, Any], visit: SimulatedVisit, device: DeviceConfig) -> None:
    """Scan a visit as it was and write its files into `folder`."""
    pictures = [scan(phantom, visit, visit.attributes, view, device)[0] for view in range(phantom.views)]
    phantom.write(folder, visit.metadata, pictures, device, visit.patient.noise)


def write_hospitals(config: HospitalsConfig, progress: Progress = lambda *_: None) -> Path:
    """Write every hospital and the test patients below `config.output`, which appears once all is written.

    Raises:
        ConfigError: `output` exists or cannot be written.
    """
    output = Path(config.output)
    if output.exists():
        raise ConfigError(f"output '{output}' exists: remove it, or choose another with output=FOLDER")
    partial = output.with_name(f"{output.name}.part")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / HELD_OUT).mkdir(parents=True)
        _write_all(partial, config, progress)
        partial.rename(output)
    except OSError as error:
        raise ConfigError(f"cannot write '{output}' ({error.strerror}): choose another with output=FOLDER") from error
    return output


def _write_all(folder: Path, config: HospitalsConfig, progress: Progress) -> None:
    phantom = find_phantom(config.phantom)
    patients: list[dict[str, Any]] = []
    with_history: list[dict[str, Any]] = []
    scans: list[list[str]] = []
    test_scans: list[list[str]] = []
    test_seed = config.seed if config.test_seed is None else config.test_seed
    for hospital in config.hospitals:
        scans += _write_hospital(folder, phantom, hospital, config.seed, progress)
        visits = draw_visits(phantom, test_seed, hospital, held_out=True)
        write = functools.partial(_write_test_patient, folder / HELD_OUT, phantom, hospital)
        for number, (entry, entry_with_history) in enumerate(side_by_side(write, visits), start=1):
            patients.append(entry)
            with_history += entry_with_history
            first, *_, last = visits[number - 1]
            path = Path(hospital.name) / first.patient.identity
            test_scans += [_table_row(path / "series", first), _table_row(path / "follow_up", last)]
            progress(f"{hospital.name}: test patients", number, len(visits))
    manifest = {"phantom": phantom.name, FIRST_VISITS: patients, LAST_VISITS: with_history}
    (folder / HELD_OUT / TRUTH).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    header = ["patient", "input", *ATTRIBUTES]
    _write_rows(folder / SCANS, [header, *scans])
    _write_rows(folder / HELD_OUT / SCANS, [header, *test_scans])


def _write_hospital(
    output: Path, phantom: Phantom[Any, Any], hospital: HospitalConfig, seed: int, progress: Progress
) -> list[list[str]]:
    """Write a hospital's visits and its table; returns them as rows of `scans.csv`."""
    folder, table, scans = output / hospital.name, hospital.table, []
    rows = [[table.patient, table.date, table.age, table.sex, table.diagnosis]]
    patients = draw_visits(phantom, seed, hospital, held_out=False)

    def path_of(visit: SimulatedVisit) -> Path:
        return Path(hospital.name) / "dicom" / visit.patient.identity / visit.metadata.day.isoformat()

    def write(visits: Sequence[SimulatedVisit]) -> None:
        for visit in visits:
            write_visit(output / path_of(visit), phantom, visit, hospital.scanner)

    for number, _ in enumerate(side_by_side(write, patients), start=1):
        progress(f"{hospital.name}: patients", number, len(patients))
    for visit in itertools.chain.from_iterable(patients):
        scans.append(_table_row(path_of(visit), visit))
        sex, diagnosis = table.sex_labels[visit.patient.sex], table.diagnosis_labels[visit.patient.diagnosis]
        day, age = visit.metadata.day.isoformat(), f"{visit.metadata.age_years:.1f}"
        rows.append([visit.patient.identity, day, age, sex, diagnosis])
    folder.mkdir(parents=True, exist_ok=True)
    _write_rows(folder / "visits.csv", rows)
    return scans


def _table_row(path: Path, visit: SimulatedVisit) -> list[str]:
    """A visit as a row of `scans.csv`."""
    return [visit.patient.identity, path.as_posix(), *(str(visit.attributes[name]) for name in ATTRIBUTES)]


def _write_rows(path: Path, rows: list[list[str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def _write_test_patient(
    folder: Path, phantom: Phantom[Any, Any], hospital: HospitalConfig, visits: Sequence[SimulatedVisit]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Write a test patient's visits and true counterfactuals.

    Returns:
        The manifest's entry of the first visit, and that of the last if there are visits between; paths from `folder`.
    """
    first, *between, last = visits
    path = Path(hospital.name) / first.patient.identity
    write_visit(folder / path / "series", phantom, first, hospital.scanner)
    edits = phantom.edits_of(first.attributes)
    entry = {"series": (path / "series").as_posix(), **_write_truths(folder, path, phantom, hospital, first, edits)}
    after = [_write_last_visit(folder, phantom, hospital, visits)] if between else []
    write_visit(folder / path / "follow_up", phantom, last, hospital.scanner)
    return entry, after


def _write_last_visit(
    folder: Path, phantom: Phantom[Any, Any], hospital: HospitalConfig, visits: Sequence[SimulatedVisit]
) -> dict[str, Any]:
    """Write the visits between first and last, and the true counterfactuals of the last, some years on.

    The first visit lies in `series`, the last in `follow_up`.
    """
    path, last = Path(hospital.name) / visits[0].patient.identity, visits[-1]
    earlier = []
    for visit in visits[:-1]:
        series = path / ("series" if visit is visits[0] else f"visit_{visit.index}")
        if visit is not visits[0]:
            write_visit(folder / series, phantom, visit, hospital.scanner)
        earlier.append({"series": series.as_posix(), "age": visit.attributes["age"]})
    age = float(last.attributes["age"])
    edits: dict[str, Attributes] = {f"history_{years}": {"age": round(age + years, 1)} for years in YEARS_AFTER_LAST}
    truths = _write_truths(folder, path, phantom, hospital, last, edits)
    return {"series": (path / "follow_up").as_posix(), "earlier": earlier, **truths}


def _write_truths(
    folder: Path,
    path: Path,
    phantom: Phantom[Any, Any],
    hospital: HospitalConfig,
    visit: SimulatedVisit,
    edits: Mapping[str, Attributes],
) -> dict[str, Any]:
    """Write the true counterfactuals of a visit into `path / truth`; returns what the manifest says of it."""
    place = path / ("truth" if visit.index == 0 else "truth_after_last")
    (folder / place).mkdir()
    entry: dict[str, Any] = {"hospital": hospital.name, "patient": visit.patient.identity}
    entry |= {"attributes": visit.attributes, "edits": []}
    for name, target in {"factual": {}, **edits}.items():
        values, rendering = scan(phantom, visit, {**visit.attributes, **target}, phantom.shown_view, hospital.scanner)
        area, truth = rendering.area_mm2, place / f"{name}.npz"
        np.savez(folder / truth, pixels=values, structure=rendering.structure, area_mm2=area)
        where = {"truth": truth.as_posix(), "area_mm2": round(area, 2)}
        if name == "factual":
            entry |= where
        else:
            entry["edits"].append({"name": name, "target": target, **where})
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


@cli.command()
def write(
    config: Path = typer.Option(..., help="YAML of the hospitals, for example configs/hospitals.yaml."),
    overrides: list[str] = typer.Argument(None, metavar="[KEY=VALUE]...", help="For example patients=4 output=FOLDER."),
    version: bool = VERSION,
) -> None:
    """Write simulated hospitals and their test patients."""
    hospitals = load_config(HospitalsConfig, config, overrides or [])
    console = Console()
    with console.status("hospitals") as status:
        folder = write_hospitals(hospitals, lambda stage, done, total: status.update(f"{stage} {done} of {total}"))
    console.print(f"wrote {folder}", soft_wrap=True)


if __name__ == "__main__":
    run_cli(cli)
