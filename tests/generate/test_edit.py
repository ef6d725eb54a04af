"""`ld-generate edit` as a researcher runs it, and how it refuses what cannot be drawn."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image

from ld_common.imaging.modality import Modality
from ld_common.release.release import ReleaseContent, read_release, write_release
from ld_generate.request import folder_names
from tests.conftest import write_mr_slice
from tests.support.releases import SOURCE, GenerateRunner, write_small_release


def test_a_scan_becomes_counterfactuals_in_its_own_geometry(run: GenerateRunner, scan: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    targets = ["--target", "age=84,diagnosis=AD", "--target", "sex=M"]
    code, printed = run("edit", "--input", scan, *targets, "--source", SOURCE, "--out", out, "num_inference_steps=4")
    assert code == 0, printed
    expected = {"input.png", "reconstruction.png", "record.json"}
    for name in ("age-84_diagnosis-AD", "sex-M"):
        expected |= {f"{name}.png", f"{name}.dcm", f"{name}_difference.png"}
    assert {path.name for path in (out / "scan").iterdir()} == expected
    with Image.open(out / "scan" / "sex-M.png") as picture:
        assert picture.size == (100, 110)
        assert picture.text["SyntheticData"] == "YES"  # type: ignore[attr-defined]
    synthetic = pydicom.dcmread(out / "scan" / "sex-M.dcm")
    assert (synthetic.Rows, synthetic.Columns) == (110, 100)
    assert "SECRET" not in str(synthetic).upper()
    record = json.loads((out / "scan" / "record.json").read_text())
    assert record["source"] == {"age": 74.0, "sex": "F", "diagnosis": "CN"}
    assert record["counterfactuals"][0]["target"] == {"age": 84.0, "diagnosis": "AD"}
    assert record["edit"]["num_inference_steps"] == 4


def test_the_same_request_gives_the_same_bytes(run: GenerateRunner, scan: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        run("edit", "--input", scan, "--target", "age=80", "--source", SOURCE, "--out", tmp_path / name)
    one, two = tmp_path / "one" / "scan", tmp_path / "two" / "scan"
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    assert all(path.read_bytes() == (two / path.name).read_bytes() for path in one.iterdir())


def test_json_lists_the_files_and_the_biomarkers(run: GenerateRunner, scan: Path, tmp_path: Path) -> None:
    options = ["--target", "age=80", "--source", SOURCE, "--out", tmp_path / "out", "--json"]
    code, out, _ = run.streams("edit", "--input", scan, *options)
    assert code == 0
    (result,) = json.loads(out)["results"]
    folder = tmp_path / "out" / "scan"
    assert (result["folder"], result["files"]) == (str(folder), sorted(path.name for path in folder.iterdir()))
    assert set(result["biomarkers_mm2"]) == {"scan", "reconstruction"}
    assert set(result["counterfactuals"][0]["biomarkers_mm2"]) == {"ventricles"}
    assert result["warnings"]


def test_a_volume_gives_its_middle_slice_or_the_chosen_one(run: GenerateRunner, tmp_path: Path) -> None:
    volume = np.zeros((60, 70, 9), np.float32)
    volume[10:50, 10:60] = np.random.default_rng(1).random((40, 50, 9)) + np.arange(9)
    path = tmp_path / "volume.nii.gz"
    nibabel.save(nibabel.Nifti1Image(volume, np.diag([3.0, 3.0, 8.0, 1.0])), path)
    common = ["--input", path, "--target", "age=80", "--source", SOURCE, "--out"]
    assert run("edit", *common, tmp_path / "middle")[0] == 0
    assert run("edit", *common, tmp_path / "fourth", "--slice", 4)[0] == 0
    assert run("edit", *common, tmp_path / "first", "--slice", 0)[0] == 0
    pictures = [(tmp_path / name / "volume" / "input.png").read_bytes() for name in ("middle", "fourth", "first")]
    assert pictures[0] == pictures[1] != pictures[2]
    assert (tmp_path / "middle" / "volume" / "age-80.nii.gz").exists()


def test_edits_are_drawn_under_each_shift_with_a_strip(run: GenerateRunner, scan: Path, tmp_path: Path) -> None:
    options = ["--input", scan, "--target", "age=80", "--source", SOURCE]
    drifts = ["--drift", "-0.1", "--drift", "0", "--drift", "0.1"]
    assert run("edit", *options, *drifts, "--out", tmp_path / "strip")[0] == 0
    assert run("edit", *options, "--out", tmp_path / "plain")[0] == 0
    strip, plain = tmp_path / "strip" / "scan", tmp_path / "plain" / "scan"
    names = ("age-80", "age-80_drift-0.1", "age-80_drift+0.1")
    unshifted, darker, brighter = (np.asarray(Image.open(strip / f"{name}.png")).astype(int) for name in names)
    alone = np.asarray(Image.open(plain / "age-80.png")).astype(int)
    assert np.abs(unshifted - alone).max() <= 1  # drawn in another batch
    assert np.abs(darker - alone).max() > 1 < np.abs(brighter - darker).max()
    assert (strip / "strip.png").exists()
    record = json.loads((strip / "record.json").read_text())
    assert [entry["delta"] for entry in record["counterfactuals"]] == [-0.1, 0.0, 0.1]


def test_the_shift_of_edits_can_be_searched_for(run: GenerateRunner, scan: Path, tmp_path: Path) -> None:
    options = ["--input", scan, "--target", "age=80", "--source", SOURCE, "--drift", "auto", "num_inference_steps=2"]
    code, printed = run("edit", *options, "--out", tmp_path / "out")
    assert code == 0, printed
    assert "δ = " in printed


def test_inputs_of_one_name_are_told_apart_by_the_folder_above() -> None:
    inputs = [Path("a/P1/series"), Path("a/P2/series"), Path("b/P1/series"), Path("a/scan.nii.gz")]
    assert folder_names(inputs) == ["P1_series", "P2_series", "P1_series_", "scan"]
    assert folder_names([Path("one.JPG"), Path("two.jpeg"), Path("three.Nii.gz")]) == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target", "age=80"], ["age, diagnosis, sex", "--source"]),
        (["--target", "age=80", "--source", SOURCE, "guidance_outside=-1"], ["guidance_outside", "-1.0"]),
        (["--target", "age=80", "--source", SOURCE, "guidance_interval=[0,80]"], ["guidance_interval", "80"]),
        (["--target", "age=80", "--source", SOURCE, "--editor", "flowedit", "feedback=2"], ["feedback", "2.0"]),
        (["--target", "age=80", "--source", SOURCE, "num_inference_stesp=3"], ["'num_inference_steps'"]),
        (["--target", "age=80", "--source", SOURCE, "steps=3"], ["now called", "num_inference_steps"]),
        (["--target", "age=80", "--source", SOURCE, "--num-seeds", "2"], ["--num-seeds 2", "ddpm", "flowedit"]),
    ],
)
def test_a_wrong_request_is_one_clear_line(
    run: GenerateRunner, scan: Path, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    code, printed = run("edit", "--input", scan, *arguments, "--out", tmp_path / "out")
    assert code == 2
    assert all(word in printed for word in words), printed
    assert len([line for line in printed.strip().splitlines() if line.startswith("error: ")]) == 1
    assert not (tmp_path / "out").exists()


def test_a_release_of_another_base_is_refused(
    release: Path, scan: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = GenerateRunner(release, capsys)  # loads the base itself
    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    (other / "vae" / "note.json").write_text("{}")
    options = ["--input", scan, "--target", "age=80", "--source", SOURCE, "--out", tmp_path / "out"]
    for base in (other, tmp_path / "absent"):
        code, printed = run("edit", *options, "--base", base)
        assert (code, "--base" in printed, str(base) in printed) == (2, True, True), printed
        assert ("not the one of this release" in " ".join(printed.split())) == (base == other), printed


def test_a_base_that_is_not_found_from_here_is_named_with_base(
    brain_mri: Modality, tiny_base: Path, scan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    folder = write_small_release(tmp_path / "moved", base, brain_mri)
    shutil.rmtree(base)
    run = GenerateRunner(folder, capsys)
    options = ["--input", scan, "--target", "age=80", "--source", SOURCE, "--out", tmp_path / "out"]
    code, printed = run("edit", *options)
    assert (code, "--base" in printed) == (2, True), printed
    code, printed = run("edit", *options, "--base", tiny_base)
    assert code == 0, printed


def test_attributes_of_the_file_and_of_the_source_must_agree(run: GenerateRunner, scan: Path, tmp_path: Path) -> None:
    pixels = pydicom.dcmread(scan).pixel_array
    aged = write_mr_slice(tmp_path / "aged.dcm", pixels, PatientAge="060Y", PatientSex="M")
    options = ["--input", aged, "--target", "age=80", "--out", tmp_path / "out"]
    code, printed = run("edit", *options, "--source", SOURCE)
    assert (code, "age is 60" in printed) == (2, True)
    source = "age=60.8,sex=M,diagnosis=CN"  # as a study's table has it, where DICOM has whole years
    assert run("edit", *options, "--source", source)[0] == 0
    assert json.loads((tmp_path / "out/aged/record.json").read_text())["source"]["age"] == 60.8


@pytest.mark.slow
def test_the_preserve_mask_keeps_its_white_region(run: GenerateRunner, scan: Path, tmp_path: Path) -> None:
    mask = np.zeros((110, 100), np.uint8)
    mask[20:60] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    options = ["--input", scan, "--source", SOURCE, "--guidance-scale", 4]
    masked = ["--preserve-mask", tmp_path / "mask.png", "--out", tmp_path / "masked", "age=60:90:30"]
    code, printed = run("sweep", *options, *masked)
    assert code == 0, printed
    assert run("edit", *options, "--target", "age=90", "--out", tmp_path / "free")[0] == 0
    original = pydicom.dcmread(scan).pixel_array[20:60]
    kept, free = (pydicom.dcmread(tmp_path / name / "scan" / "age-90.dcm") for name in ("masked", "free"))
    values = [image.pixel_array * float(image.RescaleSlope) + float(image.RescaleIntercept) for image in (kept, free)]
    step = max(float(image.RescaleSlope) for image in (kept, free))
    assert np.abs(values[0][20:60] - original).max() <= step
    assert np.abs(values[1][20:60] - original).max() > 20 * step
    assert np.abs(values[0][75:] - values[1][75:]).max() <= 2 * step
    assert kept.SOPInstanceUID != free.SOPInstanceUID
    changes = [row.split(",")[-1] for row in (tmp_path / "masked/scan/sweep_age.csv").read_text().splitlines()[3:]]
    assert all(float(change) > 0 for change in changes)
    difference = np.asarray(Image.open(tmp_path / "masked/scan/age-90_difference.png"))
    assert (difference[20:60] == difference[20, 0]).all()  # no difference where the scan is kept
    assert (difference != difference[20, 0]).any()


def test_a_mask_that_does_not_fit_is_named(run: GenerateRunner, scan: Path, tmp_path: Path) -> None:
    for shape, fill, words in (((50, 50), 255, "50 x 50"), ((110, 100), 0, "0 everywhere")):
        Image.fromarray(np.full(shape, fill, np.uint8)).save(tmp_path / "mask.png")
        options = ["--target", "age=80", "--source", SOURCE, "--preserve-mask", tmp_path / "mask.png"]
        code, printed = run("edit", "--input", scan, *options, "--out", tmp_path / "out")
        assert (code, words in printed, "mask.png" in printed) == (2, True, True)


def test_several_seeds_give_their_mean_each_sample_and_their_deviation(
    run: GenerateRunner, scan: Path, tmp_path: Path
) -> None:
    options = ["--input", scan, "--target", "age=80", "--source", SOURCE, "--guidance-scale", 3]
    code, printed = run("edit", *options, "--editor", "ddpm", "--num-seeds", 3, "--out", tmp_path / "out")
    assert code == 0, printed
    folder = tmp_path / "out" / "scan"
    samples = [np.asarray(Image.open(folder / f"age-80_seed-{seed}.png")).astype(float) for seed in range(3)]
    assert not (samples[0] == samples[1]).all()
    mean = np.asarray(Image.open(folder / "age-80.png")).astype(float)
    inside = np.all([(sample > 0) & (sample < 255) for sample in samples], axis=0)  # where no picture was clipped
    assert np.abs(np.mean(samples, axis=0) - mean)[inside].max() <= 1
    assert (folder / "age-80_uncertainty.png").exists()
    record = json.loads((folder / "record.json").read_text())
    assert record["seeds"] == [0, 1, 2]
    by_seed = record["counterfactuals"][0]["biomarkers_mm2_by_seed"]
    assert [set(biomarkers) for biomarkers in by_seed] == [{"ventricles"}] * 3


@pytest.mark.slow
def test_extrapolation_causes_a_warning_and_biomarkers_are_in_the_record(
    run: GenerateRunner, release: Path, scan: Path, tmp_path: Path
) -> None:
    small = read_release(release)
    site = {"visits": 9, "patients": 4, "coverage": [55.0, 80.0, 0.0, 1.0, 1.0, 1.0]}
    rounds = [{"round": 1, "counted": True, "sites": {"aster": site}, "left_out": {}}]
    folder = tmp_path / "covered"
    content = ReleaseContent(small.base_digest, small.state, small.drift, rounds=rounds)
    write_release(folder, small.study, small.modality, content)
    targets = ["--target", "age=75", "--target", "age=90,diagnosis=AD"]
    options = ["--input", scan, *targets, "--source", "age=70,sex=F,diagnosis=CN", "--out"]
    code, printed = run("edit", *options, tmp_path / "out", release=folder)
    assert (code, "warning: age 90" in printed) == (0, True)
    record = json.loads((tmp_path / "out" / "scan" / "record.json").read_text())
    assert [line.partition(":")[0] for line in record["warnings"]] == ["age 90", "diagnosis AD"]
    measured = [record["biomarkers_mm2"]["reconstruction"]]
    measured += [entry["biomarkers_mm2"] for entry in record["counterfactuals"]]
    assert all(set(biomarkers) == {"ventricles"} for biomarkers in measured)
    code, printed = run("sample", "--source", "age=90,sex=F,diagnosis=CN", "--out", tmp_path / "drawn", release=folder)
    assert (code, "warning: age 90" in printed) == (0, True)
    code, printed = run("edit", *options, tmp_path / "unknown")
    assert (code, "warning: the release does not say" in printed, "guidance_scale" in printed) == (0, True, False)
    code, printed = run("edit", *options, tmp_path / "strong", "--guidance-scale", 50)
    assert (code, "warning: guidance_scale 50" in printed) == (0, True)


def test_a_folder_that_cannot_be_written_is_one_line(run: GenerateRunner, scan: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    options = ["--input", scan, "--target", "age=80", "--source", SOURCE]
    code, printed = run("edit", *options, "--out", tmp_path / "file" / "out")
    assert (code, "--out" in printed, "file/out" in printed, printed.count("\n")) == (2, True, True, 1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_one_line(run: GenerateRunner, scan: Path, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    options = ["--input", scan, "--target", "age=80", "--source", SOURCE]
    code, printed = run("edit", *options, "--out", tmp_path / "closed" / "out")
    assert (code, "--out" in printed, printed.count("\n")) == (2, True, 1)
