"""Reads scans, volumes and headers that others made: decoded in a child process, checked, and prepared.

`read_scan` and `read_volume` have the results and errors of `scan_reader.decode_scan` and `volume.decode_volume`,
refuse text in the pixels and the wrong kind of head, and run the modality's `preprocessing`; `read_headers` has those
of `dicom.read_headers`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ld_common.core.ahead import map_ahead
from ld_common.imaging.burned_in_text import check_burned_in_text
from ld_common.imaging.decoding_process import shared_process, source_paths
from ld_common.imaging.dicom_header import DicomHeader
from ld_common.imaging.geometry import Scan
from ld_common.imaging.modality import Modality
from ld_common.imaging.rejection import ScanRejected, slice_number
from ld_common.imaging.scan_reader import Source
from ld_common.imaging.volume import Volume

BATCH = 64
"""Headers that are asked for at once."""


def read_scan(
    source: Source,
    modality: Modality,
    slice_index: int | None = None,
    released: bool = False,
    headers: Sequence[DicomHeader] | None = None,
) -> Scan:
    """Read one scan, decoded in a child process as `scan_reader.decode_scan` does, and prepared as the modality says.

    With `preprocessing`, the whole volume is prepared in this process, and the slice is taken from the result. Single
    slices and pictures cannot be prepared.

    Args:
        source: DICOM file, folder of one DICOM series, its files, NIfTI volume, or grey PNG or JPEG.
        modality: its `image` options choose the slice.
        slice_index: from 0, the lowest slice, upwards along the normal; of the prepared volume where there is one.
        released: a person has checked the pixels for burned-in text; else a slice with text in them is refused.
        headers: as of `scan_reader.decode_scan`.

    Raises:
        ScanRejected: the file cannot be used, or decoding it took too long, too much memory or ended the child; it
            shows another kind of head than the modality has, or cannot be prepared.
        ConfigError: a file of `preprocessing` is missing, or another one.
    """
    path, plain = source_paths(source)[0], modality.as_in_files()
    with shared_process() as child:
        scan = child.read_scan(source, plain, None if modality.preprocessing else slice_index, released, headers)
    if not released:
        check_burned_in_text(path, scan.pixels)
    if modality.image.head:
        from ld_common.imaging.head_kind import check_head

        check_head(path, scan, modality.image.head)
    if not modality.preprocessing:
        return scan
    from ld_common.imaging.preparation.prepare import prepared_scan  # seconds, which most processes save

    with shared_process() as child:
        volume = child.read_volume(source, replace(plain, image=replace(plain.image, plane="axial")), released)
    scan = prepared_scan(path, volume, scan, modality, slice_index)
    if not released:
        check_burned_in_text(path, scan.pixels)
    return scan


def read_volume(path: Path, modality: Modality, released: bool = False) -> Volume:
    """Read a NIfTI file or the folder of a DICOM series, decoded in a child process as `volume.decode_volume` does.

    With `preprocessing` of the modality, the answer is the prepared volume, on its own grid. Text is looked for in the
    file's slices along the third axis, unless they are `released`.

    Raises:
        ScanRejected, ConfigError: as `read_scan`.
    """
    with shared_process() as child:
        volume = child.read_volume(path, modality.as_in_files(), released)
    for index in range(0 if released else volume.voxels.shape[2]):
        check_burned_in_text(path, volume.voxels[:, :, index].T, f"slice {index} along the third axis")
    if modality.image.head:
        from ld_common.imaging.head_kind import check_head

        middle = slice_number(path, len(volume.upright), modality.image.slice_position, None)
        check_head(path, volume.scan(middle), modality.image.head)
    if not modality.preprocessing:
        return volume
    from ld_common.imaging.preparation.prepare import prepare

    return prepare(path, volume, modality.preprocessing)


def read_headers(
    files: Sequence[tuple[Path, bool]], modalities: Sequence[str], workers: int = 1
) -> Iterator[list[DicomHeader] | ScanRejected]:
    """The headers of each DICOM file's images, read in child processes, or its refusal.

    Args:
        files: paths, and whether a person has checked their pixels for burned-in text.
        modalities: accepted values of DICOM Modality (0008,0060).
        workers: children that read side by side.
    """

    def read(batch: Sequence[tuple[Path, bool]]) -> list[list[DicomHeader] | ScanRejected]:
        with shared_process() as child:
            return child.read_headers(batch, modalities)

    batches = (files[start : start + BATCH] for start in range(0, len(files), BATCH))
    for answers in map_ahead(read, batches, workers):
        yield from answers
