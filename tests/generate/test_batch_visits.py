"""`ld-generate batch` with several rows a patient: those before a row are its history."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from ld_generate import batch
from tests.support.releases import GenerateRunner, write_scan

HEADER = ["input", "target", "source", "patient", "date"]
WHO = "sex=F,diagnosis=CN"


class Table:
    """A table of scans in a folder, and what a batch made of it."""

    def __init__(self, folder: Path, run: GenerateRunner, release: Path) -> None:
        self.folder, self.run, self.release = folder, run, release

    def scan(self, name: str, date: str = "", patient: str = "P1", age: str = "") -> str:
        elements = {"StudyDate": date, "PatientID": patient, "PatientAge": age}
        write_scan(self.folder / name, **{key: value or None for key, value in elements.items()})
        return name

    def draw(self, *rows: list[str], header: list[str] = HEADER, options: tuple[str, ...] = ()) -> list[str]:
        """The outcome of each row."""
        path, out = self.folder / "rows.csv", self.folder / "out"
        with path.open("w", newline="") as stream:
            csv.writer(stream).writerows([header, *rows])
        self.code, self.printed = self.run("batch", path, "--source", WHO, *options, "--out", out, release=self.release)
        with (out / "batch.csv").open(newline="") as stream:
            self.outcomes = list(csv.DictReader(stream))
        return [outcome["outcome"] for outcome in self.outcomes]

    def years(self, row: int) -> list[float]:
        """How long before the scan of a row, from 1, each visit of its history was."""
        record = json.loads((self.folder / "out" / self.outcomes[row - 1]["folder"] / "record.json").read_text())
        return [round(visit["years_before"], 1) for visit in record["history"]]


@pytest.fixture
def table(tmp_path: Path, run: GenerateRunner, longitudinal: Path) -> Table:
    return Table(tmp_path, run, longitudinal)


def test_rows_of_a_patient_are_drawn_with_the_visits_before_them(table: Table) -> None:
    for year, age in ((2014, 68), (2016, 70), (2020, 74)):
        table.scan(f"{year}.dcm", f"{year}0101", age=f"0{age}Y")
    table.scan("other.dcm", "20150101", "P2", "080Y")
    drawn = table.draw(
        ["2020.dcm", "age=84", "", "one", ""],
        ["2014.dcm", "", "", "one", ""],
        ["2016.dcm", "age=80", "age=70", "one", "2016-01-01"],
        ["other.dcm", "age=84", "", "two", ""],
        ["other.dcm", "age=85", "", "", ""],
        ["2016.dcm", "age=84", "", "one", ""],
    )
    assert drawn == ["drawn", "visit", "drawn", "drawn", "drawn", "drawn"], table.printed
    assert table.code == 0
    assert "drew 5 of 5 rows, and read 1 visits without a target" in " ".join(table.printed.split())
    assert [table.years(row) for row in (1, 3, 4, 5, 6)] == [[6.0, 4.0], [2.0], [], [], [2.0]]
    assert not (table.folder / "out/00002_2014.dcm").exists()


def test_scans_without_dates_are_put_in_order_by_the_table(table: Table) -> None:
    for name in ("a.dcm", "b.dcm", "c.dcm"):
        table.scan(name, patient="")
    drawn = table.draw(
        ["a.dcm", "", "age=70.5", "one", ""],
        ["b.dcm", "age=84", "age=74", "one", ""],
        ["c.dcm", "age=84", "age=72", "one", ""],
        ["a.dcm", "age=84", "age=71", "two", "2016-01-01"],
        ["b.dcm", "age=84", "age=74", "two", "2019-01-01"],
    )
    assert drawn == ["visit", "drawn", "drawn", "drawn", "drawn"], table.printed
    assert [table.years(row) for row in (2, 3, 4, 5)] == [[3.5, 2.0], [1.5], [], [3.0]]


@pytest.mark.slow
def test_rows_that_contradict_each_other_are_refused_by_their_numbers(table: Table) -> None:
    table.scan("now.dcm", "20200101")
    table.scan("before.dcm", "20160101")
    table.scan("again.dcm", "20160101")
    table.scan("stranger.dcm", "20140101", "P2")
    table.scan("undated.dcm", patient="")
    now = ["now.dcm", "age=84", "age=74", "one", ""]
    undated = ["undated.dcm", "age=84", "age=74", "one"]
    for rows, row, words in (
        ([now, ["before.dcm", "", "", "one", ""], ["again.dcm", "", "", "one", ""]], 0, "rows 2 and 3 of one patient"),
        ([now, ["before.dcm", "", "", "one", "2016-01-02"]], 1, "2016-01-02 in the table and another one in the file"),
        ([now, ["before.dcm", "", "", "one", "2016-01-02"]], 0, "row 2 of the same patient cannot be used"),
        ([now, ["before.dcm", "", "age=60", "one", ""]], 0, "contradicts the dates"),
        ([now, ["stranger.dcm", "", "", "one", ""]], 0, "different Patient IDs"),
        ([now, ["undated.dcm", "", "", "one", ""]], 0, "do not say which was first"),
        ([now, ["undated.dcm", "", "age=74", "one", ""]], 0, "have the age 74"),
        ([now, ["undated.dcm", "", "", "one", "1 May"]], 1, "write it as YYYY-MM-DD"),
        ([now, ["absent.dcm", "", "", "one", ""]], 0, "row 2 of the same patient cannot be used"),
        ([[*undated, "2019-01-01"], [*undated, "2019-02-01"]], 0, "give one scan two dates"),
        ([["now.dcm", "age=84", "age=74", "", "2020-01-01"]], 0, "a date and no patient"),
        ([["now.dcm", "", "age=74", "", ""]], 0, "lacks its input or its target"),
    ):
        outcome = table.draw(*([*cells] for cells in rows))[row]
        assert words in outcome, (rows, table.outcomes)
        assert table.code == 1
        assert not any(secret in outcome for secret in ("P1", "P2", "2016-01-01"))
    header = [*HEADER, "history"]
    (outcome,) = table.draw([*now, "before.dcm"], header=header)
    assert "a patient and a history" in outcome


def test_a_scan_after_a_row_cannot_spoil_it(table: Table) -> None:
    table.scan("now.dcm", "20200101")
    drawn = table.draw(
        ["now.dcm", "age=84", "age=74", "one", "2020-01-01"], ["absent.dcm", "", "", "one", "2021-01-01"]
    )
    assert drawn[0] == "drawn"
    assert "absent.dcm" in drawn[1]


@pytest.mark.slow
def test_a_row_is_drawn_again_when_a_visit_before_it_changed(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    for year in (2014, 2016, 2018, 2020):
        table.scan(f"{year}.dcm", f"{year}0101")
    drawn: list[list[str]] = []
    run_edits = batch.run_edits

    def counted(model: object, release: object, requests: list[batch.EditRequest], *rest: object) -> object:
        drawn.append([request.path.name for request in requests])
        return run_edits(model, release, requests, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(batch, "run_edits", counted)
    rows = [
        ["2018.dcm", "age=84", "age=72", "one", "2018-01-01"],
        ["2020.dcm", "age=84", "age=74", "one", "2020-01-01"],
        ["2016.dcm", "", "", "one", "2016-01-01"],
    ]
    assert table.draw(*rows) == ["drawn", "drawn", "visit"]
    assert table.draw(*rows) == ["drawn", "drawn", "visit"]
    assert drawn == [["2018.dcm", "2020.dcm"]]
    rows[0][1] = "age=80"  # what is asked of an earlier visit is nothing to a later one
    table.draw(*rows)
    assert drawn[1:] == [["2018.dcm"]]
    table.draw(*rows, ["2014.dcm", "", "", "one", "2014-01-01"])
    assert drawn[2:] == [["2018.dcm", "2020.dcm"]]
    assert [table.years(row) for row in (1, 2)] == [[4.0, 2.0], [6.0, 4.0, 2.0]]


def test_an_editor_without_histories_says_so_for_the_rows_that_have_one(table: Table) -> None:
    table.scan("now.dcm", "20200101")
    table.scan("before.dcm", "20160101")
    rows = [["now.dcm", "age=84", "age=74", "one", ""], ["before.dcm", "age=84", "age=70", "one", ""]]
    drawn = table.draw(*rows, options=("--editor", "ddim", "num_inference_steps=2"))
    assert "takes no history" in drawn[0]
    assert drawn[1] == "drawn"
