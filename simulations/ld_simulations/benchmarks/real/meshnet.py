"""Segments T1-weighted heads with a MeshNet, as a judge of ventricles that shares nothing with this project.

The weights are those of neuroneural/brainchop (MIT licence), trained on conformed volumes of 1 mm.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from nibabel.spatialimages import SpatialImage

from ld_common.core.errors import ConfigError
from ld_common.imaging.preparation.skull import MeshSegmenter, on_grid

MODEL, COLOURS = "meshnet18_model", "meshnet18_colormap.json"


@dataclass(frozen=True, eq=False)
class Segmentation:
    """Structures of a volume in its own grid."""

    labels: np.ndarray
    """uint8 `(X,Y,Z)`, the row of `names`; 0 is outside of the brain."""
    names: list[str]
    voxel_ml: float

    def volume_ml(self, name: str) -> float:
        """Volume of a structure."""
        return float((self.labels == self.names.index(name)).sum()) * self.voxel_ml

    def mask(self, name: str) -> np.ndarray:
        """Where a structure is, `(X,Y,Z)`."""
        return np.asarray(self.labels == self.names.index(name))


class MeshNet:
    """The network, from the files of a tfjs layers model, with the names of its structures."""

    def __init__(self, folder: Path) -> None:
        """Read `meshnet18_model.json`, `.bin` and the names; raises `ConfigError`."""
        try:
            model, numbers = ((folder / f"{MODEL}.{ending}").read_bytes() for ending in ("json", "bin"))
            self.names = [str(name) for name in json.loads((folder / COLOURS).read_text(encoding="utf-8"))["labels"]]
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"cannot read the MeshNet in '{folder}': {error}") from error
        try:
            self._network = MeshSegmenter(model, numbers)
        except ConfigError as error:
            raise ConfigError(f"'{folder / MODEL}.bin' does not fit its .json") from error

    def segment(self, image: SpatialImage) -> Segmentation:
        """The structures of a T1-weighted head, in its own grid; about a minute on two cores."""
        values, spacing = np.asarray(image.get_fdata(dtype=np.float32)), voxel_sizes(image.affine)
        to_model = ornt_transform(io_orientation(image.affine), axcodes2ornt(MeshSegmenter.orientation))
        to_scan = ornt_transform(axcodes2ornt(MeshSegmenter.orientation), io_orientation(image.affine))
        turned = nibabel.orientations.apply_orientation(values, to_model)
        labels = on_grid(self._network.labels(turned, spacing[np.argsort(to_model[:, 0])]), turned.shape)
        own = nibabel.orientations.apply_orientation(labels, to_scan)
        return Segmentation(np.ascontiguousarray(own), self.names, float(np.prod(spacing)) / 1000)
