"""Two visits of real brains: what an independent segmentation says of the ventricles, beside this project's measure."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from scipy import ndimage

from ld_common.core.errors import ConfigError
from ld_common.diffusion.base_model import BaseModel
from ld_common.imaging.decoding_process import read_scan
from ld_common.imaging.modality import Modality
from ld_common.metrics.image import psnr
from ld_evaluate.edits import ScanPixels
from ld_simulations.benchmarks.real.meshnet import MeshNet

VENTRICLES = ("Lateral-Ventricle", "Inferior-Lateral-Ventricle")
CLOSING_VOXELS = 2
"""The mask of the brain is closed by it, so that sulci and ventricles stay inside."""
STUDIES = ("study1_T1W.nii.gz", "study2_T1W.nii.gz")


def judge_brains(
    folder: Path, network: MeshNet, modality: Modality, base: BaseModel, out: Path
) -> list[dict[str, Any]]:
    """Each patient's two visits: volumes by the MeshNet, and areas by the modality's biomarker in its own slice.

    Args:
        folder: a folder a patient, and `demographics.csv`.
        network: the independent judge, which also strips the skull.
        modality: the brain's.
        base: gives the resolution and the VAE.
        out: gets the stripped volumes and is not published.
    """
    patients = sorted(path for path in folder.iterdir() if path.is_dir())
    days = _days(folder / "demographics.csv")
    return [_judge(patient, days[_number(patient)], network, modality, base, out) for patient in patients]


def _judge(
    patient: Path, days: float, network: MeshNet, modality: Modality, base: BaseModel, out: Path
) -> dict[str, Any]:
    volumes, brains, areas, pictures = [], [], [], []
    for study in STUDIES:
        image = nibabel.load(patient / study)
        segmented = network.segment(image)
        volumes.append(sum(segmented.volume_ml(name) for name in VENTRICLES))
        brains.append(float((segmented.labels > 0).sum()) * segmented.voxel_ml)
        stripped = out / f"{patient.name}_{study}"
        mask = ndimage.binary_fill_holes(ndimage.binary_closing(segmented.labels > 0, iterations=CLOSING_VOXELS))
        values = np.where(mask, image.get_fdata(dtype=np.float32), 0)
        nibabel.save(nibabel.Nifti1Image(values, image.affine), stripped)
        seen = ScanPixels.of(read_scan(stripped, modality, released=True), modality, base.resolution)
        areas.append(seen.areas_mm2[modality.biomarkers[0]])
        pictures.append(seen.picture[None])
    through = base.autoencode(pictures[1])
    return {
        "patient": _number(patient),
        "days": days,
        "meshnet_ventricles_ml": volumes,
        "meshnet_brain_ml": brains,
        "area_mm2": areas,
        "copy_psnr_db": float(psnr(pictures[0], pictures[1]).mean()),
        "vae_psnr_db": float(psnr(through, pictures[1]).mean()),
    }


def _number(patient: Path) -> int:
    return int(patient.name.removeprefix("patient"))


def _days(table: Path) -> dict[int, float]:
    try:
        with table.open(newline="", encoding="utf-8") as stream:
            return {int(row["patient_id"]): float(row["days_between_studies"]) for row in csv.DictReader(stream)}
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"cannot read '{table}': {error!r}") from error
