"""A table, its scans' headers and a patient's visits that cannot all be true never train unseen."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
from nibabel.nifti1 import Nifti1Image

from ld_client.cli import app
from ld_client.data.exclusions import Exclusion, Reason
from ld_client.data.ingest import read_visits, survey
from ld_client.data.store_index import INDEX
from ld_client.site_config import load_modality, load_site
from ld_common.core.command import run_cli
from ld_common.core.errors import ConfigError
from tests.conftest import HEADER, PLANTED_ROWS, write_table, write_visit

BERT = [row for row in PLANTED_ROWS if row.startswith("PLANTED-BERT")]


def ingest(site_yaml: Path, *overrides: str) -> tuple[int, list[Exclusion], dict[str, int], list[str]]:
    """Number of visits, the exclusions, the accepted kinds, and the doubts as text."""
    site = load_site(site_yaml, list(overrides))
    found = survey(site, load_modality(site), bytes(32), lambda *_: None)
    entries = list(read_visits(found))
    excluded = [*found.exclusions, *(one for one in entries if isinstance(one, Exclusion))]
    doubts = [f"{one.kind}: {one.detail}" for one in found.contradictions.doubts if one.kind != "short-stack"]
    return len(entries) - (len(excluded) - len(found.exclusions)), excluded, dict(found.contradictions.accepted), doubts


def rewrite(site_yaml: Path, patient: str, date: str, **elements: Any) -> None:
    shutil.rmtree(site_yaml.parent / "scans" / patient.lower() / date)
    write_visit(site_yaml.parent / "scans", patient, date, **elements)


@pytest.mark.parametrize(
    ("kind", "elements", "words"),
    [
        ("sex", {"PatientSex": "F"}, "F in the header and M in row 7"),
        ("age", {"PatientAge": "055Y"}, "55 years in the header and 80 in row 7"),
    ],
)
def test_a_header_that_says_another_thing_than_the_table_leaves_the_scan_out(
    kind: str, elements: dict[str, str], words: str, site_yaml: Path
) -> None:
    rewrite(site_yaml, "PLANTED-CARL", "2020-11-12", **elements)
    visits, (one,), accepted, _ = ingest(site_yaml)
    assert (visits, one.reason, one.files, accepted) == (5, Reason.CONTRADICTION, 3, {})
    assert words in one.detail
    assert f"data.accept: [{kind}]" in one.detail
    assert ingest(site_yaml, f"data.accept=[{kind}]") == (6, [], {kind: 1}, [])


def test_a_rounded_age_and_the_other_half_of_a_year_are_no_contradiction(site_yaml: Path) -> None:
    rewrite(site_yaml, "PLANTED-CARL", "2020-11-12", PatientAge="079Y", PatientSex="M")
    assert ingest(site_yaml)[:2] == (6, [])


def test_a_patient_of_two_sexes_is_left_out_whole(site_yaml: Path) -> None:
    write_table(site_yaml, [row.replace("69,Male", "69,Female") for row in PLANTED_ROWS])
    visits, excluded, _, _ = ingest(site_yaml)
    assert (visits, [one.reason for one in excluded]) == (4, [Reason.CONTRADICTION] * 2)
    assert "sex-over-visits: the patient is F and M" in excluded[0].detail
    assert ingest(site_yaml, "data.accept=[sex-over-visits]")[:3] == (6, [], {"sex-over-visits": 1})


def test_ages_that_stand_still_are_kept_and_said(site_yaml: Path) -> None:
    write_table(site_yaml, [row.replace(",69,", ",66,") for row in PLANTED_ROWS])
    for file in (site_yaml.parent / "scans/planted-bert").rglob("*.dcm"):
        file.unlink()
    for row in BERT:
        write_visit(site_yaml.parent / "scans", "PLANTED-BERT", row.split(",")[1], PatientBirthDate=None)
    visits, excluded, _, (doubt,) = ingest(site_yaml)
    assert (visits, excluded) == (6, [])
    assert doubt.startswith("age-over-visits: +0.0 years of age in 3.0 years")
    assert "data.columns.age_at_baseline" in doubt
    assert ingest(site_yaml, "data.accept=[age-over-visits]")[2:] == ({"age-over-visits": 1}, [])


@pytest.fixture
def by_file(site_yaml: Path) -> Path:
    """A site whose table names the folder of each series."""
    site_yaml.write_text(site_yaml.read_text().replace("date: seen", "date: seen\n    file: path"))
    rows = [f"{row},{row.split(',')[0].lower()}/{row.split(',')[1]}" for row in PLANTED_ROWS]
    write_table(site_yaml, rows, f"{HEADER},path")
    return site_yaml


def test_a_row_may_name_the_folder_of_a_series(by_file: Path) -> None:
    assert ingest(by_file)[:2] == (6, [])


@pytest.mark.parametrize(
    ("kind", "elements"), [("patient", {"PatientID": "PLANTED-EMIL"}), ("date", {"StudyDate": "20201115"})]
)
def test_a_named_series_of_another_patient_or_date_is_left_out(
    kind: str, elements: dict[str, str], by_file: Path
) -> None:
    rewrite(by_file, "PLANTED-CARL", "2020-11-12", **elements)
    visits, (one,), _, _ = ingest(by_file)
    assert (visits, one.reason) == (5, Reason.CONTRADICTION)
    assert one.detail.startswith(f"{kind}: ")
    assert ingest(by_file, f"data.accept=[{kind}]")[0] == 6
    if kind == "date":
        assert ingest(by_file, "data.date_tolerance_days=3")[:2] == (6, [])


def test_two_series_in_a_folder_that_a_row_names_are_ambiguous(by_file: Path) -> None:
    folder = by_file.parent / "scans/planted-carl/2020-11-12/second"
    write_visit(folder, "PLANTED-CARL", "2020-11-12", SeriesDescription="T2")
    visits, excluded, _, _ = ingest(by_file)
    assert (visits, [one.reason for one in excluded]) == (5, [Reason.SEVERAL_SERIES] * 2)
    assert ingest(by_file, "data.series.description=T2")[0] == 1


def test_one_scan_under_two_patients_is_said(by_file: Path) -> None:
    volume = Nifti1Image(np.arange(1000, dtype=np.int16).reshape(10, 10, 10), np.diag([2.0, 2, 2, 1]))
    for name in ("one.nii", "two.nii"):
        nibabel.save(volume, by_file.parent / "scans" / name)
    rows = ["PLANTED-DORA,2020-01-01,60,Female,Normal,one.nii", "PLANTED-EMIL,2020-01-01,60,Male,Normal,two.nii"]
    write_table(by_file, rows, f"{HEADER},path")
    visits, _, _, doubts = ingest(by_file)
    assert (visits, doubts) == (2, ["one-scan: the same scan stands under another patient"] * 2)
    nibabel.save(Nifti1Image(np.ones((10, 10, 10), np.int16), volume.affine), by_file.parent / "scans/two.nii")
    assert ingest(by_file)[3] == []
    (by_file.parent / "scans/two.nii").unlink()
    (by_file.parent / "scans/two.nii").symlink_to("gone.nii")
    visits, excluded, _, _ = ingest(by_file)
    assert visits == 1
    assert any(one.name == "two.nii" and one.reason == Reason.UNREADABLE for one in excluded)


def test_a_spoilt_series_of_another_kind_leaves_its_visit_out(site_yaml: Path) -> None:
    root = site_yaml.parent / "scans"
    write_visit(root / "other", "PLANTED-CARL", "2020-11-12", SeriesNumber=5, SeriesDescription="T2 flair")
    assert ingest(site_yaml)[0] == 5
    write_visit(root / "again", "PLANTED-CARL", "2020-11-12", SeriesNumber=6, EchoTime=9.0)
    shutil.rmtree(root / "other")
    double = root / "planted-carl/2020-11-12/1.dcm"
    copy = pydicom.dcmread(double)  # a second image at one place
    copy.SOPInstanceUID = copy.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    copy.save_as(double.with_name("9.dcm"))
    visits, excluded, _, _ = ingest(site_yaml)
    assert visits == 5
    assert {one.reason for one in excluded} == {Reason.SEVERAL_AT_ONE_PLACE, Reason.SEVERAL_SERIES}


def test_an_aborted_run_does_not_stand_for_its_repeat(site_yaml: Path) -> None:
    folder = site_yaml.parent / "scans/planted-carl/2020-11-12"
    (folder / "2.dcm").unlink()
    write_visit(site_yaml.parent / "scans/again", "PLANTED-CARL", "2020-11-12", SeriesNumber=2)
    visits, excluded, _, _ = ingest(site_yaml)
    assert (visits, {one.reason for one in excluded}) == (5, {Reason.SEVERAL_SERIES})


def test_one_object_under_two_patients_is_said(site_yaml: Path) -> None:
    first = pydicom.dcmread(site_yaml.parent / "scans/planted-anna/2019-03-04/1.dcm")
    path = site_yaml.parent / "scans/planted-carl/2020-11-12/1.dcm"
    second = pydicom.dcmread(path)
    second.SOPInstanceUID = second.file_meta.MediaStorageSOPInstanceUID = first.SOPInstanceUID
    second.save_as(path)
    visits, _, _, doubts = ingest(site_yaml)
    assert (visits, doubts) == (6, ["one-scan: the same scan stands under another patient"] * 2)


def test_odd_names_links_and_closed_folders_end_no_run(
    site_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = site_yaml.parent / "scans"
    (root / os.fsdecode(b"M\xfcller.txt")).write_text("no scan")
    (root / "loop").symlink_to("loop")
    (tmp_path / "elsewhere").mkdir()
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    visits, excluded, _, _ = ingest(site_yaml)
    assert visits == 6
    assert {one.name: one.detail for one in excluded}["linked"].startswith("a link to a folder")
    with pytest.raises(SystemExit) as ended:
        run_cli(app, ["index", "--config", str(site_yaml)])
    assert (ended.value.code or 0) == 0, capsys.readouterr().err


def test_scans_without_a_date_fit_a_table_without_dates(site_yaml: Path) -> None:
    shutil.rmtree(site_yaml.parent / "scans")
    write_visit(site_yaml.parent / "scans", "PLANTED-CARL", "2020-11-12", StudyDate=None, PatientBirthDate=None)
    write_table(site_yaml, ["PLANTED-CARL,80,Male,Dementia"], "subject,years,gender,group")
    assert ingest(site_yaml, "data.columns.date=''")[:2] == (1, [])


def test_a_wrong_kind_is_named(site_yaml: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.accept: sexes: use patient"):
        load_site(site_yaml, ["data.accept=[sexes]"])


def test_the_summary_cannot_be_missed_and_the_index_keeps_what_was_accepted(
    site_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(site_yaml, "PLANTED-CARL", "2020-11-12", PatientSex="F")
    with pytest.raises(SystemExit):
        run_cli(app, ["index", "--config", str(site_yaml), "--accept", "sex", "--accept", "age"])
    said = capsys.readouterr().out
    assert "KEPT, BUT LOOK: short-stack: 6, such as planted-" in said
    assert "kept because data.accept says so: sex 1" in said
    with closing(sqlite3.connect(site_yaml.parent / "store" / INDEX)) as index:
        meta = dict(index.execute("SELECT key, value FROM meta"))
    assert (json.loads(meta["accepted"]), json.loads(meta["doubts"])) == ({"sex": 1}, {"short-stack": 6})
