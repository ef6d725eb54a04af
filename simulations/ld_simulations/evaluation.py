"""Counterfactuals of held-out patients against the truth that the causal model knows."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from ld_common.diffusion.base_model import BaseModel
from ld_common.diffusion.drift import LatentDrift
from ld_common.editing.base import Editor
from ld_common.editing.counterfactuals import Counterfactuals, draw_counterfactuals, edit_to
from ld_common.imaging.geometry import Scan, to_model
from ld_common.imaging.modality import Attributes, Modality
from ld_common.imaging.scan_reader import read_scan
from ld_common.metrics.image import psnr
from ld_simulations.benchmarks.latent_drift.pictures import decode
from ld_simulations.phantoms.base import SEX_EDIT, Phantom
from ld_simulations.phantoms.registry import find_phantom

HELD_OUT = "held_out.json"
"""Names the held-out patients, their edits and where the truth is."""
CHANGED = 0.1
"""Absolute change of a pixel in [-1, 1] from which the true edit is said to change it."""
CHANGED_MARGIN = 2
"""Pixels by which the region of the true edit is widened."""


@dataclass(frozen=True)
class HeldOut:
    """A held-out patient's scan and one true counterfactual of it, all in the factual scan's window."""

    hospital: str
    patient: str
    attributes: Attributes
    edit: str
    target: Attributes
    scan: int
    """Row of the scan among all scans."""
    truth: Tensor
    """`(1,S,S)` in [-1, 1]."""
    true_area_mm2: tuple[float, float]
    """The structure's area before and after, as the causal model knows it."""


@dataclass(frozen=True)
class Evaluation:
    """Held-out scans `(N,1,S,S)`, their answers in the order of `cases`, and what was measured."""

    phantom: Phantom[Any, Any]
    cases: list[HeldOut]
    scans: Tensor
    drawn: Counterfactuals
    rows: list[dict[str, Any]]
    """One row of numbers a case."""
    summary: dict[str, Any]


def read_held_out(folder: Path, modality: Modality, side: int) -> tuple[Tensor, list[HeldOut]]:
    """All held-out scans `(N,1,S,S)` in [-1, 1] and all their cases."""
    scans: list[Tensor] = []
    cases: list[HeldOut] = []
    for entry in _manifest(folder)["patients"]:
        scan = read_scan(folder / entry["series"], modality)
        image, frame = to_model(scan, side, modality.image)
        for edit in entry["edits"]:
            pixels = np.load(folder / edit["truth"])["pixels"]
            truth, _ = to_model(Scan(pixels, scan.spacing_mm, {}), side, modality.image, frame)
            areas = entry["area_mm2"], edit["area_mm2"]
            who = entry["hospital"], entry["patient"], entry["attributes"]
            cases.append(HeldOut(*who, edit["name"], edit["target"], len(scans), truth, areas))
        scans.append(image)
    return torch.stack(scans), cases


def read_phantom(folder: Path) -> Phantom[Any, Any]:
    """What the held-out patients of a folder are patients of."""
    return find_phantom(_manifest(folder)["phantom"])


