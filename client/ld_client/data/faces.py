"""Counts the head volumes of a site that seem to show a face: a notice, which excludes nothing."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ld_client.data.ingest import Progress, Survey
from ld_client.data.memory import FileMemory
from ld_client.data.store_index import open_index
from ld_common.core.errors import ScanError
from ld_common.imaging.nifti import NIFTI
from ld_common.imaging.readers import read_volume

META = "faces"
MOST_VOLUMES = 50
"""Volumes that are read whole: enough for a notice, at about a second each."""
REMEDY = (
    "training takes one axial slice of each, which stays here; ld-generate volume draws whole volumes, face included: "
    "deface what is given to it"
)


@dataclass(frozen=True)
class FaceCount:
    """Of the volumes that an index looked at."""

    volumes: int
    """Those whose head reaches from the vertex to the face."""
    faces: int
    """Those of them that seem to show it."""

    def __str__(self) -> str:
        return f"{self.faces} of {self.volumes} head volumes that were looked at seem to show a face"


def count_faces(surveyed: Survey, progress: Progress, memory: FileMemory | None = None) -> FaceCount:
    """Look at the first `MOST_VOLUMES` volumes; what cannot be read as one volume is passed over.

    A volume of the last index that did not change is not read again.
    """
    if surveyed.modality.image.plane != "axial":
        return FaceCount(0, 0)
    scans = [scan for dates in surveyed.patients.values() for scans in dates.values() for scan in scans]
    paths = sorted({path for scan in scans if (path := _volume_path(scan.paths[0], scan.files)) is not None})
    chosen = paths[:MOST_VOLUMES]
    found: list[bool] = []
    for done, path in enumerate(chosen, start=1):
        face = _face(path, surveyed, memory)
        found += [] if face is None else [face]
        progress("looking for faces", done, len(chosen))
    return FaceCount(len(found), sum(found))


def _face(path: Path, surveyed: Survey, memory: FileMemory | None) -> bool | None:
    """Whether a volume seems to show a face; None where it cannot be told."""
    try:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
    except OSError:
        return None
    key = None if memory is None else memory.key("face", files, surveyed.modality.digest())
    known = None if memory is None else memory.get(key)
    if known is not None:
        return None if known["face"] is None else bool(known["face"])
    from ld_common.imaging.face import shows_face  # a second, which an index without a new volume saves

    try:
        face = shows_face(read_volume(path, surveyed.modality.as_in_files(), released=True))
    except ScanError:
        face = None
    if memory is not None:
        memory.put(key, {"face": face})
    return face


def read_face_count(folder: Path) -> FaceCount | None:
    """What the last index found, None for an index without it; raises `StoreError` without a store."""
    with open_index(folder) as index:
        row = index.execute("SELECT value FROM meta WHERE key = ?", (META,)).fetchone()
        return None if row is None else FaceCount(**json.loads(row[0]))


def meta_of(count: FaceCount) -> dict[str, str]:
    """The count as an entry of the index."""
    return {META: json.dumps(asdict(count))}


def _volume_path(source: Path, files: int) -> Path | None:
    if source.name.lower().endswith(NIFTI):
        return source
    return source.parent if files > 1 else None
