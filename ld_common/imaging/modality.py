"""What a kind of scan is and what is said of it: the attributes a study may know, its prompt, its pixels.

A modality is config alone (`configs/modalities/*.yaml`); both sides load the same file and compare its hash.
Its attributes are the allow-list: nothing else about a patient is read, kept or put into words.
"""

from __future__ import annotations

import hashlib
import json
import math
import string
from dataclasses import dataclass, field
from typing import ClassVar

from ld_common.core.config import nearest, require, to_mapping
from ld_common.core.errors import RequestError

Value = float | str
Attributes = dict[str, Value]
"""One visit's attributes by name, for example `{"age": 74.0, "sex": "F", "diagnosis": "AD"}`."""


@dataclass
class AttributeConfig:
    """One attribute: a number within bounds, or one of the keys of `categories`."""

    RENAMED: ClassVar[dict[str, str]] = {"words": "categories"}

    minimum: float = 0.0
    maximum: float = 0.0
    unit: str = ""
    categories: dict[str, str] = field(default_factory=dict)
    """Value -> the words that the prompt uses, in the order of the values; empty for a number."""

    def __post_init__(self) -> None:
        require(
            bool(self.categories) or self.minimum < self.maximum,
            "an attribute needs either categories or a minimum below its maximum",
        )
        self.categories = dict(sorted(self.categories.items()))


@dataclass
class ImageConfig:
    """How a scan becomes the model's picture."""

    plane: str = "axial"
    """Plane of the slice that is taken from a volume; `none` for two-dimensional images."""
    view_positions: list[str] = field(default_factory=list)
    """DICOM View Positions (0018,5101) that are used, for example PA; a file that says another is refused, one that
    says none is not. Empty uses all."""
    slice_position: float = 0.5
    """Where in the volume, from 0 (first along the plane's normal) to 1."""
    field_of_view_mm: float = 200.0
    """Side of the square, centred on the image, that fills the model's picture; 0 takes the longer side."""
    low_percentile: float = 0.0
    high_percentile: float = 99.5
    """Percentiles of the scan that become -1 and 1; values beyond are clipped."""

    def __post_init__(self) -> None:
        require(self.plane in ("axial", "none"), f"image.plane is '{self.plane}': use axial or none")
        require(0 <= self.slice_position <= 1, f"image.slice_position is {self.slice_position}: use 0 to 1")
        require(self.field_of_view_mm >= 0, "image.field_of_view_mm must not be negative")
        require(
            0 <= self.low_percentile < self.high_percentile <= 100,
            "image.low_percentile must lie below image.high_percentile, both from 0 to 100",
        )


@dataclass
class Modality:
    """A kind of scan."""

    RENAMED: ClassVar[dict[str, str]] = {"prompt": "prompt_template", "measures": "biomarkers"}

    name: str = "brain_mri"
    dicom_modalities: list[str] = field(default_factory=lambda: ["MR"])
    """DICOM Modalities (0008,0060) of which a site's files must have one."""
    prompt_template: str = "axial T1 brain MRI, {sex}, {age} years, {diagnosis}"
    attributes: dict[str, AttributeConfig] = field(default_factory=dict)
    """In the order of their names, whatever a file's: what counts on an order is then the same on every side."""
    image: ImageConfig = field(default_factory=ImageConfig)
    biomarkers: list[str] = field(default_factory=list)
    """What is measured on its pictures: biomarkers by name, as `ld_common.metrics.registry` lists them."""

    def __post_init__(self) -> None:
        self.attributes = dict(sorted(self.attributes.items()))
        named = {name for _, name, _, _ in string.Formatter().parse(self.prompt_template) if name}
        for name in sorted(named ^ set(self.attributes)):
            where = "attributes" if name in named else "prompt_template"
            require(False, f"modality '{self.name}': attribute '{name}' is missing from its {where}")

    def digest(self) -> str:
        """SHA-256 of the modality's content; a store and a study must agree on it."""
        return hashlib.sha256(json.dumps(to_mapping(self), sort_keys=True).encode()).hexdigest()

    def parse(self, name: str, text: str) -> Value:
        """One attribute's value from text.

        Raises:
            RequestError: an unknown attribute, not a number, out of bounds, or not one of the known values.
        """
        if name not in self.attributes:
            raise RequestError(f"unknown attribute '{name}': {nearest(name, list(self.attributes))}")
        known = self.attributes[name]
        if known.categories:
            if text not in known.categories:
                raise RequestError(f"{name}={text} is not a known value: {nearest(text, list(known.categories))}")
            return text
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not known.minimum <= number <= known.maximum:
            bounds = f"{known.minimum:g} to {known.maximum:g} {known.unit}".strip()
            raise RequestError(f"{name}={text} is not a number within {bounds}")
        return number

    def parse_all(self, text: str) -> Attributes:
        """Attributes from `age=84,diagnosis=AD`; raises `RequestError` as `parse` does."""
        values: Attributes = {}
        for part in filter(None, (piece.strip() for piece in text.split(","))):
            name, equals, value = part.partition("=")
            if not equals:
                raise RequestError(f"'{part}' is not of the form attribute=value")
            values[name.strip()] = self.parse(name.strip(), value.strip())
        return values

    @property
    def design_width(self) -> int:
        """Length of `design`."""
        return sum(max(1, len(known.categories) - 1) for known in self.attributes.values())

    def design_vector(self, attributes: Attributes, reach: float = 1.0) -> list[float]:
        """Attributes as numbers for a regression: numbers from -reach to reach over their bounds, words as 0 and 1.

        The first word of an attribute is its reference and has no column.

        Raises:
            RequestError: an attribute is missing.
        """
        self.prompt(attributes)
        row: list[float] = []
        for name, known in self.attributes.items():
            if known.categories:
                row += [float(attributes[name] == word) for word in list(known.categories)[1:]]
            else:
                middle, half = (known.maximum + known.minimum) / 2, (known.maximum - known.minimum) / 2
                row.append(reach * (float(attributes[name]) - middle) / half)
        return row

    def condition_vector(self, attributes: Attributes) -> list[float]:
        """`design` with numbers from -10 to 10; what differs between two visits is the difference of their places.

        A few years then weigh as much as another word.

        Raises:
            RequestError: an attribute is missing.
        """
        return self.design_vector(attributes, reach=10)

    def prompt(self, attributes: Attributes) -> str:
        """The prompt for one visit, numbers rounded to whole ones.

        Raises:
            RequestError: an attribute is missing.
        """
        missing = [name for name in self.attributes if name not in attributes]
        if missing:
            raise RequestError(f"missing attribute {', '.join(missing)}: the prompt needs it")
        words = {
            name: known.categories[str(attributes[name])] if known.categories else str(round(float(attributes[name])))
            for name, known in self.attributes.items()
        }
        return self.prompt_template.format(**words)
