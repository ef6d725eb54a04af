"""The forms in which a site's table may come: without dates, with days, in several files, with labels in columns."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ld_client.data.exclusions import Exclusion, Reason
from ld_client.data.table import ENTRY, Table, TableRow, Time
from ld_client.data.table_paths import FileNames, extract
from ld_client.data.table_reading import read_table
from ld_client.data_config import ColumnsConfig, DataConfig, JoinedConfig, RuleConfig
from ld_client.site_config import SiteConfig, load_modality, load_site
from ld_common.core.errors import ConfigError, TableError
from tests.conftest import BRAIN_MRI

CHEST = BRAIN_MRI.with_name("chest_radiograph.yaml")
DATE = datetime.date

Load = Callable[..., SiteConfig]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Writes a table and a site's config with this `data`, as text or as a mapping, and loads it."""

    def write(table: str | bytes, data: dict[str, Any] | str, modality: Path = BRAIN_MRI) -> SiteConfig:
        (tmp_path / "table.csv").write_bytes(table if isinstance(table, bytes) else table.encode())
        content = {"site": "aster", "modality": str(modality), "base_model": "base", "store": "store"}
        parts = {"root": "scans", "table": "table.csv"} | (yaml.safe_load(data) if isinstance(data, str) else data)
        (tmp_path / "site.yaml").write_text(yaml.safe_dump(content | {"data": parts}))
        return load_site(tmp_path / "site.yaml")

    return write


def exclusions(table: Table) -> dict[str, Exclusion]:
    assert len({exclusion.name for exclusion in table.exclusions}) == len(table.exclusions)
    return {exclusion.name: exclusion for exclusion in table.exclusions}


def by_line(table: Table) -> dict[int, TableRow]:
    return {row.line: row for row in table.rows()}


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


# values as people and YAML write them


@pytest.mark.parametrize(
    ("values", "cells"),
    [
        ("{1: M, 2: F}", ["1", "2.0"]),
        ("{1.0: M, '2': F}", ["1", "2"]),
        ("{'0,5': M, 1: F}", ["0,5", "1,0"]),
        ("{No: M, Yes: F}", ["No", "YES"]),
        ("{off: M, true: F}", ["off", "True"]),
        ("{No: M, yes: F, 'NO': F}", ["No", "NO"]),
    ],
)
def test_numbers_and_yaml_s_booleans_are_keys_of_values(values: str, cells: list[str], load: Load) -> None:
    data = f"{{columns: {{date: '', attributes: {{sex: sex}}}}, values: {{sex: {values}}}}}"
    site = load(f"patient;sex\nA;{cells[0]}\nB;{cells[1]}\n", data)
    table = read_table(site.data)
    rows = [table.by_patient[patient][ENTRY] for patient in "AB"]
    assert [site.data.values["sex"][row.cells["sex"]] for row in rows] == ["M", "F"]


@pytest.mark.parametrize(
    ("value", "words"), [("No", "put quotes round No"), ("", "'0' has no value"), ("[M]", "'0' has no value")]
)
def test_what_is_no_word_of_the_modality_is_refused(value: str, words: str, load: Load) -> None:
    with pytest.raises(ConfigError, match=rf"data\.values\.sex: {words}"):
        load("patient,sex\n", f"{{values: {{sex: {{0: {value}}}}}}}")


def test_a_number_with_leading_zeros_is_a_word(load: Load) -> None:
    site = load("patient,date,sex\nA,2020-01-01,007\n", "{columns: {attributes: {sex: sex}}, values: {sex: {'7': M}}}")
    assert by_line(read_table(site.data))[2].cells == {"sex": "007"}


