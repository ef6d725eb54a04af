"""A patient's earlier visits, by which a longitudinal drift is calibrated to the patient (see `moves`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ld_common.core.errors import RequestError
from ld_common.diffusion.longitudinal_sums import DAYS_IN_YEAR
from ld_common.imaging.geometry import Frame, Scan, to_model
from ld_common.imaging.modality import AGE, ImageConfig
from ld_common.imaging.rendering import picture_of, render

SHORT_SPREAD = 0.5
"""A history of less spread, in years²: two visits a year apart. It says little."""
CONTRADICTION_YEARS = 1.5
"""Largest difference between an age that was given and one that follows from the dates."""


Write = Callable[[Tensor, Tensor], Tensor]
"""From the model's reconstruction and answer `(1,S,S)` to the model's picture `(1,S,S)` of what is written."""


def writing(scan: Scan, frame: Frame, rendering: str, side: int, image: ImageConfig) -> Write:
    """How a scan's answers are written.

    Args:
        scan: the scan.
        frame: of its picture.
        rendering: one of `RENDERINGS`.
        side: of the model's picture.
        image: the modality's image settings.
    """

    def write(reconstruction: Tensor, answer: Tensor) -> Tensor:
        return picture_of(render(scan.pixels, frame, reconstruction, answer, rendering), frame, side, image)

    return write


@dataclass(frozen=True, eq=False)
class EarlierScan:
    """An earlier visit as a caller gives it."""

    scan: Scan
    age: float | None = None
    """The patient's age at the visit; None takes it from the dates of both scans, or from the file."""
    name: str = "an earlier scan"
    """For messages."""


@dataclass(frozen=True, eq=False)
class ScanHistory:
    """Earlier visits of a scan's patient, if there were any, and how answers to the scan are written."""

    pictures: Tensor
    """The model's, `(K,1,S,S)` in [-1, 1]."""
    years: Sequence[float]
    """How long before the scan each was taken, above 0."""
    write: Write | None = None
    """How answers to the scan are written, on which their growth is measured; None measures the model's picture."""

    def __post_init__(self) -> None:
        if len(self.pictures) != len(self.years):
            raise RequestError(f"a history of {len(self.pictures)} pictures and {len(self.years)} times")
        if self.years and min(self.years) <= 0:
            raise RequestError("every visit of a history must be earlier than the scan")

    @classmethod
    def without_visits(cls, write: Write | None = None) -> ScanHistory:
        """Of a patient of whom there is one scan."""
        return cls(torch.zeros(0, 1, 1, 1), (), write)

    @property
    def spread(self) -> float:
        """v in years²."""
        times = self.times
        return float((times - times.mean()).square().sum())

    @property
    def times(self) -> Tensor:
        """Of all visits, the scan's last, which is 0; in years, float64."""
        return torch.tensor([*(-years for years in self.years), 0.0], dtype=torch.float64)

    def slope(self, values: Tensor) -> Tensor:
        """Least-squares slope a year of values `(1+K,...)` in the order of `times`."""
        times = self.times - self.times.mean()
        weights = (times / times.square().sum()).to(values)
        return torch.tensordot(weights, values, dims=1)


def read_history(
    scan: Scan, age: float, earlier: Sequence[EarlierScan], side: int, image: ImageConfig
) -> ScanHistory | None:
    """The history of a scan; None without an earlier one. The caller adds how answers are written.

    Args:
        scan: the scan that is edited.
        age: the patient's age in it.
        earlier: the patient's earlier visits, in any order.
        side: of the model's picture.
        image: the modality's image settings.

    Raises:
        RequestError: another patient's scan, one that is not earlier, or one whose age is not known or contradicts the
            dates.
    """
    if not earlier:
        return None
    times = visit_times(scan, age, earlier)
    order = sorted(range(len(earlier)), key=lambda row: -times[row])
    pictures = torch.stack([to_model(earlier[row].scan, side, image)[0] for row in order])
    return ScanHistory(pictures, [times[row] for row in order])


def visit_times(scan: Scan, age: float, earlier: Sequence[EarlierScan]) -> list[float]:
    """How many years before a scan each earlier visit was, above 0; raises as `read_history`."""
    return [_years_before(scan, age, visit) for visit in earlier]


def years_between(first: EarlierScan, second: EarlierScan) -> float | None:
    """Years from one visit to another: by the dates if both have one, else by the ages; None where neither is known."""
    if first.scan.study_date is not None and second.scan.study_date is not None:
        return (second.scan.study_date - first.scan.study_date).days / DAYS_IN_YEAR
    before, after = _age(first), _age(second)
    return None if before is None or after is None else after - before


def _years_before(scan: Scan, age: float, visit: EarlierScan) -> float:
    first, second = scan.patient_id, visit.scan.patient_id
    if first and second and first != second:
        raise RequestError(f"{visit.name} is of another patient than the scan: its Patient ID differs")
    years = years_between(visit, EarlierScan(scan, age))
    if years is None:
        raise RequestError(f"{visit.name} does not say when it was taken: give the age, as SCAN@AGE")
    if visit.age is not None and abs(age - visit.age - years) > CONTRADICTION_YEARS:
        raise RequestError(
            f"{visit.name}: the age {visit.age:g} contradicts the dates, which are {years:.1f} years apart"
        )
    if years <= 0:
        raise RequestError(f"{visit.name} is not earlier than the scan: a history is what came before")
    return years


def _age(visit: EarlierScan) -> float | None:
    age = visit.scan.attributes_in_file.get(AGE) if visit.age is None else visit.age
    return None if age is None else float(age)


def history_warnings(history: ScanHistory) -> list[str]:
    """A sentence where the visits are too near to each other to say much."""
    if history.spread >= SHORT_SPREAD:
        return []
    return [
        f"the history spans {max(history.years):.1f} years: too short to say how fast this patient changes; the answer "
        "is nearly that of one scan"
    ]
