"""Importers of brain data sets: BIDS, OASIS-3 and ADNI as they come, nothing picked or dropped without a line."""

from __future__ import annotations

from pathlib import Path

import pytest

from ld_common.core.errors import ConfigError, TableError
from ld_simulations.benchmarks.scans.layout_trees import adni_tree, bids_scan, bids_tree, lines, oasis3_tree, put
from tests.support.layouts import BRAIN, CASES, Imported, import_tree


def values(visits: list[dict[str, str]], *columns: str) -> list[tuple[str, ...]]:
    return [tuple(visit[column] for column in columns) for visit in visits]


def test_bids_reads_sessions_before_participants_and_dates_of_both_tables(tmp_path: Path) -> None:
    done = import_tree("bids", bids_tree(tmp_path / "bids"), tmp_path / "out")
    assert values(done.visits, "patient", "date", "age", "sex", "diagnosis") == [
        ("sub-01", "1900-01-01", "70.5", "F", "CN"),
        ("sub-01", "1902-07-01", "70.5", "F", "CN"),
        ("sub-02", "1900-01-01", "61", "M", "AD"),
        ("sub-02", "1902-01-01", "63", "M", "AD"),
    ]
    assert done.visits[1]["file"] == bids_scan("01", "2")
    # the one age of sub-01 at visits 30 months apart is seen, the growing one of sub-02 is none
    assert done.summary["contradictions"] == {"the same age at visits more than 400 days apart": 1}
    assert "sub-01" in (tmp_path / "out/contradictions.csv").read_text()
    assert done.summary["words"]["diagnosis"] == {"HC": "CN (2)", "2": "AD (2)"}


def test_bids_adds_the_time_since_the_first_visit_only_when_told(tmp_path: Path) -> None:
    done = import_tree("bids", bids_tree(tmp_path / "bids"), tmp_path / "out", "--baseline-age")
    assert [visit["age"] for visit in done.visits] == ["70.5", "72.99", "61", "63"]
    assert done.summary["contradictions"] == {}


def test_bids_takes_none_of_several_runs_until_a_rule_prefers_one(tmp_path: Path) -> None:
    root = bids_tree(tmp_path / "bids")
    (root / bids_scan("01", "1")).rename(root / bids_scan("01", "1", "01"))
    put(root, {bids_scan("01", "1", "02"): ""})
    done = import_tree("bids", root, tmp_path / "out")
    assert len(done.visits) == 3
    assert done.why(bids_scan("01", "1", "01")) == done.why(bids_scan("01", "1", "02")) == "several scans of one visit"
    chosen = ["--series", "*_run-01_T1w*", "--series", "*_T1w*"]
    done = import_tree("bids", root, tmp_path / "chosen", *chosen)
    # no row of scans.tsv dates the renamed file
    assert done.why(bids_scan("01", "1", "01")) == "no date or day"
    assert done.why(bids_scan("01", "1", "02")) == "another scan of the visit was taken"


def test_bids_without_dates_needs_a_day_in_the_label_or_one_visit(tmp_path: Path) -> None:
    people = lines(
        ("participant_id", "age", "sex", "dx"), *[(f"sub-{n}", 60, "F", "CN") for n in "ABC"], separator="\t"
    )
    files = {
        bids_scan("A", "d0000"): "",
        bids_scan("A", "d0400"): "",
        bids_scan("B", "1"): "",
        bids_scan("B", "10"): "",
        bids_scan("C"): "",
    }
    root = put(tmp_path / "bids", {**files, "participants.tsv": people})
    done = import_tree("bids", root, tmp_path / "out")
    assert values(done.visits, "patient", "day") == [("sub-A", "0"), ("sub-A", "400"), ("sub-C", "0")]
    assert done.reasons() == {"no date or day": (2, 0)}
    done = import_tree("bids", root, tmp_path / "last", "--one-visit", "last")
    assert [visit["file"] for visit in done.visits] == [bids_scan("A", "d0400"), bids_scan("B", "10"), bids_scan("C")]
    assert done.reasons() == {"another visit of the patient was taken": (2, 0)}
    put(root, {bids_scan("B", "pre1"): ""})  # as much the first as ses-1
    done = import_tree("bids", root, tmp_path / "first", "--one-visit", "first")
    assert [visit["patient"] for visit in done.visits] == ["sub-A", "sub-C"]


