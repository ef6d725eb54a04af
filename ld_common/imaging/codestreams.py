"""Sizes of compressed DICOM pixels, read from their bytes without decoding them.

A decoder believes the compressed stream, not the header beside it: some megabytes can unpack to gigabytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

RLE_HEADER = struct.Struct("<16L")
JPEG_START, JPEG2000_START, JP2_BOX = b"\xff\xd8", b"\xff\x4f\xff\x51", b"jP  \r\n\x87\n"
FRAME_MARKERS = {0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF, 0xF7}
"""Start of frame of JPEG (ISO 10918-1, table B.1) and of JPEG-LS (ISO 14495-1)."""


def rle_lengths(frame: bytes, limit: int) -> Iterator[int]:
    """Bytes that each segment of an RLE frame unpacks to (DICOM PS3.5, annex G), counted up to some above `limit`.

    Raises:
        ValueError: more than 15 segments, or an offset outside the frame.
    """
    count, *offsets = RLE_HEADER.unpack_from(frame.ljust(RLE_HEADER.size, b"\0"))
    ends = [*offsets[1:count], len(frame)]
    for start, end in zip(offsets[:count], ends, strict=True):
        if not RLE_HEADER.size <= start <= end <= len(frame):
            raise ValueError("RLE segments overlap")
        yield _packed_length(memoryview(frame)[start:end], limit)
    if count > len(offsets):
        raise ValueError("RLE frame of more than 15 segments")


def _packed_length(segment: memoryview, limit: int) -> int:
    at, length, end = 0, 0, len(segment)
    while at < end - 1 and length <= limit + 1:
        control = segment[at]
        if control == 128:
            at += 1
        elif control < 128:
            length, at = length + min(control + 1, end - at - 1), at + control + 2
        else:
            length, at = length + 257 - control, at + 2
    return length


def codestream_shape(frame: bytes) -> tuple[int, int] | None:
    """Height and width that a JPEG, JPEG-LS or JPEG 2000 stream gives itself; None where none is found."""
    if frame.startswith(JPEG_START):
        return _jpeg_shape(frame)
    start = frame.find(JPEG2000_START) if JP2_BOX in frame[:32] else 0
    if frame[start : start + 4] == JPEG2000_START and len(frame) >= start + 24:
        right, low, left, high = struct.unpack_from(">4L", frame, start + 8)
        return low - high, right - left
    return None


def _jpeg_shape(frame: bytes) -> tuple[int, int] | None:
    at = 2
    while at + 9 <= len(frame) and frame[at] == 0xFF:
        marker = frame[at + 1]
        if marker in FRAME_MARKERS:
            height, width = struct.unpack_from(">2H", frame, at + 5)
            return height, width
        at += 1 if marker == 0xFF else 2 + struct.unpack_from(">H", frame, at + 2)[0]
    return None
