"""The chest's hospitals: CR and DX files that a real reader and our own can read, whose truth is what was exposed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    SecondaryCaptureImageStorage,
)

from ld_client.data.exclusions import Exclusion
from ld_client.data.ingest import read_visits, survey
from ld_client.site_config import load_site
from ld_common.core.config import load_config
from ld_common.core.errors import ConfigError
from ld_common.imaging.geometry import to_model
from ld_common.imaging.modality import Modality
from ld_common.imaging.rejection import Rejection, ScanRejected
from ld_common.imaging.scan_reader import decode_scan
from ld_evaluate.truth import read_truths, validate_area
from ld_simulations.hospitals import write_hospitals
from ld_simulations.hospitals_config import HospitalsConfig
from ld_simulations.phantoms.scanner import ScannerConfig

CONFIGS = Path(__file__).parents[2] / "configs"
CHEST_RADIOGRAPH = CONFIGS / "modalities/chest_radiograph.yaml"
KINDS = {
    "dahlia": (DigitalXRayImageStorageForPresentation, "DX", "MONOCHROME2", 14),
    "elm": (ComputedRadiographyImageStorage, "CR", "MONOCHROME1", 10),
    "fir": (ComputedRadiographyImageStorage, "CR", "MONOCHROME2", 12),
}


@pytest.fixture(scope="module")
def modality() -> Modality:
    return load_config(Modality, CHEST_RADIOGRAPH)


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("demo") / "hospitals"
    overrides = [f"output={output}", "patients=2", "test_patients=2"]
    return write_hospitals(load_config(HospitalsConfig, CONFIGS / "chest_hospitals.yaml", overrides))


def a_file(hospitals: Path, name: str) -> Path:
    return sorted((hospitals / name / "dicom").rglob("*.dcm"))[0]


def change(source: Path, target: Path, **elements: object) -> Path:
    """A copy of a DICOM file with other header elements."""
    dataset = pydicom.dcmread(source)
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    target.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(target)
    return target


@pytest.mark.parametrize("name", list(KINDS))
def test_files_are_what_a_reader_of_radiographs_expects(hospitals: Path, name: str) -> None:
    sop_class, modality, interpretation, bits = KINDS[name]
    for path in (hospitals / name / "dicom").rglob("*.dcm"):
        header = pydicom.dcmread(path)
        assert header.SOPClassUID == sop_class == header.file_meta.MediaStorageSOPClassUID
        assert (header.Modality, header.PhotometricInterpretation) == (modality, interpretation)
        assert (header.BitsStored, header.HighBit, header.PixelRepresentation) == (bits, bits - 1, 0)
        assert (header.BodyPartExamined, header.ViewPosition, list(header.PatientOrientation)) == (
            "CHEST",
            "PA",
            ["L", "F"],
        )
        assert "PixelSpacing" not in header and min(header.Rows, header.Columns) * header.ImagerPixelSpacing[0] >= 340
        assert header.pixel_array.max() < 2**bits
        assert header.PixelIntensityRelationship == "LOG"
        assert header.PixelIntensityRelationshipSign == (1 if interpretation == "MONOCHROME1" else -1)
        assert "Simulated patient" in header.ImageComments
        assert header.PatientName and header.PatientID == path.parent.parent.name and header.InstitutionName
        if modality == "DX":
            assert (header.PresentationIntentType, header.PresentationLUTShape) == ("FOR PRESENTATION", "IDENTITY")
            assert (header.RescaleSlope, header.RescaleIntercept, header.RescaleType) == (1, 0, "US")
            assert header.ViewCodeSequence[0].CodeMeaning == "postero-anterior"


def test_what_is_read_is_what_was_exposed(hospitals: Path, modality: Modality) -> None:
    manifest = json.loads((hospitals / "held_out/held_out.json").read_text())
    assert manifest["phantom"] == "chest" and len(manifest["patients"]) == 6
    for patient in manifest["patients"]:
        scan = decode_scan(hospitals / "held_out" / patient["series"], modality)
        truth = np.load(hospitals / "held_out" / patient["truth"])
        np.testing.assert_array_equal(scan.pixels, truth["pixels"])
        assert scan.affine is None and scan.orientation == ("L", "F") and scan.spacing_mm is not None
        assert scan.attributes_in_file["sex"] == patient["attributes"]["sex"]
        areas = {edit["name"]: edit["area_mm2"] for edit in patient["edits"]}
        assert areas["age_plus_20"] > areas["age_plus_10"] > patient["area_mm2"]
        for edit in patient["edits"]:
            other = np.load(hospitals / "held_out" / edit["truth"])
            assert other["structure"].shape == other["pixels"].shape == scan.pixels.shape
            assert float(other["area_mm2"]) == pytest.approx(edit["area_mm2"], abs=0.01)
            assert np.any(other["pixels"] != truth["pixels"])


def test_every_hospital_shows_bones_bright_and_the_air_beside_the_body_black(
    hospitals: Path, modality: Modality
) -> None:
    for name in KINDS:
        image, _ = to_model(decode_scan(a_file(hospitals, name), modality), 64, modality.image)
        assert image[0, 44:, :2].mean() < -0.8 and image[0, 58:, 28:36].mean() > 0.5
        assert image[0, 20:30, 14:22].mean() < image[0, 20:30, 29:35].mean() - 0.3


def test_a_projection_is_turned_upright_whatever_its_orientation(
    hospitals: Path, modality: Modality, tmp_path: Path
) -> None:
    source = a_file(hospitals, "dahlia")
    upright = decode_scan(source, modality).pixels
    dataset = pydicom.dcmread(source)
    stored = dataset.pixel_array
    turned = {"RF": stored[:, ::-1], "LH": stored[::-1], "FL": stored.T, "HR": stored[::-1, ::-1].T}
    for letters, pixels in turned.items():
        lies = np.ascontiguousarray(pixels).tobytes()
        path = change(source, tmp_path / f"{letters}.dcm", PatientOrientation=list(letters), PixelData=lies)
        scan = decode_scan(path, modality)
        assert scan.orientation == ("L", "F")
        np.testing.assert_array_equal(scan.pixels, upright)


def test_spacing_and_orientation_may_be_absent_and_a_lateral_view_is_refused(
    hospitals: Path, modality: Modality, tmp_path: Path
) -> None:
    bare = pydicom.dcmread(a_file(hospitals, "elm"))
    del bare.ImagerPixelSpacing, bare.PatientOrientation, bare.ViewPosition
    bare.save_as(tmp_path / "bare.dcm")
    scan = decode_scan(tmp_path / "bare.dcm", modality)
    assert scan.spacing_mm is None and scan.orientation is None
    assert to_model(scan, 64, modality.image)[0].shape == (1, 64, 64)
    for elements, refusal in (
        ({"ViewPosition": "LL"}, Rejection.WRONG_GEOMETRY),
        ({"Modality": "MR"}, Rejection.WRONG_MODALITY),
        ({"SOPClassUID": SecondaryCaptureImageStorage}, Rejection.BURNED_IN),
    ):
        with pytest.raises(ScanRejected) as caught:
            decode_scan(change(a_file(hospitals, "elm"), tmp_path / "changed.dcm", **elements), modality)
        assert caught.value.rejection == refusal


SITE = """\
site: elm
modality: {modality}
base_model: unused
store: store
data:
  root: {root}
  table: {table}
  columns:
    patient: subject
    date: study_date
    attributes: {{age: age_at_study, sex: sex, diagnosis: report}}
  values: {{diagnosis: {{clear: CN, decompensated: HF}}}}
