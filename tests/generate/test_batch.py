"""`ld-generate batch`: good rows are drawn, bad ones give a reason, and finished rows are not drawn again."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from ld_common.core.errors import RequestError
from ld_generate import batch
from ld_generate.batch_table import read_rows
from tests.conftest import write_mr_slice
from tests.support.releases import SOURCE, GenerateRunner

HEADER = "input,target,source\n"
ATTRIBUTES = '"sex=F,diagnosis=CN,age=74"'


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


def lines_of(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out / "batch.csv").read_text().splitlines()))


def outcomes(out: Path, column: str = "outcome") -> list[str]:
    """A cell of each row, which may have several lines."""
    return list({line["row"]: line[column] for line in lines_of(out)}.values())


def test_a_bad_row_does_not_end_the_others(
    run: GenerateRunner,
    scans: Path,
) -> None:
    rows = table(
        scans,
        f"scan0.dcm,age=84;sex=M,{ATTRIBUTES}",
        f"words.dcm,age=84,{ATTRIBUTES}",
        f"scan1.dcm,age=200,{ATTRIBUTES}",
        f"absent.dcm,age=80,{ATTRIBUTES}",
        f"scan1.dcm,,{ATTRIBUTES}",
        "scan1.dcm,age=80,sex=F",
        f"scan2.dcm,age=80,{ATTRIBUTES}",
        "scan2.dcm,age=80,sex=F,diagnosis=CN",
    )
    out = scans / "out"
    code, printed = run("batch", rows, "--out", out)
    assert code == 1
    assert "drew 2 of 8 rows" in printed.replace("\n", " ")
    results = outcomes(out)
    assert [result == "drawn" for result in results] == [True, False, False, False, False, False, True, False]
    assert "put quotes round" in results[7]
    warned = outcomes(out, "warnings")
    assert ["extrapolation" in line for line in warned] == [result == "drawn" for result in results]
    assert "within 18 to 100" in results[2]
    assert "lacks its input or its target" in results[4]
    assert "does not say age, diagnosis" in results[5]
    assert {path.name for path in (out / "00001_scan0.dcm").glob("*.dcm")} == {"age-84.dcm", "sex-M.dcm"}
    assert (out / "00007_scan2.dcm" / "age-80.png").exists()
    assert not (out / "00002_words.dcm").exists()


def test_batch_csv_has_a_line_with_the_areas_of_each_answer(run: GenerateRunner, scans: Path) -> None:
    out = scans / "out"
    rows = table(scans, f"scan0.dcm,age=84;sex=M,{ATTRIBUTES}", f"scan1.dcm,age=200,{ATTRIBUTES}")
    for _ in range(2):  # what was drawn is read again
        run("batch", rows, "--out", out)
        first, second, failed = lines_of(out)
        record = json.loads((out / first["folder"] / "record.json").read_text())
        for line, entry in zip((first, second), record["counterfactuals"], strict=True):
            area, before = entry["biomarkers_mm2"]["ventricles"], record["biomarkers_mm2"]
            assert float(line["ventricles_mm2"]) == pytest.approx(area, rel=1e-5)
            assert float(line["ventricles_change_mm2"]) == pytest.approx(area - before["scan"]["ventricles"], abs=0.1)
            from_reconstruction = area - before["reconstruction"]["ventricles"]
            assert float(line["ventricles_change_from_reconstruction_mm2"]) == pytest.approx(
                from_reconstruction, abs=0.1
            )
            assert (out / line["folder"] / line["file"]).exists()
        assert (first["target_age"], second["target_age"]) == ("84", first["source_age"])
        assert (first["target_sex"], second["target_sex"]) == (first["source_sex"], "M")
        assert failed["ventricles_mm2"] == ""


def test_what_was_drawn_is_not_drawn_again_and_what_changed_is(
    run: GenerateRunner,
    scans: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[list[str]] = []
    run_edits = batch.run_edits

    def counted(model: object, release: object, requests: list[batch.EditRequest], *rest: object) -> object:
        drawn.append([request.path.name for request in requests])
        return run_edits(model, release, requests, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(batch, "run_edits", counted)
    common = ["--out", scans / "out"]
    first = table(scans, f"scan0.dcm,age=84,{ATTRIBUTES}", f"scan1.dcm,age=84,{ATTRIBUTES}")
    assert run("batch", first, *common)[0] == 0
    assert drawn == [["scan0.dcm", "scan1.dcm"]]
    assert run("batch", first, *common)[0] == 0
    assert len(drawn) == 1
    (scans / "out" / "00001_scan0.dcm" / "record.json").unlink()
    second = table(
        scans, f"scan0.dcm,age=84,{ATTRIBUTES}", f"scan1.dcm,age=85,{ATTRIBUTES}", f"scan2.dcm,age=84,{ATTRIBUTES}"
    )
    assert run("batch", second, *common)[0] == 0
    assert drawn[1:] == [["scan0.dcm", "scan1.dcm", "scan2.dcm"]]
    assert outcomes(scans / "out") == ["drawn"] * 3


def test_nothing_of_an_earlier_table_stays_in_a_row_s_folder(
    run: GenerateRunner,
    scans: Path,
) -> None:
    for edit, left in (("age=84", {"age-84.dcm"}), ("sex=M", {"sex-M.dcm"}), ("age=500", set())):
        run("batch", table(scans, f"scan0.dcm,{edit},{ATTRIBUTES}"), "--out", scans / "out")
        assert {path.name for path in (scans / "out" / "00001_scan0.dcm").glob("*.dcm")} == left


def test_where_a_group_fails_its_rows_are_drawn_one_by_one(
    run: GenerateRunner,
    scans: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_edits = batch.run_edits

    def picky(model: object, release: object, requests: list[batch.EditRequest], *rest: object) -> object:
        if any(request.path.name == "scan1.dcm" for request in requests):
            raise RequestError("not this one")
        return run_edits(model, release, requests, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(batch, "run_edits", picky)
    rows = table(scans, *(f"scan{number}.dcm,age=84,{ATTRIBUTES}" for number in range(3)))
    assert run("batch", rows, "--out", scans / "out")[0] == 1
    assert outcomes(scans / "out") == ["drawn", "not this one", "drawn"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("input\nscan.dcm\n", "no column 'target'"),
        ("input,target,colour\nscan.dcm,age=84,red\n", "unknown columns: colour"),
        ("input,set\nscan.dcm,age=84\n", "'set' is now called 'target'"),
        ("input,target\n", "has no row"),
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


def test_json_lists_every_row_and_the_results_of_those_that_were_drawn(run: GenerateRunner, scans: Path) -> None:
    rows = table(scans, f"scan0.dcm,age=84,{ATTRIBUTES}", f"words.dcm,age=84,{ATTRIBUTES}")
    code, out, _ = run.streams("batch", rows, "--out", scans / "out", "--json")
    printed = json.loads(out)
    assert (code, [row["outcome"] == "drawn" for row in printed["rows"]]) == (1, [True, False])
    (result,) = printed["results"]
    assert set(result["counterfactuals"][0]["biomarkers_mm2"]) == {"ventricles"}


@pytest.mark.parametrize("option", [["--num-seeds", 2], ["--slice", 0], ["--target", "age=80"], ["--drift", "0"]])
def test_options_of_single_scans_are_refused(run: GenerateRunner, scans: Path, option: list[object]) -> None:
    rows = table(scans, f"scan0.dcm,age=84,{ATTRIBUTES}")
    code, printed = run("batch", rows, "--source", SOURCE, "--out", scans / "out", *option)
    assert (code, str(option[0]) in printed) == (2, True)
