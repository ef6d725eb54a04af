"""Pixels of a DICOM image as real values: decoders, rescale, padding, MONOCHROME1."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
from pydicom import Dataset
from pydicom.encaps import generate_frames
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_modality_lut
from pydicom.pixels.utils import pixel_array
from pydicom.uid import JPEGExtended12Bit, RLELossless

from ld_common.imaging.codestreams import codestream_shape, rle_lengths
from ld_common.imaging.dicom_elements import decimal, items, texts, whole
from ld_common.imaging.rejection import Rejection, ScanRejected

GDCM = "gdcm"
NEWER_SYNTAXES = {
    "1.2.840.10008.1.2.4.110": "JPEG XL Lossless",
    "1.2.840.10008.1.2.4.111": "JPEG XL JPEG Recompression",
    "1.2.840.10008.1.2.4.112": "JPEG XL",
    "1.2.840.10008.1.2.8.1": "Deflated Image Frame Compression",
}
"""Names of transfer syntaxes that pydicom does not know."""


def check_decoder(path: Path, dataset: Dataset) -> None:
    """Raise `ScanRejected`, with the way out, where no decoder here reads a file's transfer syntax."""
    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError as error:
        name = NEWER_SYNTAXES.get(syntax, syntax.name)
        detail = f"no decoder exists for '{name}': have it sent uncompressed"
        raise ScanRejected(path, Rejection.UNSUPPORTED, detail) from error
    if not decoder.is_available:
        remedy = "; or ".join(decoder.missing_dependencies)
        raise ScanRejected(path, Rejection.NO_DECODER, f"'{syntax.name}' needs a decoder: {remedy}")
    if syntax == JPEGExtended12Bit and whole(dataset, "BitsStored") != 8:
        detail = "no decoder exists for JPEG of 12 bits with loss: have it sent uncompressed or as JPEG Lossless"
        raise ScanRejected(path, Rejection.UNSUPPORTED, detail)


def stored_pixels(dataset: Dataset, frame: int | None = None) -> np.ndarray:
    """Decoded values of a file or of one frame, as `pydicom` gives them. GDCM decodes what nothing else here can."""
    plugins = get_decoder(dataset.file_meta.TransferSyntaxUID).available_plugins
    tried = [name for name in plugins if name != GDCM] or [*plugins, ""][:1]
    for name in tried[:-1]:
        with contextlib.suppress(RuntimeError):  # the next one may read it
            return np.asarray(pixel_array(dataset, index=frame, decoding_plugin=name))
    return np.asarray(pixel_array(dataset, index=frame, decoding_plugin=tried[-1]))


def check_encoded_size(path: Path, dataset: Dataset) -> None:
    """Refuse compressed pixels that unpack to another size than the header gives, before a decoder reserves memory."""
    syntax, shape = dataset.file_meta.TransferSyntaxUID, (int(dataset.Rows), int(dataset.Columns))
    if not syntax.is_encapsulated:
        return
    for frame in generate_frames(dataset.PixelData, number_of_frames=int(dataset.get("NumberOfFrames") or 1)):
        if syntax == RLELossless:
            length = shape[0] * shape[1]
            fits = all(size <= length + 1 for size in rle_lengths(frame, length))  # an odd length is padded
        else:
            found = codestream_shape(frame)
            fits = found is None or found == shape  # a stream without a size fails in its decoder
        if not fits:
            detail = "its compressed pixels do not have the size that its header gives"
            raise ScanRejected(path, Rejection.UNREADABLE, detail)


def real_values(path: Path, dataset: Dataset, stored: np.ndarray) -> np.ndarray:
    """Real values of one image; `dataset` has the elements of its frame."""
    padding = _padding(dataset, stored)
    values = np.asarray(_rescaled(path, dataset, stored), np.float32)
    if texts(dataset, "PhotometricInterpretation") == ["MONOCHROME1"]:
        signed, bits = bool(dataset.PixelRepresentation), int(dataset.BitsStored)
        lowest = -(2 ** (bits - 1)) if signed else 0
        ends = np.array([[lowest, lowest + 2**bits - 1]], np.int32)
        values = np.float32(np.asarray(_rescaled(path, dataset, ends), np.float64).sum()) - values
    if not np.isfinite(values).all():
        raise ScanRejected(path, Rejection.UNREADABLE, "it holds values that are not finite")
    # a slice of nothing but padding, beside a head, becomes the lowest value of its volume
    values[padding] = np.nan if padding.all() else values[~padding].min()
    return values


def _rescaled(path: Path, dataset: Dataset, stored: np.ndarray) -> np.ndarray:
    """Stored values after the modality LUT, or after slope and intercept, which are 1 and 0 where they are empty."""
    if items(dataset, "ModalityLUTSequence"):
        return np.asarray(apply_modality_lut(stored, dataset))
    slope, intercept = decimal(dataset, "RescaleSlope"), decimal(dataset, "RescaleIntercept")
    for keyword, number in (("RescaleSlope", slope), ("RescaleIntercept", intercept)):
        if number is None and texts(dataset, keyword):
            raise ScanRejected(path, Rejection.UNREADABLE, f"its {keyword} is no number")
    if slope is None and intercept is None:
        return stored
    return stored.astype(np.float64) * (1.0 if slope is None else slope) + (intercept or 0.0)


def _padding(dataset: Dataset, stored: np.ndarray) -> np.ndarray:
    value, limit = (_stored_value(dataset, name) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit"))
    if value is None:
        return np.zeros(stored.shape, bool)
    ends = sorted((value, value if limit is None else limit))
    return (stored >= ends[0]) & (stored <= ends[1])


def _stored_value(dataset: Dataset, keyword: str) -> int | None:
    """A pixel value of the header in the pixels' own type: some write -2000 as the unsigned 63536."""
    value = whole(dataset, keyword)
    bits = int(dataset.BitsAllocated)
    if value is not None and dataset.PixelRepresentation and value >= 2 ** (bits - 1):
        return value - 2**bits
    if value is not None and not dataset.PixelRepresentation and value < 0:
        return value + 2**bits
    return value