def test_bids_accounts_for_every_file_and_row(tmp_path: Path) -> None:
    root = bids_tree(tmp_path / "bids")
    flair = "sub-01/ses-1/anat/sub-01_ses-1_FLAIR.nii.gz"
    wrong = "sub-01/ses-1/anat/sub-09_ses-1_T1w.nii.gz"
    put(
        root,
        {flair: "", wrong: "", "derivatives/x/sub-01/anat/sub-01_T1w.nii.gz": "", "README": "", bids_scan("07"): ""},
    )
    (root / bids_scan("08")).parent.mkdir(parents=True)
    (root / bids_scan("08")).symlink_to("../../.git/annex/absent")
    with (root / "participants.tsv").open("a") as stream:
        stream.write("sub-03\t50\tM\tHC\nsub-08\t50\tM\tHC\nsub-04\t50\tM\tHC\tx\n")
    done = import_tree("bids", root, tmp_path / "out")
    assert len(done.visits) == 4
    assert done.why(flair) == "another kind of scan"
    assert done.why(wrong) == "tables, rows or labels that disagree"
    assert done.why(bids_scan("07")) == "no table row"
    assert done.why(bids_scan("08")) == "file without content"
    assert done.why("derivatives/x/sub-01/anat/sub-01_T1w.nii.gz") == "derived file"
    assert done.why("participants.tsv row 4") == "row without a scan"
    assert done.why("participants.tsv row 6") == "row that does not fit its header"
    files = sum(path.is_symlink() or path.is_file() for path in root.rglob("*"))
    tables = 1 + 1 + 1 + 3  # participants.tsv and .json, sessions.tsv, scans.tsv
    assert sum(int(entry["files"]) for entry in done.left_out) == files - tables - len(done.visits)


def test_bids_leaves_out_participants_whose_tables_disagree(tmp_path: Path) -> None:
    root = bids_tree(tmp_path / "bids")
    sessions = lines(("session_id", "sex"), ("ses-1", "male"), ("ses-2", "F"), separator="\t")
    put(root, {"sub-01/sub-01_sessions.tsv": sessions})
    with (root / "participants.tsv").open("a") as stream:
        stream.write("sub-02\t80\tF\tHC\n")
    done = import_tree("bids", root, tmp_path / "out")
    assert [visit["file"] for visit in done.visits] == [bids_scan("01", "2")]
    assert done.summary["contradictions"] == {"two sexes in the tables": 1}


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ((), "'diagnosis'"),
        (("--value", "diagnosis=HC"), "diagnosis=HC"),
        (("--value", "sex=F", "--value", "diagnosis=CN"), "--value sex"),
        (("--column", "diagnosis=grop"), "group"),
        (("--map", "diagnosis:x=Y"), "'Y'"),
        (("--column", "weight=x"), "weight"),
        (("--one-visit", "second", "--value", "diagnosis=CN"), "second"),
        (("--label", "Edema=AD", "--value", "diagnosis=CN"), "--label"),
    ],
)
def test_an_option_that_does_not_fit_is_refused_with_its_value(
    options: tuple[str, ...], word: str, tmp_path: Path
) -> None:
    people = lines(("participant_id", "age", "sex", "groups"), ("sub-01", 70, "F", "x"), separator="\t")
    root = put(tmp_path / "bids", {"participants.tsv": people.replace("groups", "grp"), bids_scan("01"): ""})
    if "--column" in options:
        put(root, {"participants.tsv": people.replace("groups", "group")})
    with pytest.raises(Exception, match=word) as refused:
        import_tree("bids", root, tmp_path / "out", *options)
    assert not isinstance(refused.value, SystemExit | AssertionError)
    assert not (tmp_path / "out/visits.csv").exists()


def test_a_level_of_bids_may_need_a_word_of_the_site(tmp_path: Path) -> None:
    root = bids_tree(tmp_path / "bids")
    put(root, {"participants.json": '{"group": {"Levels": {"2": {"Description": "memory clinic"}}}}'})
    done = import_tree("bids", root, tmp_path / "out")
    assert done.reasons()["value not known"] == (2, 0)
    done = import_tree("bids", root, tmp_path / "mapped", "--map", "diagnosis:Memory clinic=AD")
    assert [visit["diagnosis"] for visit in done.visits] == ["CN", "CN", "AD", "AD"]


def test_ages_in_other_units_are_refused(tmp_path: Path) -> None:
    root = bids_tree(tmp_path / "bids")
    put(root, {"participants.json": '{"age": {"Units": "weeks"}}'})
    with pytest.raises(TableError, match="weeks"):
        import_tree("bids", root, tmp_path / "out")


