"""How far a scan's latents lie from those of a study's sites, and from where on an answer is not to be trusted.

A longitudinal drift is a regression, which answers any picture: a whole head where the sites had skull-stripped brains,
another modality, noise. Two distances tell them apart. Both are 1 for a picture as far from its expectation as the
sites' own are on average:

    parts      sqrt(d² / K),  d the Mahalanobis distance of the scan's K parts from those expected for its attributes
    outside    root mean square of what the drift's directions do not explain, divided by that of the sites' latents
               about their mean

The limits were chosen on the phantoms of `configs/hospitals.yaml` with `simulations/tiny_base`, for drifts of 30 to 900
patients, of 1 to 3 sites and of 16 to 48 parts. Of 199 visits of 120 other patients, 98 % had `parts` below 1.22 to
1.64 and `outside` below 0.72 to 1.23, by drift, so that at most 2 % are warned of. `outside` was 1.6 to 2.6 for heads
with a skull, 1.7 to 2.8 at 1.3 times the size, 1.3 to 2.3 shifted by 10 pixels, above 2.1 for noise and above 3.3 for
inverted pictures. Pictures upside down reached 1.0 to 2.0: a brain's outline is nearly symmetric, and about half pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

PARTS_LIMIT, OUTSIDE_LIMIT = 2.0, 1.25
"""Distances above which a scan is unlike those of the sites."""


@dataclass(frozen=True)
class Unfamiliarity:
    """Distances of one scan, as the module says."""

    parts: float
    outside: float

    @property
    def share(self) -> float:
        """The larger distance as a share of its limit."""
        return max(self.parts / PARTS_LIMIT, self.outside / OUTSIDE_LIMIT)

    @property
    def unfamiliar(self) -> bool:
        """Whether a distance is above its limit."""
        return not self.share <= 1  # what is no number is not familiar

    def warnings(self, name: str = "the scan") -> list[str]:
        """A sentence that says what to check, where the scan is unfamiliar."""
        if not self.unfamiliar:
            return []
        return [
            f"{name} is unlike the scans of the release's sites ({self.share:.1f} times the limit), so the answer may "
            "be wrong: check modality, contrast, orientation and slice, and remove the skull if the sites did"
        ]

    def record(self) -> dict[str, Any]:
        """As `record.json` holds it."""
        limits = {"parts": PARTS_LIMIT, "outside": OUTSIDE_LIMIT}
        return {
            "parts": round(self.parts, 3),
            "outside": round(self.outside, 3),
            "limits": limits,
            "unfamiliar": self.unfamiliar,
        }
