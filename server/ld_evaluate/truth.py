"""Counterfactuals of simulated patients against the true ones, which the causal model of the simulation knows.

Layout of a folder with truths (`held_out.json`): `patients`, a list of entries with `hospital`, `patient`, `series`
(the scan, a path), `attributes`, `area_mm2`, and `edits`; each edit has `name`, `target`, `area_mm2` and `truth`, an
`.npz` whose `pixels` (H,W) are the true counterfactual in the scan's own device values. Paths are relative to the
folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from ld_common.core.errors import RequestError
from ld_common.diffusion.base_model import BaseModel
from ld_common.editing.counterfactuals import Counterfactuals
from ld_common.imaging.decoding_process import read_scan
from ld_common.imaging.geometry import Scan, to_model
from ld_common.imaging.modality import Attributes, Modality
from ld_common.metrics.image import psnr
from ld_common.metrics.registry import BIOMARKERS
from ld_evaluate.files import TRUTH

CHANGED = 0.1
"""Least absolute change of a pixel in [-1, 1] that counts as changed by the true edit."""
CHANGED_MARGIN_PX = 2
"""Pixels by which the changed region is dilated."""


@dataclass(frozen=True)
class TrueCounterfactual:
    """One true counterfactual of a held-out patient's scan, in the intensity window of that scan."""

    hospital: str
    patient: str
    attributes: Attributes
    edit: str
    target: Attributes
    scan: int
    """Row of the scan among all scans."""
    image: Tensor
    """`(1,S,S)` in [-1, 1]."""
    true_area_mm2: tuple[float, float]
    """Area of the structure before and after, as the causal model knows it."""

    @property
    def grows(self) -> bool:
        """Whether the edit is one of age or disease, which change the structure's size."""
        return "sex" not in self.target


def read_truths(folder: Path, modality: Modality, resolution: int) -> tuple[Tensor, list[TrueCounterfactual]]:
    """All held-out scans `(N,1,S,S)` in [-1, 1] and all true counterfactuals.

    Raises:
        RequestError: `held_out.json` or a file that it names cannot be read.
        ScanError: a scan cannot be used.
    """
    scans: list[Tensor] = []
    truths: list[TrueCounterfactual] = []
    try:
        manifest: dict[str, Any] = json.loads((folder / TRUTH).read_text(encoding="utf-8"))
        for entry in manifest["patients"]:
            scan = read_scan(folder / entry["series"], modality)
            image, frame = to_model(scan, resolution, modality.image)
            for edit in entry["edits"]:
                pixels = np.load(folder / edit["truth"])["pixels"]
                true_image, _ = to_model(Scan(pixels, scan.spacing_mm, {}), resolution, modality.image, frame)
                truths.append(
                    TrueCounterfactual(
                        hospital=entry["hospital"],
                        patient=entry["patient"],
                        attributes=entry["attributes"],
                        edit=edit["name"],
                        target=edit["target"],
                        scan=len(scans),
                        image=true_image,
                        true_area_mm2=(entry["area_mm2"], edit["area_mm2"]),
                    )
                )
            scans.append(image)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RequestError(f"'{folder / TRUTH}' cannot be used ({error!r}): restore it, or remove it") from error
    return torch.stack(scans), truths


def measure(
    base: BaseModel, modality: Modality, scans: Tensor, truths: Sequence[TrueCounterfactual], drawn: Counterfactuals
) -> list[dict[str, Any]]:
    """A row of numbers for each true counterfactual; areas and PSNRs are of images that all passed the VAE.

    Args:
        base: for its VAE and resolution.
        modality: its first biomarker is the structure that is measured.
        scans: `(N,1,S,S)` in [-1, 1], as read.
        truths: M true counterfactuals.
        drawn: the model's, its images in the order of `truths`.
    """
    seen_truths = base.autoencode(torch.stack([truth.image for truth in truths]))
    before = drawn.autoencoded[torch.tensor([truth.scan for truth in truths])]
    scan_areas, drawn_areas, true_areas = (
        _areas_mm2(modality, images) for images in (drawn.autoencoded, drawn.images, seen_truths)
    )
    gain = psnr(drawn.images, seen_truths) - psnr(before, seen_truths)
    rows = []
    for row, truth in enumerate(truths):
        changed = (truth.image - scans[truth.scan]).abs()[0] > CHANGED
        unchanged = ~torch.as_tensor(ndimage.binary_dilation(changed.numpy(), iterations=CHANGED_MARGIN_PX))
        error = (drawn.images[row] - scans[truth.scan]).abs()[0][unchanged].mean()
        vae_error = (before[row] - scans[truth.scan]).abs()[0][unchanged].mean()
        rows.append(
            {
                "hospital": truth.hospital,
                "patient": truth.patient,
                "edit": truth.edit,
                "grows": truth.grows,
                "area_before_mm2": float(scan_areas[truth.scan]),
                "growth_mm2": float(drawn_areas[row] - scan_areas[truth.scan]),
                "true_growth_mm2": float(true_areas[row] - scan_areas[truth.scan]),
                "copy_gain_db": float(gain[row]),
                "identity_ratio": float(error / vae_error),
            }
        )
    return rows


