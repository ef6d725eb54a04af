"""Inputs as hospitals have them, which once came out wrong, and what a right reading of each is.

A case is a folder with scans, a table and a site's YAML file in which `MAIN` stands for the repository and `OUT` for a
folder to write to. A judge yields what is wrong; nothing for a case that is read as its README says.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ld_client.cli import app
from ld_client.data.exclusions import Exclusion
from ld_client.data.ingest import Survey, Visit, read_visits, survey
from ld_client.site_config import load_modality, load_site
from ld_common.core.errors import TableError
from ld_common.imaging.geometry import Scan
from ld_simulations.benchmarks.scans.commands import run_command

ACCEPTED = ("data.accept=[sex,age]",)
"""For cases about tables: the header of all their patients is the same."""


@dataclass(frozen=True)
class SiteReading:
    """What a site's index reads, before it encodes anything."""

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
        affines = [scan_of(visit).affine for visit in self.visits]
        return [round(float(affine[2, 3]), 1) for affine in affines if affine is not None]

    @property
    def ages(self) -> list[float]:
        """Ages, the lowest first."""
        return sorted(float(visit.attributes["age"]) for visit in self.visits)

    def values(self, attribute: str) -> set[object]:
        """The values of an attribute."""
        return {visit.attributes[attribute] for visit in self.visits}


def scan_of(visit: Visit) -> Scan:
    """The scan of a visit that was read without a memory of earlier indexes."""
    if not isinstance(visit.scan, Scan):
        raise TypeError("its scan was not read")
    return visit.scan


def read_site(site_yaml: Path, overrides: Sequence[str] = ()) -> SiteReading:
    """Read what a site's YAML file names, with a key of zeros; raises `LdError`."""
    site = load_site(site_yaml, list(overrides))
    surveyed = survey(site, load_modality(site), bytes(32), lambda *_: None)
    entries = list(read_visits(surveyed))
    excluded = [*surveyed.exclusions, *(one for one in entries if isinstance(one, Exclusion))]
    return SiteReading(surveyed, [one for one in entries if isinstance(one, Visit)], excluded)


@dataclass(frozen=True)
class CaseFolder:
    """One case, and where it may write."""

    folder: Path
    project: Path
    out: Path

    def read(self, file: str = "site.yaml", overrides: Sequence[str] = ()) -> SiteReading:
        """Read the case by its site's file; raises `LdError`."""
        text = (self.folder / file).read_text(encoding="utf-8").replace("MAIN", str(self.project))
        text = text.replace("OUT", str(self.out / "out"))
        text = text.replace("root: ", f"root: {self.folder}/").replace("table: ", f"table: {self.folder}/")
        site_yaml = self.out / "site.yaml"
        site_yaml.write_text(text, encoding="utf-8")
        return read_site(site_yaml, overrides)


Judge = Callable[[CaseFolder], Iterable[str]]


def _middle_of_the_head(case: CaseFolder) -> Iterator[str]:
    read = case.read()
    if read.heights != [0.0]:
        yield f"slices at {read.heights} mm, not at 0: {read.said}"
        return
    scan = scan_of(read.visits[0])
    if scan.spacing_mm is None:
        yield "no spacing"
    if not 0 <= float(scan.pixels.min()) < float(scan.pixels.max()) < 600:
        yield f"values from {scan.pixels.min():g} to {scan.pixels.max():g}"


def _left_out(words: str) -> Judge:
    """Nothing is read, and the reason holds these words."""

    def judge(case: CaseFolder) -> Iterator[str]:
        read = case.read()
        if read.visits or words not in read.said:
            yield f"{len(read.visits)} visits; not left out for '{words}': {read.said}"

    return judge


def _said(words: str) -> Judge:
    """What is read aside, these words are said."""

    def judge(case: CaseFolder) -> Iterator[str]:
        said = case.read().said
        if words not in said:
            yield f"'{words}' is not said: {said}"

    return judge


def _control(case: CaseFolder) -> Iterator[str]:
    yield from _middle_of_the_head(case)
    if said := case.read().said:
        yield f"something is said of a control: {said}"


def _ages(*wanted: float) -> Judge:
    def judge(case: CaseFolder) -> Iterator[str]:
        read = case.read(overrides=ACCEPTED)
        if not np.array_equal(read.ages, wanted):
            yield f"ages {read.ages}, not {list(wanted)}: {read.said}"

    return judge


