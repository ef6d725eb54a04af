"""A modality: the patient attributes that a study may use, the prompt they make, and how a scan becomes a picture.

A modality is a config file (`configs/modalities/*.yaml`). Server and sites load the same file and compare its hash. Its
attributes are an allow-list: nothing else about a patient is read, stored or written into a prompt.
"""

from __future__ import annotations

import hashlib
import json
import math
import string
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from ld_common.core.config import nearest, require, to_mapping
from ld_common.core.errors import RequestError
from ld_common.imaging.modality_steps import REGISTER, StepConfig, check_steps

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
    """Words of the prompt by value, sorted by value; empty for a number."""

    def __post_init__(self) -> None:
        require(
            bool(self.categories) or self.minimum < self.maximum,
            "an attribute needs either categories or a minimum below its maximum",
        )
        self.categories = dict(sorted(self.categories.items()))


AGE = "age"
"""Name of the attribute that passes with the years."""
DEFORMATION, DIFFERENCE, DECODED = "deformation", "difference", "decoded"
PROJECTION = "none"
"""Plane of modalities whose scans are two-dimensional images."""
PLANES = ("axial", "coronal", "sagittal", PROJECTION)
RENDERINGS = (DEFORMATION, DIFFERENCE, DECODED)
WHOLE, STRIPPED = "whole", "stripped"
HEADS = ("", WHOLE, STRIPPED)


@dataclass
class ImageConfig:
    """Plane, slice, field of view and window of the model's picture, and how answers are written."""

    plane: str = "axial"
    """Plane of the slice that is taken from a volume, `axial`, `coronal` or `sagittal`, whichever way it was acquired;
    `none` for two-dimensional images."""
    part_mm: float = 0.0
    """Length of the body part along the plane's normal, such as 150 of a head. In a stack that is much longer,
    `slice_position` counts within the part, from where air begins above it; 0 always takes the whole stack."""
    body_parts: list[str] = field(default_factory=list)
    """Patterns of accepted DICOM Body Parts Examined (0018,0015), for example `*CHEST*`; empty accepts all. A file
    without one is accepted."""
    view_positions: list[str] = field(default_factory=list)
    """Accepted DICOM View Positions (0018,5101), for example PA; empty accepts all. Where it is empty, the view's code,
    orientation or description may tell a lateral view; a file that says nothing is accepted."""
    slice_position: float = 0.5
    """Position of the slice, from 0 (first along the plane's normal) to 1."""
    field_of_view_mm: float = 200.0
    """Side of the centred square that fills the model's picture; 0 uses the longer side."""
    low_percentile: float = 0.0
    high_percentile: float = 99.5
    """Percentiles of the scan that become -1 and 1; values beyond them are clipped."""
    head: str = ""
    """What the files of a head show, before any `preprocessing`: `whole` (with skull and scalp) or `stripped` (the
    brain alone). A file that clearly shows the other is refused; empty looks at none."""
    symmetric: bool = False
    """Whether left and right are alike, as in a brain: a longitudinal drift then learns from mirror images as well."""
    rendering: str = DIFFERENCE
    """How an answer becomes pixels of the scan's file: `deformation` moves the scan's own pixels (tissue that grows or
    shrinks), `difference` adds the change of brightness, `decoded` writes the model's picture."""

    def __post_init__(self) -> None:
        require(self.rendering in RENDERINGS, f"image.rendering is '{self.rendering}': use {', '.join(RENDERINGS)}")
        require(self.head in HEADS, f"image.head is '{self.head}': use {WHOLE}, {STRIPPED} or leave it empty")
        require(self.plane in PLANES, f"image.plane is '{self.plane}': use {', '.join(PLANES)}")
        require(self.part_mm >= 0, f"image.part_mm is {self.part_mm:g}: use 0 or more")
        require(0 <= self.slice_position <= 1, f"image.slice_position is {self.slice_position}: use 0 to 1")
        require(self.field_of_view_mm >= 0, "image.field_of_view_mm must not be negative")
        require(
            0 <= self.low_percentile < self.high_percentile <= 100,
            "image.low_percentile must lie below image.high_percentile, both from 0 to 100",
        )


