"""`ld-generate` says, or with `--strict` refuses, what the release's sites had no scans of."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ld_common import CounterfactualPipeline
from ld_common.core.errors import RequestError
from ld_common.diffusion.base_model import BaseModel
from ld_common.imaging.geometry import Scan
from ld_common.imaging.modality import Modality
from ld_common.release.release import read_release
from tests.support.brains import brain, whole_head, write_brain
from tests.support.releases import SOURCE, GenerateRunner

ATTRIBUTES = {"age": 74.0, "sex": "F", "diagnosis": "CN"}


def record(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "record.json").read_text())
    return content


def test_a_scan_like_those_of_the_sites_is_familiar_and_others_are_warned_of(
    run: GenerateRunner, informed: Path, tmp_path: Path
) -> None:
    head = whole_head(500)
    pictures = {"alike": brain(500), "head": head, "inverted": head.max() - head}
    pictures["noise"] = np.random.default_rng(0).integers(0, 900, head.shape).astype(np.uint16)
    inputs = [
        word for name, pixels in pictures.items() for word in ("--input", write_brain(tmp_path / f"{name}.dcm", pixels))
    ]
    common = ("--source", SOURCE, "--target", "age=80", "--out", tmp_path / "out")
    code, output = run("edit", *inputs, *common, release=informed)
    assert code == 0, output
    records = {name: record(tmp_path / "out" / name) for name in pictures}
    assert {name: entry["familiarity"]["unfamiliar"] for name, entry in records.items()} == {
        "alike": False,
        "head": True,
        "inverted": True,
        "noise": True,
    }
    assert records["alike"]["warnings"] == []
    assert "remove the skull" in records["head"]["warnings"][0]
    assert "remove the skull" in " ".join(output.split())
    familiarity = records["alike"]["familiarity"]
    assert all(familiarity[name] < familiarity["limits"][name] for name in ("parts", "outside"))


def test_strict_refuses_before_anything_is_drawn(run: GenerateRunner, informed: Path, tmp_path: Path) -> None:
    alike, head = write_brain(tmp_path / "alike.dcm", brain(501)), write_brain(tmp_path / "head.dcm", whole_head(501))
    out = tmp_path / "out"
    for command, arguments, words in (
        ("edit", ("--input", head, "--target", "age=80"), "unlike the scans"),
        ("edit", ("--input", alike, "--target", "age=95"), "beyond is extrapolated"),
        ("edit", ("--input", alike, "--input", head, "--target", "age=80"), "head.dcm"),
        ("sweep", ("age=60:90:10", "--input", alike), "age 90: the sites had scans of 59"),
    ):
        code, output = run(command, *arguments, "--strict", "--source", SOURCE, "--out", out, release=informed)
        assert (code, out.exists()) == (2, False), output
        assert "--strict refuses" in output
        assert words in " ".join(output.split())
    common = ("--input", alike, "--target", "age=80", "--source", SOURCE, "--out", out)
    assert run("edit", *common, "--strict", release=informed)[0] == 0
    assert record(out / "alike")["warnings"] == []


def test_strict_judges_every_row_of_a_batch(run: GenerateRunner, informed: Path, tmp_path: Path) -> None:
    write_brain(tmp_path / "alike.dcm", brain(502))
    write_brain(tmp_path / "head.dcm", whole_head(502))
    table = tmp_path / "table.csv"
    table.write_text("input,target\nalike.dcm,age=80\nhead.dcm,age=80\nalike.dcm,age=99\n")
    out, common = tmp_path / "out", ("batch", table, "--source", SOURCE, "--out", tmp_path / "out")
    assert run(*common, release=informed)[0] == 0
    assert all((out / f"0000{row}_{name}.dcm").exists() for row, name in enumerate(("alike", "head", "alike"), 1))
    assert run(*common, "--strict", release=informed)[0] == 1
    outcomes = [row["outcome"] for row in csv.DictReader((out / "batch.csv").open())]
    assert outcomes[0] == "drawn"
    assert "unlike the scans" in outcomes[1]
    assert "extrapolated" in outcomes[2]
    assert not (out / "00002_head.dcm").exists()


@pytest.mark.slow
def test_strict_judges_a_volume_by_the_slice_that_was_trained_on(
    run: GenerateRunner, informed: Path, tmp_path: Path
) -> None:
    for name, slice_pixels in (("alike", brain(503)), ("head", whole_head(503))):
        (tmp_path / name).mkdir()
        for number in range(3):
            write_brain(tmp_path / name / f"{number}.dcm", slice_pixels, ImagePositionPatient=[0, 0, 9.0 * number])
    common = ("--strict", "--source", SOURCE, "--target", "age=80", "--out", tmp_path / "out")
    code, output = run("volume", "--input", tmp_path / "head", *common, release=informed)
    assert code == 2 and "unlike the scans" in " ".join(output.split()), output
    code, output = run("volume", "--input", tmp_path / "alike", "--slices", "0:2", *common, release=informed)
    assert code == 2 and "others are extrapolated" in " ".join(output.split()), output
    assert not (tmp_path / "out").exists()
    code, output = run("volume", "--input", tmp_path / "alike", *common, release=informed)
    assert code == 0, output
    assert record(tmp_path / "out/alike")["familiarity"]["unfamiliar"] is False


def test_an_earlier_scan_is_judged_too(run: GenerateRunner, informed: Path, tmp_path: Path) -> None:
    now = write_brain(tmp_path / "now.dcm", brain(504), StudyDate="20200101")
    before = write_brain(tmp_path / "before.dcm", whole_head(504), StudyDate="20160101")
    common = ("--input", now, "--history", f"{before}@70", "--source", SOURCE, "--target", "age=80")
    code, output = run("edit", *common, "--out", tmp_path / "out", release=informed)
    assert code == 0, output
    assert "an earlier scan is unlike the scans" in " ".join(output.split())
    assert run("edit", *common, "--strict", "--out", tmp_path / "strict", release=informed)[0] == 2


def test_a_release_without_a_longitudinal_drift_says_nothing_of_scans(
    run: GenerateRunner, release: Path, tmp_path: Path
) -> None:
    scan = write_brain(tmp_path / "head.dcm", whole_head(505))
    common = ("--input", scan, "--source", SOURCE, "--target", "age=80", "--out", tmp_path / "out")
    code, output = run("edit", *common)
    assert code == 0, output
    assert record(tmp_path / "out/head")["familiarity"] is None
    code, output = run("edit", *common, "--strict")  # it does not say its ranges either
    assert code == 2 and "extrapolation cannot be detected" in " ".join(output.split())


def test_the_pipeline_warns_and_refuses_too(
    informed: Path, model: BaseModel, brain_mri: Modality, tmp_path: Path
) -> None:
    release = read_release(informed)
    alike, head = (Scan(pixels.astype(np.float32), (1.9, 1.9), {}) for pixels in (brain(506), whole_head(506)))
    pipe = CounterfactualPipeline(model, brain_mri, drift=release.drift, release=release)  # type: ignore[arg-type]
    result = pipe(head, ATTRIBUTES, target={"age": 80}, editor="drift")
    assert result.unfamiliarity is not None and result.unfamiliarity.unfamiliar
    assert "unlike the scans" in result.warnings[0]
    result.save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/result.json").read_text())["familiarity"]["unfamiliar"] is True
    pipe.strict = True
    for scan, target, words in ((head, 80, "unlike the scans"), (alike, 99, "extrapolated")):
        with pytest.raises(RequestError, match=words):
            pipe(scan, ATTRIBUTES, target={"age": target}, editor="drift")
    assert pipe(alike, ATTRIBUTES, target={"age": 80}, editor="drift").warnings == []
    with pytest.raises(RequestError, match="nothing says"):
        CounterfactualPipeline(model, brain_mri, drift=release.drift, strict=True)(  # type: ignore[arg-type]
            alike, ATTRIBUTES, target={"age": 80}, editor="drift"
        )