def test_decimal_commas_are_read_and_words_with_commas_are_left(load: Load) -> None:
    site = load(
        "patient;date;age;sex\nA;2020-01-01;74,5;1,5\nB;2020-01-01;1.234,5;x, y\n",
        "{columns: {attributes: {age: age, sex: sex}}, values: {sex: {'1,5': M}}}",
    )
    rows = by_line(read_table(site.data))
    assert [rows[line].cells for line in (2, 3)] == [{"age": "74.5", "sex": "1,5"}, {"age": "1.234,5", "sex": "x, y"}]


# encodings


def test_a_row_with_a_needed_cell_of_another_encoding_is_excluded(load: Load) -> None:
    content = "patient;date;sex;note\nMüller;2020-01-01;F;x\nMeier;2020-01-01;F;schön\n".encode("windows-1252")
    columns = {"columns": {"attributes": {"sex": "sex"}}}
    table = read_table(load(content, columns).data)
    assert (list(by_line(table)), exclusions(table)["row 2"].reason) == ([3], Reason.BROKEN_ROW)
    assert "data.encoding" in exclusions(table)["row 2"].detail
    table = read_table(load(content, columns | {"encoding": "windows-1252"}).data)
    assert [row.patient for row in table.rows()] == ["Müller", "Meier"]
    with pytest.raises(ConfigError, match="windows-1252"):
        load(content, {"encoding": "utf-16"})


def test_a_column_of_another_encoding_says_what_to_do(load: Load) -> None:
    with pytest.raises(TableError, match=r"no column 'größe'.*data\.encoding"):
        read_table(load("patient,date,größe\n".encode("latin-1"), {"columns": {"attributes": {"age": "größe"}}}).data)


# time


def test_a_table_without_dates_has_one_visit_of_each_patient(load: Load) -> None:
    site = load("patient,sex\nA,F\nB,F\nB,M\nC,M\nC,M\nC,M\n", {"columns": {"date": "", "attributes": {"sex": "sex"}}})
    table = read_table(site.data)
    assert (table.time, [row.patient for row in table.rows()]) == (Time.NONE, ["A", "C"])
    reasons = {name: exclusion.reason for name, exclusion in exclusions(table).items()}
    assert reasons == {
        "row 3": Reason.NO_PATIENT_OR_DATE,
        "row 4": Reason.NO_PATIENT_OR_DATE,
        "row 6": Reason.DUPLICATE,
        "row 7": Reason.DUPLICATE,
    }
    assert "2 rows of the patient have no date" in exclusions(table)["row 3"].detail


def test_only_a_table_without_the_usual_column_of_dates_is_taken_for_one_without_dates(load: Load) -> None:
    table = read_table(load("patient,age\nA,74\n", {"columns": {"attributes": {"age": "age"}}}).data)
    assert (table.time, len(table.rows())) == (Time.NONE, 1)
    assert "each patient has one visit" in table.notes[0]
    site = load("patient,age\nA,74\n", {"columns": {"date": "seen", "attributes": {"age": "age"}}})
    with pytest.raises(TableError, match=r"no column 'seen'.*without dates set data\.columns\.date to \"\""):
        read_table(site.data)


def test_days_since_entry_stand_in_place_of_dates(load: Load) -> None:
    site = load("patient;day\nA;129\nA;-30\nA;757.0\nA;12,5\nA;\nA;2020-01-01\n", {"columns": {"day": "day"}})
    table = read_table(site.data)
    days = [(row.date - ENTRY).days for row in sorted(table.rows(), key=lambda row: row.date)]
    assert (table.time, days) == (Time.DAY, [-30, 129, 757])
    assert {exclusion.detail for exclusion in table.exclusions} == {"'day' is no whole number of days"}
    assert [exclusion.name for exclusion in table.exclusions] == ["row 5", "row 6", "row 7"]
    row, distance = table.nearest("A", ENTRY + datetime.timedelta(days=40))
    assert (row and row.line, distance) == (3, 70)


