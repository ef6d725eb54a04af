"""`ld-generate` as a researcher runs it, and what it says when something is wrong."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import torch
from PIL import Image

from ld_common.adapters.base import inject
from ld_common.adapters.registry import read_adapter
from ld_common.core.command import run_cli
from ld_common.core.config import from_mapping
from ld_common.diffusion.base_model import base_digest, load_denoiser
from ld_common.diffusion.drift import LatentDrift
from ld_common.imaging.modality import Modality
from ld_common.protocol.study_config import StudyConfig
from ld_common.release.release import ReleaseContent, find_release_base, read_release, write_release
from ld_generate.cli import cli
from ld_generate.request import folder_names
from tests.conftest import random_state, write_mr_slice

GIVEN = "age=74,sex=F,diagnosis=CN"


@pytest.fixture(scope="module")
def release(tiny_base: Path, brain_mri: Modality, tmp_path_factory: pytest.TempPathFactory) -> Path:
    study = from_mapping(StudyConfig, {"base_model": str(tiny_base), "adapter": {"rank": 2}})
    adapted = inject(load_denoiser(str(tiny_base)), read_adapter(study.adapter), study.seed)
    state = random_state(adapted.state(), 0.1)
    folder, drift = tmp_path_factory.mktemp("release"), torch.full((4, 1, 1), 0.5)
    content = ReleaseContent(base_digest(str(tiny_base)), state, drift, {"aster": 2 * drift})
    return write_release(folder, study, brain_mri, content)


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    pixels = np.zeros((110, 100), np.uint16)
    pixels[20:90, 20:80] = np.random.default_rng(0).integers(300, 900, (70, 60))
    return write_mr_slice(tmp_path / "scan.dcm", pixels, PatientName="Secret^Name", PatientID="SECRET-1")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Exit code and what was said, both streams."""
    with pytest.raises(SystemExit) as ended:
        run_cli(cli, ["--allow-unsigned", *map(str, arguments), "steps=4"])
    said = capsys.readouterr()
    code = ended.value.code
    return int(code or 0), said.out + said.err


