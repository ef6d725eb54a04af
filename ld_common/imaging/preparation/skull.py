"""Removes everything but the brain from a T1-weighted head, by a network that others trained."""

from __future__ import annotations

import functools
import io
import json
import threading
from typing import Protocol

import numpy as np
import torch
from monai.data.meta_tensor import MetaTensor
from monai.transforms.transform import Transform
from nibabel.affines import voxel_sizes
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from ld_common.core.errors import ConfigError
from ld_common.imaging.face import largest_part
from ld_common.imaging.modality_steps import StepConfig
from ld_common.imaging.preparation.files import read_deepbet, read_step_files
from ld_common.imaging.preparation.refusal import StepRefusedError

BRAIN_ML = (300.0, 2600.0)
"""Plausible volumes of a brain's mask, from an infant's to a head scaled to a template."""
BRIGHTEST_PERCENTILE = 99.5
HEAD = 0.15
"""Grey value, of the brightest, above which a voxel belongs to the head."""
ONE_AT_A_TIME = threading.Lock()
"""A network takes all cores and up to 3 GB, however many scans are read side by side."""
CLOSING_MM = 2
"""The MeshNet's mask is closed by it, so that sulci stay inside."""


class BrainNetwork(Protocol):
    """A network that finds the brain."""

    orientation: str
    """Directions of the axes that it takes, in nibabel's letters."""

    def mask(self, grey: np.ndarray, spacing_mm: np.ndarray) -> np.ndarray:
        """Where the brain is, bool `(I,J,K)`, of float32 values from 0 in the network's orientation."""


class SkullStripping(Transform):
    """Sets everything but the brain to the volume's lowest value."""

    def __init__(self, network: BrainNetwork) -> None:
        self._network = network

    def __call__(self, image: MetaTensor) -> MetaTensor:
        """The brain `(1,I,J,K)`, one connected part without holes.

        Raises:
            StepRefusedError: no brain, or one of an implausible volume.
        """
        values, affine = image.numpy()[0], image.affine.numpy()
        there = ornt_transform(io_orientation(affine), axcodes2ornt(self._network.orientation))
        back = ornt_transform(axcodes2ornt(self._network.orientation), io_orientation(affine))
        turned = np.ascontiguousarray(apply_orientation(values - values.min(), there))
        spacing_mm = voxel_sizes(affine)[np.argsort(there[:, 0])]
        with ONE_AT_A_TIME:
            found = largest_part(self._network.mask(turned, spacing_mm))
        volume_ml = float(found.sum() * np.prod(spacing_mm)) / 1000
        if not BRAIN_ML[0] <= volume_ml <= BRAIN_ML[1]:
            low, high = BRAIN_ML
            raise StepRefusedError(
                f"{volume_ml:.0f} ml of brain were found in it, not {low:.0f} to {high:.0f}: it is no T1-weighted "
                "volume of a whole head, or its orientation or voxel size is wrong"
            )
        brain = np.ascontiguousarray(apply_orientation(ndimage.binary_fill_holes(found), back))
        image.copy_(torch.from_numpy(np.where(brain, values, values.min()))[None])
        return image


def read_network(step: StepConfig) -> BrainNetwork:
    """The network of a step `strip_skull`; raises `ConfigError`."""
    return _mesh_network(step.weights, step.sha256) if step.weights else _outline_network()


@functools.lru_cache(maxsize=1)
def _mesh_network(weights: str, sha256: str) -> MeshSegmenter:
    content, numbers = read_step_files(StepConfig("strip_skull", weights=weights, sha256=sha256))
    return MeshSegmenter(content, numbers)


@functools.lru_cache(maxsize=1)
def _outline_network() -> OutlineNetwork:
    return OutlineNetwork(*read_deepbet())


