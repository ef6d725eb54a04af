"""Simulated patients, whose true counterfactuals the causal model of the simulation knows.

Layout of a folder with truths (`held_out.json`): `patients`, a list of entries with `hospital`, `patient`, `series`
(the scan, a path), `attributes`, `area_mm2`, and `edits`; each edit has `name`, `target`, `area_mm2` and `truth`, an
`.npz` whose `pixels` (H,W) are the true counterfactual in the scan's own device values. Paths are relative to the
folder. `with_history`, where there is one, has entries of the same form for the last visit of patients with three or
more, and in each `earlier`: a list of `series` and `age`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from ld_common.core.errors import RequestError
from ld_common.editing.counterfactuals import Counterfactuals
from ld_common.editing.history import ScanHistory, writing
from ld_common.imaging.modality import Attributes, Modality
from ld_common.imaging.readers import read_scan
from ld_common.metrics.image import psnr
from ld_common.metrics.registry import BIOMARKERS
from ld_evaluate.edits import EvaluationEdit, ScanPixels, TrueAnswer, growth_mm2
from ld_evaluate.files import FIRST_VISITS, LAST_VISITS, TRUTH

CHANGED = 0.1
"""Least absolute change of a pixel in [-1, 1] that counts as changed by the true edit."""
CHANGED_MARGIN_PX = 2
"""Pixels by which the changed region is dilated."""


@dataclass(frozen=True, eq=False)
class TrueCounterfactual:
    """One true counterfactual of a held-out patient's scan, in the intensity window of that scan."""

    hospital: str
    patient: str
    attributes: Attributes
    edit: str
    target: Attributes
    scan: int
    """Row of the scan among all scans."""
    scanned: ScanPixels
    pixels: np.ndarray
    """`(H,W)` in the scan's own values."""
    image: Tensor
    """`(1,S,S)` in [-1, 1]."""
    true_area_mm2: tuple[float, float]
    """Area of the structure before and after, as the causal model knows it."""

    @property
    def grows(self) -> bool:
        """Whether the edit is one of age or disease, which change the structure's size."""
        return "sex" not in self.target

    def question(self, modality: Modality, first_row: int = 0) -> EvaluationEdit:
        """The edit that asks for it; growth of the first biomarker is the causal model's, of others as measured.

        Args:
            modality: the release's.
            first_row: row of the folder's first scan among the scans that are asked.
        """
        growth = growth_mm2(modality, self.scanned, self.image)
        if growth:
            growth[modality.biomarkers[0]] = self.true_area_mm2[1] - self.true_area_mm2[0]
        truth = TrueAnswer(self.pixels, self.image, growth)
        row = first_row + self.scan
        return EvaluationEdit(self.patient, row, self.edit, self.attributes, self.target, self.scanned, truth)


def read_truths(
    folder: Path, modality: Modality, resolution: int, group: str = FIRST_VISITS, most: int | None = None
) -> tuple[Tensor, list[TrueCounterfactual]]:
    """All held-out scans `(N,1,S,S)` in [-1, 1] and all true counterfactuals.

    Args:
        folder: has `held_out.json`.
        modality: the release's.
        resolution: side of the model's picture, in pixels.
        group: `patients`, or `with_history` for last visits; there may be none of these.
        most: number of patients, the first ones; None for all.

    Raises:
        RequestError: `held_out.json` or a file that it names cannot be read.
        ScanError: a scan cannot be used.
    """
    scans: list[Tensor] = []
    truths: list[TrueCounterfactual] = []
    try:
        manifest: dict[str, Any] = json.loads((folder / TRUTH).read_text(encoding="utf-8"))
        for entry in (manifest["patients"] if group == FIRST_VISITS else manifest.get(group, []))[:most]:
            # simulated, so nobody wrote a name into them: the search for text takes most of the time
            scan = read_scan(folder / entry["series"], modality, released=True)
            scanned = ScanPixels.of(scan, modality, resolution)
            for edit in entry["edits"]:
                pixels = np.asarray(np.load(folder / edit["truth"])["pixels"], np.float32)
                truths.append(
                    TrueCounterfactual(
                        hospital=entry["hospital"],
                        patient=entry["patient"],
                        attributes=entry["attributes"],
                        edit=edit["name"],
                        target=edit["target"],
                        scan=len(scans),
                        scanned=scanned,
                        pixels=pixels,
                        image=scanned.picture_of(pixels, modality),
                        true_area_mm2=(entry["area_mm2"], edit["area_mm2"]),
                    )
                )
            scans.append(scanned.picture)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RequestError(f"'{folder / TRUTH}' cannot be used ({error!r}): restore it, or remove it") from error
    return torch.stack(scans) if scans else torch.empty((0, 1, resolution, resolution)), truths


def read_earlier(folder: Path, modality: Modality, resolution: int) -> list[ScanHistory]:
    """The earlier visits of each scan of `with_history`, in its order; raises as `read_truths`."""
    try:
        manifest: dict[str, Any] = json.loads((folder / TRUTH).read_text(encoding="utf-8"))
        histories = []
        for entry in manifest.get(LAST_VISITS, []):
            last = read_scan(folder / entry["series"], modality, released=True)
            frame, image = ScanPixels.of(last, modality, resolution).frame, modality.image
            scans = [read_scan(folder / visit["series"], modality, released=True) for visit in entry["earlier"]]
            pictures = torch.stack([ScanPixels.of(scan, modality, resolution).picture for scan in scans])
            age = float(entry["attributes"]["age"])
            years = [age - float(visit["age"]) for visit in entry["earlier"]]
            histories.append(ScanHistory(pictures, years, writing(last, frame, image.rendering, resolution, image)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RequestError(f"'{folder / TRUTH}' cannot be used ({error!r}): restore it, or remove it") from error
    return histories


def through_vae(
    scans: Tensor, truths: Sequence[TrueCounterfactual], seen_truths: Tensor, drawn: Counterfactuals
) -> dict[str, float]:
    """What the network itself did, whatever the way of writing: means over the edits of its own pictures.

    `copy_gain_db` is the gain over the unedited scan where all pictures passed the VAE. `identity_ratio` is the error
    outside the region that truly changes over the VAE's own error there.

    Args:
        scans: `(N,1,S,S)` in [-1, 1], as read.
        truths: M true counterfactuals.
        seen_truths: their images after the VAE, `(M,1,S,S)`.
        drawn: the model's, its images in the order of `truths`.
    """
    before = drawn.autoencoded[[truth.scan for truth in truths]]
    gains = psnr(drawn.images, seen_truths) - psnr(before, seen_truths)
    ratios = []
    for row, truth in enumerate(truths):
        changed = (truth.image - scans[truth.scan]).abs()[0] > CHANGED
        unchanged = ~torch.as_tensor(ndimage.binary_dilation(changed.numpy(), iterations=CHANGED_MARGIN_PX))
        error, vae_error = (
            (images[row] - scans[truth.scan]).abs()[0][unchanged].mean() for images in (drawn.images, before)
        )
        ratios.append(float(error / vae_error))
    return {"copy_gain_db": float(gains.mean()), "identity_ratio": float(np.mean(ratios))}


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
