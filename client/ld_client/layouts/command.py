"""`ld-client import`: a public layout as it comes, made into a table of visits and a site's config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from ld_client.layouts.labels import parse_label
from ld_common.core.command import Json, grouped, print_json, print_lines, printable, stage_bars
from ld_common.core.config import load_config, nearest, require
from ld_common.core.errors import TableError
from ld_common.imaging.modality import Modality

if TYPE_CHECKING:
    from ld_client.layouts.entries import LayoutOptions
    from ld_client.layouts.summary import ImportSummary

BRAIN, CHEST = "brain_mri", "chest_radiograph"
DEFAULT_MODALITY = {"bids": BRAIN, "oasis3": BRAIN, "adni": BRAIN, "chexpert": CHEST, "mimic_cxr": CHEST}
MODALITIES = Path("configs/modalities")
KEYS = ("patient", "date", "day")
READ_BY = {
    "label": ("chexpert", "mimic_cxr"),
    "pattern": ("tree",),
    "date_format": ("bids", "tree"),
    "tolerance_days": ("oasis3", "adni", "tree"),
    "baseline_age": ("bids", "tree"),
}
"""Options that not every layout reads."""
Layout = Annotated[str, typer.Argument(metavar="LAYOUT", help="bids, oasis3, adni, chexpert, mimic_cxr or tree.")]
Root = Annotated[Path, typer.Argument(metavar="ROOT", help="Folder of the data set; nothing is written into it.")]


@dataclass(frozen=True)
class SiteOutput:
    """What site.yaml says, and where it lies."""

    out: Annotated[Path, typer.Option("--out", help="Folder for visits.csv, site.yaml and left_out.csv.")] = Path()
    modality: Annotated[
        Path | None,
        typer.Option("--modality", help="The modality's YAML file; configs/modalities/ of the layout's by default."),
    ] = None
    base_model: Annotated[str, typer.Option("--base-model", help="Folder of the base model, for site.yaml.")] = ""
    site: Annotated[str, typer.Option("--site", help="The hospital's name; the layout's by default.")] = ""
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier import.")] = False


@dataclass(frozen=True)
class ReadingRules:
    """How tables and files are read."""

    table: Annotated[
        list[Path] | None,
        typer.Option("--table", help="Table to read, several times for several; found by name where it is left out."),
    ] = None
    series: Annotated[
        list[str] | None,
        typer.Option("--series", help="Pattern of the scans to take; several times in order of preference."),
    ] = None
    column: Annotated[
        list[str] | None, typer.Option("--column", help="ATTRIBUTE=COLUMN, also patient=, date= or day=COLUMN.")
    ] = None
    words: Annotated[
        list[str] | None, typer.Option("--map", help="ATTRIBUTE:WORD=VALUE: what a word of the tables stands for.")
    ] = None
    value: Annotated[
        list[str] | None, typer.Option("--value", help="ATTRIBUTE=VALUE of every visit, where no table says it.")
    ] = None
    label: Annotated[
        list[str] | None,
        typer.Option("--label", help="FINDING=DIAGNOSIS, or FINDING:0=DIAGNOSIS for its absence (chest data sets)."),
    ] = None
    pattern: Annotated[
        str, typer.Option("--pattern", help="Paths of a tree, such as {patient}/{date}/*.nii.gz or {patient}/{day}/.")
    ] = ""
    date_format: Annotated[str, typer.Option("--date-format", help="Of dates, as in strptime; ISO 8601 if empty.")] = ""


@dataclass(frozen=True)
class ChoiceRules:
    """Rules for what the data leave open."""

    tolerance_days: Annotated[
        int | None,
        typer.Option(
            "--tolerance-days", min=0, help="Most days from a scan to its row: 180 for oasis3 and adni, 0 for a tree."
        ),
    ] = None
    one_visit: Annotated[
        str, typer.Option("--one-visit", help="first or last: take one visit of each patient, also without dates.")
    ] = ""
    baseline_age: Annotated[
        bool, typer.Option("--baseline-age", help="The patient's age is that at the first visit: add the time since.")
    ] = False


@grouped
def import_layout(
    layout: Layout, root: Root, site: SiteOutput, reading: ReadingRules, choice: ChoiceRules, as_json: Json = False
) -> None:
    """Read a public data set as it comes into visits.csv and site.yaml, which ld-client index reads."""
    from ld_client.layouts.base import LayoutImport
    from ld_client.layouts.output import SiteEntries, check_output, write_left_out, write_site
    from ld_client.layouts.registry import LAYOUTS
    from ld_client.layouts.settle import settle
    from ld_client.layouts.summary import summarize
    from ld_common.protocol.site_name import check_site_name

    importer = LAYOUTS.load(layout)
    require(root.is_dir(), f"'{root}' is not a folder: give the folder of the data set")
    check_output(site.out, root, site.force)
    entries = SiteEntries(site.site or layout, _modality_file(layout, site.modality), site.base_model)
    check_site_name(entries.site)
    for option, layouts in READ_BY.items():
        given = {**vars(reading), **vars(choice)}[option] not in (None, "", False, [])
        unread = given and layout not in layouts and LAYOUTS.package_of(layout) is None
        require(
            not unread, f"--{option.replace('_', '-')} is for {' and '.join(layouts)}, not for {layout}: leave it out"
        )
    options = _options(root, entries.modality, reading, choice)
    with stage_bars(Console(stderr=True)) as progress:
        run = LayoutImport(options, progress)
        importer(run)
        visits = settle(run)
    written = write_left_out(site.out, run)
    written += write_site(site.out, run, visits, entries) if visits else []
    _show(summarize(layout, run, visits, [str(path) for path in written]), as_json)
    if not visits:
        raise TableError(f"no scan became a visit: '{written[0]}' has the reasons")
    if not as_json:
        missing = "" if site.base_model else ", once base_model is filled in"
        print_lines(f"next: ld-client index --config {written[-1]}{missing}")


def _options(root: Path, modality_file: Path, reading: ReadingRules, choice: ChoiceRules) -> LayoutOptions:
    from ld_client.layouts.entries import LayoutOptions

    modality = load_config(Modality, modality_file)
    require(choice.one_visit in ("", "first", "last"), f"--one-visit is '{choice.one_visit}': use first or last")
    known = list(modality.attributes)
    columns, constants = _pairs("--column", reading.column), _pairs("--value", reading.value)
    for option, names, allowed in (("--column", columns, [*known, *KEYS]), ("--value", constants, known)):
        for name in names:
            require(name in allowed, f"{option} names '{name}': {nearest(name, allowed)}")
    for name, value in constants.items():
        modality.parse(name, value)
    return LayoutOptions(
        root=root,
        modality=modality,
        tables=tuple(reading.table or ()),
        series=tuple(reading.series or ()),
        columns=columns,
        words=_words(modality, reading.words or ()),
        constants=constants,
        labels=tuple(map(parse_label, reading.label or ())),
        tolerance_days=choice.tolerance_days,
        one_visit=choice.one_visit,
        baseline_age=choice.baseline_age,
        pattern=reading.pattern,
        date_format=reading.date_format,
    )


def _modality_file(layout: str, given: Path | None) -> Path:
    if given is not None:
        return given
    name = DEFAULT_MODALITY.get(layout)
    path = MODALITIES / f"{name}.yaml"
    require(name is not None and path.is_file(), "give --modality FILE, the modality's YAML file of the study")
    return path


def _pairs(option: str, texts: Sequence[str] | None) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in texts or ():
        name, equals, value = (part.strip() for part in text.partition("="))
        require(bool(name and equals and value), f"{option} is '{text}': write NAME=VALUE")
        require(name not in pairs, f"{option} names '{name}' twice")
        pairs[name] = value
    return pairs


def _words(modality: Modality, texts: Sequence[str]) -> dict[str, dict[str, str]]:
    """The words of --map: attribute -> word in lower case -> value."""
    words: dict[str, dict[str, str]] = {}
    for text in texts:
        left, equals, value = (part.strip() for part in text.rpartition("="))
        name, colon, word = (part.strip() for part in left.partition(":"))
        form = f"--map is '{text}': write ATTRIBUTE:WORD=VALUE, such as --map \"diagnosis:patient=AD\""
        require(bool(equals and colon and value and word), form)
        require(name in modality.attributes, f"--map names '{name}': {nearest(name, list(modality.attributes))}")
        categories = list(modality.attributes[name].categories)
        require(value in categories, f"--map gives {name} '{value}': {nearest(value, categories)}")
        words.setdefault(name, {})[word.lower()] = value
    return words


def _show(summary: ImportSummary, as_json: bool) -> None:
    from ld_client.layouts.output import CONTRADICTIONS, LEFT_OUT
    from ld_client.layouts.summary import contradiction_lines, summary_lines

    if as_json:
        return print_json(summary)
    print_lines(*summary_lines(summary))
    if summary.left_out:
        table = Table("left out because", "files", "rows", Column("for example", overflow="fold"))
        for entry in summary.left_out:
            table.add_row(entry.cause, str(entry.files), str(entry.rows), Text(printable(entry.example)))
        Console().print(table)
        print_lines(f"{LEFT_OUT} lists all that was left out")
    print_lines(*contradiction_lines(summary, CONTRADICTIONS))
    return print_lines(*(f"wrote {path}" for path in summary.written))
