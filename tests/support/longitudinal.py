"""A longitudinal drift fitted to random visits, for tests that need one and not a good one."""

from __future__ import annotations

from pathlib import Path

import torch

from ld_common.adapters.base import inject
from ld_common.adapters.registry import read_adapter
from ld_common.core.config import from_mapping
from ld_common.diffusion.base_model import base_digest, load_denoiser
from ld_common.diffusion.longitudinal import LongitudinalDrift
from ld_common.diffusion.longitudinal_fit import fit_tables
from ld_common.diffusion.longitudinal_sums import VisitTable
from ld_common.imaging.modality import Attributes, Modality
from ld_common.protocol.study_config import StudyConfig
from ld_common.release.release import ReleaseContent, write_release
from tests.conftest import random_state


def random_drift(modality: Modality, latent_shape: tuple[int, int, int]) -> LongitudinalDrift:
    """Of 20 patients with three visits, two years apart, whose latents move along one direction."""
    generator = torch.Generator().manual_seed(0)
    way = torch.randn(latent_shape, generator=generator)
    latents, designs, names, days = [], [], [], []
    for patient in range(20):
        start = torch.randn(latent_shape, generator=generator)
        for visit in range(3):
            age = 55.0 + patient + 2 * visit
            attributes: Attributes = {"age": age, "sex": "FM"[patient % 2], "diagnosis": ("CN", "AD")[patient // 2 % 2]}
            noise = 0.05 * torch.randn(latent_shape, generator=generator)
            latents.append(0.5 * start + 0.05 * (age - 60) * way + noise)
            designs.append(modality.design_vector(attributes))
            names.append(str(patient))
            days.append(round(visit * 730.5))
    table = VisitTable.of(torch.stack(latents), designs, modality.numeric_columns, names, days)
    return fit_tables([table], modality.numeric_columns, torch.zeros(latent_shape[0]), latent_shape)[0]


def write_longitudinal_release(folder: Path, base: Path, modality: Modality) -> Path:
    """A LoRA of random weights with a longitudinal drift, whose editor is `drift`."""
    study = from_mapping(
        StudyConfig,
        {
            "base_model": str(base),
            "adapter": {"rank": 2},
            "drift": {"shape": "longitudinal"},
            "edit": {"name": "drift"},
        },
    )
    model = load_denoiser(str(base))
    drift = random_drift(modality, model.latent_shape)
    state = random_state(inject(model, read_adapter(study.adapter), study.seed).state(), 0.1)
    return write_release(folder, study, modality, ReleaseContent(base_digest(str(base)), state, drift))
