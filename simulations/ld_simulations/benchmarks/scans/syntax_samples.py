"""A DICOM file in each transfer syntax, encoded here where an encoder is installed."""

from __future__ import annotations

import base64
import functools
import io
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pydicom.data
from PIL import Image
from pydicom import Dataset, dcmread
from pydicom.encaps import encapsulate, generate_frames
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset, write_file_meta_info
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from ld_simulations.benchmarks.scans.pictures import EMPTY_PREAMBLE, SPACING_MM, disc, mr_image
from ld_simulations.benchmarks.scans.samples import LEVEL, PICTURE, FormatSample, Written

GROUP = "transfer syntaxes"
FILE = "image.dcm"
TWELVE_BITS = (16 * PICTURE + np.arange(PICTURE.shape[1])).astype(np.uint16)
EIGHT_BITS = PICTURE.astype(np.uint8)
OTHERS = {
    "1.2.840.10008.1.2.1.98": "Encapsulated Uncompressed Explicit VR Little Endian",
    "1.2.840.10008.1.2.8.1": "Deflated Image Frame Compression",
    "1.2.840.10008.1.2.4.94": "JPIP Referenced",
    "1.2.840.10008.1.2.4.110": "JPEG XL Lossless",
    "1.2.840.10008.1.2.4.100": "MPEG-2 Main Profile / Main Level",
    "1.2.840.10008.1.2.4.102": "MPEG-4 AVC/H.264 High Profile / Level 4.1",
    "1.2.840.10008.1.2.4.107": "HEVC/H.265 Main Profile / Level 5.1",
}
"""Syntaxes that no decoder of pydicom reads."""
SMALL = (16 * disc(LEVEL, 16).astype(np.uint16)).astype(np.uint16)
SMALL_HTJ2K = """
/0//UQApQAAAAAAQAAAAEAAAAAAAAAAAAAAAEAAAABAAAAAAAAAAAAABDwEB/1AACAACAAAACv9SAAwAAgABAAIEBEAB/1wACiCIkJCQiIiI
/2QAFwABT3BlbkpQSCBWZXIgMC4yNi4zLv+QAAoAAAAAAXoAAf+TwAAunDn/fg70DiSg3/uflrcMJMHf+7cMnJYnwSfRX9Qv6lj7PXClIEc3
AMAAFvQAAW/AABb4LolFZI00BEAQq8Q84MVSQlJsBVUWbbkZykowEZcALon8CkcekBIxJikcglgAUmK0kmiostwByKRKMAKYAKqhSU3alSSw
0SNlSKJH11DmeIIjOPzsAJkHIQDXOADAAC9JgABelwAAu6Bmz+IGZ3nD2VlO6bNncRZHOOJrj3CWWa7j4J9dp1n48cgjH73PNT5zQ7P47Cyc
OfusZ53SLAKZq/5vw6Kff5aIsJADZSBA99QBZmfx2SnP4mfXMYtZfHaWZ3HDszjCEV/z4yMe8RFnOctZ3vCRWWfvXXv27Nl1HNxn3XBKs/gA
JPdRx7XZfQQvL2EHyEAhukCB79YBnn32M8969tlnP+ujjz7+6A+fedazP/7h688+89nPPPsKYAuMxQC6zFAXLx8uYf5vOfGMA2UYwPfaAf/Z
"""
"""`SMALL` as a lossless HTJ2K codestream, written by OpenJPH: no package that this project needs encodes HTJ2K."""


def syntax_samples() -> list[FormatSample]:
    """One sample for each transfer syntax."""
    native = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian)
    samples = [_sample(syntax, functools.partial(_native, syntax)) for syntax in native]
    encoded: dict[UID, dict[str, Any]] = {
        RLELossless: {},
        JPEGLSLossless: {},
        JPEGLSNearLossless: {"jls_error": 4},
        JPEG2000Lossless: {},
        JPEG2000: {"j2k_psnr": [70]},
    }
    samples += [_sample(syntax, functools.partial(_compressed, syntax, options)) for syntax, options in encoded.items()]
    samples += [
        _sample(JPEGBaseline8Bit, functools.partial(_jpeg, JPEGBaseline8Bit), ", 8 bit"),
        _sample(JPEGExtended12Bit, functools.partial(_jpeg, JPEGExtended12Bit), ", 8 bit"),
        _sample(JPEGExtended12Bit, functools.partial(_borrowed, "test_files/JPGExtended.dcm", None), ", 12 bit"),
        _sample(JPEGLossless, functools.partial(_borrowed, "JPEG-LL.dcm", JPEGLossless)),
        _sample(JPEGLosslessSV1, functools.partial(_borrowed, "JPEG-LL.dcm", JPEGLosslessSV1)),
    ]
    high = (HTJ2KLossless, HTJ2KLosslessRPCL, HTJ2K)
    samples += [_sample(syntax, functools.partial(_high_throughput, syntax)) for syntax in high]
    return samples + [
        FormatSample(GROUP, name, syntax, functools.partial(_unread, syntax)) for syntax, name in OTHERS.items()
    ]


