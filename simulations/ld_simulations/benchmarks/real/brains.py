"""Two visits of real brains: what an independent segmentation says of the ventricles, beside this project's measure."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.affines import voxel_sizes
from PIL import Image
from scipy import ndimage

from ld_common.core.atomic_files import write_bytes
from ld_common.core.errors import ConfigError
from ld_common.diffusion.base_model import BaseModel
from ld_common.imaging.modality import Modality
from ld_common.imaging.readers import read_scan
from ld_common.metrics.image import psnr
from ld_evaluate.edits import ScanPixels
from ld_simulations.benchmarks.real.meshnet import MeshNet, Segmentation

VENTRICLES = ("Lateral-Ventricle", "Inferior-Lateral-Ventricle")
CLOSING_VOXELS = 2
"""The mask of the brain is closed by it, so that sulci and ventricles stay inside."""
STUDIES = ("study1_T1W.nii.gz", "study2_T1W.nii.gz")


def judge_brains(
    folder: Path, network: MeshNet, modality: Modality, base: BaseModel, out: Path
) -> list[dict[str, Any]]:
    """Each patient's two visits: volumes by the MeshNet, and areas by it and by the modality's biomarker in one slice.

    The slice is the one in which the MeshNet sees the most of the lateral ventricles. Volumes have axial slices along
    their third axis.

    Args:
        folder: a folder a patient, and `demographics.csv`.
        network: the independent judge, which also strips the skull.
        modality: the brain's.
        base: gives the resolution and the VAE.
        out: gets the stripped volumes and pictures of the slices, and is not published.
    """
    patients = sorted(path for path in folder.iterdir() if path.is_dir())
    days = _days(folder / "demographics.csv")
    return [_judge(patient, days[_number(patient)], network, modality, base, out) for patient in patients]


def _judge(
    patient: Path, days: float, network: MeshNet, modality: Modality, base: BaseModel, out: Path
) -> dict[str, Any]:
    volumes, brains, areas, seen_areas, pictures = [], [], [], [], []
    for study in STUDIES:
        image = nibabel.Nifti1Image.from_filename(patient / study)
        segmented = network.segment(image)
        volumes.append(sum(segmented.volume_ml(name) for name in VENTRICLES))
        brains.append(float((segmented.labels > 0).sum()) * segmented.voxel_ml)
        stripped = out / f"{patient.name}_{study}"
        mask = ndimage.binary_fill_holes(ndimage.binary_closing(segmented.labels > 0, iterations=CLOSING_VOXELS))
        values = np.where(mask, image.get_fdata(dtype=np.float32), 0)
        nibabel.save(nibabel.Nifti1Image(values, image.affine), stripped)
        ventricles = np.any([segmented.mask(name) for name in VENTRICLES], axis=0).sum((0, 1))
        widest = int(ventricles.argmax())
        areas.append(float(ventricles[widest]) * float(np.prod(voxel_sizes(image.affine)[:2])))
        scan = read_scan(stripped, modality, widest, released=True)
        seen = ScanPixels.of(scan, modality, base.resolution)
        seen_areas.append(seen.areas_mm2[modality.biomarkers[0]])
        pictures.append(seen.picture[None])
        write_bytes(out / f"{patient.name}_{study}.png", _looked_at(segmented, widest, values))
    through = base.autoencode(pictures[1])
    return {
        "patient": _number(patient),
        "days": days,
        "meshnet_ventricles_ml": volumes,
        "meshnet_brain_ml": brains,
        "meshnet_area_mm2": areas,
        "area_mm2": seen_areas,
        "copy_psnr_db": float(psnr(pictures[0], pictures[1]).mean()),
        "vae_psnr_db": float(psnr(through, pictures[1]).mean()),
    }


def _looked_at(segmented: Segmentation, plane: int, values: np.ndarray) -> bytes:
    """The slice with the MeshNet's ventricles in red, PNG, to be looked at."""
    grey = np.clip(values[:, :, plane] / np.percentile(values, 99.5), 0, 1)
    colours = np.repeat(grey[..., None], 3, -1)
    inside = np.any([segmented.mask(name)[:, :, plane] for name in VENTRICLES], axis=0)
    colours[inside ^ ndimage.binary_erosion(inside)] = (1, 0, 0)
    stream = io.BytesIO()
    Image.fromarray((255 * np.rot90(colours)).astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def _number(patient: Path) -> int:
    return int(patient.name.removeprefix("patient"))


def _days(table: Path) -> dict[int, float]:
    try:
        with table.open(newline="", encoding="utf-8") as stream:
            return {int(row["patient_id"]): float(row["days_between_studies"]) for row in csv.DictReader(stream)}
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"cannot read '{table}': {error!r}") from error
