"""Edits that are asked of scans, with the true answer where one is known, in the pixels of the scan's own file."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ld_common.editing.history import ScanHistory, writing
from ld_common.imaging.geometry import Frame, Scan, to_model, value_range
from ld_common.imaging.modality import Attributes, Modality
from ld_common.imaging.rendering import picture_of
from ld_common.metrics.registry import BIOMARKERS
from ld_evaluate.files import FOLLOW_UP

SAME_POSITION_MM = 0.1
"""Largest difference of two scans' affines, in mm, at which their pixels show the same places."""


@dataclass(frozen=True, eq=False)
class ScanPixels:
    """A scan as its file holds it, and as the model sees it."""

    pixels: np.ndarray
    """float32 `(H,W)`, real values."""
    frame: Frame
    picture: Tensor
    """`(1,S,S)` in [-1, 1]."""
    areas_mm2: dict[str, float]
    """Biomarkers of the picture; empty where the spacing is not known."""

    @classmethod
    def of(cls, scan: Scan, modality: Modality, side: int) -> ScanPixels:
        """A scan with its picture of `side` pixels; raises `ScanError` if it has no contrast."""
        picture, frame = to_model(scan, side, modality.image)
        pixels = np.asarray(scan.pixels, np.float32)
        return cls(pixels, frame, picture, areas_mm2(modality, frame, picture))

    def picture_of(self, values: np.ndarray, modality: Modality) -> Tensor:
        """The model's picture `(1,S,S)` of values `(H,W)` in this scan's grid, in its grey range."""
        return picture_of(values, self.frame, self.picture.shape[-1], modality.image)

    def without_visits(self, modality: Modality) -> ScanHistory:
        """What is known of the patient beside the scan: how answers are written."""
        scan, image = Scan(self.pixels, self.frame.spacing_mm, {}), modality.image
        return ScanHistory.without_visits(writing(scan, self.frame, image.rendering, self.picture.shape[-1], image))


@dataclass(frozen=True, eq=False)
class TrueAnswer:
    """What an edit should have given."""

    pixels: np.ndarray | None
    """`(H,W)` in the scan's grid and grey range; None for a follow-up of another grid or position."""
    picture: Tensor
    """`(1,S,S)` in the scan's grey range."""
    growth_mm2: dict[str, float]
    """True change of each biomarker."""


@dataclass(frozen=True, eq=False)
class EvaluationEdit:
    """One edit of one scan."""

    patient: str
    scan: int
    """Row of the scan among the baselines."""
    name: str
    """Kind of edit, for example `age_plus_10`; `FOLLOW_UP` where a later scan is the truth."""
    source: Attributes
    """All attributes of the scan."""
    target: Attributes
    """The attributes that change."""
    scanned: ScanPixels
    truth: TrueAnswer | None = None
    years: float = 1.0
    """Time to the follow-up; 1 for the other edits."""

    @property
    def direction(self) -> str:
        """The categories that it asks for: men made women and women made men grow in opposite directions."""
        if self.name == FOLLOW_UP:
            return ""
        return ", ".join(str(value) for value in self.target.values() if isinstance(value, str))


def areas_mm2(modality: Modality, frame: Frame, picture: Tensor) -> dict[str, float]:
    """The modality's biomarkers on a picture `(1,S,S)`; empty where the spacing is not known."""
    if frame.spacing_mm is None:
        return {}
    pixel_mm = frame.field_of_view / picture.shape[-1]
    return {name: float(BIOMARKERS.load(name)(picture[None], pixel_mm)[0]) for name in modality.biomarkers}


def growth_mm2(modality: Modality, scanned: ScanPixels, picture: Tensor) -> dict[str, float]:
    """Change of each biomarker from a scan to a picture `(1,S,S)` in its grid."""
    areas = areas_mm2(modality, scanned.frame, picture)
    return {name: area - scanned.areas_mm2[name] for name, area in areas.items()}


def later_scan(scanned: ScanPixels, later: Scan, modality: Modality) -> TrueAnswer:
    """A follow-up as the truth of its baseline.

    MR values have no unit, so its grey levels are scaled such that both scans' windows agree. Its pixels are compared
    where both files have one grid at one position; elsewhere only the pictures are, which share their centre.

    Raises:
        ScanError: the follow-up has no contrast.
    """
    frame = scanned.frame
    low, high = value_range(later, modality.image)
    scale = (frame.high - frame.low) / (high - low)
    pixels = (frame.low + (later.pixels.astype(np.float64) - low) * scale).astype(np.float32)
    side = scanned.picture.shape[-1]
    picture, own_frame = to_model(Scan(pixels, later.spacing_mm, {}), side, modality.image, frame)
    areas = areas_mm2(modality, own_frame, picture)
    growth = {name: area - scanned.areas_mm2[name] for name, area in areas.items() if name in scanned.areas_mm2}
    return TrueAnswer(pixels if _same_grid(frame, later) else None, picture, growth)


def _same_grid(frame: Frame, later: Scan) -> bool:
    if frame.shape != later.pixels.shape or (frame.spacing_mm is None) != (later.spacing_mm is None):
        return False
    if not np.allclose(frame.spacing_mm or 1.0, later.spacing_mm or 1.0, rtol=1e-3):
        return False
    if frame.affine is None or later.affine is None:
        return True
    return bool(np.abs(frame.affine - later.affine).max() <= SAME_POSITION_MM)
