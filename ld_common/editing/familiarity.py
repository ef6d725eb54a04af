"""Whether scans resemble those that a longitudinal drift was fitted to."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ld_common.diffusion.base_model import BaseModel
from ld_common.diffusion.longitudinal import LongitudinalDrift
from ld_common.diffusion.unfamiliarity import Unfamiliarity
from ld_common.editing.history import ScanHistory
from ld_common.imaging.modality import AGE, Attributes, Modality


def unfamiliarity_of(
    base: BaseModel, drift: object, modality: Modality, picture: Tensor, attributes: Attributes
) -> Unfamiliarity | None:
    """How far a scan lies from those of the sites; None without a longitudinal drift, which alone holds their moments.

    Args:
        base: encodes the picture.
        drift: the release's.
        modality: for the design vector.
        picture: of the scan, `(1,S,S)` in [-1, 1].
        attributes: all attributes of the scan.
    """
    if not isinstance(drift, LongitudinalDrift):
        return None
    return drift.unfamiliarity(base.encode(picture[None])[0], modality.design_vector(attributes))


def history_unfamiliarity(
    base: BaseModel, drift: object, modality: Modality, history: ScanHistory | None, attributes: Attributes
) -> list[Unfamiliarity]:
    """The same for each earlier visit; `attributes` are those of the scan, and the visits' but for the age."""
    if history is None:
        return []
    distances = [
        unfamiliarity_of(base, drift, modality, picture, attributes | {AGE: float(attributes[AGE]) - years})
        for picture, years in zip(history.pictures, history.years, strict=True)
    ]
    return [distance for distance in distances if distance is not None]


def unfamiliarity_warnings(scan: Unfamiliarity | None, earlier: Sequence[Unfamiliarity] = ()) -> list[str]:
    """Sentences for a scan and for earlier ones of the patient, as far as they are unfamiliar."""
    lines = [] if scan is None else scan.warnings()
    return lines + [line for distance in earlier for line in distance.warnings("an earlier scan")]
