"""Pictures of brains, and a release that was fitted to such pictures, for tests of what is familiar to a release."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ld_common.adapters.base import inject
from ld_common.adapters.registry import read_adapter
from ld_common.core.config import from_mapping
from ld_common.diffusion.base_model import BaseModel, load_denoiser
from ld_common.diffusion.longitudinal import LongitudinalDrift
from ld_common.diffusion.longitudinal_fit import fit
from ld_common.diffusion.longitudinal_sums import VisitTable, basis_of, sketch, sums
from ld_common.imaging.geometry import Scan, to_model
from ld_common.imaging.modality import Modality
from ld_common.protocol.study_config import StudyConfig
from ld_common.release.data_ranges import site_coverage
from ld_common.release.release import ReleaseContent, write_release
from tests.conftest import random_state, write_mr_slice

Row, Column = np.mgrid[:100, :100] / 50 - 0.99


def brain(seed: int, age: float = 74.0) -> np.ndarray:
    """uint16 `(100,100)`: a bright ellipse with a dark hole that grows with age."""
    height, width, grey, hole = np.random.default_rng(seed).normal([0.82, 0.66, 700, 0.16], [0.03, 0.03, 40, 0.02])
    hole += 0.003 * (age - 70)
    noise = np.random.default_rng(seed + 1000).normal(0, 8, Row.shape)
    inside = (Row / height) ** 2 + (Column / width) ** 2 < 1
    dark = Row**2 + (1.5 * Column) ** 2 < hole**2
    return np.clip(np.where(inside & ~dark, grey, 0) + 100 * dark + noise, 0, 4000).astype(np.uint16)


def whole_head(seed: int) -> np.ndarray:
    """The same brain in a skull and a bright scalp."""
    radius = np.sqrt((Row / 0.98) ** 2 + (Column / 0.85) ** 2)
    return np.maximum(brain(seed), np.where((radius > 0.93) & (radius < 1.05), 900, 0)).astype(np.uint16)


def write_brain(path: Path, pixels: np.ndarray, **elements: Any) -> Path:
    return write_mr_slice(path, pixels, PixelSpacing=[1.9, 1.9], **elements)


def fitted(base: BaseModel, modality: Modality) -> LongitudinalDrift:
    """Of 60 patients with three visits each."""
    pictures, designs, names, days = [], [], [], []
    for patient in range(60):
        for visit in range(3):
            age = 60.0 + patient / 3 + 2 * visit
            scan = Scan(brain(patient, age).astype(np.float32), (1.9, 1.9), {})
            pictures.append(to_model(scan, base.resolution, modality.image)[0])
            attributes = {"age": age, "sex": "FM"[patient % 2], "diagnosis": ("CN", "AD")[patient // 2 % 2]}
            designs.append(modality.design_vector(attributes))
            names.append(str(patient))
            days.append(round(730.5 * visit))
    latents = base.encode(torch.stack(pictures))
    table = VisitTable.of(latents, designs, modality.numeric_columns, names, days)
    basis = basis_of(sketch(table, 0), 0)
    return fit(
        sums(table, basis), basis, modality.numeric_columns, torch.zeros(base.latent_shape[0]), base.latent_shape
    )[0]


def write_familiar_release(folder: Path, base: Path, model: BaseModel, modality: Modality) -> Path:
    """A release with a longitudinal drift, of a site with patients of 60 to 85 years; its editor is `drift`.

    Args:
        folder: of the release.
        base: folder of the base.
        model: the same base; any adapter in it plays no part.
        modality: the release's.
    """
    options = {
        "base_model": str(base),
        "adapter": {"rank": 2},
        "drift": {"shape": "longitudinal"},
        "edit": {"name": "drift"},
    }
    study = from_mapping(StudyConfig, options)
    state = random_state(inject(load_denoiser(str(base)), read_adapter(study.adapter), study.seed).state(), 0.1)
    ages = [60.0, 85.0]
    patients = [f"{age}{sex}{group}" for age in ages for sex in "FM" for group in ("CN", "AD")]
    attributes = [{"age": float(name[:4]), "sex": name[4], "diagnosis": name[5:]} for name in patients]
    coverage = site_coverage(modality, patients, attributes, 1)
    rounds = [{"round": 1, "counted": True, "sites": {"aster": {"patients": 8, "visits": 8, "coverage": coverage}}}]
    content = ReleaseContent(model.digest, state, fitted(model, modality), rounds=rounds)
    return write_release(folder, study, modality, content)
