"""`ld-generate send`: synthetic DICOM files to a PACS. Other commands do the same with `--send`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ld_common.core.command import Json, print_lines, printable, progress_bar
from ld_common.core.config import require
from ld_common.core.errors import RequestError
from ld_common.imaging.dicomweb_options import PANEL, PacsAccess, PacsOptions
from ld_generate.console import print_note, status

if TYPE_CHECKING:
    from ld_generate.sending import SentFile


@dataclass(frozen=True, kw_only=True)
class SendOptions(PacsOptions):
    """Whether the synthetic DICOM files are sent to a PACS once they are written, and how."""

    send: Annotated[
        str,
        typer.Option(
            metavar="URL",
            help="Also store the synthetic DICOM files in a PACS: the address of its DICOMweb service.",
            rich_help_panel=PANEL,
        ),
    ] = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in ("ca", "cert", "user") if getattr(self, name)]
        require(bool(self.send) or not given, f"--{next(iter(given), '')} has no use without --send URL")
        if self.send:
            self.access(self.send)  # a mistake costs no drawing


Folder = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="Results of other commands, in subfolders too.", show_default=False)
]
Url = Annotated[str, typer.Argument(metavar="URL", help="Address of the PACS's DICOMweb service.", show_default=False)]


def send(folder: Folder, url: Url, options: PacsOptions, as_json: Json = False) -> None:
    """Store the synthetic DICOM files of a folder of results in a PACS, over DICOMweb (STOW-RS).

    Nothing is sent where one DICOM file in the folder does not say that it is synthetic. A file that the PACS has
    already stays there once. The exit code is 1 when the PACS lacks a file afterwards.

    Example: ld-generate send counterfactuals https://pacs.example/dicom-web --user viewer --password-file password
    """
    access = options.access(url)
    if not folder.is_dir():
        raise RequestError(f"there is no folder '{folder}': give a folder of results")
    from ld_generate.report import print_json
    from ld_generate.sending import synthetic_files

    results = _send(synthetic_files(folder), access)
    if as_json:
        print_json({"pacs": access.host, "files": [asdict(result) for result in results]})
    else:
        print_lines(_summary(results, access))
    _end(results)


def send_written(files: Sequence[Path], options: SendOptions) -> None:
    """Do what `--send` asks for with the files that a command wrote; ends the command where the PACS lacks one."""
    if options.send:
        access = options.access(options.send)
        results = _send([file for file in files if file.suffix == ".dcm"], access)
        print_note(_summary(results, access))
        _end(results)


def _send(files: Sequence[Path], access: PacsAccess) -> list[SentFile]:
    """Send with a progress bar, and a line on standard error for each file that the PACS lacks."""
    from ld_generate.sending import send_files

    with progress_bar(status, "sending", len(files)) as advance:
        results = send_files(files, access, advance)
    for result in results:
        if result.problem:
            print_note(printable(f"not sent: {result.file}: {result.problem}"))
    return results


def _summary(results: Sequence[SentFile], access: PacsAccess) -> str:
    sent = sum(not result.problem for result in results)
    return f"sent {sent} of {len(results)} synthetic DICOM files to {access.host}"


def _end(results: Sequence[SentFile]) -> None:
    if any(result.problem for result in results):
        raise typer.Exit(1)
