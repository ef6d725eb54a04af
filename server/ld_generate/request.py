"""Requests of edits: a scan, what it shows, and what shall change."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from ld_common.core.errors import RequestError, ScanError
from ld_common.diffusion.base_model import BaseModel
from ld_common.diffusion.unfamiliarity import Unfamiliarity
from ld_common.editing.familiarity import history_unfamiliarity, unfamiliarity_of, unfamiliarity_warnings
from ld_common.editing.history import EarlierScan, ScanHistory, read_history, writing
from ld_common.imaging.geometry import Frame, Scan, to_model
from ld_common.imaging.modality import AGE, DECODED, Attributes, Modality
from ld_common.imaging.nifti import NIFTI
from ld_common.imaging.readers import read_scan
from ld_common.imaging.scan_reader import PICTURES
from ld_common.imaging.scan_table import agree, shown
from ld_common.release.release import Release
from ld_generate.attribute_sweep import Sweep
from ld_generate.doubts import refuse_doubts
from ld_generate.options import HistoryFile, OutputOptions, ScanOptions, read_history_options
from ld_generate.preserve_mask import read_preserve_mask
from ld_generate.samples import make_folder
from ld_generate.watermark import check_watermark_fits

SUFFIXES = (*NIFTI, ".dcm", *PICTURES)
MIN_SIDE = 16
"""Fewest rows and columns of a scan; a smaller image is an icon."""


@dataclass(frozen=True)
class RequestOptions:
    """What the requests of one command have in common."""

    out: Path
    """Folder of the results, in which each scan gets one."""
    source: Attributes = field(default_factory=dict)
    """Attributes that the files do not say."""
    slice_index: int | None = None
    """Slice of a volume, from 0; None for the one that training used."""
    burned_in_text_checked: bool = False
    """A person has checked the pixels for burned-in text."""
    preserve_mask: Path | None = None
    watermark: bool = False
    rendering: str = ""
    """One of `RENDERINGS`; empty for the modality's."""
    history: Sequence[HistoryFile] = ()
    """Earlier scans of the patient, where there is one input."""
    earlier: Sequence[EarlierScan] = ()
    """The same, already read."""
    study_date: datetime.date | None = None
    """Of the input, where something else than its file says it."""
    strict: bool = False
    """Refuse what the release's scans do not cover."""
    keep_geometry: bool = False
    """Write the scan's position and frame of reference into DICOM answers, which links them to it."""

    @classmethod
    def of(
        cls, modality: Modality, scans: ScanOptions, output: OutputOptions, slice_index: int | None = None
    ) -> RequestOptions:
        """Those of a command line; raises `RequestError` for a wrong `--source`."""
        return cls(
            out=output.out,
            source=modality.parse_all(scans.source),
            slice_index=slice_index,
            burned_in_text_checked=scans.burned_in_text_checked,
            preserve_mask=scans.preserve_mask,
            watermark=output.watermark,
            rendering=scans.rendering,
            history=read_history_options(scans.history or []),
            strict=scans.strict,
            keep_geometry=output.keep_geometry,
        )


@dataclass(frozen=True)
class EditRequest:
    """A scan in the model's frame, what it shows, and what shall change."""

    path: Path
    scan: Scan
    frame: Frame
    image: Tensor
    """The model's picture of the scan, `(1,S,S)` in [-1, 1]."""
    source: Attributes
    """All attributes of the scan."""
    targets: list[Attributes]
    """The changed attributes of each counterfactual."""
    slice_index: int | None
    """As in `RequestOptions`."""
    folder: Path
    sweep: Sweep | None = None
    """Its targets are the last of `targets`."""
    preserve_mask: np.ndarray | None = None
    """Share of the scan in each pixel `(H,W)`, from 0 to 1; None edits all of it."""
    watermark: bool = False
    keep_geometry: bool = False
    rendering: str = DECODED
    history: ScanHistory | None = None
    """Earlier visits of the patient."""
    unfamiliarity: Unfamiliarity | None = None
    """How unlike the sites' scans it is; None where the release cannot tell."""
    earlier_unfamiliarity: Sequence[Unfamiliarity] = ()
    """The same for each scan of the history."""

    @property
    def unfamiliarity_warnings(self) -> list[str]:
        """A sentence for each scan that is unlike the sites'."""
        return unfamiliarity_warnings(self.unfamiliarity, self.earlier_unfamiliarity)