def summarize(rows: Sequence[Mapping[str, Any]], growth_ceiling: float) -> dict[str, Any]:
    """Means over the rows of `measure`; growth is judged on edits of age and disease, the rest on all edits.

    Args:
        rows: of `measure`.
        growth_ceiling: correlation with the true growth that the best prediction from one image has.
    """
    growing = [row for row in rows if row["grows"]]
    drawn = np.array([row["growth_mm2"] for row in growing])
    true = np.array([row["true_growth_mm2"] for row in growing])
    signs = np.sign(true)
    with np.errstate(invalid="ignore"):  # NaN where nothing grows
        correlation = float(np.corrcoef(drawn, true)[0, 1])
    return {
        "edit_direction_rate": float(np.mean(np.sign(drawn) == signs)),
        "growth_ratio": float((drawn * signs).mean() / (true * signs).mean()),
        "growth_correlation": correlation,
        "growth_correlation_ceiling": growth_ceiling,
        "copy_gain_db": float(np.mean([row["copy_gain_db"] for row in rows])),
        "identity_ratio": float(np.mean([row["identity_ratio"] for row in rows])),
        "by_edit": {
            edit: _summarize_edit([row for row in rows if row["edit"] == edit])
            for edit in sorted({row["edit"] for row in rows})
        },
    }


def validate_area(modality: Modality, scans: Tensor, truths: Sequence[TrueCounterfactual]) -> dict[str, float]:
    """The biomarker on scans `(N,1,S,S)` and true counterfactuals against the areas of the causal model."""
    before = _areas_mm2(modality, scans).numpy()
    after = _areas_mm2(modality, torch.stack([truth.image for truth in truths])).numpy()
    growing = [row for row, truth in enumerate(truths) if truth.grows]
    true = np.array([truth.true_area_mm2 for truth in truths])
    measured = np.stack([before[[truth.scan for truth in truths]], after], 1)
    error = measured - true
    changes = (measured[:, 1] - measured[:, 0])[growing], (true[:, 1] - true[:, 0])[growing]
    return {
        "mean_error_mm2": float(error.mean()),
        "mean_absolute_error_mm2": float(np.abs(error).mean()),
        "mean_area_mm2": float(true.mean()),
        "correlation": float(np.corrcoef(measured.ravel(), true.ravel())[0, 1]),
        "change_correlation": float(np.corrcoef(*changes)[0, 1]),
    }


def _areas_mm2(modality: Modality, images: Tensor) -> Tensor:
    """The modality's first biomarker in images `(N,1,S,S)`, `(N,)`."""
    return BIOMARKERS.load(modality.biomarkers[0])(images, modality.image.field_of_view_mm / images.shape[-1])


def _summarize_edit(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | int]:
    drawn = np.array([row["growth_mm2"] for row in rows])
    true = np.array([row["true_growth_mm2"] for row in rows])
    varies = len(rows) > 2 and drawn.std() > 0 and true.std() > 0
    return {
        "cases": len(rows),
        "growth_mm2": float(drawn.mean()),
        "true_growth_mm2": float(true.mean()),
        "growth_correlation": float(np.corrcoef(drawn, true)[0, 1]) if varies else 0.0,
        "direction_rate": float(np.mean(np.sign(drawn) == np.sign(true))),
        "copy_gain_db": float(np.mean([row["copy_gain_db"] for row in rows])),
        "identity_ratio": float(np.mean([row["identity_ratio"] for row in rows])),
    }