def test_a_date_column_that_is_called_days_may_hold_them(load: Load) -> None:
    table = read_table(load("patient,days_to_visit\nA,129\nA,757\n", {"columns": {"date": "days_to_visit"}}).data)
    assert (table.time, table.exclusions) == (Time.DAY, [])
    for header, cell in (("visit", "129"), ("birthday", "129"), ("day_of_visit", "2020-01-01")):
        table = read_table(load(f"patient,{header}\nA,{cell}\nA,130\n", {"columns": {"date": header}}).data)
        assert table.time is Time.DATE
        assert "set data.columns.day" in exclusions(table)["row 3"].detail


def test_a_series_without_a_file_is_matched_only_where_there_is_no_choice(load: Load) -> None:
    days = read_table(load("patient,day\nA,129\nB,0\nB,700\nC,x\nC,5\n", {"columns": {"day": "day"}}).data)
    undated = read_table(load("patient,sex\nA,F\nB,F\nB,M\n", {"columns": {"date": ""}}).data)
    first, second = DATE(2019, 3, 4), DATE(2021, 3, 4)
    for table in (days, undated):
        row = table.match("A", first, [first, first], 0)
        assert isinstance(row, TableRow)
        assert row.line == 2
        assert "scans of 2 dates" in str(table.match("A", first, [first, second], 10_000))
        assert "no row of this patient" in str(table.match("Z", first, [first], 0))
    assert "days since entry" in str(days.match("B", first, [first], 0))
    assert "data.columns.file" in str(days.match("B", first, [first, second], 0))
    assert "2 rows" in str(days.match("C", first, [first], 0))  # one of them cannot be used
    assert isinstance(undated.match("B", first, [first], 0), TableRow)  # nothing that is read differs


def test_a_series_of_a_dated_table_is_matched_by_its_date(load: Load) -> None:
    table = read_table(load("patient,date\nA,2019-03-04\nA,2021-03-04\nB,soon\n", {}).data)
    row = table.match("A", DATE(2021, 3, 1), [DATE(2021, 3, 1)], 3)
    assert isinstance(row, TableRow)
    assert row.line == 3
    assert "3 days away" in str(table.match("A", DATE(2021, 3, 1), [], 2))
    assert "none of the patient's rows can be used" in str(table.match("B", DATE(2021, 3, 1), [], 2))


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"day": "d", "date": "seen"}, "date and day"),
        ({"patient": ""}, "patient is empty"),
        ({"date": "", "age_at_baseline": "AGE"}, "needs data.columns.date or day"),
        ({"day": "d", "age_at_baseline": "AGE", "baseline_date": "x"}, "baseline_date needs"),
        ({"age_at_baseline": "AGE", "attributes": {"age": "AGE"}}, "name one of them"),
    ],
)
def test_columns_that_contradict_each_other_are_refused(columns: dict[str, Any], words: str, load: Load) -> None:
    with pytest.raises(ConfigError, match=words):
        load("patient\n", {"columns": columns})


@pytest.mark.parametrize("date_format", ["%d.%d.%Y", "%Q", "%"])
def test_a_format_that_is_none_is_refused_before_the_table_is_read(date_format: str, load: Load) -> None:
    with pytest.raises(ConfigError, match=r"data\.date_format"):
        load("patient,date\n", {"date_format": date_format})


# the age of ADNIMERGE and of OASIS-3's demographics


MERGE = (
    "PTID,EXAMDATE,EXAMDATE_bl,AGE\n"
    "A,2006-09-08,2005-09-08,74.3\nA,2005-09-08,2005-09-08,74.3\nA,2009-09-10,2005-09-08,\n"
    "B,2006-03-06,2005-09-05,80\nB,2007-03-06,2005-09-05,81\nC,2006-03-06,2005-09-05,old\n"
)


def ages(table: Table) -> dict[int, str]:
    return {line: row.cells["age"] for line, row in by_line(table).items()}


