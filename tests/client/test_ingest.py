from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image, ImageDraw, ImageFont

from ld_client.data.exclusions import Exclusion, Reason
from ld_client.data.indexing import build_store
from ld_client.data.ingest import Visit, read_visits, survey
from ld_client.data.pseudonyms import pseudonym
from ld_client.data.store_key import KEY_FILE, load_key
from ld_client.site_config import load_modality, load_site
from ld_common.core.errors import ConfigError, StoreError, TableError
from ld_common.imaging.geometry import Scan
from ld_common.imaging.rejection import Rejection
from tests.conftest import HEADER, PLANTED_ROWS, write_mr_slice, write_table, write_visit
from tests.imaging.test_scan_forms import enhanced

KEY = bytes(32)


def ingest(site_yaml: Path, overrides: Sequence[str] = ()) -> tuple[list[Visit], dict[str, Exclusion]]:
    """All visits, and the exclusions by name."""
    site = load_site(site_yaml, overrides)
    found = survey(site, load_modality(site), KEY, lambda *_: None)
    entries = list(read_visits(found))
    exclusions = found.exclusions + [entry for entry in entries if isinstance(entry, Exclusion)]
    assert len({one.name for one in exclusions}) == len(exclusions)
    return [entry for entry in entries if isinstance(entry, Visit)], {one.name: one for one in exclusions}


def reasons(exclusions: dict[str, Exclusion]) -> Counter[Reason]:
    return Counter(one.reason for one in exclusions.values())


def scans(site_yaml: Path) -> Path:
    return site_yaml.parent / "scans"


def add_column(site_yaml: Path) -> None:
    """Let the site name its files in a column `path`."""
    site_yaml.write_text(site_yaml.read_text().replace("date: seen", "date: seen\n    file: path"))


@pytest.mark.parametrize(("echo", "intercept"), [(10, 2000), (90, 3000)])
def test_a_rule_chooses_among_the_echoes_of_one_enhanced_file(echo: int, intercept: int, site_yaml: Path) -> None:
    shutil.rmtree(scans(site_yaml))
    path = enhanced(scans(site_yaml) / "a.dcm", [0.0, 0.0, 5.0, 5.0, 10.0, 10.0], [10, 90] * 3)
    dataset = pydicom.dcmread(path)
    dataset.PatientID, dataset.StudyDate, dataset.PatientSex = "PLANTED-CARL", "20201112", "M"
    dataset.PatientAge = "080Y"
    dataset.save_as(path)
    _, exclusions = ingest(site_yaml)
    assert exclusions["a.dcm"].reason == Reason.SEVERAL_AT_ONE_PLACE
    (visit,), exclusions = ingest(site_yaml, [f"data.series.echo_ms={echo}"])
    assert "a.dcm" not in exclusions
    assert isinstance(visit.scan, Scan) and visit.scan.pixels.min() == intercept


DIRECTIONS = {"axial": [1, 0, 0, 0, 1, 0], "sagittal": [0, 1, 0, 0, 0, -1], "coronal": [1, 0, 0, 0, 0, -1]}
ACROSS = {"sagittal": 0, "coronal": 1, "axial": 2}
"""Axis of the body along which the slices of a plane lie."""


def survey_file(site_yaml: Path, planes: dict[str, int]) -> str:
    """Add one Enhanced MR file with so many frames of each plane to the scans of Carl; returns its name."""
    kinds = [plane for plane, count in planes.items() for _ in range(count)]
    path = enhanced(scans(site_yaml) / "survey.dcm", [0.0] * len(kinds))
    dataset = pydicom.dcmread(path)
    for number, (kind, frame) in enumerate(zip(kinds, dataset.PerFrameFunctionalGroupsSequence, strict=True)):
        orientation, position = pydicom.Dataset(), [0.0, 0.0, 0.0]
        orientation.ImageOrientationPatient = DIRECTIONS[kind]
        position[ACROSS[kind]] = 10.0 * number
        frame.PlaneOrientationSequence = pydicom.Sequence([orientation])
        frame.PlanePositionSequence[0].ImagePositionPatient = position
    dataset.PatientID, dataset.StudyDate, dataset.PatientSex = "PLANTED-CARL", "20201112", "M"
    dataset.PatientAge = "080Y"
    dataset.save_as(path)
    return path.name


