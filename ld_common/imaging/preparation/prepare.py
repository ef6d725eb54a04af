"""Runs a modality's `preprocessing` on a volume, by MONAI transforms, and takes the model's slice from the result.

The same volume and list give the same bits on one machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data.meta_tensor import MetaTensor
from monai.transforms.compose import Compose
from monai.transforms.intensity.array import GaussianSmooth
from monai.transforms.spatial.array import Orientation, Spacing
from monai.transforms.transform import Transform
from nibabel.affines import voxel_sizes
from nibabel.nifti1 import Nifti1Header, Nifti1Image

from ld_common.core.errors import LdError
from ld_common.imaging.geometry import Scan
from ld_common.imaging.modality import Modality
from ld_common.imaging.modality_steps import BIAS_FIELD, ORIENT, REGISTER, RESAMPLE, STRIP_SKULL, StepConfig
from ld_common.imaging.preparation.bias_field import BiasFieldCorrection
from ld_common.imaging.preparation.files import read_template
from ld_common.imaging.preparation.refusal import StepRefusedError
from ld_common.imaging.preparation.registration import RigidRegistration
from ld_common.imaging.preparation.skull import SkullStripping, read_network
from ld_common.imaging.rejection import MAX_PIXELS, Rejection, ScanRejected
from ld_common.imaging.scan_reader import volume_scan
from ld_common.imaging.volume import Volume

LEAST_SLICES = 8
"""Along each axis of a volume that is prepared."""
ORTHOGONAL = 1e-3
"""Largest cosine between two axes of a volume."""
LABELS = (("L", "R"), ("P", "A"), ("I", "S"))
FWHM = 2 * math.sqrt(2 * math.log(2))


class Resampling(Transform):
    """Resamples to cubic voxels, linearly; smooths first along axes that get coarser, so that nothing aliases."""

    def __init__(self, spacing_mm: float) -> None:
        self._spacing_mm = spacing_mm

    def __call__(self, image: MetaTensor) -> MetaTensor:
        """The volume `(1,I,J,K)` on a grid with the same axes.

        Raises:
            StepRefusedError: it would have too many voxels.
        """
        sizes = voxel_sizes(image.affine.numpy()) / self._spacing_mm
        if np.prod(np.ceil(sizes * np.array(image.shape[1:]))) > MAX_PIXELS:
            raise StepRefusedError(f"at {self._spacing_mm:g} mm it would have more than {MAX_PIXELS} voxels")
        sigmas = [math.sqrt(max(0.0, 1 / size**2 - 1)) / FWHM for size in sizes]
        if max(sigmas) > 0:
            image = GaussianSmooth([max(sigma, 1e-3) for sigma in sigmas])(image)
        return Spacing(self._spacing_mm)(image)


def prepare(path: Path, volume: Volume, steps: Sequence[StepConfig]) -> Volume:
    """The volume after all steps; its affine still maps voxels to the patient's millimetres.

    Args:
        path: of the volume, for messages.
        volume: as the file holds it.
        steps: the modality's `preprocessing`.

    Raises:
        ScanRejected: a volume that is too thin, or that a step cannot prepare.
        ConfigError: a step's file is missing or another one.
    """
    _check_whole(path, volume)
    transforms = Compose([_transform(step) for step in steps])
    values = torch.from_numpy(np.ascontiguousarray(volume.voxels, np.float32).copy())[None]
    try:
        done = transforms(MetaTensor(values, affine=torch.from_numpy(np.array(volume.affine, np.float64))))
    except (RuntimeError, StepRefusedError, MemoryError) as error:
        raise _refusal(path, error) from error
    voxels, affine = np.asfortranarray(done.numpy()[0], np.float32), np.array(done.affine.numpy(), np.float64)
    header = None if volume.header is None else _header(voxels, affine)
    return replace(volume, voxels=voxels, affine=affine, header=header)


def prepared_scan(path: Path, volume: Volume, raw: Scan, modality: Modality, slice_index: int | None) -> Scan:
    """The slice that `modality.image` takes from the prepared volume, or the one at `slice_index` of it.

    Args:
        path: of the scan, for messages.
        volume: as the file holds it.
        raw: the slice of the file, for all that is no pixel or place.
        modality: the steps, and the slice's plane and position.
        slice_index: from 0, as in `scan_reader.decode_scan`, counted in the prepared volume.

    Raises:
        ScanRejected: as `prepare`, or a slice that does not exist.
    """
    prepared = prepare(path, volume, modality.preprocessing)
    image = Nifti1Image(prepared.voxels, prepared.affine)
    scan = volume_scan(path, image, prepared.affine, modality.image, slice_index, raw.attributes_in_file)
    return replace(
        scan, patient_id=raw.patient_id, study_date=raw.study_date, frame_of_reference=raw.frame_of_reference
    )


def _transform(step: StepConfig) -> Transform:
    if step.step == RESAMPLE:
        return Resampling(step.spacing_mm)
    if step.step == STRIP_SKULL:
        return SkullStripping(read_network(step))
    if step.step == REGISTER:
        return RigidRegistration(read_template(step))
    others: dict[str, Transform] = {ORIENT: Orientation("RAS", labels=LABELS), BIAS_FIELD: BiasFieldCorrection()}
    return others[step.step]


def _check_whole(path: Path, volume: Volume) -> None:
    if min(volume.voxels.shape) < LEAST_SLICES:
        shape = " x ".join(map(str, volume.voxels.shape))
        detail = f"{shape} voxels are no volume that the modality's preprocessing can prepare: give the whole series"
        raise ScanRejected(path, Rejection.WRONG_GEOMETRY, detail)
    axes = volume.affine[:3, :3] / np.linalg.norm(volume.affine[:3, :3], axis=0)
    if np.abs(axes.T @ axes - np.eye(3)).max() > ORTHOGONAL:
        raise ScanRejected(path, Rejection.WRONG_GEOMETRY, "its axes are not at right angles: resample it to a grid")


def _refusal(path: Path, error: Exception) -> Exception:
    """The reason behind an error of a step, which MONAI wraps."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, LdError):
            return cause
        if isinstance(cause, StepRefusedError):
            return ScanRejected(path, Rejection.WRONG_GEOMETRY, str(cause))
        if isinstance(cause, MemoryError) or "alloc" in str(cause):
            return ScanRejected(path, Rejection.TOO_LARGE, "preparing it needs more memory than there is")
        cause = cause.__cause__
    name = type(error.__cause__ or error).__name__
    return ScanRejected(path, Rejection.UNSUPPORTED, f"a step of the modality's preprocessing failed on it ({name})")


def _header(voxels: np.ndarray, affine: np.ndarray) -> Nifti1Header:
    """Geometry of a prepared NIfTI volume."""
    image: Any = Nifti1Image(voxels, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code="scanner")
    image.set_qform(affine, code="scanner")
    return image.header
