"""The importer of plain trees, and what every import writes and refuses."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from ld_client.cli import app
from ld_client.layouts.base import LayoutImport
from ld_client.layouts.entries import LayoutVisit
from ld_client.layouts.registry import LAYOUTS
from ld_client.site_config import load_site
from ld_common.core.errors import ConfigError, LdError, TableError
from ld_simulations.benchmarks.scans.layout_trees import lines, put
from tests.conftest import write_mr_slice
from tests.support.layouts import BRAIN, import_tree

ALL_HEALTHY = ("--value", "diagnosis=CN")
PEOPLE = lines(("patient", "age", "sex", "diagnosis"), ("A", "70,5", "w", "CN"), ("B", 80, "M", "AD")).replace(
    ",5", ".5"
)


def series(folder: Path, patient: str, date: str, description: str, start: int = 0, **elements: object) -> None:
    """Two slices of a series."""
    for place in range(start, start + 2):
        write_mr_slice(
            folder / f"{place}.dcm",
            np.eye(4, dtype=np.uint16),
            PatientID=patient,
            StudyDate=date,
            SeriesDescription=description,
            PatientAge="070Y",
            PatientSex="F",
            **elements,
        )


def test_nifti_by_path_and_a_table_of_patients(tmp_path: Path) -> None:
    scans = ["A/2020-01-01/t1.nii.gz", "A/20220101/t1.nii.gz", "B/2020-05-05_10_00_00.0/t1.nii.gz"]
    others = ["B/someday/t1.nii.gz", "C/2020-01-01/t1.nii.gz", "deep/B/2020-01-01/t1.nii.gz", "notes.txt"]
    root = put(tmp_path / "tree", dict.fromkeys([*scans, *others], ""))
    table = put(tmp_path, {"people.csv": PEOPLE}) / "people.csv"
    options = ("--table", str(table), "--pattern", "{patient}/{date}/*.nii.gz", "--map", "sex:w=F")
    done = import_tree("tree", root, tmp_path / "out", *options)
    assert [(visit["date"], visit["age"], visit["sex"]) for visit in done.visits] == [
        ("2020-01-01", "70.5", "F"),
        ("2022-01-01", "70.5", "F"),
        ("2020-05-05", "80", "M"),
    ]
    assert [visit["file"] for visit in done.visits] == scans
    assert [done.why(name) for name in others] == [
        "no date or day",
        "no table row",
        "image outside the layout",
        "not a scan",
    ]
    assert done.summary["contradictions"] == {"the same age at visits more than 400 days apart": 1}
    grown = import_tree("tree", root, tmp_path / "grown", *options, "--baseline-age")
    assert [visit["age"] for visit in grown.visits] == ["70.5", "72.5", "80"]


def test_days_in_the_path_and_a_table_of_visits_joined_by_day(tmp_path: Path) -> None:
    root = put(tmp_path / "tree", dict.fromkeys(["A/d0000/a.png", "A/d0900/a.png", "A/d2000/a.png"], ""))
    rows = [("A", 0, 70, "F", "CN"), ("A", 880, 72.5, "F", "AD"), ("A", 1500, 74, "M", "AD")]
    table = put(tmp_path, {"visits.csv": lines(("id", "when", "age", "sex", "diagnosis"), *rows)}) / "visits.csv"
    options = ("--pattern", "{patient}/{day}/a.png", "--column", "patient=id", "--column", "day=when")
    done = import_tree("tree", root, tmp_path / "out", *options, "--table", str(table), "--tolerance-days", "30")
    assert [(visit["day"], visit["age"], visit["diagnosis"]) for visit in done.visits] == [
        ("0", "70", "CN"),
        ("900", "72.5", "AD"),
    ]
    assert done.why("A/d2000/a.png") == "no table row near enough"
    assert done.why("visits.csv row 4") == "row without a scan"
    site = yaml.safe_load((tmp_path / "out/site.yaml").read_text())
    assert site["data"]["columns"] == {
        "patient": "patient",
        "date": "",
        "day": "day",
        "file": "file",
        "attributes": {"age": "age", "diagnosis": "diagnosis", "sex": "sex"},
    }


def test_dicom_by_its_headers(tmp_path: Path) -> None:
    root = tmp_path / "pacs"
    series(root / "1/t1", "A", "20200101", "T1 MPRAGE")
    series(root / "1/t2", "A", "20200101", "T2 TSE")
    series(root / "2", "A", "20220101", "T1 MPRAGE")
    series(root / "3", "B", "", "T1 MPRAGE")
    series(root / "4", "B", "20200101", "T1 MPRAGE", SeriesInstanceUID="1.2.3")
    series(root / "4", "B", "20200101", "T2 TSE", start=2, SeriesInstanceUID="1.2.4")
    write_mr_slice(root / "5/ct.dcm", np.eye(4, dtype=np.uint16), Modality="CT")
    put(root, {"6/a.nii.gz": "", "readme.txt": "a", "7/broken.dcm": "DICM"})
    table = put(tmp_path, {"t.csv": lines(("ptid", "diagnosis"), ("A", "CN"), ("B", "AD"), ("Z", "AD"))}) / "t.csv"
    done = import_tree("tree", root, tmp_path / "out", "--table", str(table), "--series", "T1*")
    assert [(visit["patient"], visit["date"], visit["file"]) for visit in done.visits] == [
        ("A", "2020-01-01", "1/t1"),
        ("A", "2022-01-01", "2"),
        ("B", "2020-01-01", ""),
    ]
    # two series share a folder: the index matches the row by header, and knows which series is meant
    site = yaml.safe_load((tmp_path / "out/site.yaml").read_text())["data"]
    assert site["series"] == {"description": "T1*"}
    assert site["columns"]["attributes"] == {"diagnosis": "diagnosis"}
    assert "age: from the DICOM headers, by ld-client index" in done.summary["statements"]
    assert done.reasons() == {
        "another kind of scan": (5, 0),
        "no date or day": (2, 0),
        "image outside the layout": (1, 0),
        "row without a scan": (0, 1),
        "not a scan": (2, 0),
    }
    both = import_tree("tree", root, tmp_path / "both", "--table", str(table))
    assert [visit["file"] for visit in both.visits] == ["2"]
    assert both.reasons()["several scans of one visit"] == (8, 0)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--pattern", "{date}/*.nii"), "patient"),
        (("--pattern", "{patient}/{visit}/*.nii"), "{visit}"),
        (("--pattern", "{patient}/*.dcm"), "slash"),
        (("--column", "patient=nobody"), "nobody"),
        (("--table", "absent.csv"), "absent.csv"),
    ],
)
def test_a_tree_that_cannot_be_read_as_told_is_refused(options: tuple[str, ...], word: str, tmp_path: Path) -> None:
    root = put(tmp_path / "tree", {"A/t1.nii": ""})
    values = ("--value", "age=70", "--value", "sex=F", *ALL_HEALTHY)
    with pytest.raises(LdError) as refused:
        import_tree("tree", root, tmp_path / "out", *values, *options)
    assert word in str(refused.value)


def constant(root: Path, out: Path, *options: str, **files: str) -> None:
    put(root, {"A/2020-01-01/t1.nii": "", "A/2021-01-01/t1.nii": "", **files})
    values = ("--value", "age=70", "--value", "sex=F", *ALL_HEALTHY)
    import_tree("tree", root, out, "--pattern", "{patient}/{date}/*.nii", *values, *options)


def test_the_site_file_is_read_by_the_index_and_only_by_its_owner(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    constant(tmp_path / "tree", tmp_path / "out", "--base-model", str(base), "--site", "birch")
    config = load_site(tmp_path / "out/site.yaml")
    assert (config.site, config.base_model) == ("birch", str(base))
    assert Path(config.data.root) == tmp_path / "tree"
    assert Path(config.data.table) == tmp_path / "out/visits.csv"
    assert config.data.columns.file == "file"
    for path in (tmp_path / "out").iterdir():
        assert path.stat().st_mode & 0o077 == 0, path


def test_an_import_is_not_replaced_unless_forced_and_never_lies_in_the_root(tmp_path: Path) -> None:
    constant(tmp_path / "tree", tmp_path / "out")
    before = (tmp_path / "out/visits.csv").read_bytes()
    with pytest.raises(ConfigError, match="--force"):
        constant(tmp_path / "tree", tmp_path / "out")
    assert (tmp_path / "out/visits.csv").read_bytes() == before
    assert (tmp_path / "out/contradictions.csv").is_file() is False  # 366 days
    constant(tmp_path / "tree", tmp_path / "out", "--force", **{"B/2020-01-01/t1.nii": ""})
    assert b"\nB," in (tmp_path / "out/visits.csv").read_bytes()
    for inside in ("tree", "tree/new"):
        with pytest.raises(ConfigError, match="--out"):
            constant(tmp_path / "tree", tmp_path / inside)
    names = sorted(path.relative_to(tmp_path / "tree").as_posix() for path in (tmp_path / "tree").rglob("*.*"))
    assert names == ["A/2020-01-01/t1.nii", "A/2021-01-01/t1.nii", "B/2020-01-01/t1.nii"]


def test_one_file_of_two_visits_and_falling_ages_are_contradictions(tmp_path: Path) -> None:
    root = put(tmp_path / "tree", {"A/2020-01-01/t1.nii": "", "A/2025-01-01/t1.nii": "", "A/2023-01-01/t1.nii": ""})
    (root / "B/2020-01-01").mkdir(parents=True)
    os.link(root / "A/2020-01-01/t1.nii", root / "B/2020-01-01/t1.nii")
    rows = [("A", "2020-01-01", 70, "F"), ("A", "2023-01-01", 66, "F"), ("A", "2025-01-01", 71, "M")]
    table = lines(("patient", "date", "age", "sex"), *rows, ("B", "2020-01-01", 70, "F"))
    options = ("--table", str(put(tmp_path, {"t.csv": table}) / "t.csv"), "--pattern", "{patient}/{date}/t1.nii")
    done = import_tree("tree", root, tmp_path / "out", *options, *ALL_HEALTHY)
    assert len(done.visits) == 4
    assert done.summary["contradictions"] == {
        "one file stands for two visits": 1,
        "age goes down from a visit to a later one": 1,
        "sex changes over the visits": 1,
        "age and time between visits differ by more than 1.5 years": 1,
    }


def test_other_attributes_of_the_modality_come_from_columns_of_their_name(tmp_path: Path) -> None:
    modality = tmp_path / "crp.yaml"
    modality.write_text(
        BRAIN.read_text()
        .replace("  sex:", "  crp: {minimum: 0, maximum: 400, unit: mg/l}\n  sex:")
        .replace("{diagnosis}", "{diagnosis}, CRP {crp}")
    )
    root = put(tmp_path / "tree", dict.fromkeys([f"{who}/t1.nii" for who in "ABCD"], ""))
    rows = [("A", "12 mg/l"), ("B", "12"), ("C", "900"), ("D", "n/a")]
    people = lines(("patient", "CRP", "age", "sex", "diagnosis"), *[(*row, 70, "F", "CN") for row in rows])
    table = put(tmp_path, {"t.csv": people}) / "t.csv"
    options = ("--table", str(table), "--pattern", "{patient}/t1.nii")
    done = import_tree("tree", root, tmp_path / "out", *options, modality=modality)
    # a number with its unit stays for the index to judge
    assert [visit["crp"] for visit in done.visits] == ["12 mg/l", "12"]
    assert done.reasons() == {"value out of range": (1, 0), "missing value": (1, 0)}


def test_the_text_summary_shows_what_was_read_left_out_and_contradictory(tmp_path: Path) -> None:
    root = put(tmp_path / "tree", dict.fromkeys(["A/2020-01-01/t1.nii", "A/2023-01-01/t1.nii", "x.nii"], ""))
    table = put(tmp_path, {"people.csv": PEOPLE}) / "people.csv"
    options = ["--pattern", "{patient}/{date}/*.nii", "--table", str(table), "--map", "sex:w=F"]
    command = ["import", "tree", str(root), "--out", str(tmp_path / "out"), "--modality", str(BRAIN), *options]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    for part in (
        "1 patients, 2 visits",
        "'w' is F (2)",
        "image outside the layout",
        "CONTRADICTIONS",
        "--baseline-age",
    ):
        assert part in result.output
    assert "next: ld-client index --config" in result.output


def test_another_package_can_add_a_layout(tmp_path: Path) -> None:
    def two(run: LayoutImport) -> None:
        run.add(LayoutVisit("A", "a.nii", {"age": "70", "sex": "F", "diagnosis": "CN"}, day=0))

    LAYOUTS.register("two", two)
    try:
        done = import_tree("two", put(tmp_path / "tree", {"a.nii": "", "b.nii": ""}), tmp_path / "out")
    finally:
        LAYOUTS.unregister("two")
    assert [visit["file"] for visit in done.visits] == ["a.nii"]
    assert done.why("b.nii") == "image outside the layout"


def test_linked_and_hidden_folders_are_said_not_to_be_read(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere", {"2020-01-01/t1.nii": ""})
    root = put(tmp_path / "tree", {".git/x": "", "A/2020-01-01/t1.nii": ""})
    (root / "B").symlink_to(tmp_path / "elsewhere")
    values = ("--value", "age=70", "--value", "sex=F", *ALL_HEALTHY)
    done = import_tree("tree", root, tmp_path / "out", "--pattern", "{patient}/{date}/*.nii", *values)
    assert done.why("B") == "file that cannot be used"
    assert "1 hidden files and folders are not looked at" in done.summary["statements"]


def test_nothing_that_becomes_a_visit_is_an_error_with_the_reasons_at_hand(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="left_out"):
        constant(tmp_path / "tree", tmp_path / "out", "--series", "nothing")
    assert (tmp_path / "out/left_out.csv").read_text().count("another kind of scan") == 2
    assert not (tmp_path / "out/site.yaml").exists()