@pytest.mark.parametrize("others", [{"sagittal": 5, "coronal": 4}, {"sagittal": 1, "coronal": 4}])
def test_of_several_planes_in_one_file_the_wanted_one_is_taken(others: dict[str, int], site_yaml: Path) -> None:
    shutil.rmtree(scans(site_yaml))
    name = survey_file(site_yaml, {"coronal": others["coronal"], "axial": 5, "sagittal": others["sagittal"]})
    (visit,), exclusions = ingest(site_yaml)
    assert isinstance(visit.scan, Scan)
    assert visit.scan.affine is not None
    assert visit.scan.orientation == ("L", "P")
    # the middle one of the five, whose place in the file tells its values
    assert visit.scan.pixels.min() == 1000 * (others["coronal"] + 2)
    line = exclusions[name]
    assert (line.files, line.reason) == (0, Reason.WRONG_GEOMETRY)
    assert line.detail.startswith(f"{sum(others.values())} of its frames have another plane")


@pytest.mark.parametrize(
    "planes",
    [
        {"sagittal": 4, "coronal": 4},  # none is axial
        {"sagittal": 1, "coronal": 1, "axial": 1},  # one slice is no stack
    ],
)
def test_a_file_of_several_planes_without_a_wanted_stack_is_refused(planes: dict[str, int], site_yaml: Path) -> None:
    shutil.rmtree(scans(site_yaml))
    name = survey_file(site_yaml, planes)
    visits, exclusions = ingest(site_yaml)
    assert visits == []
    assert (exclusions[name].files, exclusions[name].reason) == (1, Reason.WRONG_GEOMETRY)
    assert "write each as a file of its own" in exclusions[name].detail


def test_a_series_of_one_plane_goes_before_a_file_of_several(site_yaml: Path) -> None:
    survey_file(site_yaml, {"coronal": 5, "axial": 5, "sagittal": 5})
    site = load_site(site_yaml)
    found = survey(site, load_modality(site), KEY, lambda *_: None)
    entries = list(read_visits(found))
    assert len([entry for entry in entries if isinstance(entry, Visit)]) == 6
    (other,) = [entry for entry in entries if isinstance(entry, Exclusion)]
    assert (other.name, other.reason) == ("survey.dcm", Reason.OTHER_SERIES)


def test_every_visit_comes_once_in_the_order_of_pseudonym_and_day(site_yaml: Path) -> None:
    visits, exclusions = ingest(site_yaml)
    assert exclusions == {}
    order = [(visit.pseudonym, visit.days_since_baseline) for visit in visits]
    assert order == sorted(order)
    anna = [visit for visit in visits if visit.pseudonym == pseudonym(KEY, "PLANTED-ANNA")]
    assert [visit.days_since_baseline for visit in anna] == [0, 366, 1096]
    assert [visit.attributes["diagnosis"] for visit in anna] == ["CN", "CN", "AD"]
    assert anna[0].attributes == {"age": 70.0, "sex": "F", "diagnosis": "CN"}
    assert all(visit.scan.pixels.max() > 500 for visit in visits)  # the middle slice of three


def test_a_pseudonym_needs_the_key() -> None:
    assert pseudonym(KEY, "a") == pseudonym(KEY, "a") != pseudonym(KEY, "b")
    assert pseudonym(b"1" * 32, "a") != pseudonym(KEY, "a")


def test_bad_files_are_lines_and_never_the_end(site_yaml: Path) -> None:
    root, grey = scans(site_yaml), np.eye(4, dtype=np.uint16)
    whole = write_visit(root / "broken", "PLANTED-CARL", "2020-11-12", SeriesNumber=0)[1]
    whole.write_bytes(whole.read_bytes()[:-200])
    write_mr_slice(root / "half.dcm", grey).write_bytes(whole.read_bytes()[:450])
    (root / "notes.txt").write_text("seen by Dr Nobody")
    write_mr_slice(root / "ct.dcm", grey, Modality="CT")
    write_mr_slice(root / "huge.dcm", grey, Rows=65535, Columns=65535)
    write_mr_slice(root / "text.dcm", grey, BurnedInAnnotation="YES")
    write_mr_slice(root / "ours.dcm", grey, SyntheticData="YES")
    (root / ".hidden").write_text("not looked at")
    visits, exclusions = ingest(site_yaml)
    assert len(visits) == 6  # the series after the broken one was taken
    assert {name: one.reason for name, one in exclusions.items()} == {
        "broken/planted-carl/2020-11-12/0.dcm": Reason.UNREADABLE,
        "half.dcm": Reason.NOT_AN_IMAGE,
        "notes.txt": Reason.NOT_AN_IMAGE,
        "ct.dcm": Reason.WRONG_MODALITY,
        "huge.dcm": Reason.TOO_LARGE,
        "text.dcm": Reason.BURNED_IN,
        "ours.dcm": Reason.SYNTHETIC,
    }


