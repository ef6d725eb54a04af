"""Joins a scan with the row of a visit nearest in time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ld_client.layouts.entries import Cause
from ld_client.layouts.tables import LayoutRow

TOLERANCE_DAYS = 180
"""Half of the year that lies between two clinical visits of OASIS-3 or ADNI."""


@dataclass(frozen=True)
class DatedRow:
    """A row of a patient's visit."""

    when: int
    """Days, on the same scale as the scans'."""
    row: LayoutRow
    table: str

    @property
    def name(self) -> str:
        """How lists call it."""
        return f"{self.table} row {self.row.number}"


def nearest_row(
    rows: Sequence[DatedRow], when: int, tolerance_days: int, content: Callable[[LayoutRow], object]
) -> DatedRow | tuple[Cause, str]:
    """The row nearest to a scan, or the reason why there is none.

    Of two rows equally near that agree in `content`, the earlier one is taken; two that do not agree are refused.
    """
    if not rows:
        return Cause.NO_ROW, "no row of this patient can be used"
    distance = min(abs(entry.when - when) for entry in rows)
    if distance > tolerance_days:
        return Cause.TOO_FAR, f"the nearest row is {distance} days away; see --tolerance-days"
    near = [entry for entry in rows if abs(entry.when - when) == distance]
    if len({repr(content(entry.row)) for entry in near}) > 1:
        names = " and ".join(entry.name for entry in near)
        return Cause.CONFLICT, f"{names}, both {distance} days away, disagree"
    return min(near, key=lambda entry: (entry.when, entry.row.number))