def test_age_at_baseline_and_the_time_since_make_the_age(load: Load) -> None:
    columns = {"patient": "PTID", "date": "EXAMDATE", "age_at_baseline": "AGE"}
    table = read_table(load(MERGE, {"columns": columns}).data)
    assert ages(table) == {2: "75.3", 3: "74.3", 4: "78.31", 7: "old"}
    assert [exclusion.reason for exclusion in table.exclusions] == [Reason.CONFLICTING_ROWS] * 2
    assert "'AGE' differs between the patient's rows" in exclusions(table)["row 5"].detail
    table = read_table(load(MERGE, {"columns": columns, "where": {"EXAMDATE": "2009-09-10"}}).data)
    assert ages(table) == {4: "78.31"}  # the first date is that of the table, not of the rows that are used


def test_baseline_may_be_a_column_or_day_0(load: Load) -> None:
    columns = {"patient": "PTID", "date": "EXAMDATE", "age_at_baseline": "AGE", "baseline_date": "EXAMDATE_bl"}
    rows = ["A,2006-09-08,2005-09-08,74.3", "B,2006-01-01,2005-01-01,70", "B,2007-01-01,2006,70", ""]
    late = "\n".join(["PTID,EXAMDATE,EXAMDATE_bl,AGE", *rows])
    assert ages(read_table(load(late, {"columns": columns}).data))[2] == "75.3"
    moved = late.replace("2006,70", "2006-01-01,70")
    table = read_table(load(moved, {"columns": columns}).data)
    assert "'EXAMDATE_bl' differs" in exclusions(table)["row 3"].detail
    table = read_table(load("patient,day,AGE\nA,731,65\n", {"columns": {"day": "day", "age_at_baseline": "AGE"}}).data)
    assert ages(table) == {2: "67"}


def test_age_at_baseline_needs_a_modality_with_an_age(load: Load, tmp_path: Path) -> None:
    (tmp_path / "modality.yaml").write_text(
        'prompt_template: "a brain, {sex}"\nattributes: {sex: {categories: {F: a, M: b}}}'
    )
    site = load(MERGE, {"columns": {"age_at_baseline": "AGE"}}, tmp_path / "modality.yaml")
    with pytest.raises(ConfigError, match=r"age_at_baseline names 'age', which brain_mri lacks"):
        load_modality(site)


# several tables


CLINICAL = (
    "OASISID,days_to_visit,label\nP1,0,P1_d0000\nP1,722,P1_d0722\nP2,400,P2_d0400\nP3,10,P3_d0010\nP4,1,P4_d0001\n"
)
DEMOGRAPHICS = "OASISID;AgeatEntry;GENDER;EDUC\nP1;65,15;2;12\nP2;67,21;1;18\nP2;67,21;1;19\nP4;50;1;x\nP4;50;2;x\n"
JOINED = {
    "columns": {
        "patient": "OASISID",
        "day": "days_to_visit",
        "age_at_baseline": "AgeatEntry",
        "attributes": {"sex": "GENDER"},
    },
    "joined": [{"table": "demographics.csv", "by": {"OASISID": "OASISID"}}],
}


def test_columns_of_a_second_table_are_joined(load: Load, tmp_path: Path) -> None:
    (tmp_path / "demographics.csv").write_text(DEMOGRAPHICS)
    table = read_table(load(CLINICAL, JOINED).data)
    rows = by_line(table)
    assert [rows[line].cells for line in (2, 3, 4, 5)] == [
        {"sex": "2", "age": "65.15"},
        {"sex": "2", "age": "67.13"},
        {"sex": "1", "age": "68.31"},  # two rows of the second table agree in all that is read
        {"sex": "", "age": ""},  # no row
    ]
    (exclusion,) = table.exclusions
    assert (exclusion.name, exclusion.reason) == ("row 6", Reason.CONFLICTING_ROWS)
    assert "rows 5 and 6 of demographics.csv" in exclusion.detail