class MeshSegmenter:
    """A MeshNet: dilated convolutions at full resolution, whose class 0 is outside of the brain.

    Fedorov et al., "End-to-end learning of brain tissue segmentation from imperfect labeling", IJCNN 2017. It takes
    volumes of 1 mm in FreeSurfer's orientation.
    """

    orientation = "LIA"

    def __init__(self, model: bytes, numbers: bytes) -> None:
        """Take a tfjs layers model: its JSON, and its float32 weights in the order of the manifest.

        Raises:
            ConfigError: they are not a MeshNet.
        """
        try:
            content = json.loads(model)
            shapes = [entry["shape"] for group in content["weightsManifest"] for entry in group["weights"]]
            layers = [layer["config"] for layer in content["modelTopology"]["model_config"]["config"]["layers"]]
            self._dilations = [int(layer["dilation_rate"][0]) for layer in layers if "dilation_rate" in layer]
            ends = np.cumsum([int(np.prod(shape)) for shape in shapes])
            values = np.frombuffer(numbers, "<f4")
            if ends[-1] != len(values) or len(shapes) != 2 * len(self._dilations):
                raise ValueError("its weights do not fit its layers")
            parts = np.split(values, ends[:-1])
            arrays = [torch.from_numpy(part.reshape(shape).copy()) for part, shape in zip(parts, shapes, strict=True)]
            self._layers = [
                (kernel.permute(4, 3, 0, 1, 2).contiguous(), bias)
                for kernel, bias in zip(arrays[::2], arrays[1::2], strict=True)
            ]
        except (ValueError, LookupError, TypeError, RuntimeError) as error:
            raise ConfigError(f"the weights of step 'strip_skull' are no MeshNet of tfjs: {error}") from error

    def mask(self, grey: np.ndarray, spacing_mm: np.ndarray) -> np.ndarray:
        """As `BrainNetwork`; some 45 s on two cores and 3 GB for a head."""
        closed = ndimage.binary_closing(self.labels(grey, spacing_mm) > 0, iterations=CLOSING_MM)
        return on_grid(closed.astype(np.uint8), grey.shape) > 0

    def labels(self, grey: np.ndarray, spacing_mm: np.ndarray) -> np.ndarray:
        """The class of each voxel of 1 mm, uint8 `(X,Y,Z)`, of the values that `mask` takes."""
        bright = float(np.percentile(grey, BRIGHTEST_PERCENTILE))
        fine = np.clip(ndimage.zoom(grey, spacing_mm, order=1) / max(bright, 1e-6), 0, 1)
        places = ndimage.find_objects(ndimage.binary_opening(fine > HEAD, iterations=2).astype(int))
        labels = np.zeros(fine.shape, np.uint8)
        if places:
            labels[places[0]] = self._run(torch.from_numpy(np.ascontiguousarray(fine[places[0]])))
        return labels

    @torch.inference_mode()
    def _run(self, grey: Tensor) -> np.ndarray:
        values = grey[None, None].float()
        for number, ((kernel, bias), dilation) in enumerate(zip(self._layers, self._dilations, strict=True)):
            padding = dilation * (kernel.shape[-1] // 2)
            values = functional.conv3d(values, kernel, bias, padding=padding, dilation=dilation)
            if number + 1 < len(self._layers):
                values = functional.elu_(values)
        return values[0].argmax(0).to(torch.uint8).numpy()


def on_grid(labels: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Labels `(X,Y,Z)` of the same box on a grid of another shape, each voxel that of the nearest one."""
    sizes = [length / size for length, size in zip(shape, labels.shape, strict=True)]
    return np.asarray(ndimage.zoom(labels, sizes, order=0))


class OutlineNetwork:
    """The two networks of deepbet (Fisch et al., Computers in Biology and Medicine 2024; MIT licence).

    The first finds the brain's box in the whole volume, the second the brain in the box.
    """

    orientation = "RAS"
    _WHOLE, _BOX, _MARGIN = (128, 128, 128), (256, 256, 256), 0.1

    def __init__(self, box: bytes, brain: bytes) -> None:
        self._find, self._outline = (torch.jit.load(io.BytesIO(content), "cpu").eval() for content in (box, brain))

    @torch.inference_mode()
    def mask(self, grey: np.ndarray, spacing_mm: np.ndarray) -> np.ndarray:
        """As `BrainNetwork`; some 5 s on two cores and 1.2 GB for a head."""
        small = _nearest(torch.from_numpy(grey), self._WHOLE)
        low, high = small.quantile(0.005), small.quantile(0.995)
        found = largest_part(self._find(_normalized(small, low, high)[None, None])[0, 1].numpy() > 0.5)
        brain = np.zeros(grey.shape, bool)
        if not found.any():
            return brain
        box = tuple(self._side(found.mean(tuple({0, 1, 2} - {axis})), length) for axis, length in enumerate(grey.shape))
        inside = _nearest(torch.from_numpy(np.ascontiguousarray(grey[box])), self._BOX)
        share = self._outline(_normalized(inside, low, high)[None, None])[0, 1]
        brain[box] = _nearest(share, brain[box].shape).numpy() > 0.5
        return brain

    def _side(self, shares: np.ndarray, length: int) -> slice:
        """The part of an axis that holds the brain, with a margin, from its share of each plane of `_WHOLE`."""
        shown = np.flatnonzero(shares > 0.02)
        if not len(shown):
            return slice(0, length)
        scale = length / len(shares)
        middle = round((shown[-1] + 1 + shown[0]) / 2 * scale)
        size = round((shown[-1] + 1 - shown[0]) * scale * (1 + 2 * self._MARGIN))
        return slice(max(0, middle - size // 2), min(length, middle + size // 2))


def _normalized(grey: Tensor, low: Tensor, high: Tensor) -> Tensor:
    clipped = ((grey - low) / (high - low).clamp_min(1e-6)).clamp(0, 1)
    return 0.226 * (clipped - clipped.mean()) / clipped.std().clamp_min(1e-6) + 0.449


def _nearest(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    return functional.interpolate(values[None, None], shape, mode="nearest-exact")[0, 0]
