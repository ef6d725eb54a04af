"""The values of one attribute at which `ld-generate sweep` draws a scan."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ld_common.core.errors import RequestError
from ld_common.imaging.modality import Attributes, Modality

MAX_VALUES = 100


@dataclass(frozen=True)
class Sweep:
    """Values of one attribute."""

    attribute: str
    values: list[float]

    @property
    def targets(self) -> list[Attributes]:
        """The changed attribute for each value."""
        return [{self.attribute: value} for value in self.values]


def read_sweep(modality: Modality, text: str) -> Sweep:
    """A sweep from `attribute=first:last:step`; the last value is included where a step meets it.

    Raises:
        RequestError: another form, an attribute with categories, a value out of bounds, fewer than 2 or more than
            `MAX_VALUES` values, or values that round to the same whole number, as prompts show them.
    """
    name, _, numbers = text.partition("=")
    attribute = modality.attributes.get(name)
    if attribute is not None and attribute.categories:
        raise RequestError(
            f"{name} has categories, {', '.join(attribute.categories)}: use ld-generate edit with a --target for each"
        )
    try:
        first, last, step = (float(part) for part in numbers.split(":"))
        count = math.floor((last - first) / step + 1e-9) + 1
    except (ValueError, ZeroDivisionError, OverflowError):
        raise RequestError(f"'{text}' is not of the form attribute=first:last:step, such as age=60:90:5") from None
    if not 2 <= count <= MAX_VALUES:
        raise RequestError(f"'{text}' has {max(count, 0)} values: a sweep has 2 to {MAX_VALUES}")
    values = [float(modality.parse(name, f"{first + index * step:.10g}")) for index in range(count)]
    if len({round(value) for value in values}) < count:
        raise RequestError(f"'{text}': prompts show whole numbers, so some of these values are equal; use a step of 1")
    return Sweep(name, values)