def test_a_joined_table_has_its_own_encoding_and_broken_rows(load: Load, tmp_path: Path) -> None:
    (tmp_path / "more.csv").write_bytes("id;sex\nMüller;F\nMeier;M;x\n".encode("latin-1"))
    joined = {"table": "more.csv", "by": {"patient": "id"}, "encoding": "latin-1"}
    columns = {"date": "", "attributes": {"sex": "sex"}}
    table = read_table(load("patient\nMüller\nMeier\n", {"columns": columns, "joined": [joined]}).data)
    assert [row.cells["sex"] for row in table.rows()] == ["F", ""]
    assert exclusions(table)["row 3 of more.csv"].reason is Reason.BROKEN_ROW


def test_columns_of_the_same_name_are_told_by_a_prefix(load: Load, tmp_path: Path) -> None:
    (tmp_path / "more.csv").write_text("patient,visit,sex\nA,1,F\nA,2,M\n")
    main = "patient,visit,date,sex\nA,2,2020-01-01,unknown\n"
    joined = {"table": "more.csv", "by": {"patient": "patient", "visit": "visit"}}
    columns = {"attributes": {"sex": "sex"}}
    with pytest.raises(TableError, match=r"'sex' comes from data\.joined\.0 and data\.table: set a prefix"):
        read_table(load(main, {"columns": columns, "joined": [joined]}).data)
    data = {"columns": {"attributes": {"sex": "more sex"}}, "joined": [joined | {"prefix": "more "}]}
    assert by_line(read_table(load(main, data).data))[2].cells == {"sex": "M"}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"joined": [{"table": "more.csv", "by": {"patient": "ident"}}]}, r"no column 'ident'.*'id'"),
        ({"joined": [{"table": "more.csv", "by": {"patiant": "id"}}]}, r"no column 'patiant' \(data\.joined\.0\.by"),
        ({"joined": [{"table": "absent.csv", "by": {"patient": "id"}}]}, "absent.csv"),
        ({"where": {"sx": "F"}}, r"no column 'sx' \(data\.where"),
        ({"rules": {"sex": [{"where": {"sx": 1}, "value": "F"}]}}, r"no column 'sx' \(data\.rules\.sex"),
        ({"extract": {"path": "{a}"}}, r"no column 'path' \(data\.extract"),
        ({"extract": {"sex": "{patient}"}}, "'patient' comes from data.extract.sex and data.table"),
        ({"file_pattern": "{label}/*.nii"}, r"no column 'label' \(data\.file_pattern"),
    ],
)
def test_columns_that_are_not_there_are_named_by_their_key(
    data: dict[str, Any], words: str, load: Load, tmp_path: Path
) -> None:
    (tmp_path / "more.csv").write_text("id,sex\nA,F\n")
    with pytest.raises(TableError, match=words):
        read_table(load("patient,date,sex\nA,2020-01-01,F\n", data).data)


def test_no_option_is_a_word_that_yaml_reads_as_a_boolean() -> None:
    for schema in (DataConfig, ColumnsConfig, JoinedConfig, RuleConfig):
        names = [entry.name for entry in dataclasses.fields(schema)]
        assert list(yaml.safe_load("\n".join(f"{name}: 1" for name in names))) == names


def test_a_joined_table_needs_columns_to_join_it_by(load: Load) -> None:
    with pytest.raises(ConfigError, match="has no `by`"):
        load("patient\n", {"joined": [{"table": "more.csv"}]})


# which rows, and what they say


