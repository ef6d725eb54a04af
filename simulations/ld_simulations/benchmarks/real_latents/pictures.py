"""Everyday pictures that come with Python packages, real radiographs, and slices of real MR volumes."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import torch
from nibabel.affines import voxel_sizes
from PIL import Image
from torch import Tensor

from ld_common.core.errors import ConfigError
from ld_common.core.seeding import numpy_generator
from ld_common.imaging.geometry import Scan, to_model
from ld_common.imaging.modality import Modality
from ld_common.imaging.readers import read_scan

SKIMAGE = ("astronaut", "camera", "chelsea", "coffee", "rocket", "coins", "brick", "grass", "gravel", "clock")
"""Pictures of skimage.data that its wheel holds; of documents, cells and stars there is none."""
FILES = {
    "grace_hopper": ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "china": ("sklearn", "datasets/images/china.jpg"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
}
"""Package and file of further pictures; one that is not installed is left out."""
MIDDLE = (0.3, 0.7)
"""Part of a stack of axial slices that is taken, from 0, the lowest, to 1."""


@dataclass(frozen=True, eq=False)
class SourcedPictures:
    """N pictures, each with what it was taken from."""

    pictures: Tensor
    """`(N,1,S,S)`, or `(N,3,S,S)` in colour, in [-1, 1]."""
    sources: list[str]
    """Patient, or source picture of a crop."""
    sites: list[str]
    """Site of a scan; the same word for all that have none."""

    def __len__(self) -> int:
        return len(self.sources)

    def rows(self, rows: Sequence[int]) -> SourcedPictures:
        """Some of the pictures."""
        picked = list(rows)
        names = ([values[row] for row in picked] for values in (self.sources, self.sites))
        return SourcedPictures(self.pictures[picked], *names)

    def grey(self) -> SourcedPictures:
        """The same pictures without colour, by luminance (ITU-R 601)."""
        weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
        pictures = (self.pictures.expand(-1, 3, -1, -1) * weights).sum(1, keepdim=True)
        return SourcedPictures(pictures, self.sources, self.sites)


def everyday_crops(side: int, crops: int) -> SourcedPictures:
    """Random square crops `(N,3,S,S)` of everyday pictures, from `side` pixels up to the whole of the shorter side."""
    pictures, sources = [], []
    for name, pixels in _everyday().items():
        random = numpy_generator(0, "everyday-crops", name)
        shorter = min(pixels.shape[:2])
        for _ in range(crops):
            size = int(random.integers(min(side, shorter), shorter + 1))
            top, left = (int(random.integers(0, length - size + 1)) for length in pixels.shape[:2])
            crop = Image.fromarray(pixels[top : top + size, left : left + size])
            resized = np.asarray(crop.resize((side, side), Image.Resampling.BICUBIC), np.float32)
            pictures.append(torch.from_numpy(resized / 127.5 - 1).permute(2, 0, 1))
            sources.append(name)
    return SourcedPictures(torch.stack(pictures), sources, ["everyday"] * len(sources))


def radiographs(folder: Path, modality: Modality, side: int) -> SourcedPictures:
    """All radiographs of the table `(N,1,S,S)`, read as a site's index reads them; a site is a device and projection.

    Raises:
        ConfigError: the table cannot be read.
        ScanRejected: a picture cannot be read.
    """
    try:
        with (folder / "data.csv").open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
        files = [folder / "png" / f"{row['image_id']}.png" for row in rows]
        sites = [f"{row['modality']} {row['projection']}" for row in rows]
        patients = [row["patient_id"] for row in rows]
    except (OSError, KeyError) as error:
        raise ConfigError(f"cannot read '{folder / 'data.csv'}': {error!r}") from error
    pictures = [to_model(read_scan(file, modality, released=True), side, modality.image)[0] for file in files]
    return SourcedPictures(torch.stack(pictures), patients, sites)


def mr_slices(folder: Path, modality: Modality, side: int, slices: int) -> SourcedPictures:
    """Axial slices `(N,1,S,S)` of every volume below a folder a patient, heads with skull.

    Raises:
        ConfigError: a volume cannot be read, or there is none.
    """
    pictures, patients = [], []
    for file in sorted(folder.glob("patient*/*.nii.gz")):
        try:
            image = nibabel.as_closest_canonical(nibabel.Nifti1Image.from_filename(file))
            values = image.get_fdata(dtype=np.float32)
        except (OSError, nibabel.filebasedimages.ImageFileError) as error:
            raise ConfigError(f"cannot read '{file}': {error}") from error
        column_mm, row_mm, _ = (float(size) for size in voxel_sizes(image.affine))
        first, last = (int(part * (values.shape[2] - 1)) for part in MIDDLE)
        for plane in np.linspace(first, last, slices).round().astype(int):
            pixels = np.ascontiguousarray(values[::-1, ::-1, plane].T)  # rows to the back, columns to the left
            pictures.append(to_model(Scan(pixels, (row_mm, column_mm), {}), side, modality.image)[0])
            patients.append(file.parent.name)
    if not pictures:
        raise ConfigError(f"'{folder}' has no volume patient*/*.nii.gz: give the folder of the MR volumes")
    return SourcedPictures(torch.stack(pictures), patients, ["MR"] * len(patients))


def few_of_each(pictures: SourcedPictures, most: int) -> SourcedPictures:
    """At most this many pictures of each source, evenly over its own."""
    rows: list[int] = []
    for source in sorted(set(pictures.sources)):
        own = [row for row, name in enumerate(pictures.sources) if name == source]
        rows += [
            own[index] for index in np.unique(np.linspace(0, len(own) - 1, min(most, len(own))).round().astype(int))
        ]
    return pictures.rows(sorted(rows))


def _everyday() -> dict[str, np.ndarray]:
    """uint8 `(H,W,3)` by name, of those that are installed."""
    from skimage import data

    loaders: dict[str, Callable[[], np.ndarray]] = {name: getattr(data, name) for name in SKIMAGE}
    found = {name: load() for name, load in loaders.items()}
    for name, (package, file) in FILES.items():
        spec = importlib.util.find_spec(package)
        path = Path(spec.origin).parent / file if spec is not None and spec.origin else None
        if path is not None and path.is_file():
            found[name] = np.asarray(Image.open(path))
    return {
        name: np.repeat(pixels[..., None], 3, -1) if pixels.ndim == 2 else pixels[..., :3]
        for name, pixels in found.items()
    }
