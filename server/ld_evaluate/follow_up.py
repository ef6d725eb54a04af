"""Baselines edited to their follow-ups' attributes, against the follow-ups and against copies of the baselines."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ld_common.imaging.modality import Modality
from ld_common.metrics.image import psnr
from ld_common.metrics.registry import BIOMARKERS
from ld_evaluate.bootstrap import bootstrap_interval

SCALES = (0.071, 0.453, 0.476)
"""The first three weights of MS-SSIM (Wang 2003), normalised: an image of 64 pixels has room for three scales."""
SSIM_WINDOW = 7


def follow_up_metrics(modality: Modality, predicted: Tensor, copied: Tensor, later: Tensor) -> dict[str, float]:
    """Errors of predictions and of copies `(K,1,S,S)` against the follow-ups, all after the VAE; empty without any.

    `<biomarker>_error_cut` is the share of the copies' error that the predictions remove, with its interval.
    """
    if not len(predicted):
        return {}
    metrics: dict[str, float] = {}
    images = {"followup": predicted, "copy": copied}
    for name, pictures in images.items():
        metrics |= {
            f"{name}_psnr_db": float(psnr(pictures, later).mean()),
            f"{name}_ssim": float(_ssim(pictures, later)),
            f"{name}_ms_ssim": float(_ms_ssim(pictures, later)),
        }
    if not modality.image.field_of_view_mm:
        return metrics
    pixel_mm = modality.image.field_of_view_mm / later.shape[-1]
    for biomarker in modality.biomarkers:
        measure = BIOMARKERS.load(biomarker)
        true = measure(later, pixel_mm)
        errors = {
            name: (measure(pictures, pixel_mm) - true).abs().double().numpy() for name, pictures in images.items()
        }
        metrics |= {f"{name}_{biomarker}_error_mm2": float(values.mean()) for name, values in errors.items()}
        prediction_errors, copy_errors = errors["followup"], errors["copy"]
        if copy_errors.sum() > 0:
            key = f"followup_{biomarker}_error_cut"
            metrics[key] = float(1 - prediction_errors.sum() / copy_errors.sum())
            patients = np.arange(len(copy_errors))
            metrics |= bootstrap_interval(key, patients, copy_errors - prediction_errors, copy_errors)
    return metrics


def _ssim(first: Tensor, second: Tensor) -> Tensor:
    from monai.metrics.regression import SSIMMetric  # slow to import, and a folder without follow-ups needs none

    metric = SSIMMetric(spatial_dims=2, data_range=2.0, win_size=SSIM_WINDOW)
    return torch.as_tensor(metric(first, second)).mean()


def _ms_ssim(first: Tensor, second: Tensor) -> Tensor:
    from monai.metrics.regression import MultiScaleSSIMMetric

    metric = MultiScaleSSIMMetric(spatial_dims=2, data_range=2.0, kernel_size=SSIM_WINDOW, weights=SCALES)
    return torch.as_tensor(metric(first, second)).mean()
