"""What a decoding child answered, checked: a decoder that a file took over can send anything."""

from __future__ import annotations

import base64
import datetime
import re
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from nibabel.spatialimages import HeaderDataError

from ld_common.core.errors import RequestError
from ld_common.imaging.dicom_header import DicomHeader
from ld_common.imaging.geometry import Scan
from ld_common.imaging.modality import Attributes, Modality
from ld_common.imaging.rejection import MAX_PIXELS, MAX_SLICE_PIXELS, Rejection, ScanRejected
from ld_common.imaging.volume import Volume

UID_TEXT = re.compile(r"[0-9.]{1,64}", re.ASCII)
MALFORMED_ANSWER = (
    *(ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError),
    *(HeaderDataError, RequestError),
)
"""Exceptions on an answer that no unharmed child gives."""


def refusal_of(content: dict[str, Any], path: Path) -> ScanRejected | None:
    """The refusal that an answer about the file at `path` is; None for a result. Raises one of `MALFORMED_ANSWER`."""
    if "rejection" not in content:
        return None
    rejection, detail, name = Rejection(content["rejection"]), _text(content["detail"]), _text(content["name"])
    inside = name not in ("", ".", "..") and Path(name).name == name
    return ScanRejected(path / name if inside else path, rejection, detail[:500])


def scan_of(content: dict[str, Any], values: np.ndarray, modality: Modality) -> Scan:
    """A scan from its fields and its pixels `(N,)`, row by row; raises one of `MALFORMED_ANSWER`."""
    height, width = _shape(content["shape"], 2, values, MAX_SLICE_PIXELS)
    spacing, affine = content["spacing_mm"], content["affine"]
    return Scan(
        pixels=values.reshape(height, width),
        spacing_mm=None if spacing is None else _pair(spacing),
        attributes_in_file=_attributes(content["attributes"], modality),
        affine=None if affine is None else _affine(affine),
        orientation=_orientation(content["orientation"]),
        patient_id=_text(content["patient_id"]),
        study_date=_date(content["study_date"]),
        frame_of_reference=_uid(content["frame_of_reference"]),
    )


def volume_of(content: dict[str, Any], values: np.ndarray, modality: Modality) -> Volume:
    """A volume from its fields and its voxels `(N,)`, the first axis fastest; raises one of `MALFORMED_ANSWER`."""
    shape = _shape(content["shape"], 3, values, MAX_PIXELS)
    header = None
    if content["nifti"] is not None:
        block = base64.b64decode(_text(content["nifti"]), validate=True)
        kinds: dict[int, Any] = {kind.sizeof_hdr: kind for kind in (Nifti1Header, Nifti2Header)}
        header = kinds[len(block)](block, check=False)
        stored = header.get_data_shape()
        if stored[:3] != shape or max(stored[3:], default=1) > 1:
            raise ValueError
    attributes = _attributes(content["attributes"], modality)
    return Volume(
        voxels=values.reshape(shape, order="F"),
        affine=_affine(content["affine"]),
        attributes_in_file=attributes,
        header=header,
        frame_of_reference=_uid(content["frame_of_reference"]),
        patient_id=_text(content["patient_id"]),
        study_date=_date(content["study_date"]),
    )


def headers_of(content: dict[str, Any], values: np.ndarray, path: Path) -> list[DicomHeader]:
    """The headers of the images of the file at `path`, which have no array; raises one of `MALFORMED_ANSWER`."""
    headers = [header_from(fields, path) for fields in content["headers"]]
    if values.size or not headers:
        raise ValueError
    return headers


def header_from(fields: dict[str, Any], path: Path) -> DicomHeader:
    """A header of `decoding_worker.header_fields`, checked; raises one of `MALFORMED_ANSWER`."""
    spacing, affine = fields["spacing_mm"], fields["affine"]
    for number in (fields["series_number"], fields["frame"]):
        if not (number is None or type(number) is int):
            raise ValueError
    texts = (
        *("patient_id", "sex", "series_uid", "series_description", "sop_uid", "sop_class", "view_position"),
        *("image_type", "time_point", "body_part"),
    )
    return DicomHeader(
        path=path,
        study_date=_date(fields["study_date"]),
        age_years=_number(fields["age_years"]),
        series_number=fields["series_number"],
        spacing_mm=None if spacing is None else _pair(spacing),
        affine=None if affine is None else _affine(affine),
        position_mm=_number(fields["position_mm"]),
        orientation=_orientation(fields["orientation"]),
        frame_of_reference=_uid(fields["frame_of_reference"]),
        study_uid=_uid(fields["study_uid"]),
        echo_ms=_number(fields["echo_ms"]),
        frame=fields["frame"],
        **{name: _text(fields[name]) for name in texts},
    )


def _shape(value: Any, axes: int, values: np.ndarray, most: int) -> tuple[int, ...]:
    shape = tuple(value)
    whole = len(shape) == axes and all(type(length) is int and 0 < length <= most for length in shape)
    if not whole or np.prod(shape, dtype=object) != values.size or values.size > most:
        raise ValueError
    if not (np.isfinite(values.min()) and np.isfinite(values.max())):  # both are NaN if one value is
        raise ValueError
    return shape


def _attributes(value: Any, modality: Modality) -> Attributes:
    texts = {name: text if isinstance(text, str) else repr(_number(text)) for name, text in value.items()}
    return {name: modality.parse(name, text) for name, text in texts.items()}


def _affine(value: Any) -> np.ndarray:
    affine = np.array(value, np.float64)
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        raise ValueError
    return affine


def _pair(value: Any) -> tuple[float, float]:
    first, second = (_number(number) for number in value)
    if first is None or second is None or min(first, second) <= 0:
        raise ValueError
    return first, second


def _number(value: Any) -> float | None:
    if value is None:
        return None
    number = float(value)
    if isinstance(value, str) or not np.isfinite(number):
        raise ValueError
    return number


def _orientation(value: Any) -> tuple[str, str] | None:
    if value is None:
        return None
    first, second = map(_text, value)
    if not {first, second} <= set("LRAPHF"):
        raise ValueError
    return first, second


def _date(value: Any) -> datetime.date | None:
    return None if value is None else datetime.date.fromisoformat(_text(value))


def _uid(value: Any) -> str:
    text = _text(value)
    if text and not UID_TEXT.fullmatch(text):
        raise ValueError
    return text


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value