def _age_is_not(wrong: float) -> Judge:
    def judge(case: CaseFolder) -> Iterator[str]:
        if wrong in case.read(overrides=ACCEPTED).ages:
            yield f"an age of {wrong:g}, which stands in no cell"

    return judge


def _values(attribute: str, *wanted: str) -> Judge:
    def judge(case: CaseFolder) -> Iterator[str]:
        values = case.read(overrides=ACCEPTED).values(attribute)
        if values != set(wanted):
            yield f"{attribute} is {sorted(map(str, values))}, not {sorted(wanted)}"

    return judge


def _refused_table(words: str) -> Judge:
    def judge(case: CaseFolder) -> Iterator[str]:
        try:
            case.read()
        except TableError as error:
            if words not in str(error):
                yield f"the table is refused without '{words}': {error}"
        else:
            yield "the table is read"

    return judge


def _one_left_out(words: str) -> Judge:
    """One visit is read, and the other image is left out."""

    def judge(case: CaseFolder) -> Iterator[str]:
        read = case.read()
        if len(read.visits) != 1 or f"0.dcm: wrong geometry: its {words}" not in read.said:
            yield f"{len(read.visits)} visits, not 1 without the image whose {words}: {read.said}"

    return judge


def _one_scan(shape: tuple[int, int] | None = None, spacing_mm: tuple[float, float] | None = None) -> Judge:
    """One visit is read, with these rows and columns and this spacing where they are given."""

    def judge(case: CaseFolder) -> Iterator[str]:
        read = case.read()
        if len(read.visits) != 1:
            yield f"{len(read.visits)} visits, not 1: {read.said}"
            return
        scan = scan_of(read.visits[0])
        if shape is not None and scan.pixels.shape != shape:
            yield f"{scan.pixels.shape} pixels, not {shape}"
        if spacing_mm is not None and scan.spacing_mm != spacing_mm:
            yield f"a spacing of {scan.spacing_mm}, not {spacing_mm}"

    return judge


def _imported(layout: str, root: str, visits: int, *options: str, with_tables: bool = True) -> Judge:
    """`ld-client import` reads the data set without a table made by hand, and the index reads what it wrote."""

    def judge(case: CaseFolder) -> Iterator[str]:
        tables = sorted(case.folder.glob("*.csv")) if with_tables else []
        given = [part for table in tables for part in ("--table", str(table))]
        modality = "chest_radiograph" if layout == "chexpert" else "brain_mri"
        arguments = ["import", layout, str(case.folder / root), "--out", str(case.out / "imported"), *options, *given]
        arguments += ["--modality", str(case.project / f"configs/modalities/{modality}.yaml")]
        arguments += ["--base-model", str(case.project / "simulations/tiny_base"), "--json"]
        done = run_command(app, arguments)
        if done.code:
            yield f"the import ended with {done.code}: {done.said}"
            return
        counts = json.loads(done.out)["visits"], len(read_site(case.out / "imported/site.yaml").visits)
        if counts != (visits, visits):
            yield f"{counts[0]} visits imported and {counts[1]} read, not {visits}"

    return judge


def _adni_with_table(case: CaseFolder) -> Iterator[str]:
    yield from _imported("adni", "ADNI", 4)(case)
    said = case.read("with_age_bl.yaml").said
    if "78 years in the header and 74.3" not in said:
        yield f"the age at baseline passes for that of the visit: {said}"
    ages = case.read("age_from_header.yaml").ages
    if ages != [74, 75, 78, 81]:
        yield f"ages {ages}, not those of the headers"


