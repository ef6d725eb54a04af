"""What a release's evaluation says of drawn changes over the years: bands around them, and the cohort's curves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from ld_common.core.errors import ReleaseError
from ld_common.imaging.modality import Attributes
from ld_common.metrics.bands import Band
from ld_common.metrics.cohort import CohortCurve

if TYPE_CHECKING:
    from ld_common.editing.history import ScanHistory

T = TypeVar("T")


@dataclass(frozen=True)
class AgeCalibration:
    """The sections `bands` and `cohort` of an evaluation."""

    editor: str = ""
    """Whose answers were judged, with the release's own options."""
    biomarker: str = ""
    one_scan: Band | None = None
    """Of answers to one scan."""
    history: Band | None = None
    """Of answers that earlier visits calibrated."""
    least_spread: float = 0.0
    """Of the histories that were judged, in years²."""
    curves: list[CohortCurve] = field(default_factory=list)

    def band_of(self, history: ScanHistory | None) -> Band | None:
        """The band of an answer with this history: one of less spread than those judged gets the band of one scan."""
        if history is not None and self.history is not None and history.spread >= self.least_spread:
            return self.history
        return self.one_scan

    def curve_of(self, attributes: Attributes) -> CohortCurve | None:
        """The curve of the patients with the same categories."""
        categories = {name: value for name, value in attributes.items() if isinstance(value, str)}
        return next((curve for curve in self.curves if curve.categories == categories), None)


def read_age_calibration(evaluation: Mapping[str, Any]) -> AgeCalibration:
    """Both sections of an evaluation, as far as they are there and can be read."""
    bands, cohort = (_mapping(evaluation.get(name)) for name in ("bands", "cohort"))
    history = _mapping(bands.get("history"))
    spread = history.get("least_spread_years2")
    states = cohort.get("curves")
    curves = [_read(CohortCurve.from_state, state) for state in (states if isinstance(states, list) else [])]
    same = not (bands and cohort) or bands.get("biomarker") == cohort.get("biomarker")
    return AgeCalibration(
        editor=str(evaluation.get("editor", "")),
        biomarker=str(bands.get("biomarker") or cohort.get("biomarker") or ""),
        one_scan=_read(Band.from_state, bands.get("one_scan")),
        history=_read(Band.from_state, history) if isinstance(spread, int | float) else None,
        least_spread=float(spread) if isinstance(spread, int | float) else 0.0,
        curves=[curve for curve in curves if curve is not None] if same else [],
    )


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _read(read: Callable[[Mapping[str, Any]], T], state: Any) -> T | None:
    if not isinstance(state, Mapping):
        return None
    try:
        return read(state)
    except ReleaseError:
        return None
