"""`ld-generate` with a patient's earlier scans."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from ld_common.release.release import read_manifest, write_manifest
from tests.support.releases import SOURCE, GenerateRunner, write_scan


@pytest.fixture
def visits(tmp_path: Path) -> list[Path]:
    """Scans of 2016, 2018 and 2020 of one patient."""
    return [
        write_scan(tmp_path / f"{year}.dcm", StudyDate=f"{year}0101", PatientID="P1") for year in (2016, 2018, 2020)
    ]


def picture(folder: Path) -> bytes:
    return next(folder.glob("age-84.png")).read_bytes()


def test_earlier_scans_change_the_answer_and_are_recorded_without_names(
    run: GenerateRunner, longitudinal: Path, visits: list[Path], tmp_path: Path
) -> None:
    common = ("--allow-unsigned", "--input", visits[2], "--source", SOURCE, "--target", "age=84")
    alone, told = tmp_path / "alone", tmp_path / "told"
    assert run("edit", *common, "--out", alone, release=longitudinal)[0] == 0
    history = ("--history", visits[1], "--history", f"{visits[0]}@70")
    code, output = run("edit", *common, *history, "--out", told, release=longitudinal)
    assert code == 0, output
    record = json.loads((told / "2020/record.json").read_text())
    assert [entry["years_before"] for entry in record["history"]] == [
        pytest.approx(4.0, abs=0.01),
        pytest.approx(2.0, abs=0.01),
    ]
    assert "2016" not in json.dumps(record["history"])
    assert json.loads((alone / "2020/record.json").read_text())["history"] == []
    assert record["edit"]["name"] == "drift"


@pytest.mark.slow
def test_a_sweep_and_a_batch_take_a_history(
    run: GenerateRunner, longitudinal: Path, visits: list[Path], tmp_path: Path
) -> None:
    code, output = run(
        "sweep",
        "age=75:85:5",
        "--allow-unsigned",
        "--input",
        visits[2],
        "--history",
        visits[0],
        "--source",
        SOURCE,
        "--out",
        tmp_path / "sweep",
        release=longitudinal,
    )
    assert code == 0, output
    table = tmp_path / "table.csv"
    with table.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["input", "target", "history"])
        writer.writerow(["2020.dcm", "age=84", "2016.dcm; 2018.dcm@72"])
        writer.writerow(["2020.dcm", "age=84", ""])
        writer.writerow(["2020.dcm", "age=84", "2018.dcm@now"])
    out = tmp_path / "batch"
    code, output = run("batch", table, "--allow-unsigned", "--source", SOURCE, "--out", out, release=longitudinal)
    outcomes = list(csv.DictReader((out / "batch.csv").open()))
    assert [row["outcome"] for row in outcomes[:2]] == ["drawn", "drawn"], output
    assert "is no age" in outcomes[2]["outcome"]
    assert code == 1
    records = [json.loads((out / row["folder"] / "record.json").read_text()) for row in outcomes[:2]]
    assert [len(record["history"]) for record in records] == [2, 0]


def test_what_is_no_history_is_one_clear_sentence(
    run: GenerateRunner, longitudinal: Path, release: Path, visits: list[Path], tmp_path: Path
) -> None:
    other = write_scan(tmp_path / "other.dcm", StudyDate="20180101", PatientID="P2")
    common = ("--allow-unsigned", "--source", SOURCE, "--target", "age=84", "--out", tmp_path / "out")
    one = ("--input", visits[2])
    for arguments, where, words in (
        ((*one, "--history", other), longitudinal, "another patient"),
        ((*one, "--history", f"{visits[0]}@old"), longitudinal, "is no age"),
        ((*one, "--input", visits[1], "--history", visits[0]), longitudinal, "one patient's scan"),
        (("--input", visits[0], "--history", visits[2]), longitudinal, "not earlier"),
        ((*one, "--history", visits[0]), release, "takes no history"),
        ((*one, "--history", visits[0], "--editor", "ddim"), longitudinal, "takes no history"),
    ):
        code, output = run("edit", *common, *arguments, release=where)
        assert code == 2, output
        assert words in " ".join(output.split())


def test_a_short_history_is_said_to_be_one(
    run: GenerateRunner, longitudinal: Path, visits: list[Path], tmp_path: Path
) -> None:
    recent = write_scan(tmp_path / "recent.dcm", StudyDate="20191001", PatientID="P1")
    code, output = run(
        "edit",
        "--allow-unsigned",
        "--input",
        visits[2],
        "--history",
        recent,
        "--source",
        SOURCE,
        "--target",
        "age=84",
        "--out",
        tmp_path / "out",
        release=longitudinal,
    )
    assert code == 0, output
    assert "too short to say" in " ".join(output.split())


def test_what_the_evaluation_says_of_such_edits_is_repeated(
    run: GenerateRunner, longitudinal: Path, visits: list[Path], tmp_path: Path
) -> None:
    judged = tmp_path / "judged"
    shutil.copytree(longitudinal, judged)
    numbers = {"attributes": ["age"], "cases": 25, "gain_db": 6.9, "error_over_same": 1.3, "error_over_same_low": 1.1}
    evaluation = {"edits": {"age_plus_10": numbers, "other_sex": {"attributes": ["sex"], "cases": 25, "gain_db": 5.0}}}
    write_manifest(judged, read_manifest(judged) | {"evaluation": evaluation})
    common = ("--allow-unsigned", "--input", visits[2], "--source", SOURCE, "--target", "age=84")
    code, output = run("edit", *common, "--out", tmp_path / "out", release=judged)
    assert code == 0, output
    record = json.loads((tmp_path / "out/2020/record.json").read_text())
    assert len(record["evaluation"]) == 1
    assert "does not tell who changes faster" in record["evaluation"][0]
    assert "6.9 dB nearer" in " ".join(output.split())
