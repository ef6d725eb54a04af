"""Rigid registration of a head to a template, by mutual information with SimpleITK."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from monai.data.meta_tensor import MetaTensor
from monai.transforms.transform import Transform
from nibabel.affines import voxel_sizes
from scipy import ndimage

from ld_common.imaging.head_kind import head_kind
from ld_common.imaging.preparation.files import Template
from ld_common.imaging.preparation.itk_images import FLIP, itk_image, simpleitk, voxels_of
from ld_common.imaging.preparation.refusal import StepRefusedError
from ld_common.imaging.volume import Volume

BINS, SEED = 32, 1
WORKING_MM = 2.0
"""Volumes are averaged to about this spacing first."""
COARSE, FINE = (8.0, 4.0), (4.0, 2.0)
"""Spacings of the search in mm, from coarse to fine; half of each is the standard deviation of smoothing."""
SAMPLES = 30_000
"""Voxels of the template that are compared, at most."""
ITERATIONS, FIRST_STEP, LAST_STEP, RELAXATION = 100, 2.0, 5e-3, 0.7
"""Steps are in mm of motion."""
MOST_DEGREES = 45.0
"""A head turned further than this against the template: the search went wrong, or the file's axes are."""
LIKENESS_MM, LEAST_LIKENESS = 2.0, 0.4
"""Smoothing before the correlation of template and registered scan, over what either shows, and its least value. Real
brains had 0.53 to 0.82 with the MNI152 template; upside down, backwards or lying they had up to 0.30."""


class RigidRegistration(Transform):
    """Resamples a volume onto a template's grid after a rigid motion. Deterministic: fixed samples, one thread.

    The affine of the answer still maps voxels to the patient's own millimetres: the motion is in the affine, which is
    turned against the template's. `template.affine @ inverse(affine)` is the motion from patient to template.
    """

    def __init__(self, template: Template) -> None:
        self._template = template

    def __call__(self, image: MetaTensor) -> MetaTensor:
        """The volume `(1,I,J,K)` on the template's grid, linearly interpolated; its lowest value outside of the scan.

        Raises:
            StepRefusedError: no plausible motion was found.
        """
        sitk, values = simpleitk(), image.numpy()[0]
        _check_kinds(self._template.voxels, self._template.affine, values, image.affine.numpy())
        fixed = itk_image(self._template.voxels, self._template.affine)
        moving = itk_image(values, image.affine.numpy())
        motion = _register(_averaged(fixed), _averaged(moving))
        matrix = _matrix(motion)
        turned = math.degrees(math.acos(np.clip((np.trace(matrix[:3, :3]) - 1) / 2, -1, 1)))
        if turned > MOST_DEGREES:
            raise StepRefusedError(f"registration to the template turned it by {turned:.0f}°: check its orientation")
        resampled = voxels_of(sitk.Resample(moving, fixed, motion, sitk.sitkLinear, float(values.min())))
        _check_likeness(self._template.voxels, resampled, self._template.affine)
        affine = FLIP @ matrix @ FLIP @ self._template.affine
        return MetaTensor(torch.from_numpy(np.ascontiguousarray(resampled))[None], affine=torch.from_numpy(affine))


def _averaged(image: Any) -> Any:
    steps = [max(1, round(WORKING_MM / spacing)) for spacing in image.GetSpacing()]
    return simpleitk().BinShrink(image, steps)