@dataclass
class Modality:
    """A kind of scan, for example axial T1 brain MRI."""

    RENAMED: ClassVar[dict[str, str]] = {"prompt": "prompt_template", "measures": "biomarkers"}

    name: str = "brain_mri"
    dicom_modalities: list[str] = field(default_factory=lambda: ["MR"])
    """Accepted DICOM Modalities (0008,0060)."""
    prompt_template: str = "axial T1 brain MRI, {sex}, {age} years, {diagnosis}"
    attributes: dict[str, AttributeConfig] = field(default_factory=dict)
    """Sorted by name, so that the order is the same on every side."""
    image: ImageConfig = field(default_factory=ImageConfig)
    preprocessing: list[StepConfig] = field(default_factory=list)
    """Steps that prepare a volume before its slice is taken, in their order; empty takes the file's own voxels. Index,
    `ld-generate` and `ld-evaluate` run the same list."""
    biomarkers: list[str] = field(default_factory=list)
    """Biomarkers measured on its pictures, by their names in `ld_common.metrics.registry`."""

    def __post_init__(self) -> None:
        self.attributes = dict(sorted(self.attributes.items()))
        named = {name for _, name, _, _ in string.Formatter().parse(self.prompt_template) if name}
        for name in sorted(named ^ set(self.attributes)):
            where = "attributes" if name in named else "prompt_template"
            require(False, f"modality '{self.name}': attribute '{name}' is missing from its {where}")
        check_steps(self.preprocessing, self.image.plane == PROJECTION, self.image.head == STRIPPED)

    def digest(self) -> str:
        """SHA-256 of the modality's content; a store and a study must agree on it.

        Files of `preprocessing` count by their hash. Without `preprocessing` and `image.head` it is what it was before
        there were any.
        """
        content = self.shared()
        if self.preprocessing:
            content["preprocessing"] = [step.identity() for step in self.preprocessing]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def shared(self) -> dict[str, Any]:
        """The modality as another machine reads it: no folders, and no empty options that came after the others."""
        content = to_mapping(self)
        content["preprocessing"] = [step.shared() for step in self.preprocessing]
        if not self.preprocessing:
            del content["preprocessing"]
        if not self.image.head:
            del content["image"]["head"]
        return content

    def located(self, folder: Path) -> Modality:
        """The modality with the files of its `preprocessing` in `folder`, where their paths are relative."""
        if not self.preprocessing:
            return self
        return replace(self, preprocessing=[step.located(folder) for step in self.preprocessing])

    def as_in_files(self) -> Modality:
        """The modality for reading files as they are: nothing is prepared, and any kind of head is taken."""
        return replace(self, preprocessing=[], image=replace(self.image, head=""))

    def with_any_head(self) -> Modality:
        """The modality without a check of what kind of head a file shows."""
        return replace(self, image=replace(self.image, head=""))

    @property
    def registers(self) -> bool:
        """Whether prepared volumes have the grid of a template."""
        return any(step.step == REGISTER for step in self.preprocessing)

    def parse(self, name: str, text: str) -> Value:
        """Parse one attribute's value.

        Raises:
            RequestError: an unknown attribute, not a number, out of bounds, or not one of the known values.
        """
        if name not in self.attributes:
            raise RequestError(f"unknown attribute '{name}': {nearest(name, list(self.attributes))}")
        attribute = self.attributes[name]
        if attribute.categories:
            if text not in attribute.categories:
                raise RequestError(f"{name}={text} is not a known value: {nearest(text, list(attribute.categories))}")
            return text
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not attribute.minimum <= number <= attribute.maximum:
            bounds = f"{attribute.minimum:g} to {attribute.maximum:g} {attribute.unit}".strip()
            raise RequestError(f"{name}={text} is not a number within {bounds}")
        return number

    def parse_all(self, text: str) -> Attributes:
        """Parse `age=84,diagnosis=AD`; raises `RequestError` as `parse` does."""
        values: Attributes = {}
        for part in filter(None, (piece.strip() for piece in text.split(","))):
            name, equals, value = part.partition("=")
            if not equals:
                raise RequestError(f"'{part}' is not of the form attribute=value")
            values[name.strip()] = self.parse(name.strip(), value.strip())
        return values

    @property
    def design_width(self) -> int:
        """Length of `design_vector`."""
        return sum(max(1, len(attribute.categories) - 1) for attribute in self.attributes.values())

    @property
    def numeric_columns(self) -> list[bool]:
        """Which columns of `design_vector` are numbers; the others are categories."""
        widths = [(not kind.categories, max(1, len(kind.categories) - 1)) for kind in self.attributes.values()]
        return [number for number, width in widths for _ in range(width)]

    def design_vector(self, attributes: Attributes, reach: float = 1.0) -> list[float]:
        """Attributes as a row of a regression's design matrix, `(design_width,)`.

        Numbers run from -reach to reach over their bounds. A category is 1 in its column; the first one is the
        reference and has no column.

        Raises:
            RequestError: an attribute is missing.
        """
        self.prompt(attributes)
        row: list[float] = []
        for name, attribute in self.attributes.items():
            if attribute.categories:
                row += [float(attributes[name] == word) for word in list(attribute.categories)[1:]]
            else:
                middle, half = (attribute.maximum + attribute.minimum) / 2, (attribute.maximum - attribute.minimum) / 2
                row.append(reach * (float(attributes[name]) - middle) / half)
        return row

    def condition_vector(self, attributes: Attributes) -> list[float]:
        """`design_vector` with numbers from -10 to 10, so that a few years weigh as much as another category.

        The change between two visits is the difference of their vectors.

        Raises:
            RequestError: an attribute is missing.
        """
        return self.design_vector(attributes, reach=10)

    def prompt(self, attributes: Attributes) -> str:
        """The prompt of one visit; numbers are rounded to integers.

        Raises:
            RequestError: an attribute is missing.
        """
        missing = [name for name in self.attributes if name not in attributes]
        if missing:
            raise RequestError(f"the prompt needs {', '.join(missing)}")
        words = {
            name: attribute.categories[str(attributes[name])]
            if attribute.categories
            else str(round(float(attributes[name])))
            for name, attribute in self.attributes.items()
        }
        return self.prompt_template.format(**words)
