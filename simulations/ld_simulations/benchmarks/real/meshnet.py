"""Segments T1-weighted heads with a MeshNet, as a judge of ventricles that shares nothing with this project.

Fedorov et al., "End-to-end learning of brain tissue segmentation from imperfect labeling", IJCNN 2017; the weights are
those of neuroneural/brainchop (MIT licence), trained on conformed volumes of 1 mm in FreeSurfer's orientation.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import torch
from nibabel.affines import voxel_sizes
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from nibabel.spatialimages import SpatialImage
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from ld_common.core.errors import ConfigError

MODEL, COLOURS = "meshnet18_model", "meshnet18_colormap.json"
ORIENTATION = ("L", "I", "A")
BRIGHTEST_PERCENTILE = 99.5
HEAD = 0.15
"""Grey value, of the brightest, above which a voxel belongs to the head."""


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
    """The network, from the files of a tfjs layers model."""

    def __init__(self, folder: Path) -> None:
        """Read `meshnet18_model.json`, `.bin` and the names of its structures; raises `ConfigError`."""
        try:
            model = json.loads((folder / f"{MODEL}.json").read_text(encoding="utf-8"))
            numbers = np.fromfile(folder / f"{MODEL}.bin", "<f4")
            self.names = [str(name) for name in json.loads((folder / COLOURS).read_text(encoding="utf-8"))["labels"]]
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"cannot read the MeshNet in '{folder}': {error}") from error
        shapes = [entry["shape"] for group in model["weightsManifest"] for entry in group["weights"]]
        layers = [layer["config"] for layer in model["modelTopology"]["model_config"]["config"]["layers"]]
        self._dilations = [layer["dilation_rate"][0] for layer in layers if "dilation_rate" in layer]
        ends = np.cumsum([int(np.prod(shape)) for shape in shapes])
        if ends[-1] != len(numbers) or len(shapes) != 2 * len(self._dilations):
            raise ConfigError(f"'{folder / MODEL}.bin' does not fit its .json")
        parts = np.split(numbers, ends[:-1])
        arrays = [torch.from_numpy(part.reshape(shape).copy()) for part, shape in zip(parts, shapes, strict=True)]
        self._layers = [
            (kernel.permute(4, 3, 0, 1, 2).contiguous(), bias)
            for kernel, bias in zip(arrays[::2], arrays[1::2], strict=True)
        ]

    @torch.inference_mode()
    def segment(self, image: SpatialImage) -> Segmentation:
        """The structures of a T1-weighted head, in its own grid; about a minute on two cores."""
        values = np.asarray(image.get_fdata(dtype=np.float32))
        spacing = voxel_sizes(image.affine)
        to_model = ornt_transform(io_orientation(image.affine), axcodes2ornt(ORIENTATION))
        turned = nibabel.orientations.apply_orientation(values, to_model)
        zooms = spacing[np.argsort(to_model[:, 0])]
        grey = np.clip(ndimage.zoom(turned, zooms, order=1) / np.percentile(turned, BRIGHTEST_PERCENTILE), 0, 1)
        place = ndimage.find_objects(ndimage.binary_opening(grey > HEAD, iterations=2).astype(int))[0]
        labels = np.zeros(grey.shape, np.uint8)
        labels[place] = self._run(torch.from_numpy(np.ascontiguousarray(grey[place])))
        back = [length / size for length, size in zip(turned.shape, labels.shape, strict=True)]
        to_scan = ornt_transform(axcodes2ornt(ORIENTATION), io_orientation(image.affine))
        own = nibabel.orientations.apply_orientation(ndimage.zoom(labels, back, order=0), to_scan)
        return Segmentation(np.ascontiguousarray(own), self.names, float(np.prod(spacing)) / 1000)

    def _run(self, grey: Tensor) -> np.ndarray:
        values = grey[None, None].float()
        for number, ((kernel, bias), dilation) in enumerate(zip(self._layers, self._dilations, strict=True)):
            padding = dilation * (kernel.shape[-1] // 2)
            values = functional.conv3d(values, kernel, bias, padding=padding, dilation=dilation)
            if number + 1 < len(self._layers):
                values = functional.elu_(values)
        return values[0].argmax(0).to(torch.uint8).numpy()