TRAIN = """\
Path,Sex,Age,Frontal/Lateral,No Finding,Cardiomegaly
CheXpert/train/patient1/study1/view1_frontal.jpg,Female,68,Frontal,1.0,
CheXpert/train/patient2/study2/view1_frontal.jpg,Female,87,Frontal,,-1.0
CheXpert/train/patient2/study2/view2_lateral.jpg,Female,87,Lateral,,1.0
CheXpert/train/patient3/study1/view1_frontal.jpg,Male,50,Frontal,0.0,1.0
CheXpert/train/patient3/study1/view2_lateral.jpg,Male,50,Lateral,,
odd.jpg,Male,50,Frontal,,1.0
"""
CHEXPERT = r"""
columns: {date: "", file: Path, attributes: {age: Age, sex: Sex}}
extract: {Path: "CheXpert/*/{patient}/{study}/*"}
where: {Frontal/Lateral: Frontal}
rules:
  diagnosis:
    - {where: {Cardiomegaly: 1}, value: HF}
    - {where: {No Finding: 1, Cardiomegaly: [0, ""]}, value: CN}
"""


def test_chexpert_s_table_is_read_as_it_comes(load: Load) -> None:
    site = load(TRAIN, CHEXPERT, CHEST)
    load_modality(site)
    table = read_table(site.data)
    told = {row.patient: (row.cells["diagnosis"], row.cells["sex"], row.cells["age"]) for row in table.by_file.values()}
    assert told == {
        "patient1": ("CN", "Female", "68"),
        "patient2": ("", "Female", "87"),  # uncertain
        "patient3": ("HF", "Male", "50"),
    }
    excluded = exclusions(table)
    assert set(excluded) == {"table, data.where.Frontal/Lateral", "row 7"}
    filtered = excluded["table, data.where.Frontal/Lateral"]
    assert (filtered.files, filtered.reason) == (0, Reason.ROW_NOT_SELECTED)
    assert filtered.detail == "2 rows are not Frontal/Lateral = Frontal"
    assert excluded["row 7"].reason is Reason.NO_PATIENT_OR_DATE
    lateral = table.left_out["CheXpert/train/patient3/study1/view2_lateral.jpg"]
    assert lateral[0] is Reason.ROW_NOT_SELECTED  # and not: no row names this file
    assert table.left_out["odd.jpg"] == (Reason.NO_PATIENT_OR_DATE, "row 7: no patient")


def test_filters_take_one_cell_or_several(load: Load) -> None:
    rows = "patient,date,view,field\nA,2020-01-01,PA,3\nB,2020-01-01,AP,1.5\nC,2020-01-01,LL,3\nD,2020-01-01,PA,3.0\n"
    table = read_table(load(rows, "{where: {view: [PA, AP], field: 3}}").data)
    assert [row.patient for row in table.rows()] == ["A", "D"]
    assert sorted(exclusion.detail for exclusion in table.exclusions) == [
        "1 row is not field = 3",
        "1 row is not view = PA or AP",
    ]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("{rules: {diagnosis: [{where: {a: 1}, value: FLU}]}}", "diagnosis=FLU is not a known value"),
        ("{rules: {diagnose: [{where: {a: 1}, value: CN}]}}", "did you mean 'diagnosis'"),
        ("{rules: {diagnosis: [{value: CN}]}}", "has no `where`"),
        ("{rules: {diagnosis: [{where: {a: 1}}]}}", "value"),
        ("{rules: {sex: [{where: {a: 1}, value: F}]}, values: {sex: {w: F}}}", "stands beside"),
        ("{columns: {file: a}, file_pattern: '{b}'}", "columns.file and file_pattern"),
        ("{extract: {a: '{b}/{b}'}}", r"data\.extract\.a is '\{b\}/\{b\}'"),
    ],
)
def test_rules_that_cannot_be_meant_are_refused(data: str, words: str, load: Load) -> None:
    with pytest.raises(ConfigError, match=words):
        load_modality(load("patient,date\n", data, CHEST))


def test_rows_that_disagree_or_cannot_be_used_say_so_of_their_file(load: Load) -> None:
    rows = "patient,date,file\nA,2020-01-01,a.nii\nB,2020-01-01,a.nii\nC,soon,.\\c//d.nii\nD,2020-01-01,e.nii,x\n"
    table = read_table(load(rows, {"columns": {"file": "file"}}).data)
    reasons = {file: reason for file, (reason, _) in table.left_out.items()}
    assert reasons == {
        "a.nii": Reason.CONFLICTING_ROWS,
        "c/d.nii": Reason.NO_PATIENT_OR_DATE,
        "e.nii": Reason.BROKEN_ROW,
    }
    assert table.by_file == {}


