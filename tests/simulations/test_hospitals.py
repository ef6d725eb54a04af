"""The demo's hospitals: files that a real reader can read, whose truth is what was scanned."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path

import numpy as np
import pydicom
import pytest

from ld_common.core.config import load_config
from ld_common.core.errors import ConfigError
from ld_simulations.hospitals import draw_visits, scan, write_hospitals
from ld_simulations.hospitals_config import HospitalsConfig
from ld_simulations.phantoms.base import Population
from ld_simulations.phantoms.brain import BRAIN
from ld_simulations.phantoms.device import stored_values
from ld_simulations.phantoms.scanner import ScannerConfig, acquire

CONFIG = Path(__file__).parents[2] / "configs/hospitals.yaml"
NAMES = ("aster", "birch", "cedar")


def small_config(output: Path, *overrides: str) -> HospitalsConfig:
    return load_config(HospitalsConfig, CONFIG, [f"output={output}", "patients=2", "test_patients=2", *overrides])


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hospitals(small_config(tmp_path_factory.mktemp("demo") / "hospitals"))


def read_slices(folder: Path) -> list[tuple[pydicom.Dataset, np.ndarray]]:
    """Data sets by position and their scanner values, as an independent reader would get them."""
    found = []
    for path in sorted(folder.glob("*.dcm")):
        dataset = pydicom.dcmread(path)
        stored = dataset.pixel_array.astype(np.float64)
        if dataset.PhotometricInterpretation == "MONOCHROME1":
            lowest = -(2 ** (dataset.BitsStored - 1)) if dataset.PixelRepresentation else 0
            stored = 2 * lowest + 2**dataset.BitsStored - 1 - stored
        found.append((dataset, stored * dataset.RescaleSlope + dataset.RescaleIntercept))
    return sorted(found, key=lambda item: item[0].ImagePositionPatient[2])


def digests(root: Path) -> dict[str, str]:
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
def test_same_seed_same_bytes_and_another_seed_other_ones(tmp_path: Path) -> None:
    seeds = {"first": 0, "again": 0, "other": 1}
    few = ["patients=1", "test_patients=1"]
    first, again, other = (
        digests(write_hospitals(small_config(tmp_path / name, f"seed={seed}", *few))) for name, seed in seeds.items()
    )
    assert again == first
    assert not set(other.values()) & set(first.values())


def test_series_are_what_a_reader_of_mr_images_expects(hospitals: Path) -> None:
    series = [path.parent for path in hospitals.rglob("*.dcm")]
    uids = []
    for folder in sorted(set(series)):
        slices = read_slices(folder)
        assert len(slices) == 3
        assert len({dataset.SeriesInstanceUID for dataset, _ in slices}) == 1
        assert np.allclose(np.diff([dataset.ImagePositionPatient[2] for dataset, _ in slices]), 8, atol=1e-3)
        by_name = sorted(slices, key=lambda item: str(item[0].filename))
        by_number = sorted(slices, key=lambda item: item[0].InstanceNumber)
        for order in (by_name, by_number):
            assert order[1][0].SOPInstanceUID != slices[1][0].SOPInstanceUID
        for dataset, _ in slices:
            uids.append(dataset.SOPInstanceUID)
            assert dataset.SOPClassUID == pydicom.uid.MRImageStorage == dataset.file_meta.MediaStorageSOPClassUID
            assert (dataset.Modality, dataset.BurnedInAnnotation, dataset.PatientPosition) == ("MR", "NO", "HFS")
            assert min(dataset.Rows, dataset.Columns) * dataset.PixelSpacing[0] >= 200
    assert len(set(uids)) == len(uids)


def test_tables_name_the_visits_with_each_hospitals_labels(hospitals: Path) -> None:
    columns = []
    for name in NAMES:
        rows = list(csv.reader((hospitals / name / "visits.csv").open(encoding="utf-8")))
        columns.append(tuple(rows[0]))
        folders = {f"{path.parent.name}/{path.name}" for path in (hospitals / name / "dicom").glob("*/*")}
        assert {f"{patient}/{day}" for patient, day, *_ in rows[1:]} == folders
        for patient, day, age, *_ in rows[1:]:
            header = pydicom.dcmread(next((hospitals / name / "dicom" / patient / day).glob("*.dcm")))
            assert header.PatientID == patient and header.StudyDate == day.replace("-", "")
            assert int(header.PatientAge[:3]) == int(float(age))
            assert 18 <= float(age) <= 100
    assert len(set(columns)) == len(NAMES)


def test_truth_belongs_to_the_scan_it_was_edited_from(hospitals: Path) -> None:
    folder = hospitals / "held_out"
    manifest = json.loads((folder / "held_out.json").read_text(encoding="utf-8"))
    listed = list(csv.DictReader((folder / "scans.csv").open(encoding="utf-8")))
    assert {(folder / row["input"]).is_dir() for row in listed} == {True}
    assert [row["input"] for row in listed[::2]] == [entry["series"] for entry in manifest["patients"]]
    for first, later in zip(listed[::2], listed[1::2], strict=True):
        assert first["patient"] == later["patient"]
        assert float(first["age"]) < float(later["age"]) < float(first["age"]) + 7
    assert len(manifest["patients"]) == 2 * len(NAMES)
    for patient in manifest["patients"]:
        scanned = read_slices(folder / patient["series"])[1][1]
        factual = np.load(folder / patient["truth"])
        np.testing.assert_array_equal(factual["pixels"], scanned.astype(np.float32))
        edits = {edit["name"]: edit for edit in patient["edits"]}
        assert len(edits) == 4 and edits["age_plus_20"]["target"]["age"] <= 100
        assert edits["age_plus_20"]["area_mm2"] > edits["age_plus_10"]["area_mm2"]
        assert edits["age_plus_10"]["area_mm2"] > patient["area_mm2"]
        for edit in edits.values():
            truth = np.load(folder / edit["truth"])
            assert truth["pixels"].shape == truth["structure"].shape == scanned.shape
            assert float(truth["area_mm2"]) == pytest.approx(edit["area_mm2"], abs=0.01)
            # the same noise: where there is no head in either, nothing differs
            empty = np.zeros(scanned.shape, bool)
            empty[:5], empty[-5:] = True, True
            np.testing.assert_array_equal(truth["pixels"][empty], factual["pixels"][empty])
            assert np.any(truth["pixels"] != factual["pixels"])


def test_monochrome1_is_stored_inverted(hospitals: Path) -> None:
    dataset, values = read_slices(next((hospitals / "birch" / "dicom").glob("*/*")))[1]
    assert dataset.PhotometricInterpretation == "MONOCHROME1"
    assert dataset.pixel_array[:4].mean() > 250 and values[:4].mean() < 0.05 * values.max()


def test_scanners_show_the_same_anatomy_up_to_contrast() -> None:
    config = load_config(HospitalsConfig, CONFIG)
    visit = draw_visits(BRAIN, 0, config.hospitals[0], held_out=True)[0][0]
    pictures, ranges = [], []
    for hospital in config.hospitals:
        scanner = hospital.scanner
        scanner.rows, scanner.columns, scanner.spacing_mm = 112, 112, 1.9
        values, _ = scan(BRAIN, visit, visit.attributes, 1, scanner)
        ranges.append((float(values.min()), float(values.max())))
        pictures.append(values.ravel())
    assert np.corrcoef(pictures).min() > 0.93
    assert np.abs(np.diff([high - low for low, high in ranges])).min() > 100


def test_disease_is_shared_out_exactly_and_held_out_patients_can_age_twenty_years() -> None:
    config = load_config(HospitalsConfig, CONFIG)
    for hospital in config.hospitals:
        held_out = [visits[0].patient for visits in draw_visits(BRAIN, 0, hospital, held_out=True)]
        assert sum(patient.diagnosis == "AD" for patient in held_out) == round(hospital.population.disease_share * 8)
        assert max(patient.age_years for patient in held_out) <= 80
        visits = draw_visits(BRAIN, 0, hospital, held_out=False)
        assert len(visits) == 48 and {len(patient) for patient in visits} == {2, 3, 4}
        assert not {patient.identity for patient in held_out} & {patient[0].patient.identity for patient in visits}


@pytest.mark.parametrize("monochrome1", [False, True])
@pytest.mark.parametrize(("bits", "signed", "slope", "intercept"), [(8, False, 4.0, 0.0), (16, True, 0.0625, 2048.0)])
def test_what_is_stored_is_what_was_acquired(
    bits: int, signed: bool, slope: float, intercept: float, monochrome1: bool
) -> None:
    config = ScannerConfig(
        bits_stored=bits, signed=signed, rescale_slope=slope, rescale_intercept=intercept, monochrome1=monochrome1
    )
    rng = np.random.default_rng(0)
    values = acquire(rng.random(config.shape, np.float32), config, np.ones(5, np.float32), rng)
    stored = stored_values(values, config).astype(np.float64)
    low, high = config.stored_range
    assert low <= stored.min() and stored.max() <= high
    restored = low + high - stored if monochrome1 else stored
    np.testing.assert_array_equal(restored * slope + intercept, values)


def test_a_folder_that_exists_is_not_written_over(hospitals: Path) -> None:
    with pytest.raises(ConfigError, match="exists"):
        write_hospitals(small_config(hospitals))


def test_settings_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="200 mm"):
        ScannerConfig(rows=64, columns=64, spacing_mm=1.0)
    with pytest.raises(ConfigError, match="same name"):
        load_config(HospitalsConfig, None, ["hospitals=[{name: a}, {name: a}]"])
    with pytest.raises(ConfigError, match="age_mean_years"):
        Population(age_mean_years=95)
    with pytest.raises(ConfigError, match="patient"):
        small_config(tmp_path, "patient=3")