def read_requests(
    base: BaseModel,
    release: Release,
    inputs: Sequence[Path],
    targets: list[Attributes],
    options: RequestOptions,
    sweep: Sweep | None = None,
) -> list[EditRequest]:
    """Read scans and determine their attributes.

    Args:
        base: the base with the release's adapter.
        release: the release.
        inputs: files, or folders of a DICOM series.
        targets: the changed attributes of each counterfactual.
        options: all else.
        sweep: further targets along one attribute.

    Raises:
        ScanError: a file that cannot be used.
        RequestError: attributes that are missing or contradict the file, a mask that does not fit, or, with
            `options.strict`, a scan or a target that the release's scans do not cover.
    """
    modality, resolution, requests = release.modality, base.resolution, []
    for path, name in zip(inputs, folder_names(inputs), strict=True):
        scan = read_scan(path, modality, options.slice_index, options.burned_in_text_checked)
        scan = dated(path, scan, options.study_date)
        if options.watermark:
            check_watermark_fits(*scan.pixels.shape)
        if options.keep_geometry:
            check_geometry(path, scan.frame_of_reference)
        image, frame = model_picture(path, scan, resolution, modality)
        mask = None
        if options.preserve_mask is not None:
            mask = read_preserve_mask(options.preserve_mask, modality, options.slice_index, scan, frame, resolution)
        source = source_of(modality, path, scan.attributes_in_file, options.source)
        rendering = options.rendering or modality.image.rendering
        history = _read_history(modality, scan, source, resolution, options)
        if history is not None:
            history = replace(history, write=writing(scan, frame, rendering, resolution, modality.image))
        request = EditRequest(
            path=path,
            scan=scan,
            frame=frame,
            image=image,
            source=source,
            targets=[*targets, *(sweep.targets if sweep else [])],
            slice_index=options.slice_index,
            folder=options.out / name,
            sweep=sweep,
            preserve_mask=mask,
            watermark=options.watermark,
            keep_geometry=options.keep_geometry,
            rendering=rendering,
            history=history,
            unfamiliarity=unfamiliarity_of(base, release.drift, modality, image, source),
            earlier_unfamiliarity=history_unfamiliarity(base, release.drift, modality, history, source),
        )
        if options.strict:
            refuse_doubts(release, path, [source, *request.targets], request.unfamiliarity_warnings)
        requests.append(request)
    return requests


def _read_history(
    modality: Modality, scan: Scan, source: Attributes, resolution: int, options: RequestOptions
) -> ScanHistory | None:
    if not options.history and not options.earlier:
        return None
    if AGE not in source:
        raise RequestError(f"a history needs the attribute {AGE}, which {modality.name} lacks")
    earlier = [
        EarlierScan(
            read_scan(file.path, modality, options.slice_index, options.burned_in_text_checked),
            file.age,
            f"'{file.path}'",
        )
        for file in options.history
    ]
    return read_history(scan, float(source[AGE]), [*earlier, *options.earlier], resolution, modality.image)


def dated(path: Path, scan: Scan, given: datetime.date | None) -> Scan:
    """The scan with a date that was given for it; raises `RequestError` where its file says another one."""
    if given is None or scan.study_date == given:
        return scan
    if scan.study_date is not None:
        raise RequestError(f"the date of '{path}' is {given} in the table and another one in the file")
    return replace(scan, study_date=given)


def check_geometry(path: Path, frame_of_reference: str) -> None:
    """Refuse `--keep-geometry` for a scan that lies in no frame of reference; raises `RequestError`."""
    if not frame_of_reference:
        raise RequestError(
            f"--keep-geometry needs DICOM images with a position and a Frame of Reference UID, which '{path}' lacks: "
            "leave it out; NIfTI answers lie where their scan does anyway"
        )


def model_picture(path: Path, scan: Scan, resolution: int, modality: Modality) -> tuple[Tensor, Frame]:
    """The model's picture of a scan, as `to_model`; raises `ScanError` for an icon or an image without contrast."""
    height, width = scan.pixels.shape
    if min(height, width) < MIN_SIDE:
        raise ScanError(f"cannot use '{path}': {height} x {width} pixels, at least {MIN_SIDE} x {MIN_SIDE} are needed")
    try:
        return to_model(scan, resolution, modality.image)
    except ScanError as error:
        raise ScanError(f"cannot use '{path}': {error}") from error


def folder_names(inputs: Sequence[Path]) -> list[str]:
    """A unique folder name for each input; equal names, such as `series`, get the name of the folder above in front."""
    stems = [
        next((path.name[: -len(end)] for end in SUFFIXES if path.name.lower().endswith(end)), path.name)
        for path in inputs
    ]
    names: list[str] = []
    for path, stem in zip(inputs, stems, strict=True):
        name = f"{path.resolve().parent.name}_{stem}" if stems.count(stem) > 1 else stem
        while name in names:
            name += "_"
        names.append(name)
    return names


def make_folders(requests: Sequence[EditRequest]) -> None:
    """Make the folders of the results before anything is drawn; raises `RequestError` when one cannot be made."""
    for request in requests:
        make_folder(request.folder)


def source_of(modality: Modality, path: Path, in_file: Attributes, source: Attributes) -> Attributes:
    """All attributes of a scan, from its file and from `--source`.

    Raises:
        RequestError: the two contradict each other, or an attribute is missing.
    """
    for name in sorted(set(in_file) & set(source)):
        if not agree(in_file[name], source[name]):
            raise RequestError(f"{name} is {shown(in_file[name])} in '{path}' and {shown(source[name])} in --source")
    attributes = {name: value for name, value in (in_file | source).items() if name in modality.attributes}
    missing = [name for name in modality.attributes if name not in attributes]
    if missing:
        raise RequestError(f"'{path}' does not say {', '.join(missing)}: add --source {'=...,'.join(missing)}=...")
    return attributes