def test_scans_and_rows_without_each_other_are_reported(site_yaml: Path) -> None:
    write_visit(scans(site_yaml), "PLANTED-DORA", "2020-01-01")
    write_visit(scans(site_yaml), "PLANTED-CARL", "2020-11-15")
    write_mr_slice(scans(site_yaml) / "nobody.dcm", np.eye(4, dtype=np.uint16), PatientID="", StudyDate="")
    write_table(site_yaml, [*PLANTED_ROWS, "PLANTED-EMIL,2020-01-01,60,Male,Normal"])
    visits, exclusions = ingest(site_yaml)
    assert len(visits) == 6
    assert exclusions["planted-dora/2020-01-01/0.dcm"].reason == Reason.NO_TABLE_ROW
    assert exclusions["planted-dora/2020-01-01/0.dcm"].files == 3
    assert "3 days away" in exclusions["planted-carl/2020-11-15/0.dcm"].detail
    assert exclusions["row 8"].reason == Reason.NO_SCAN
    assert exclusions["nobody.dcm"].reason == Reason.NO_PATIENT_OR_DATE
    visits, exclusions = ingest(site_yaml, ["data.date_tolerance_days=3"])
    assert len(visits) == 7
    assert "planted-carl/2020-11-15/0.dcm" not in exclusions


@pytest.mark.parametrize(
    ("row", "reason", "word"),
    [
        ("PLANTED-CARL,2020-11-12,,Male,Dementia", Reason.MISSING_VALUE, "age"),
        ("PLANTED-CARL,2020-11-12,n/a,Male,Dementia", Reason.MISSING_VALUE, "age"),
        ("PLANTED-CARL,2020-11-12,80,Male,", Reason.MISSING_VALUE, "diagnosis"),
        ("PLANTED-CARL,2020-11-12,80,Male,MCI", Reason.UNKNOWN_VALUE, "diagnosis=MCI"),
        ("PLANTED-CARL,2020-11-12,eighty,Male,Dementia", Reason.UNKNOWN_VALUE, "age=eighty"),
        ("PLANTED-CARL,2020-11-12,130,Male,Dementia", Reason.OUT_OF_RANGE, "18 to 100"),
        ("PLANTED-CARL,12.11.2020,80,Male,Dementia", Reason.NO_TABLE_ROW, "patient"),
        (",2020-11-12,80,Male,Dementia", Reason.NO_TABLE_ROW, "patient"),
    ],
)
def test_a_row_that_cannot_be_used_leaves_its_scan_out(row: str, reason: Reason, word: str, site_yaml: Path) -> None:
    write_table(site_yaml, [*PLANTED_ROWS[:5], row])
    for file in (scans(site_yaml) / "planted-carl").rglob("*.dcm"):
        file.unlink()  # and no age in the header either
    write_visit(scans(site_yaml), "PLANTED-CARL", "2020-11-12", PatientBirthDate=None)
    visits, exclusions = ingest(site_yaml)
    assert len(visits) == 5
    one = exclusions["planted-carl/2020-11-12/0.dcm"]
    assert (one.reason, one.files) == (reason, 3)
    assert word in one.detail


def test_a_word_that_the_config_knows_is_no_blank(site_yaml: Path) -> None:
    site_yaml.write_text(site_yaml.read_text().replace("Normal: CN", "none: CN"))
    write_table(site_yaml, [row.replace("Normal", "none") for row in PLANTED_ROWS])
    visits, exclusions = ingest(site_yaml)
    assert len(visits) == len(PLANTED_ROWS)
    assert exclusions == {}


def test_age_and_sex_fall_back_to_the_header(site_yaml: Path) -> None:
    for file in (scans(site_yaml) / "planted-carl").rglob("*.dcm"):
        file.unlink()
    write_visit(scans(site_yaml), "PLANTED-CARL", "2020-11-12", PatientAge="081Y", PatientSex="M")
    write_table(site_yaml, [*PLANTED_ROWS[:5], "PLANTED-CARL,2020-11-12,,,Dementia"])
    visits, exclusions = ingest(site_yaml)
    assert exclusions == {}
    assert {"age": 81.0, "sex": "M", "diagnosis": "AD"} in [visit.attributes for visit in visits]