# files


def test_a_row_s_file_is_found_by_a_pattern_of_its_cells(load: Load, tmp_path: Path) -> None:
    touch(
        tmp_path / "scans",
        *("P1_d0129/anat2/NIFTI/sub-P1_T1w.nii.gz", "P1_d0129/anat3/NIFTI/sub-P1_T2w.nii.gz"),
        *("P2_d0371/anat1/NIFTI/a_T1w.nii.gz", "P2_d0371/anat2/NIFTI/b_T1w.nii.gz"),
        *("P[4]/anat1/NIFTI/a_T1w.nii.gz", "P4/anat1/NIFTI/a_T1w.nii.gz", "P5/.hidden/NIFTI/a_T1w.nii.gz"),
    )
    rows = "patient,date,label\n" + "".join(
        f"{label[:2] or 'P6'},2020-01-01,{label}\n"
        for label in ("P1_d0129", "P2_d0371", "P3_d0001", "P[4]", "P5", "../scans/P4", "")
    )
    table = read_table(load(rows, {"file_pattern": "{label}/anat*/**/*_T1w.nii.gz"}).data)
    assert {file: row.line for file, row in table.by_file.items()} == {
        "P1_d0129/anat2/NIFTI/sub-P1_T1w.nii.gz": 2,
        "P[4]/anat1/NIFTI/a_T1w.nii.gz": 5,  # a cell is no pattern
    }
    excluded = exclusions(table)
    assert {name: exclusion.reason for name, exclusion in excluded.items()} == {
        "row 3": Reason.SEVERAL_FILES,
        **{f"row {line}": Reason.NO_SCAN for line in (4, 6, 7, 8)},
    }
    assert excluded["row 3"].detail.startswith("2 files match")
    assert excluded["row 4"].detail == "0 files match data.file_pattern"
    assert table.left_out["P2_d0371/anat1/NIFTI/a_T1w.nii.gz"][0] is Reason.SEVERAL_FILES


def test_a_pattern_extracts_what_stands_between_slashes() -> None:
    assert extract("{a}_MR_d{day}", "OAS30001_MR_d0129") == {"a": "OAS30001", "day": "0129"}
    assert extract("**/{name}.nii", "x/y/z.nii") == {"name": "z"}
    assert extract("**/{name}.nii", "z.nii") == {"name": "z"}
    assert extract("{a}/*", "x/y/z") is None
    assert extract("a.c", "abc") is None
    assert extract("{a}", "x" * 5000) is None


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("sub/b.nii.gz", "sub/B.NII.gz"),
        ("/srv/scans/data/sub/c.nii.gz", "sub/c.nii.gz"),
        ("data/sub/e.nii.gz", "sub/e.nii.gz"),
        ("sub/f", "sub/f.nii.gz"),
        ("SUB/F.NII", "sub/f.nii.gz"),
        ("P2/ses-1/T1w.nii.gz", "p2/ses-1/T1w.nii"),
        ("P3/T1w.nii.gz", "p3/ses-1/T1w.nii"),
        ("sub/g.nii.gz", ""),
    ],
)
def test_the_file_nearest_to_a_path_that_is_none(name: str, nearest: str) -> None:
    sub = ["sub/a b.nii.gz", "sub/B.NII.gz", "sub/c.nii.gz", "sub/e.nii.gz", "sub/f.nii.gz", "other/c.nii.gz"]
    names = FileNames([*sub, "p1/ses-1/T1w.nii", "p2/ses-1/T1w.nii", "p3/ses-1/T1w.nii"])
    assert names.nearest(name) == nearest