def test_oasis3_joins_the_nearest_clinical_visit_and_counts_the_age_from_entry(tmp_path: Path) -> None:
    root = oasis3_tree(tmp_path, ("OAS30001", 129), ("OAS30001", 757), ("OAS30002", 371), ("OAS30002", 2000))
    done = import_tree("oasis3", root / "scans", tmp_path / "out")
    assert values(done.visits, "patient", "day", "age", "sex", "diagnosis") == [
        ("OAS30001", "129", "65.5", "F", "CN"),
        ("OAS30001", "757", "67.22", "F", "CN"),
        ("OAS30002", "371", "71.02", "M", "AD"),
    ]
    late = "OAS30002_MR_d2000/anat2/NIFTI/sub-OAS30002_ses-d2000_T1w.nii.gz"
    assert done.why(late) == "no table row near enough"
    assert done.reasons()["another kind of scan"] == (4, 0)
    assert done.why("OASIS3_UDSb4_cdr.csv row 5") == "missing value"
    with_more = import_tree("oasis3", root / "scans", tmp_path / "more", "--tolerance-days", "1600")
    assert len(with_more.visits) == 4


@pytest.mark.parametrize(
    ("dx", "value"),
    [
        ("No dementia", "CN"),
        ("DAT", "AD"),
        ("AD dem w/CVD contribut", "AD"),
        ("AD dem/FLD prior to AD dem", "AD"),
        ("AD dem cannot be primary", ""),
        ("uncertain dementia", ""),
        ("Vascular Demt- primary", ""),
    ],
)
def test_oasis3_takes_only_diagnoses_that_say_healthy_or_alzheimer(dx: str, value: str, tmp_path: Path) -> None:
    root = oasis3_tree(tmp_path, ("OAS30001", 10), ("OAS30002", 400), dx=dx)
    done = import_tree("oasis3", root / "scans", tmp_path / "out")
    assert [visit["diagnosis"] for visit in done.visits if visit["patient"] == "OAS30001"] == [value] * bool(value)
    assert ("value not known" in done.reasons()) == (not value)
    # with CDR 0, Alzheimer's disease is a contradiction
    assert list(done.summary["contradictions"]) == ["diagnosis and CDR disagree"] * (value == "AD")


def test_oasis3_sees_two_nearest_visits_that_disagree_and_ages_that_do_not_fit(tmp_path: Path) -> None:
    root = oasis3_tree(tmp_path, ("OAS30001", 361), ("OAS30002", 400))
    table = root / "OASIS3_UDSb4_cdr.csv"
    table.write_text(table.read_text().replace("722,67.13,0,Cognitively normal", "722,61,0.5,AD Dementia"))
    done = import_tree("oasis3", root / "scans", tmp_path / "out", "--tolerance-days", "365")
    assert [visit["patient"] for visit in done.visits] == ["OAS30002"]
    assert done.reasons()["tables, rows or labels that disagree"] == (1, 0)
    assert done.summary["contradictions"] == {"two tables give ages more than 1.5 years apart": 1}


def test_adni_takes_each_series_with_its_exam_and_the_age_at_the_scan(tmp_path: Path) -> None:
    first, last = "MP-RAGE/2005-08-26_12_00_00.0/I11", "MPRAGE/2009-09-01_08_00_00.0/I22"
    volume = f"{last}/ADNI_011_S_0002_MR_MPRAGE_br_raw_I22.nii"
    root = adni_tree(tmp_path, f"{first}/a.dcm", f"{first}/b.dcm", volume, "FLAIR/2005-08-26_12_30_00.0/I12/a.dcm")
    done = import_tree("adni", root / "ADNI", tmp_path / "out")
    assert values(done.visits, "date", "file", "age", "sex", "diagnosis") == [
        ("2005-08-26", f"011_S_0002/{first}", "74.26", "M", "CN"),
        ("2009-09-01", f"011_S_0002/{volume}", "78.28", "M", "AD"),
    ]
    assert done.summary["contradictions"] == {}
    assert done.why("011_S_0002/FLAIR/2005-08-26_12_30_00.0/I12") == "another kind of scan"
    assert done.why("ADNIMERGE_01Jan2024.csv row 3") == "missing value"


