"""Inputs as hospitals have them, which once came out wrong: each reads as its README says.

They are no part of the project; where they are absent, the tests of each kind remain (`test_scan_forms.py`,
`test_contradictions.py`, `test_table_forms.py`, `test_layouts.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from ld_client.cli import app
from ld_client.data.exclusions import Exclusion
from ld_client.data.ingest import Survey, Visit, read_visits, survey
from ld_client.site_config import load_modality, load_site
from ld_common.core.command import run_cli
from ld_common.core.errors import TableError

ROOT = Path(__file__).parents[2]
CASES = ROOT.parent / "shared/cases"

pytestmark = pytest.mark.skipif(not CASES.exists(), reason="no shared/cases beside the project")


@dataclass(frozen=True)
class Read:
    """What a site's index reads of one case."""

    survey: Survey
    visits: list[Visit]
    exclusions: list[Exclusion]

    @property
    def said(self) -> str:
        """Exclusions and doubts as text."""
        lines = [f"{one.name}: {one.reason.value}: {one.detail}" for one in self.exclusions]
        return "\n".join([*lines, *(f"{one.kind}: {one.detail}" for one in self.survey.contradictions.doubts)])

    @property
    def heights(self) -> list[float]:
        """Heights of the slices, in mm."""
        affines = [visit.scan.affine for visit in self.visits]
        return [round(float(affine[2, 3]), 1) for affine in affines if affine is not None]

    def ages(self) -> list[float]:
        """Ages, the lowest first."""
        return sorted(float(visit.attributes["age"]) for visit in self.visits)


@pytest.fixture
def read_case(tmp_path: Path) -> Callable[..., Read]:
    """A function that reads a case by its site's file; `overrides` are of the site's config."""

    def read(name: str, file: str = "site.yaml", overrides: Sequence[str] = ()) -> Read:
        case = CASES / name
        text = (case / file).read_text().replace("MAIN", str(ROOT)).replace("OUT", str(tmp_path / "out"))
        site_yaml = tmp_path / "site.yaml"
        site_yaml.write_text(text.replace("root: ", f"root: {case}/").replace("table: ", f"table: {case}/"))
        return read_site(site_yaml, overrides)

    return read


def read_site(site_yaml: Path, overrides: Sequence[str] = ()) -> Read:
    site = load_site(site_yaml, list(overrides))
    found = survey(site, load_modality(site), bytes(32), lambda *_: None)
    entries = list(read_visits(found))
    excluded = [*found.exclusions, *(one for one in entries if isinstance(one, Exclusion))]
    return Read(found, [one for one in entries if isinstance(one, Visit)], excluded)


@pytest.mark.parametrize(
    "name",
    [
        *("00_control", "02_localizer_first", "03_localizer_inside_series", "04_sagittal_mprage"),
        *("08_series_uid_per_slice", "22_padding_US_on_signed", "25b_series_number_text", "25c_spacing_comma"),
        *("25i_rescale_empty", "27_no_preamble", "32_studydate_empty_acq_there", "48_plain_named_gz"),
        *("49b_neg_background", "49g_int64", "52_neck_in_fov", "95_enhanced_mr", "71_days_not_dates"),
        "70_no_date_column",
    ],
)
def test_the_slice_at_the_middle_of_the_head_is_read(name: str, read_case: Callable[..., Read]) -> None:
    read = read_case(name)
    assert read.heights == [0.0], read.said
    assert read.visits[0].scan.spacing_mm is not None
    pixels = read.visits[0].scan.pixels
    assert 0 <= pixels.min() < pixels.max() < 600


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("01_multi_echo", "several images at one position (echo 10 ms; 90 ms)"),
        ("09_time_series", "several images at one position"),
        ("36_header_table_sex_disagree", "M in the header and F"),
        ("43_qform_sform_disagree", "qform and sform disagree"),
        ("44_codes_zero", "gives no orientation"),
        ("47_truncated_gz_90", "cut off"),
        ("47c_corrupt_gz_tail", "checksum is wrong"),
        ("49e_float64_over_float32", "3.4e38"),
        ("50_mgz", "FreeSurfer"),
        ("50b_hdrimg", ".hdr"),
        ("64b_unquoted_decimal_comma", "more cells than columns"),
        ("91b_jpg_named_png", "JPEG"),
    ],
)
def test_what_cannot_be_used_is_left_out_for_the_true_reason(
    name: str, words: str, read_case: Callable[..., Read]
) -> None:
    read = read_case(name)
    assert read.visits == []
    assert words in read.said