def _check_kinds(template: np.ndarray, template_affine: np.ndarray, voxels: np.ndarray, affine: np.ndarray) -> None:
    """Refuse a whole head for a template of a brain, and the reverse: scalp would be matched to cortex."""
    kinds = []
    for volume in (Volume(template, template_affine, {}, None), Volume(voxels, affine, {}, None)):
        kinds.append(head_kind(volume.scan(len(volume.upright) // 2)))
    if None not in kinds and kinds[0] != kinds[1]:
        raise StepRefusedError(
            f"the template shows a {kinds[0]} head, and the scan a {kinds[1]} one when it is registered: put step "
            "'strip_skull' before 'register', or use a template that shows what the scan does"
        )


def _register(fixed: Any, moving: Any) -> Any:
    """The rigid motion from the template's millimetres to the scan's; the better of two starts."""
    sitk, tried = simpleitk(), []
    for start in (sitk.CenteredTransformInitializerFilter.MOMENTS, sitk.CenteredTransformInitializerFilter.GEOMETRY):
        motion = sitk.CenteredTransformInitializer(fixed, moving, sitk.Euler3DTransform(), start)
        tried.append(_improved(fixed, moving, sitk.Euler3DTransform(motion), COARSE))
    _, best = min(tried, key=lambda entry: entry[0])
    return _improved(fixed, moving, best, FINE)[1]


def _improved(fixed: Any, moving: Any, motion: Any, levels_mm: Sequence[float]) -> Any:
    """The metric, which is less for better motions, and the motion."""
    sitk = simpleitk()
    search = sitk.ImageRegistrationMethod()
    search.SetNumberOfThreads(1)
    search.SetNumberOfWorkUnits(1)
    search.SetMetricAsMattesMutualInformation(BINS)
    search.SetMetricSamplingStrategy(search.RANDOM)
    spacing, voxels = min(fixed.GetSpacing()), math.prod(fixed.GetSize())
    shrunk = [max(1, round(level / spacing)) for level in levels_mm]
    search.SetMetricSamplingPercentagePerLevel([min(1.0, SAMPLES * factor**3 / voxels) for factor in shrunk], SEED)
    search.SetInterpolator(sitk.sitkLinear)
    search.SetOptimizerAsRegularStepGradientDescent(FIRST_STEP, LAST_STEP, ITERATIONS, RELAXATION, 1e-9)
    search.SetOptimizerScalesFromPhysicalShift()
    search.SetShrinkFactorsPerLevel(shrunk)
    search.SetSmoothingSigmasPerLevel([level / 2 for level in levels_mm])
    search.SetSmoothingSigmasAreSpecifiedInPhysicalUnits(True)
    search.SetInitialTransform(motion, inPlace=True)
    try:
        search.Execute(fixed, moving)
    except RuntimeError as error:
        raise StepRefusedError("it does not overlap with the template: its file gives a wrong place") from error
    return search.GetMetricValue(), motion


def _matrix(motion: Any) -> np.ndarray:
    """A rigid motion about a centre as `(4,4)`."""
    matrix = np.eye(4)
    matrix[:3, :3] = np.array(motion.GetMatrix()).reshape(3, 3)
    matrix[:3, 3] = motion.TransformPoint((0.0, 0.0, 0.0))
    return matrix


def _check_likeness(template: np.ndarray, registered: np.ndarray, affine: np.ndarray) -> None:
    """Refuse a registered scan that is unlike the template, both of which `affine` places."""
    seen = _foreground(template) | _foreground(registered)
    sigmas = LIKENESS_MM / voxel_sizes(affine)
    values = [ndimage.gaussian_filter(voxels, sigmas)[seen] for voxels in (template, registered)]
    likeness = float(np.corrcoef(*values)[0, 1]) if min(map(np.std, values)) > 0 else 0.0
    if likeness < LEAST_LIKENESS:
        raise StepRefusedError(
            f"registered, its correlation with the template is {likeness:.2f}, below {LEAST_LIKENESS}: it has another "
            "contrast or shows another part, or its file gives a wrong orientation"
        )


def _foreground(voxels: np.ndarray) -> np.ndarray:
    sitk = simpleitk()
    image = sitk.GetImageFromArray(np.ascontiguousarray(voxels.T, np.float32))
    threshold = sitk.OtsuThresholdImageFilter()
    threshold.Execute(image)
    return np.asarray(voxels > 0.5 * (voxels.min() + threshold.GetThreshold()))