def test_equal_rows_count_once_and_conflicting_ones_not_at_all(site_yaml: Path) -> None:
    changed = PLANTED_ROWS[5].replace("Dementia", "Normal")
    write_table(site_yaml, [*PLANTED_ROWS, "", PLANTED_ROWS[3], changed, PLANTED_ROWS[5], ",,,,"])
    visits, exclusions = ingest(site_yaml)
    assert len(visits) == 5
    assert exclusions["row 9"].reason == Reason.DUPLICATE
    assert [exclusions[f"row {line}"].reason for line in (7, 10, 11)] == [Reason.CONFLICTING_ROWS] * 3
    assert exclusions["planted-carl/2020-11-12/0.dcm"].reason == Reason.NO_TABLE_ROW


def test_a_repeated_series_of_one_day_gives_one_visit(site_yaml: Path) -> None:
    write_visit(scans(site_yaml) / "again", "PLANTED-CARL", "2020-11-12", SeriesNumber=5)
    visits, exclusions = ingest(site_yaml)
    assert len(visits) == 6
    other = exclusions["again/planted-carl/2020-11-12/0.dcm"]
    assert (other.reason, other.files) == (Reason.OTHER_SERIES, 3)
    assert "planted-carl/2020-11-12/0.dcm" in other.detail


def test_of_different_series_of_one_day_none_is_taken_until_a_rule_chooses(site_yaml: Path) -> None:
    later = {"SeriesNumber": 5, "SeriesDescription": "ax T1 post", "EchoTime": 4.5}
    write_visit(scans(site_yaml) / "again", "PLANTED-CARL", "2020-11-12", **later)
    visits, exclusions = ingest(site_yaml)
    assert len(visits) == 5
    both = [exclusions[f"{folder}planted-carl/2020-11-12/0.dcm"] for folder in ("", "again/")]
    assert [(one.reason, one.files) for one in both] == [(Reason.SEVERAL_SERIES, 3)] * 2
    assert "'ax T1 post', echo 4.5 ms" in both[0].detail
    for rule in ("description='*t1*'", "echo_ms=4.5"):
        visits, exclusions = ingest(site_yaml, [f"data.series.{rule}"])
        assert [visit.attributes["age"] for visit in visits] == [80.0]
        assert reasons(exclusions) == {Reason.NOT_SELECTED: 18, Reason.NO_SCAN: 5}


def test_copies_of_an_object_are_exclusions(site_yaml: Path) -> None:
    original = scans(site_yaml) / "planted-carl/2020-11-12/1.dcm"
    (scans(site_yaml) / "zcopy.dcm").write_bytes(original.read_bytes())
    visits, exclusions = ingest(site_yaml)
    assert len(visits) == 6
    assert exclusions["zcopy.dcm"].reason == Reason.DUPLICATE


def test_suspected_text_is_released_by_pattern(site_yaml: Path) -> None:
    for file in (scans(site_yaml) / "planted-carl").rglob("*.dcm"):
        file.unlink()
    write_visit(scans(site_yaml), "PLANTED-CARL", "2020-11-12", ImageType=["DERIVED", "SECONDARY"])
    visits, exclusions = ingest(site_yaml)
    (held_back,) = [one for one in exclusions.values() if one.reason == Reason.BURNED_IN]  # one line a series
    assert (len(visits), held_back.files) == (5, 3)
    visits, exclusions = ingest(site_yaml, ["data.burned_in_text_checked=[planted-carl/*]"])
    assert (len(visits), exclusions) == (6, {})


@pytest.mark.usefixtures("search_for_text")
def test_a_series_is_checked_for_text_only_where_all_its_files_are(site_yaml: Path) -> None:
    picture = Image.new("L", (128, 72), 20)
    ImageDraw.Draw(picture).ellipse((10, 6, 118, 66), fill=120)
    ImageDraw.Draw(picture).text((4, 4), "WEBER, ANNA", font=ImageFont.load_default(14), fill=230)
    folder = scans(site_yaml) / "planted-carl/2020-11-12"
    for number, height in enumerate((-5, 0, 5)):
        place = {"ImagePositionPatient": [0, 0, height], "PatientID": "PLANTED-CARL", "StudyDate": "20201112"}
        write_mr_slice(folder / f"{number}.dcm", np.asarray(picture).astype(np.uint16), **place)
    for pattern, visits in (("planted-carl/*/0.dcm", 5), ("planted-carl/*", 6)):
        read, exclusions = ingest(site_yaml, [f"data.burned_in_text_checked=['{pattern}']"])
        assert (len(read), reasons(exclusions)[Reason.BURNED_IN]) == (visits, 6 - visits)