def test_adni_takes_the_scan_that_is_no_repeat_and_refuses_two_equals(tmp_path: Path) -> None:
    date, other = "2005-08-26_12_00_00.0", "2009-09-01_08_00_00.0"
    scans = (f"MPRAGE/{date}/I1/a.dcm", f"MPRAGE_Repeat/{date}/I2/a.dcm")
    equals = (f"MPRAGE/{other}/I3/a.dcm", f"MPR__GradWarp__N3/{other}/I4/a.nii")
    root = adni_tree(tmp_path, *scans, *equals)
    done = import_tree("adni", root / "ADNI", tmp_path / "out")
    assert [visit["file"] for visit in done.visits] == [f"011_S_0002/MPRAGE/{date}/I1"]
    assert done.why(f"011_S_0002/MPRAGE_Repeat/{date}/I2") == "another scan of the visit was taken"
    assert done.reasons()["several scans of one visit"] == (2, 0)
    chosen = import_tree("adni", root / "ADNI", tmp_path / "raw", "--series", "MPRAGE", "--series", "*")
    assert [visit["file"].rpartition("/")[2] for visit in chosen.visits] == ["I1", "I3"]


def test_adni_compares_the_collections_table_and_stands_on_it_alone(tmp_path: Path) -> None:
    root = adni_tree(tmp_path, "MPRAGE/2005-08-26_12_00_00.0/I1/a.dcm")
    head = ("Image Data ID", "Subject", "Group", "Sex", "Age", "Visit", "Acq Date")
    row = ["I1", "011_S_0002", "CN", "M", 79, "sc", "8/26/2005"]
    put(root, {"ADNI1_Screening.csv": lines(head, row)})
    done = import_tree("adni", root / "ADNI", tmp_path / "out")
    assert done.summary["contradictions"] == {"two tables give ages more than 1.5 years apart": 1}
    assert done.visits[0]["age"] == "74.26"
    put(root, {"ADNI1_Screening.csv": lines(head, [*row[:3], "F", 74, *row[5:]])})
    with pytest.raises(TableError, match="left_out"):
        import_tree("adni", root / "ADNI", tmp_path / "sexes")
    (root / "ADNIMERGE_01Jan2024.csv").unlink()
    done = import_tree("adni", root / "ADNI", tmp_path / "alone")
    assert values(done.visits, "age", "sex", "diagnosis") == [("74", "F", "CN")]


def test_two_tables_that_fit_are_not_chosen_between(tmp_path: Path) -> None:
    root = adni_tree(tmp_path, "MPRAGE/2005-08-26_12_00_00.0/I1/a.dcm")
    newer = root / "ADNIMERGE_02Feb2025.csv"
    newer.write_text((root / "ADNIMERGE_01Jan2024.csv").read_text())
    with pytest.raises(TableError, match="--table"):
        import_tree("adni", root / "ADNI", tmp_path / "out")
    assert len(import_tree("adni", root / "ADNI", tmp_path / "out", "--table", str(newer)).visits) == 1


def case(layout: str, root: str, tmp_path: Path, *options: str, modality: Path = BRAIN) -> Imported:
    """The import of one of the shared cases; skips the test where they are absent."""
    if not (CASES / root).is_dir():
        pytest.skip("the shared cases are not here")
    return import_tree(layout, CASES / root, tmp_path / "out", *options, modality=modality)


def test_the_shared_brain_cases_come_in_without_a_table_made_by_hand(tmp_path: Path) -> None:
    done = case("bids", "D1_bids/bids", tmp_path / "1", "--value", "diagnosis=CN")
    assert (done.summary["patients"], done.summary["visits"]) == (5, 10)
    assert done.summary["contradictions"]["dates run against the session numbers"] == 4
    done = case("oasis3", "D2_oasis3/scans", tmp_path / "2")
    assert values(done.visits, "day", "age", "diagnosis") == [
        ("129", "65.5", "CN"),
        ("757", "67.22", "CN"),
        ("371", "68.23", "AD"),
        ("2340", "73.62", "AD"),
    ]
    done = case("adni", "D3_adni/ADNI", tmp_path / "3")
    assert [visit["age"] for visit in done.visits] == ["74.26", "74.79", "81.27"]
    done = case("adni", "D3b_adni_axial/ADNI", tmp_path / "4")
    assert [visit["age"] for visit in done.visits] == ["74.26", "74.79", "78.28", "81.27"]
    assert done.summary["contradictions"] == {}


def test_a_name_that_is_no_layout_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="oasis3"):
        import_tree("oasis", tmp_path, tmp_path / "out")
