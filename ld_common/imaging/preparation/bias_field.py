"""Removes a smooth brightness field from MR volumes by SimpleITK's N4 (Tustison et al., IEEE TMI 2010)."""

from __future__ import annotations

import numpy as np
import torch
from monai.data.meta_tensor import MetaTensor
from monai.transforms.transform import Transform

from ld_common.imaging.preparation.itk_images import itk_image, simpleitk, voxels_of
from ld_common.imaging.preparation.refusal import StepRefusedError

WORKING_MM = 6.0
"""Spacing on which the field is fitted; it is smoother than that."""
LEVELS, ITERATIONS, CONVERGED = 3, 50, 1e-3
"""Three levels end at four splines along each axis, some 50 mm; a finer one takes cortex for field."""
AIR = 0.1
"""Upper end of air, as a share of the 98th percentile of what is not the lowest value. A higher threshold, as by Otsu,
leaves out the dark end of a strong field."""


class BiasFieldCorrection(Transform):
    """Divides a volume by its field, which is 1 on average over the tissue. Deterministic: one thread."""

    def __call__(self, image: MetaTensor) -> MetaTensor:
        """The corrected volume `(1,I,J,K)`; raises `StepRefusedError` for one grey value."""
        values = image.numpy()[0]
        low = float(values.min())
        field = np.exp(self._log_field(values - low, image.affine.numpy()))
        image.copy_(torch.from_numpy((low + (values - low) / field).astype(np.float32))[None])
        return image

    def _log_field(self, values: np.ndarray, affine: np.ndarray) -> np.ndarray:
        """Logarithm of the field of values from 0, `(I,J,K)`."""
        sitk = simpleitk()
        whole = itk_image(values, affine)
        steps = [
            max(1, min(round(WORKING_MM / spacing), length // 8))
            for spacing, length in zip(whole.GetSpacing(), whole.GetSize(), strict=True)
        ]
        thinned = sitk.Shrink(whole, steps)
        thin = voxels_of(thinned)
        mask = thin > AIR * np.percentile(thin[thin > 0], 98) if thin.max() > 0 else thin > 0
        if not mask.any():
            raise StepRefusedError("it has one grey value: there is no tissue whose brightness could be evened out")
        tissue = sitk.GetImageFromArray(np.ascontiguousarray(mask.T, np.uint8))
        tissue.CopyInformation(thinned)
        filtered = sitk.N4BiasFieldCorrectionImageFilter()
        filtered.SetMaximumNumberOfIterations([ITERATIONS] * LEVELS)
        filtered.SetConvergenceThreshold(CONVERGED)
        filtered.SetNumberOfThreads(1)
        filtered.SetNumberOfWorkUnits(1)
        filtered.Execute(sitk.Cast(thinned, sitk.sitkFloat32), tissue)
        log_field = voxels_of(filtered.GetLogBiasFieldAsImage(whole))
        inside = tuple(slice(None, None, step) for step in steps)
        fitting = tuple(slice(length) for length in mask.shape)
        return np.asarray(log_field - log_field[inside][fitting][mask].mean())