def test_a_scan_becomes_counterfactuals_in_its_own_geometry(
    release: Path, scan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    sets = ["--set", "age=84,diagnosis=AD", "--set", "sex=M"]
    code, said = run(capsys, "--release", release, "--input", scan, *sets, "--given", GIVEN, "--out", out)
    assert code == 0, said
    files = {path.name for path in (out / "scan").iterdir()}
    wanted = {"input.png", "reconstruction.png", "record.json"}
    for name in ("age-84_diagnosis-AD", "sex-M"):
        wanted |= {f"{name}.png", f"{name}.dcm", f"{name}_difference.png"}
    assert files == wanted
    with Image.open(out / "scan" / "sex-M.png") as picture:
        assert picture.size == (100, 110)
        assert picture.text["SyntheticData"] == "YES"  # type: ignore[attr-defined]
    synthetic = pydicom.dcmread(out / "scan" / "sex-M.dcm")
    assert (synthetic.Rows, synthetic.Columns) == (110, 100)
    assert "SECRET" not in str(synthetic).upper()
    record = json.loads((out / "scan" / "record.json").read_text())
    assert record["counterfactuals"][0]["set"] == {"age": 84.0, "diagnosis": "AD"}
    assert record["edit"]["steps"] == 4


def test_the_same_question_gives_the_same_bytes(
    release: Path, scan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        run(
            capsys, "--release", release, "--input", scan, "--set", "age=80", "--given", GIVEN, "--out", tmp_path / name
        )
    one, two = tmp_path / "one" / "scan", tmp_path / "two" / "scan"
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    assert all(path.read_bytes() == (two / path.name).read_bytes() for path in one.iterdir())


def test_a_volume_gives_its_middle_slice_or_the_one_asked_for(
    release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    volume = np.zeros((60, 70, 9), np.float32)
    volume[10:50, 10:60] = np.random.default_rng(1).random((40, 50, 9)) + np.arange(9)
    path = tmp_path / "volume.nii.gz"
    nibabel.save(nibabel.Nifti1Image(volume, np.diag([3.0, 3.0, 8.0, 1.0])), path)
    common = ["--release", release, "--input", path, "--set", "age=80", "--given", GIVEN, "--out"]
    assert run(capsys, *common, tmp_path / "middle")[0] == 0
    assert run(capsys, *common, tmp_path / "fourth", "--slice", 4)[0] == 0
    assert run(capsys, *common, tmp_path / "first", "--slice", 0)[0] == 0
    pictures = [(tmp_path / name / "volume" / "input.png").read_bytes() for name in ("middle", "fourth", "first")]
    assert pictures[0] == pictures[1] != pictures[2]
    assert (tmp_path / "middle" / "volume" / "age-80.nii.gz").exists()


def test_without_a_scan_pictures_are_drawn_from_one_noise_under_each_drift(
    release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drifts = [word for value in ("release", "aster", "-0.1", "0") for word in ("--drift", value)]
    out = tmp_path / "drawn"
    code, said = run(capsys, "--release", release, "--given", GIVEN, *drifts, "--samples", 2, "--out", out)
    assert code == 0, said
    names = {f"sample-{number}_drift-{name}.png" for number in (1, 2) for name in ("release", "aster", "-0.1", "0")}
    assert {path.name for path in out.iterdir()} == names | {"strip.png", "record.json"}
    first = [np.asarray(Image.open(out / f"sample-1_drift-{name}.png")) for name in ("release", "aster", "0")]
    assert not any((one == other).all() for one, other in ((first[0], first[1]), (first[0], first[2])))
    record = json.loads((out / "record.json").read_text())
    assert record["drifts"] == ["release", "aster", "-0.1", "0"]


def test_edits_are_drawn_under_each_shift_with_a_strip(
    release: Path, scan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--release", release, "--input", scan, "--set", "age=80", "--given", GIVEN]
    drifts = ["--drift", "-0.1", "--drift", "0", "--drift", "0.1"]
    assert run(capsys, *asked, *drifts, "--out", tmp_path / "strip")[0] == 0
    assert run(capsys, *asked, "--out", tmp_path / "plain")[0] == 0
    strip, plain = tmp_path / "strip" / "scan", tmp_path / "plain" / "scan"
    names = ("age-80", "age-80_drift-0.1", "age-80_drift+0.1")
    unshifted, darker, brighter = (np.asarray(Image.open(strip / f"{name}.png")).astype(int) for name in names)
    alone = np.asarray(Image.open(plain / "age-80.png")).astype(int)
    assert np.abs(unshifted - alone).max() <= 1  # drawn in another batch
    assert np.abs(darker - alone).max() > 1 < np.abs(brighter - darker).max()
    assert (strip / "strip.png").exists()
    record = json.loads((strip / "record.json").read_text())
    assert [one["drift"] for one in record["counterfactuals"]] == [-0.1, 0.0, 0.1]


def test_the_shift_of_edits_can_be_searched_for(
    release: Path, scan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--release", release, "--input", scan, "--set", "age=80", "--given", GIVEN, "--drift", "auto"]
    code, said = run(capsys, *asked, "--out", tmp_path / "out")
    assert code == 0, said
    assert "δ = " in said


def test_inputs_of_one_name_are_told_apart_by_the_folder_above() -> None:
    inputs = [Path("a/P1/series"), Path("a/P2/series"), Path("b/P1/series"), Path("a/scan.nii.gz")]
    assert folder_names(inputs) == ["P1_series", "P2_series", "P1_series_", "scan"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "age=80"], "does not say"),
        (["--set", "age=eighty", "--given", GIVEN], "age=eighty"),
        (["--set", "age=180", "--given", GIVEN], "18 to 100 years"),
        (["--set", "diagnose=AD", "--given", GIVEN], "did you mean 'diagnosis'"),
        (["--set", "diagnosis=ADD", "--given", GIVEN], "did you mean 'AD'"),
        (["--set", "", "--given", GIVEN], "changes nothing"),
        (["--set", "age=80", "--given", GIVEN, "--depth", "1.5"], "depth"),
        (["--set", "age=80", "--given", GIVEN, "--strength", "nan"], "strength is nan"),
        (["--set", "age=80", "--given", GIVEN, "--strength", "-1"], "strength is -1.0"),
        (["--set", "age=80", "--given", GIVEN, "late_share=-1"], "late_share is -1.0"),
        (["--set", "age=80", "--given", GIVEN, "late_below=80"], "late_below is 80.0"),
        (["--set", "age=80", "--given", GIVEN, "feedback=2"], "feedback is 2.0"),
        (["--set", "age=80", "--given", GIVEN, "stesp=3"], "'steps'"),
        (["--set", "age=80", "--given", GIVEN, "--drift", "aste"], "none of release, auto, aster"),
        (["--set", "age=80", "--given", GIVEN, "--drift", "nan"], "none of release, auto, aster"),
        (["--set", "age=80", "--given", GIVEN, "--drift", "aster"], "give a number"),
        (["--given", GIVEN], "--set is missing"),
        (["--set", "age=80", "--given", GIVEN, "--device", "tpu"], "device is 'tpu'"),
        (["--set", "age=80", "--given", GIVEN, "--precision", "int8"], "precision is 'int8'"),
    ],
)
def test_a_wrong_question_is_one_clear_line(
    release: Path, scan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    code, said = run(capsys, "--release", release, "--input", scan, *arguments, "--out", tmp_path / "out")
    assert code == 2
    assert words in said
    assert said.strip().count("\n") == 0
    assert not (tmp_path / "out").exists()


def test_a_release_of_another_base_is_refused(
    release: Path, scan: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    (other / "vae" / "note.json").write_text("{}")
    asked = ["--release", release, "--input", scan, "--set", "age=80", "--given", GIVEN]
    code, said = run(capsys, *asked, "--base", other)
    assert (code, "is not the one of this release" in said) == (2, True)
    code, said = run(capsys, "--release", tmp_path / "nowhere", *asked[2:])
    assert (code, "holds no release" in said) == (2, True)


def test_what_the_file_says_and_what_is_given_must_agree(
    release: Path, scan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = pydicom.dcmread(scan).pixel_array
    aged = write_mr_slice(tmp_path / "aged.dcm", pixels, PatientAge="060Y", PatientSex="M")
    code, said = run(capsys, "--release", release, "--input", aged, "--set", "age=80", "--given", GIVEN)
    assert (code, "age is 60" in said) == (2, True)
    given = "age=60.8,sex=M,diagnosis=CN"  # as a study's table has it, where DICOM has whole years
    code, _ = run(
        capsys, "--release", release, "--input", aged, "--set", "age=80", "--given", given, "--out", tmp_path / "o"
    )
    assert (code, json.loads((tmp_path / "o/aged/record.json").read_text())["input"]["attributes"]["age"]) == (0, 60.8)


def test_what_the_mask_keeps_stays_as_it_is(
    release: Path, scan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = np.zeros((110, 100), np.uint8)
    kept[20:60] = 255
    Image.fromarray(kept).save(tmp_path / "mask.png")
    asked = ["--release", release, "--input", scan, "--given", GIVEN, "--strength", 4]
    masked = [*asked, "--mask", tmp_path / "mask.png", "--trajectory", "age=60:90:30", "--out", tmp_path / "masked"]
    code, said = run(capsys, *masked)
    assert code == 0, said
    assert run(capsys, *asked, "--set", "age=90", "--out", tmp_path / "free")[0] == 0
    own = pydicom.dcmread(scan).pixel_array[20:60]
    held, free = (pydicom.dcmread(tmp_path / name / "scan" / "age-90.dcm") for name in ("masked", "free"))
    values = [one.pixel_array * float(one.RescaleSlope) + float(one.RescaleIntercept) for one in (held, free)]
    step = max(float(one.RescaleSlope) for one in (held, free))
    assert np.abs(values[0][20:60] - own).max() <= step
    assert np.abs(values[1][20:60] - own).max() > 20 * step
    assert np.abs(values[0][75:] - values[1][75:]).max() <= 2 * step
    assert held.SOPInstanceUID != free.SOPInstanceUID
    changes = [row.split(",")[-1] for row in (tmp_path / "masked/scan/trajectory_age.csv").read_text().splitlines()[3:]]
    assert all(float(change) > 0 for change in changes)
    difference = np.asarray(Image.open(tmp_path / "masked/scan/age-90_difference.png"))
    assert (difference[20:60] == difference[20, 0]).all()  # nothing differs where the scan is kept
    assert (difference != difference[20, 0]).any()


def test_a_mask_that_does_not_fit_is_named(
    release: Path, scan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for shape, fill, words in (((50, 50), 255, "the mask"), ((110, 100), 0, "keeps nothing")):
        Image.fromarray(np.full(shape, fill, np.uint8)).save(tmp_path / "mask.png")
        asked = ["--input", scan, "--set", "age=80", "--given", GIVEN, "--mask", tmp_path / "mask.png"]
        code, said = run(capsys, "--release", release, *asked, "--out", tmp_path / "out")
        assert (code, words in said) == (2, True)


def test_several_seeds_give_their_mean_each_of_them_and_their_deviation(
    release: Path, scan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--release", release, "--input", scan, "--set", "age=80", "--given", GIVEN, "--strength", 3]
    code, said = run(capsys, *asked, "--method", "ddpm", "--seeds", 3, "--out", tmp_path / "out")
    assert code == 0, said
    folder = tmp_path / "out" / "scan"
    each = [np.asarray(Image.open(folder / f"age-80_seed-{seed}.png")).astype(float) for seed in range(3)]
    assert not (each[0] == each[1]).all()
    mean = np.asarray(Image.open(folder / "age-80.png")).astype(float)
    inside = np.all([(one > 0) & (one < 255) for one in each], axis=0)  # where no picture was clipped
    assert np.abs(np.mean(each, axis=0) - mean)[inside].max() <= 1
    assert (folder / "age-80_uncertainty.png").exists()
    record = json.loads((folder / "record.json").read_text())
    assert record["seeds"] == [0, 1, 2]
    assert [set(one) for one in record["counterfactuals"][0]["areas_mm2_by_seed"]] == [{"ventricles"}] * 3
    code, said = run(capsys, *asked, "--method", "invert", "--seeds", 3, "--out", tmp_path / "none")
    assert (code, "a --method that draws noise: ddpm, flowedit, sdedit" in " ".join(said.split())) == (2, True)


def test_what_no_site_had_scans_of_is_warned_of_and_areas_are_in_the_record(
    release: Path, scan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = read_release(release)
    site = {"visits": 9, "patients": 4, "coverage": [55.0, 80.0, 0.0, 1.0, 1.0, 1.0]}
    rounds = [{"round": 1, "counted": True, "sites": {"aster": site}, "left_out": {}}]
    folder = tmp_path / "covered"
    state, drift = told.state, told.drift.mean if isinstance(told.drift, LatentDrift) else None
    study = dataclasses.replace(told.study, base_model=find_release_base(told))
    write_release(folder, study, told.modality, ReleaseContent(told.base_digest, state, drift, rounds=rounds))
    asked = ("--set", "age=75", "--set", "age=90,diagnosis=AD", "--given", "age=70,sex=F,diagnosis=CN")
    code, said = run(capsys, "--release", folder, "--input", scan, *asked, "--out", tmp_path / "out")
    assert code == 0
    assert "warning: age 90: the sites had scans of 55 to 80 years" in said
    record = json.loads((tmp_path / "out" / "scan" / "record.json").read_text())
    assert [line.partition(":")[0] for line in record["warnings"]] == ["age 90", "diagnosis AD"]
    areas = [record["areas_mm2"]["reconstruction"], *(one["areas_mm2"] for one in record["counterfactuals"])]
    assert all(set(one) == {"ventricles"} for one in areas)
    code, said = run(capsys, "--release", folder, "--given", "age=90,sex=F,diagnosis=CN", "--out", tmp_path / "drawn")
    assert code == 0
    assert "warning: age 90" in said
    code, said = run(capsys, "--release", release, "--input", scan, *asked, "--out", tmp_path / "unknown")
    assert (code, "does not say what its sites had scans of" in said) == (0, True)
    assert "strength" not in said
    strong = [*asked, "--strength", 50, "--out", tmp_path / "strong"]
    code, said = run(capsys, "--release", release, "--input", scan, *strong)
    assert (code, "strength 50: the release is best asked at 2" in said) == (0, True)
