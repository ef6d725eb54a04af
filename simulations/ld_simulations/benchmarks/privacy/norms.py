"""Norms of public patients' gradients, by which `privacy.max_grad_norm` is chosen."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from opacus import GradSampleModule
from torch import Tensor

from ld_client.privacy.dp_sgd import Patients
from ld_client.train import loss_sampler
from ld_common.adapters.base import inject
from ld_common.adapters.registry import read_adapter
from ld_common.core.seeding import torch_generator
from ld_common.diffusion.base_model import load_denoiser
from ld_simulations.benchmarks.privacy.plan import AT_ONCE
from ld_simulations.benchmarks.privacy.quality import QualityRuns

CLIPS = (1.0, 0.1, 0.03, 0.01, 0.003, 0.001)
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
CHUNKS = 16
"""Times `AT_ONCE` examples."""


def gradient_norms(runs: QualityRuns) -> dict[str, Any]:
    """Quantiles of the norm of a public patient's gradient at the public start, and the signal left by clipping.

    The signal is the norm of the mean clipped gradient over the clip norm: 1 if all patients agree. Noise is in units
    of the clip norm, too. The estimate, the inner product of the means of two halves, has no bias.
    """
    benchmark, seed = runs.benchmark, runs.config.seeds[0]
    setting = benchmark.config.base_setting()
    study = benchmark.study_of(setting, seed)
    adapted = inject(load_denoiser(benchmark.study.base_model, runs.config.device), read_adapter(study.adapter), seed)
    if setting.warm_start:
        adapted.load(runs.public_start((setting.rank, seed, "")))
    data = runs.training_data(runs.public, runs.config.public_patients)
    generator = torch_generator(seed, "gradient norms")
    examples = loss_sampler(adapted, data, study, generator)
    patients = Patients(data.patients, functools.partial(torch.rand, generator=generator))
    hooks = GradSampleModule(adapted.model.unet, loss_reduction="sum")
    rows = []
    for _ in range(CHUNKS):
        chosen = torch.randint(
            len(patients.rows), (max(1, AT_ONCE // setting.augmentation_multiplicity),), generator=generator
        )
        with warnings.catch_warnings():  # a first layer that learns has no input with a gradient, nor needs one
            warnings.filterwarnings("ignore", "Full backward hook")
            examples.scans_loss(
                patients.draw(chosen.tolist(), setting.augmentation_multiplicity).flatten(), "sum"
            ).backward()
        rows.append(_by_patient(hooks, setting.augmentation_multiplicity))
    hooks.to_standard_module()
    gradients = torch.cat(rows)
    norms = gradients.norm(dim=1)
    return {
        "patients": len(gradients),
        "augmentation_multiplicity": setting.augmentation_multiplicity,
        "quantiles": {f"{share:g}": float(norms.quantile(share)) for share in QUANTILES},
        "clips": [{"max_grad_norm": clip, **_clipped(gradients, norms, clip)} for clip in CLIPS],
    }


def _by_patient(hooks: GradSampleModule, augmentation_multiplicity: int) -> Tensor:
    """Mean gradient of each patient over its augmented examples `(P,N)`; clears the hooks."""
    trainable = [parameter for parameter in hooks.parameters() if parameter.requires_grad]
    gradients = torch.cat([parameter.grad_sample.flatten(1) for parameter in trainable], 1).cpu()
    for parameter in trainable:
        parameter.grad_sample = parameter.grad = None
    return gradients.view(-1, augmentation_multiplicity, gradients.shape[1]).mean(1)


def _clipped(gradients: Tensor, norms: Tensor, clip: float) -> dict[str, float]:
    clipped = gradients * (clip / norms).clamp(max=1.0)[:, None]
    halves = clipped[::2].mean(0), clipped[1::2].mean(0)
    signal = float(halves[0] @ halves[1])
    return {"clipped_share": float((norms > clip).float().mean()), "signal": max(0.0, signal) ** 0.5 / clip}
