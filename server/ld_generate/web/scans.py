"""What was dropped on the page, or picked from its examples, as the one path that `read_scan` takes."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path

from ld_common.core.errors import ConfigError, RequestError
from ld_common.imaging.modality import Modality
from ld_common.imaging.rejection import MAX_FILE_BYTES, Refusal, ScanRefused, refusing
from ld_generate.request import SUFFIXES

MOST_FILES = 4096
"""Of one series."""


def find_examples(folder: Path, modality: Modality) -> dict[str, Path]:
    """The scans below a folder by name: each image, and each folder with the DICOM slices of one volume.

    Raises:
        ConfigError: there are none.
    """
    found = set()
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.name.endswith(SUFFIXES)):
        is_slice = modality.image.plane != "none" and file.suffix == ".dcm"
        found.add(file.parent if is_slice else file)
    if not found:
        raise ConfigError(f"--examples '{folder}' holds no scan: give a folder with .dcm, .nii, .nii.gz or .png in it")
    names = {path: path.relative_to(folder).parts or (folder.name,) for path in sorted(found)}
    # what every name ends with tells none of them from another
    while len(names) > 1 and min(map(len, names.values())) > 1 and len({parts[-1] for parts in names.values()}) == 1:
        names = {path: parts[:-1] for path, parts in names.items()}
    return {" / ".join(parts): path for path, parts in names.items()}


def one_scan(files: Sequence[Path], folder: Path) -> Path:
    """One file as it is; several, or those of a .zip, as a folder of one series, which is made in `folder`.

    Raises:
        RequestError: nothing was dropped, or what was dropped is there no more.
        ScanRefused: an archive that is damaged or holds too much.
    """
    if not files:
        raise RequestError("there is no scan yet: drop one, or pick an example")
    if not all(file.exists() for file in files):
        raise RequestError("this scan was removed from the server after a while without use: drop it again")
    if len(files) == 1 and files[0].suffix.lower() != ".zip":
        return files[0]
    series = folder / (files[0].stem if len(files) == 1 else "series")
    series.mkdir()
    if len(files) == 1:
        return _unpacked(files[0], series)
    for number, file in enumerate(files):
        (series / f"{number:05d}.dcm").symlink_to(file.resolve())
    return series


def _unpacked(archive: Path, series: Path) -> Path:
    with refusing(archive, zipfile.BadZipFile), zipfile.ZipFile(archive) as opened:
        members = [member for member in opened.infolist() if not member.is_dir()]
        if len(members) > MOST_FILES or sum(member.file_size for member in members) > MAX_FILE_BYTES:
            detail = f"at most {MOST_FILES} files and {MAX_FILE_BYTES} bytes of one series are read"
            raise ScanRefused(archive, Refusal.TOO_LARGE, detail)
        for number, member in enumerate(members):
            # the names inside are the archive's word: none of them is used
            with opened.open(member) as source, (series / f"{number:05d}.dcm").open("wb") as target:
                shutil.copyfileobj(source, target)
    return series
