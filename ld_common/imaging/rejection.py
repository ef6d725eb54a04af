"""Reasons for which an image file is refused, and a guard that maps library exceptions to them."""

from __future__ import annotations

import math
import struct
import warnings
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path

from ld_common.core.errors import LdError, ScanError

MAX_FILE_BYTES = 512 * 2**20
MAX_PIXELS = 2**27
"""Voxels of one volume; 512 MiB as float32."""
MAX_SLICE_PIXELS = 2**25
"""Pixels of one image; a radiograph of 43 cm at 0.1 mm has 18 million."""
MIN_SPACING_MM, MAX_SPACING_MM = 0.01, 100.0
"""Plausible pixel spacings; beyond them the file's unit is not millimetres."""
MALFORMED: tuple[type[Exception], ...] = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, OSError, RuntimeError),
    *(TypeError, ValueError, struct.error, zlib.error),
)
"""Exceptions that the libraries raise on malformed files, besides those of `malformed`."""


class Rejection(StrEnum):
    """Reason for which a file was refused."""

    UNREADABLE = "unreadable"
    NOT_AN_IMAGE = "not an image"
    TOO_LARGE = "too large"
    WRONG_MODALITY = "wrong modality"
    WRONG_GEOMETRY = "wrong geometry"
    UNSUPPORTED = "unsupported kind of image"
    NO_DECODER = "missing decoder"
    BURNED_IN = "may hold burned-in text"
    SYNTHETIC = "synthetic image"
    LOCALIZER = "localizer"
    SEVERAL_AT_ONE_PLACE = "several images at one place"
    MISSING_SLICE = "missing slice"
    NO_ORIENTATION = "no certain orientation"


class ScanRejected(ScanError):
    """An image file cannot be used, for one of a fixed set of reasons."""

    def __init__(self, path: Path, rejection: Rejection, detail: str) -> None:
        super().__init__(f"cannot use '{path}': {rejection}: {detail}")
        self.path = path
        self.rejection = rejection
        self.detail = detail
        """Explanation without path, so that it cannot name a patient. Of a header's values it has numbers, image types
        and time points, which a person chooses images by."""


class ValuesTooLargeError(ArithmeticError):
    """Values of a file are beyond single precision."""


def malformed() -> tuple[type[Exception], ...]:
    """Exceptions that the libraries raise on malformed files. Who only names reasons need not load pydicom."""
    from pydicom.errors import BytesLengthException, InvalidDicomError

    return (*MALFORMED, BytesLengthException, InvalidDicomError)


@contextmanager
def rejecting(path: Path, *more: type[Exception]) -> Iterator[None]:
    """Turn exceptions that a library raises on a malformed file into `ScanRejected`; drop its warnings.

    The message gives only the exception's type, since its text may quote the header.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except LdError:
        raise
    except PermissionError as error:
        raise ScanRejected(path, Rejection.UNREADABLE, "no permission to read it: change its permissions") from error
    except MemoryError as error:
        raise ScanRejected(path, Rejection.TOO_LARGE, "reading it needs more memory than there is") from error
    except ValuesTooLargeError as error:
        detail = "it holds values above 3.4e38: write it in single precision"
        raise ScanRejected(path, Rejection.UNREADABLE, detail) from error
    except (*malformed(), *more) as error:
        detail = f"damaged or not what its name says ({type(error).__name__}); export it again"
        raise ScanRejected(path, Rejection.UNREADABLE, detail) from error


def check_file(path: Path) -> None:
    """Raise `ScanRejected` unless `path` is a readable regular file of at most `MAX_FILE_BYTES`."""
    with rejecting(path):
        if not path.is_file():
            raise ScanRejected(path, Rejection.UNREADABLE, "no regular file has that name")
        with path.open("rb"):
            size = path.stat().st_size
    if not size:
        raise ScanRejected(path, Rejection.NOT_AN_IMAGE, "the file is empty; copy it again")
    if size > MAX_FILE_BYTES:
        raise ScanRejected(path, Rejection.TOO_LARGE, f"{size} bytes, at most {MAX_FILE_BYTES} are read")


def check_slice_size(path: Path, height: int, width: int) -> None:
    """Raise `ScanRejected` for an image of more than `MAX_SLICE_PIXELS`."""
    if height * width > MAX_SLICE_PIXELS:
        detail = f"{height} x {width} pixels, at most {MAX_SLICE_PIXELS} are read: write it at a lower resolution"
        raise ScanRejected(path, Rejection.TOO_LARGE, detail)


def check_spacing(path: Path, spacing_mm: Iterable[float]) -> None:
    """Raise `ScanRejected` for implausible distances between pixels."""
    for distance in spacing_mm:
        if not MIN_SPACING_MM <= distance <= MAX_SPACING_MM:
            detail = f"its pixels are {distance:g} mm apart: write it in millimetres"
            raise ScanRejected(path, Rejection.WRONG_GEOMETRY, detail)


def slice_number(path: Path, slices: int, fraction: float, index: int | None) -> int:
    """`index`, or the slice at `fraction` of `slices`; raises `ScanRejected` for an index that does not exist."""
    chosen = math.floor(fraction * (slices - 1) + 0.5) if index is None else index
    if not 0 <= chosen < slices:
        raise ScanRejected(path, Rejection.WRONG_GEOMETRY, f"slice {chosen} of {slices}: use 0 to {slices - 1}")
    return chosen