def _sample(syntax: UID, write: Any, suffix: str = "") -> FormatSample:
    name = syntax.name.replace("Image Compression", "").replace("  ", " ").strip() + suffix
    return FormatSample(GROUP, name, str(syntax), write)


def _native(syntax: UID, folder: Path) -> Written:
    big = syntax == ExplicitVRBigEndian
    dataset = mr_image(TWELVE_BITS, BitsStored=12, HighBit=11)
    if big:
        dataset.PixelData = TWELVE_BITS.byteswap().tobytes()
        dataset["PixelData"].VR = "OW"
    return _saved(folder, dataset, syntax, TWELVE_BITS)


def _compressed(syntax: UID, options: dict[str, Any], folder: Path) -> Written:
    dataset = mr_image(TWELVE_BITS, BitsStored=12, HighBit=11)
    dataset.compress(syntax, TWELVE_BITS, generate_instance_uid=False, **options)
    return _saved(folder, dataset, syntax, TWELVE_BITS)


def _jpeg(syntax: UID, folder: Path) -> Written:
    stream = io.BytesIO()
    Image.fromarray(EIGHT_BITS).save(stream, "JPEG", quality=95)
    return _encapsulated(folder, syntax, EIGHT_BITS, stream.getvalue())


def _encapsulated(folder: Path, syntax: UID, pixels: np.ndarray, frame: bytes) -> Written:
    dataset = mr_image(pixels, PixelData=encapsulate([frame]))
    dataset["PixelData"].VR = "OB"
    return _saved(folder, dataset, syntax, pixels)


def _borrowed(name: str, syntax: UID | None, folder: Path) -> Written | None:
    """The header of a grey MR image and the pixels of a file of pydicom's, or of the package pydicom-data."""
    path = Path(pydicom.data.__file__).parent / name
    spec = find_spec("data_store")
    if not path.exists() and spec is not None and spec.submodule_search_locations:
        path = Path(spec.submodule_search_locations[0]) / "data" / name
    if not path.exists():
        return None
    lent = dcmread(path)
    frame = next(generate_frames(lent.PixelData, number_of_frames=1))
    bits = {key: lent[key].value for key in ("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation")}
    empty = np.zeros((lent.Rows, lent.Columns), np.uint16)
    field = max(empty.shape) * SPACING_MM
    dataset = mr_image(empty, PixelData=encapsulate([frame]), **bits, PixelSpacing=[field / max(empty.shape)] * 2)
    dataset["PixelData"].VR = "OB"
    written = _saved(folder, dataset, syntax or lent.file_meta.TransferSyntaxUID, empty)
    return Written(written.file)


def _high_throughput(syntax: UID, folder: Path) -> Written:
    return _encapsulated(folder, syntax, SMALL, base64.b64decode(SMALL_HTJ2K))


def _unread(syntax: str, folder: Path) -> Written:
    """A file that names a syntax; what its pixels are does not matter. `save_as` writes only syntaxes that it knows."""
    dataset = mr_image(EIGHT_BITS, PixelData=encapsulate([bytes(64)]))
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    meta = dataset.file_meta
    meta.TransferSyntaxUID = UID(syntax)
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = dataset.SOPClassUID, dataset.SOPInstanceUID
    stream = DicomBytesIO()
    stream.is_little_endian, stream.is_implicit_VR = True, False
    stream.write(EMPTY_PREAMBLE + b"DICM")
    write_file_meta_info(stream, meta)
    write_dataset(stream, dataset)
    (folder / FILE).write_bytes(stream.getvalue())
    return Written(FILE)


def _saved(folder: Path, dataset: Dataset, syntax: UID, truth: np.ndarray) -> Written:
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.save_as(folder / FILE, enforce_file_format=True)
    return Written(FILE, truth.astype(np.float32))