@pytest.mark.attack
@pytest.mark.usefixtures("search_for_text")
def test_a_png_with_a_name_is_held_back_until_it_is_checked(site_yaml: Path) -> None:
    add_column(site_yaml)
    picture = Image.new("L", (96, 64), 20)
    ImageDraw.Draw(picture).text((4, 4), "WEBER, ANNA", font=ImageFont.load_default(12), fill=230)
    picture.save(scans(site_yaml) / "c.png")
    row = "PLANTED-OLAF,2018-01-31,61,Male,Normal,c.png"
    write_table(site_yaml, [*(f"{planted}," for planted in PLANTED_ROWS), row], f"{HEADER},path")
    visits, exclusions = ingest(site_yaml)
    assert (len(visits), exclusions["c.png"].reason) == (6, Reason.BURNED_IN)
    assert "top centre" in exclusions["c.png"].detail
    visits, exclusions = ingest(site_yaml, ["data.burned_in_text_checked=[c.png]"])
    assert (len(visits), exclusions) == (7, {})


def test_baseline_is_the_first_visit_that_could_be_read(site_yaml: Path) -> None:
    slices = sorted((scans(site_yaml) / "planted-anna/2019-03-04").iterdir())
    slices[1].write_bytes(slices[1].read_bytes()[:-100])
    visits, exclusions = ingest(site_yaml)
    anna = [visit for visit in visits if visit.pseudonym == pseudonym(KEY, "PLANTED-ANNA")]
    assert [visit.days_since_baseline for visit in anna] == [0, 730]
    assert exclusions["planted-anna/2019-03-04/0.dcm"].reason == Reason.UNREADABLE


def test_niftis_and_pngs_are_found_through_the_table(site_yaml: Path) -> None:
    add_column(site_yaml)
    root = scans(site_yaml)
    volume = np.random.default_rng(0).integers(0, 900, (20, 24, 3)).astype(np.int16)
    for name in ("sub-1/a.nii.gz", "sub-1/b.nii", "unnamed.nii.gz", "flat.nii"):
        (root / name).parent.mkdir(exist_ok=True)
        content = volume * 0 if name == "flat.nii" else volume
        nibabel.save(nibabel.Nifti1Image(content, np.diag([2, 2, 5, 1.0])), root / name)
    Image.fromarray(np.eye(20, dtype=np.uint8) * 200).save(root / "c.png")
    rows = [
        "PLANTED-NINA,2018-01-01,60,Female,Normal,sub-1/a.nii.gz",
        "PLANTED-NINA,2018-01-31,60,Female,Normal,./sub-1\\b.nii",
        "PLANTED-OLAF,2018-01-31,61,Male,Normal,c.png",
        "PLANTED-OLAF,2019-01-31,62,Male,Normal,flat.nii",
        "PLANTED-OLAF,2020-01-31,63,Male,Normal,absent.nii",
        *(f"{row}," for row in PLANTED_ROWS),
    ]
    write_table(site_yaml, rows, f"{HEADER},path")
    visits, exclusions = ingest(site_yaml)
    assert len(visits) == 9
    nina = [visit for visit in visits if visit.pseudonym == pseudonym(KEY, "PLANTED-NINA")]
    assert [visit.days_since_baseline for visit in nina] == [0, 30]
    np.testing.assert_array_equal(nina[0].scan.pixels, volume[::-1, ::-1, 1].T)
    assert {name: one.reason for name, one in exclusions.items()} == {
        "unnamed.nii.gz": Reason.NO_TABLE_ROW,
        "flat.nii": Reason.NO_CONTRAST,
        "row 6": Reason.NO_SCAN,
    }


def test_a_nifti_without_a_file_column_says_what_to_set(site_yaml: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(np.zeros((3, 3, 3), np.int16), np.eye(4)), scans(site_yaml) / "a.nii")
    assert "data.columns.file" in ingest(site_yaml)[1]["a.nii"].detail


def test_missing_columns_are_named_with_the_nearest(site_yaml: Path) -> None:
    write_table(site_yaml, PLANTED_ROWS, "subject,seen_on,years,gendr,group")
    with pytest.raises(TableError, match=r"no column 'seen'.*'seen_on'.*no column 'gender'.*'gendr'"):
        ingest(site_yaml)
    write_table(site_yaml, PLANTED_ROWS, "subject,seen,years,gender,group,seen")
    with pytest.raises(TableError, match="'seen' occurs more than once"):
        ingest(site_yaml)


