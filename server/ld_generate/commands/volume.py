"""`ld-generate volume`: counterfactuals of whole volumes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

import typer

from ld_common.core.command import loading, progress_bar
from ld_generate.console import print_note, status
from ld_generate.options import (
    SCANS,
    Delta,
    EditorOptions,
    LoadOptions,
    OutputOptions,
    ScanOptions,
    Target,
    check_attributes,
    read_slice_range,
    read_targets,
)


@dataclass(frozen=True, kw_only=True)
class VolumeOptions:
    """What is edited in which slices."""

    target: Target
    slices: Annotated[
        str,
        typer.Option(
            metavar="FIRST:LAST",
            help="Axial slices to edit, from 0, the lowest. By default 5 % of all, around the one that was trained on.",
            show_default=False,
            rich_help_panel=SCANS,
        ),
    ] = ""
    drift: Delta = None

    def __post_init__(self) -> None:
        if self.slices:
            read_slice_range(self.slices)


def volume(
    load_options: LoadOptions,
    scans: ScanOptions,
    options: VolumeOptions,
    editor_options: EditorOptions,
    output: OutputOptions,
) -> None:
    """Edit volumes (NIfTI files, folders of a DICOM series) and write them in the input's geometry.

    Slices near the one that the release was trained on are edited; all others keep the input's values. --history takes
    earlier volumes of the patient, registered rigidly to the input. KEY=VALUE sets an option of the editor.

    Example: ld-generate volume RELEASE --input head.nii.gz --source age=74,sex=F,diagnosis=CN --target age=84
    """
    check_attributes(load_options, options.target, scans.source)
    with loading(status):
        from ld_common.imaging.face import shows_face
        from ld_generate.loading import choose_editor, load_model, open_release
        from ld_generate.report import print_results
        from ld_generate.request import RequestOptions
        from ld_generate.samples import make_folder
        from ld_generate.volume import draw_volume, read_volume_requests
        from ld_generate.volume_writer import write_volumes

    release = open_release(load_options)
    editor = choose_editor(release, editor_options)
    editor = replace(editor, delta=options.drift[0]) if options.drift else editor
    request_options = RequestOptions.of(release.modality, scans, output)
    targets = read_targets(release.modality, options.target)
    model = load_model(release, load_options)
    requests = read_volume_requests(model, release, scans.inputs, targets, request_options, options.slices)
    for request in requests:
        if shows_face(request.volume):
            print_note(f"'{request.path}' seems to show a face, which its counterfactuals repeat: deface it first")
        make_folder(request.folder)
    count = sum(len(request.edited) * (1 + len(request.targets)) for request in requests)
    files = []
    with progress_bar(status, "drawing slices", count) as advance:
        for request in requests:
            files += write_volumes(release, request, draw_volume(model, release, request, editor, advance), editor)
    print_results(files, output.as_json)