CHEXPERT = ("--one-visit", "first", "--label", "No Finding=CN", "--label", "Cardiomegaly=HF")
JUDGES: dict[str, Judge] = {
    "00_control": _control,
    "01_multi_echo": _left_out("several images at one position (echo 10 ms; 90 ms)"),
    "02_localizer_first": _middle_of_the_head,
    "03_localizer_inside_series": _middle_of_the_head,
    "04_sagittal_mprage": _middle_of_the_head,
    "08_series_uid_per_slice": _middle_of_the_head,
    "09_time_series": _left_out("several images at one position"),
    "11_half_transferred": _said("5 slices cover 30 mm"),
    "22_padding_US_on_signed": _middle_of_the_head,
    "25b_series_number_text": _middle_of_the_head,
    "25c_spacing_comma": _middle_of_the_head,
    "25i_rescale_empty": _middle_of_the_head,
    "27_no_preamble": _middle_of_the_head,
    "32_studydate_empty_acq_there": _middle_of_the_head,
    "36_header_table_sex_disagree": _left_out("M in the header and F"),
    "36c_sex_changes_between_visits": _said("sex"),
    "43_qform_sform_disagree": _left_out("qform and sform disagree"),
    "44_codes_zero": _left_out("gives no orientation"),
    "47_truncated_gz_90": _left_out("cut off"),
    "47c_corrupt_gz_tail": _left_out("checksum is wrong"),
    "48_plain_named_gz": _middle_of_the_head,
    "49b_neg_background": _middle_of_the_head,
    "49e_float64_over_float32": _left_out("3.4e38"),
    "49g_int64": _middle_of_the_head,
    "50_mgz": _left_out("FreeSurfer"),
    "50b_hdrimg": _left_out(".hdr"),
    "52_neck_in_fov": _middle_of_the_head,
    "61_semicolon_decimal_comma": _ages(70.1, 74.5),
    "64b_unquoted_decimal_comma": _left_out("more cells than columns"),
    "64d_shift_decimal_weight_age": _age_is_not(55),
    "65a_int_keys": _values("sex", "F", "M"),
    "65c_yes_no": _values("diagnosis", "CN", "AD"),
    "70_no_date_column": _middle_of_the_head,
    "71_days_not_dates": _middle_of_the_head,
    "72_xlsx": _refused_table("an Excel workbook: save it as CSV"),
    "81_hand_first": _one_left_out("Body Part"),
    "81b_lateral_without_viewposition": _one_left_out("view is not"),
    "87b_deflated_dx": _one_scan(shape=(640, 640)),
    "88b_nominal_spacing": _one_scan(spacing_mm=(1.4, 1.4)),
    "91_jpg": _one_scan(),
    "91b_jpg_named_png": _left_out("JPEG"),
    "95_enhanced_mr": _middle_of_the_head,
    "98_file_paths": _said("the nearest is 'sub/B.NII.gz'"),
    "99_2d_nifti": _one_scan(shape=(49, 41)),
    "D1_bids": _imported("bids", "bids", 10, "--value", "diagnosis=CN", with_tables=False),
    "D2_oasis3": _imported("oasis3", "scans", 4),
    "D3_adni": _imported("adni", "ADNI", 3),
    "D3b_adni_axial": _adni_with_table,
    "D4_chexpert": _imported("chexpert", "CheXpert-v1.0-small", 1, *CHEXPERT, with_tables=False),
}
"""By the name of the case's folder."""


def case_names(cases: Path) -> list[str]:
    """Folders of the cases that are there, and those that should be."""
    return sorted({path.name for path in cases.iterdir() if path.is_dir()} | JUDGES.keys())


def problems_of(name: str, cases: Path, project: Path, out: Path) -> list[str]:
    """What is wrong with the reading of one case; a case without a judge is not right.

    Args:
        name: of the case.
        cases: folder of all cases.
        project: the repository.
        out: an empty folder to write to.

    Raises:
        LdError: the case's files cannot be read at all.
    """
    if name not in JUDGES:
        return ["nobody said what a right reading is"]
    return list(JUDGES[name](CaseFolder((cases / name).resolve(), project.resolve(), out)))


def judge_cases(cases: Path, project: Path) -> dict[str, list[str]]:
    """The problems of every case by its name; an exception is one of them."""
    found: dict[str, list[str]] = {}
    for name in case_names(cases):
        with tempfile.TemporaryDirectory() as out:
            try:
                found[name] = problems_of(name, cases, project, Path(out))
            except Exception as error:
                found[name] = [f"{type(error).__name__}: {error}"]
            places = {str(cases.resolve()): "CASES", str(project.resolve()): "PROJECT", out: "OUT"}
            found[name] = [_without(problem, places) for problem in found[name]]
    return found


def _without(text: str, places: Mapping[str, str]) -> str:
    """A text with words for this machine's folders."""
    for place, word in places.items():
        text = text.replace(place, word)
    return text
