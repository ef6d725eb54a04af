"""`ld-generate --batch`: good rows are drawn, bad ones say why, and what was drawn is not drawn again."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from ld_common.core.errors import RequestError
from ld_generate import batch
from ld_generate.batch import read_rows
from tests.conftest import write_mr_slice
from tests.generate.test_generate import release, run  # noqa: F401  (a fixture)

HEADER = "input,set,given\n"
GIVEN = '"sex=F,diagnosis=CN,age=74"'


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    for number in range(3):
        pixels = np.zeros((110, 100), np.uint16)
        pixels[20:90, 20:80] = np.random.default_rng(number).integers(300, 900, (70, 60))
        write_mr_slice(tmp_path / f"scan{number}.dcm", pixels)
    (tmp_path / "words.dcm").write_text("no scan at all")
    return tmp_path


def table(folder: Path, *rows: str) -> Path:
    path = folder / "rows.csv"
    path.write_text(HEADER + "".join(f"{row}\n" for row in rows))
    return path


def outcomes(out: Path) -> list[str]:
    return [row["outcome"] for row in csv.DictReader((out / "batch.csv").read_text().splitlines())]


def test_a_bad_row_does_not_end_the_others(
    release: Path,  # noqa: F811
    scans: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = table(
        scans,
        f"scan0.dcm,age=84;sex=M,{GIVEN}",
        f"words.dcm,age=84,{GIVEN}",
        f"scan1.dcm,age=200,{GIVEN}",
        f"absent.dcm,age=80,{GIVEN}",
        f"scan1.dcm,,{GIVEN}",
        "scan1.dcm,age=80,sex=F",
        f"scan2.dcm,age=80,{GIVEN}",
        "scan2.dcm,age=80,sex=F,diagnosis=CN",
    )
    out = scans / "out"
    code, said = run(capsys, "--release", release, "--batch", rows, "--out", out)
    assert code == 1
    assert "drew 2 of 8 rows" in said.replace("\n", " ")
    found = outcomes(out)
    assert [one == "drawn" for one in found] == [True, False, False, False, False, False, True, False]
    assert "put quotes round" in found[7]
    warned = [row["warnings"] for row in csv.DictReader((out / "batch.csv").read_text().splitlines())]
    assert ["does not say what its sites" in one for one in warned] == [one == "drawn" for one in found]
    assert "within 18 to 100" in found[2]
    assert "lacks its input or its set" in found[4]
    assert "does not say age, diagnosis" in found[5]
    assert {path.name for path in (out / "00001_scan0.dcm").glob("*.dcm")} == {"age-84.dcm", "sex-M.dcm"}
    assert (out / "00007_scan2.dcm" / "age-80.png").exists()
    assert not (out / "00002_words.dcm").exists()


def test_what_was_drawn_is_not_drawn_again_and_what_changed_is(
    release: Path,  # noqa: F811
    scans: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[list[str]] = []
    run_edits = batch.run_edits

    def counted(model: object, own: object, questions: list[batch.EditRequest], *rest: object) -> object:
        drawn.append([question.path.name for question in questions])
        return run_edits(model, own, questions, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(batch, "run_edits", counted)
    common = ["--release", release, "--out", scans / "out", "--batch"]
    first = table(scans, f"scan0.dcm,age=84,{GIVEN}", f"scan1.dcm,age=84,{GIVEN}")
    assert run(capsys, *common, first)[0] == 0
    assert drawn == [["scan0.dcm", "scan1.dcm"]]
    assert run(capsys, *common, first)[0] == 0
    assert len(drawn) == 1
    (scans / "out" / "00001_scan0.dcm" / "record.json").unlink()
    second = table(scans, f"scan0.dcm,age=84,{GIVEN}", f"scan1.dcm,age=85,{GIVEN}", f"scan2.dcm,age=84,{GIVEN}")
    assert run(capsys, *common, second)[0] == 0
    assert drawn[1:] == [["scan0.dcm", "scan1.dcm", "scan2.dcm"]]
    assert outcomes(scans / "out") == ["drawn"] * 3


def test_nothing_of_an_earlier_table_stays_in_a_row_s_folder(
    release: Path,  # noqa: F811
    scans: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for edit, left in (("age=84", {"age-84.dcm"}), ("sex=M", {"sex-M.dcm"}), ("age=500", set())):
        run(capsys, "--release", release, "--batch", table(scans, f"scan0.dcm,{edit},{GIVEN}"), "--out", scans / "out")
        assert {path.name for path in (scans / "out" / "00001_scan0.dcm").glob("*.dcm")} == left


def test_where_a_group_fails_its_rows_are_drawn_one_by_one(
    release: Path,  # noqa: F811
    scans: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_edits = batch.run_edits

    def picky(model: object, own: object, questions: list[batch.EditRequest], *rest: object) -> object:
        if any(question.path.name == "scan1.dcm" for question in questions):
            raise RequestError("not this one")
        return run_edits(model, own, questions, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(batch, "run_edits", picky)
    rows = table(scans, *(f"scan{number}.dcm,age=84,{GIVEN}" for number in range(3)))
    assert run(capsys, "--release", release, "--batch", rows, "--out", scans / "out")[0] == 1
    assert outcomes(scans / "out") == ["drawn", "not this one", "drawn"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("input\nscan.dcm\n", "no column 'set'"),
        ("input,set,colour\nscan.dcm,age=84,red\n", "mean nothing here: colour"),
        ("input,set\n", "has no row"),
        ("", "no column 'input'"),
    ],
)
def test_a_table_that_is_none_is_named(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(content)
    with pytest.raises(RequestError, match=words):
        read_rows(path)


def test_a_table_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot read the table"):
        read_rows(tmp_path / "absent.csv")


@pytest.mark.parametrize("option", [["--seeds", 2], ["--slice", 0], ["--set", "age=80"], ["--drift", "0"]])
def test_what_a_batch_would_not_heed_is_refused(
    release: Path,  # noqa: F811
    scans: Path,
    capsys: pytest.CaptureFixture[str],
    option: list[object],
) -> None:
    rows = table(scans, f"scan0.dcm,age=84,{GIVEN}")
    code, said = run(capsys, "--release", release, "--batch", rows, "--out", scans / "out", *option)
    assert (code, "--batch says itself" in said) == (2, True)
