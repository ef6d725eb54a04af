"""`ld-client fetch`: scans from the hospital's PACS into the store's quarantine."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from ld_client.site_commands import SiteOptions
from ld_common.core.command import Json, grouped, print_json, print_lines, printable, stage_bars
from ld_common.imaging.dicomweb_options import PANEL, PacsOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ld_client.pacs.fetcher import FetchedSeries
    from ld_client.pacs.query import RemoteSeries, SeriesFound

QUARANTINE = "quarantine"
"""Folder in the store."""

Pacs = Annotated[
    str, typer.Option(metavar="URL", help="Address of the PACS's DICOMweb service.", rich_help_panel=PANEL)
]
Query = Annotated[
    list[str],
    typer.Option(
        metavar="ATTRIBUTE=VALUE",
        help="What is fetched, by attributes of studies and series: Modality=MR, StudyDate=20150101-20201231, "
        "SeriesDescription=*T1*. Repeatable; all must match.",
    ),
]


@grouped
def fetch(
    site: SiteOptions,
    pacs: Pacs,
    query: Query,
    pacs_options: PacsOptions,
    list_only: bool = typer.Option(False, "--list", help="Show what matches, and fetch nothing."),
    out: Path | None = typer.Option(None, help="Folder in place of the store's quarantine."),
    as_json: Json = False,
) -> None:
    """Fetch scans from the hospital's PACS over DICOMweb into the store's quarantine, and continue a stopped fetch.

    Only whole series are put there; nothing trains on them before ld-client index reads the folder. The exit code is 1
    when a series is missing.

    Example: ld-client fetch --config site.yaml --pacs https://pacs.example/dicom-web --query Modality=MR --list
    """
    from ld_client.pacs.fetcher import fetch_series
    from ld_client.pacs.query import read_query, search
    from ld_common.imaging.dicomweb import PacsService
    from ld_common.imaging.dicomweb_errors import PacsError

    access, wanted = pacs_options.access(pacs), read_query(query)
    quarantine = None
    if not list_only:
        quarantine = (site.load().store_path / QUARANTINE if out is None else out).resolve()
    console = Console(stderr=True)
    with PacsService(access) as service:
        with console.status("searching") as status:
            found = search(service, wanted, lambda done, total: status.update(f"searching study {done} of {total}"))
        results = []
        if quarantine is not None and found.series:
            with stage_bars(console) as progress:
                results = fetch_series(service, found.series, quarantine, progress)
    for reason, count in found.ignored.most_common():
        notice = f"the PACS listed {count} that do not match, which were ignored: {reason}"
        console.print(printable(notice), soft_wrap=True, highlight=False, markup=False)
    if quarantine is None:
        return _show_found(found, as_json)
    if not results:
        raise PacsError(f"{access.host} has no series that matches: see what there is with a wider --query and --list")
    if as_json:
        print_json({"quarantine": str(quarantine), "series": [_plain(result) for result in results]})
    else:
        _show_results(results, quarantine, site)
    if any(result.missing for result in results):
        raise typer.Exit(1)
    return None


def _show_found(found: SeriesFound, as_json: bool) -> None:
    """Print the series of each modality and description, the most frequent first."""
    groups: dict[tuple[str, str], list[RemoteSeries]] = {}
    for series in found.series:
        groups.setdefault((series.modality, series.description), []).append(series)
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    rows = [
        {
            "modality": modality,
            "description": description,
            "studies": len({series.study_uid for series in members}),
            "series": len(members),
            "images": sum(series.images or 0 for series in members),
        }
        for (modality, description), members in ordered
    ]
    if as_json:
        return print_json({"studies": found.studies, "series": len(found.series), "groups": rows})
    table = Table("modality", Column("description", overflow="fold"), "studies", "series", "images")
    for row in rows:
        table.add_row(*(Text(printable(str(cell))) for cell in row.values()))
    Console().print(table)
    images = sum(series.images or 0 for series in found.series)
    return print_lines(f"{found.studies} studies, {len(found.series)} series, {images} images; nothing was fetched")


def _show_results(results: Sequence[FetchedSeries], quarantine: Path, site: SiteOptions) -> None:
    for result in results:
        series = result.series
        images = f"{result.images} images" if series.images is None else f"{result.images} of {series.images} images"
        line = f"{result.outcome.value}: {result.folder.name}, {series.modality} '{series.description}', {images}"
        if result.missing:
            line += f": {result.problem} (series {series.series_uid})"
        print_lines(line)
    counts = Counter(result.outcome for result in results)
    print_lines(", ".join(f"{count} series {outcome.value}" for outcome, count in counts.items()))
    if any(result.missing for result in results):
        print_lines("fetch again to continue with what is missing")
    named = site.home is not None or site.config is not None
    options = site.arguments() if named else "--config SITE"
    print_lines(f"see {quarantine}; to read it: ld-client index {options} data.root={quarantine}")


def _plain(result: FetchedSeries) -> dict[str, Any]:
    entry = asdict(result) | asdict(result.series)
    del entry["series"]
    return entry | {"announced": entry["images"], "images": result.images, "outcome": result.outcome.value}