def test_tables_from_spreadsheets_are_read(site_yaml: Path) -> None:
    table = site_yaml.parent / "visits.csv"
    rows = [row.replace(",", ";") for row in [HEADER, *PLANTED_ROWS]]
    table.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(rows).encode() + b"\r\n;;;;\r\n")
    assert len(ingest(site_yaml)[0]) == 6
    table.write_text("\n".join(row.replace("2020-03-04", "04.03.2020") for row in rows))
    visits, exclusions = ingest(site_yaml)
    assert exclusions["row 3"].reason == Reason.NO_PATIENT_OR_DATE
    assert len(visits) == 5
    dates = ["-".join(reversed(row.split(";")[1].split("-"))).replace("-", ".") for row in rows]
    lines = [row.replace(row.split(";")[1], date) for row, date in zip(rows[1:], dates[1:], strict=True)]
    table.write_text("\n".join([rows[0], *lines]))
    assert len(ingest(site_yaml, ["data.date_format='%d.%m.%Y'"])[0]) == 6


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00", b'subject,seen\n"open', b""])
def test_a_table_that_cannot_be_read_is_one_error(content: bytes | None, site_yaml: Path) -> None:
    table = site_yaml.parent / "visits.csv"
    table.unlink()
    if content is not None:
        table.write_bytes(content)
    with pytest.raises(TableError):
        ingest(site_yaml)


def test_config_errors_name_the_key_and_the_remedy(site_yaml: Path) -> None:
    for overrides, match in (
        (["data.columns.attributes.weight=kg"], "'weight'.*lacks"),
        (["data.values.diagnoses.x=CN"], "did you mean 'diagnosis'"),
        (["data.tabel=x"], "did you mean 'table'"),
        (["batch_size=0"], "batch_size is 0"),
        (["modality=absent.yaml"], "absent.yaml"),
    ):
        with pytest.raises(ConfigError, match=match):
            ingest(site_yaml, overrides)
    text = site_yaml.read_text()
    site_yaml.write_text(text.replace(", diagnosis: group", ""))
    with pytest.raises(ConfigError, match="no column for 'diagnosis'"):
        ingest(site_yaml)
    site_yaml.write_text(text.replace("store: store\n", ""))
    with pytest.raises(ConfigError, match="store"):
        ingest(site_yaml)
    site_yaml.write_text(text)
    with pytest.raises(TableError, match="is not a folder"):
        ingest(site_yaml, ["data.root=nowhere"])


def test_paths_are_relative_to_the_yaml_file(site_yaml: Path) -> None:
    site = load_site(site_yaml, ["store=elsewhere", "base_model=some/hub-id"])
    assert Path(site.data.root) == site_yaml.parent / "scans"
    assert site.store_path == site_yaml.parent / "elsewhere"
    assert site.base_model == "some/hub-id"


def test_the_key_is_made_once_and_only_for_its_owner(tmp_path: Path) -> None:
    store = tmp_path / "store"
    key = load_key(store)
    assert len(key) == 32
    assert load_key(store) == key
    path = store / KEY_FILE
    assert (path.stat().st_mode & 0o777, store.stat().st_mode & 0o777) == (0o600, 0o700)
    path.chmod(0o644)
    with pytest.raises(StoreError, match="chmod 600"):
        load_key(store)
    path.chmod(0o600)
    path.write_bytes(b"short")
    with pytest.raises(StoreError, match="5 bytes"):
        load_key(store)


@pytest.mark.parametrize("what", ["index", "ledger", "former name"])
def test_a_lost_key_is_not_made_anew_where_data_were_used(site_yaml: Path, what: str) -> None:
    """Another key would hold out other patients, and train on those who were held out."""
    site = load_site(site_yaml, ["ledger=ledger.sqlite"])
    build_store(site)
    key = site.store_path / KEY_FILE
    if what == "former name":
        key.rename(key.with_name("site.key"))
    else:
        key.unlink()
    if what == "ledger":
        shutil.rmtree(site.store_path)
        site.ledger_path.write_bytes(b"")
    with pytest.raises(StoreError, match="rename" if what == "former name" else "restore it from a backup"):
        build_store(site)
    assert not key.exists()


def test_every_refusal_is_a_reason() -> None:
    assert {refusal.value for refusal in Rejection} <= {reason.value for reason in Reason}