def test_a_stack_far_shorter_than_a_head_is_said(read_case: Callable[..., Read]) -> None:
    assert "5 slices cover 30 mm" in read_case("11_half_transferred").said
    assert read_case("00_control").said == ""


def test_a_join_that_is_wrong_is_not_silent(read_case: Callable[..., Read]) -> None:
    assert "sex" in read_case("36c_sex_changes_between_visits").said
    assert "78 years in the header and 74.3" in read_case("D3b_adni_axial", "with_age_bl.yaml").said
    assert read_case("D3b_adni_axial", "age_from_header.yaml").ages() == [74, 75, 78, 81]


def test_tables_are_read_as_they_come(read_case: Callable[..., Read]) -> None:
    accept = ["data.accept=[sex,age]"]  # the header of both patients is the same
    assert read_case("61_semicolon_decimal_comma", overrides=accept).ages() == [70.1, 74.5]
    assert {visit.attributes["sex"] for visit in read_case("65a_int_keys", overrides=accept).visits} == {"F", "M"}
    assert {visit.attributes["diagnosis"] for visit in read_case("65c_yes_no", overrides=accept).visits} == {"CN", "AD"}
    assert 55 not in read_case("64d_shift_decimal_weight_age", overrides=accept).ages()
    with pytest.raises(TableError, match="an Excel workbook: save it as CSV"):
        read_case("72_xlsx")
    assert "the nearest is 'sub/B.NII.gz'" in read_case("98_file_paths").said


def test_radiographs_of_other_parts_and_views_are_left_out(read_case: Callable[..., Read]) -> None:
    for name, words in (("81_hand_first", "Body Part"), ("81b_lateral_without_viewposition", "view is not")):
        read = read_case(name)
        assert len(read.visits) == 1
        assert f"0.dcm: wrong geometry: its {words}" in read.said
    assert read_case("88b_nominal_spacing").visits[0].scan.spacing_mm == (1.4, 1.4)
    assert read_case("87b_deflated_dx").visits[0].scan.pixels.shape == (640, 640)
    assert len(read_case("91_jpg").visits) == 1


def test_one_slice_is_one_slice(read_case: Callable[..., Read]) -> None:
    assert read_case("99_2d_nifti").visits[0].scan.pixels.shape == (49, 41)


@pytest.mark.parametrize(
    ("case", "layout", "root", "options", "visits"),
    [
        ("D1_bids", "bids", "bids", ["--value", "diagnosis=CN"], 10),
        ("D2_oasis3", "oasis3", "scans", [], 4),
        ("D3_adni", "adni", "ADNI", [], 3),
        ("D3b_adni_axial", "adni", "ADNI", [], 4),
        (
            *("D4_chexpert", "chexpert", "CheXpert-v1.0-small"),
            ["--one-visit", "first", "--label", "No Finding=CN", "--label", "Cardiomegaly=HF"],
            1,
        ),
    ],
)
def test_layouts_are_indexed_without_a_table_made_by_hand(
    case: str,
    layout: str,
    root: str,
    options: list[str],
    visits: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tables = [part for table in sorted((CASES / case).glob("*.csv")) for part in ("--table", str(table))]
    tables = [] if layout in ("bids", "chexpert") else tables
    arguments = ["import", layout, str(CASES / case / root), "--out", str(tmp_path), *options, *tables]
    arguments += ["--base-model", str(ROOT / "simulations/tiny_base"), "--json"]
    with pytest.raises(SystemExit) as ended:
        run_cli(app, arguments)
    said = capsys.readouterr()
    assert (ended.value.code or 0) == 0, said.err
    assert json.loads(said.out)["visits"] == visits
    assert len(read_site(tmp_path / "site.yaml").visits) == visits