def _manifest(folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((folder / HELD_OUT).read_text())
    return manifest


def evaluate(
    base: BaseModel,
    modality: Modality,
    folder: Path,
    config: Editor,
    ceiling: float,
    progress: Callable[[int], None] = lambda done: None,
    drift: LatentDrift | None = None,
) -> Evaluation:
    """Draw and judge every case of a folder of held-out patients.

    Args:
        base: the base with the release's adapter.
        modality: what the prompts and pictures are.
        folder: the folder with `held_out.json`.
        config: how to edit.
        ceiling: growth correlation that no method can pass, from the causal model.
        progress: as in `draw_counterfactuals`.
        drift: the drift that the adapter was trained with.
    """
    phantom = read_phantom(folder)
    scans, cases = read_held_out(folder, modality, base.resolution)
    factual = {case.scan: modality.prompt(case.attributes) for case in cases}
    edits = [edit_to(modality, case.scan, case.attributes, case.target, config.delta) for case in cases]
    prompts = [factual[row] for row in range(len(scans))]
    drawn = draw_counterfactuals(base, scans, prompts, edits, config, progress, drift)
    rows = measure(base, phantom, modality, scans, cases, drawn)
    summary = summarize(rows, growth_ceiling=ceiling)
    summary["inversion_psnr_db"] = float(psnr(drawn.reconstructions, drawn.autoencoded).mean())
    summary["vae_psnr_db"] = float(psnr(drawn.autoencoded, scans).mean())
    summary["area_validation"] = validate_area(phantom, modality, base.resolution, scans, cases)
    return Evaluation(phantom, cases, scans, drawn, rows, summary)


def measure(
    base: BaseModel,
    phantom: Phantom[Any, Any],
    modality: Modality,
    scans: Tensor,
    cases: Sequence[HeldOut],
    drawn: Counterfactuals,
) -> list[dict[str, Any]]:
    """One row of numbers for each case; areas and PSNRs are of images that all went through the VAE."""
    pixel_mm = modality.image.field_of_view_mm / base.resolution
    truths = torch.stack([case.truth for case in cases])
    seen_truths = decode(base, truths)
    owner = torch.tensor([case.scan for case in cases])
    before = drawn.autoencoded[owner]
    areas = [phantom.measure_areas_mm2(images, pixel_mm) for images in (drawn.autoencoded, drawn.images, seen_truths)]
    gain = psnr(drawn.images, seen_truths) - psnr(before, seen_truths)
    rows = []
    for row, case in enumerate(cases):
        changed = (case.truth - scans[case.scan]).abs()[0] > CHANGED
        kept = ~torch.as_tensor(ndimage.binary_dilation(changed.numpy(), iterations=CHANGED_MARGIN))
        error = (drawn.images[row] - scans[case.scan]).abs()[0][kept].mean()
        own = (before[row] - scans[case.scan]).abs()[0][kept].mean()
        rows.append(
            {
                "hospital": case.hospital,
                "patient": case.patient,
                "edit": case.edit,
                "area_before_mm2": float(areas[0][case.scan]),
                "growth_mm2": float(areas[1][row] - areas[0][case.scan]),
                "true_growth_mm2": float(areas[2][row] - areas[0][case.scan]),
                "copy_gain_db": float(gain[row]),
                "identity_ratio": float(error / own),
            }
        )
    return rows


def summarize(rows: Sequence[dict[str, Any]], growth_ceiling: float) -> dict[str, Any]:
    """The numbers of the README's table; growth is judged on age and disease edits, the rest on all."""
    grown = [row for row in rows if row["edit"] != SEX_EDIT]
    drawn = np.array([row["growth_mm2"] for row in grown])
    true = np.array([row["true_growth_mm2"] for row in grown])
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
        "by_edit": {edit: _of_edit(rows, edit) for edit in sorted({row["edit"] for row in rows})},
    }


def _of_edit(rows: Sequence[dict[str, Any]], edit: str) -> dict[str, float | int]:
    own = [row for row in rows if row["edit"] == edit]
    drawn = np.array([row["growth_mm2"] for row in own])
    true = np.array([row["true_growth_mm2"] for row in own])
    varies = len(own) > 2 and drawn.std() > 0 and true.std() > 0
    return {
        "cases": len(own),
        "growth_mm2": float(drawn.mean()),
        "true_growth_mm2": float(true.mean()),
        "growth_correlation": float(np.corrcoef(drawn, true)[0, 1]) if varies else 0.0,
        "direction_rate": float(np.mean(np.sign(drawn) == np.sign(true))),
        "copy_gain_db": float(np.mean([row["copy_gain_db"] for row in own])),
        "identity_ratio": float(np.mean([row["identity_ratio"] for row in own])),
    }


def validate_area(
    phantom: Phantom[Any, Any], modality: Modality, side: int, scans: Tensor, cases: Sequence[HeldOut]
) -> dict[str, float]:
    """The area measure on plain scans and true counterfactuals against the areas that the causal model knows."""
    pixel_mm = modality.image.field_of_view_mm / side
    before = phantom.measure_areas_mm2(scans, pixel_mm).numpy()
    after = phantom.measure_areas_mm2(torch.stack([case.truth for case in cases]), pixel_mm).numpy()
    grown = [row for row, case in enumerate(cases) if case.edit != SEX_EDIT]
    known = np.array([case.true_area_mm2 for case in cases])
    measured = np.stack([before[[case.scan for case in cases]], after], 1)
    error = measured - known
    changes = (measured[:, 1] - measured[:, 0])[grown], (known[:, 1] - known[:, 0])[grown]
    return {
        "mean_error_mm2": float(error.mean()),
        "mean_absolute_error_mm2": float(np.abs(error).mean()),
        "mean_area_mm2": float(known.mean()),
        "correlation": float(np.corrcoef(measured.ravel(), known.ravel())[0, 1]),
        "change_correlation": float(np.corrcoef(*changes)[0, 1]),
    }