"""


def test_a_site_takes_every_frontal_view_and_says_why_it_left_out_the_lateral_one(
    hospitals: Path, tmp_path: Path
) -> None:
    root = tmp_path / "scans"
    visits = sorted((hospitals / "elm" / "dicom").rglob("*.dcm"))
    for number, path in enumerate(visits):
        change(path, root / f"{number}.dcm")
    # a lateral view of the first visit, in the same series and with the lower number
    lateral = {"ViewPosition": "LL", "SOPInstanceUID": "1.2.3", "SeriesNumber": 0}
    change(visits[0], root / "lateral.dcm", **lateral)
    site = tmp_path / "site.yaml"
    site.write_text(SITE.format(modality=CHEST_RADIOGRAPH, root=root, table=hospitals / "elm" / "visits.csv"))
    loaded = load_site(site)
    found = survey(loaded, load_config(Modality, CHEST_RADIOGRAPH), bytes(32), lambda *_: None)
    read = list(read_visits(found))
    assert not any(isinstance(row, Exclusion) for row in read)
    excluded = found.exclusions
    assert [(exclusion.name, exclusion.reason.value) for exclusion in excluded] == [("lateral.dcm", "wrong geometry")]
    assert len(read) == len(visits)


def test_the_hearts_area_can_be_validated_on_scans(hospitals: Path, modality: Modality) -> None:
    folder = hospitals / "held_out"
    validation = validate_area(modality, *read_truths(folder, modality, 64))
    assert validation["correlation"] > 0.9 and validation["change_correlation"] > 0.8


def test_settings_of_another_phantom_are_refused() -> None:
    with pytest.raises(ConfigError, match="diagnosis_labels needs the keys CN and HF"):
        load_config(
            HospitalsConfig, None, ["phantom=chest", "hospitals=[{name: a, table: {diagnosis_labels: {CN: a, AD: b}}}]"]
        )
    with pytest.raises(ConfigError, match="tissue_contrast"):
        load_config(HospitalsConfig, None, ["phantom=chest", "hospitals=[{name: a, scanner: {tissue_contrast: 0.5}}]"])
    with pytest.raises(ConfigError, match="known: brain, chest"):
        load_config(HospitalsConfig, None, ["phantom=foot", "hospitals=[{name: a}]"])
    plain = load_config(HospitalsConfig, None, ["hospitals=[{name: a}]"]).hospitals[0]
    assert plain.scanner == ScannerConfig() and plain.table.diagnosis_labels == {"CN": "CN", "AD": "AD"}
