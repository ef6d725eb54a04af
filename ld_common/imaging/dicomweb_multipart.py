"""Multipart answers of a PACS, taken apart as they arrive and within limits."""

from __future__ import annotations

import email.message
from collections.abc import Iterator

import requests

from ld_common.imaging.dicomweb_errors import PacsError, PacsSilent

MAX_PART_HEADER = 16 * 2**10


def split_parts(chunks: Iterator[bytes], boundary: bytes) -> Iterator[bytes | None]:
    """The contents of a multipart body in pieces, and None at the end of each part.

    Args:
        chunks: the body as it arrives.
        boundary: as its content type gives it.

    Raises:
        PacsError: it ends before its last boundary, or is no multipart body.
    """
    delimiter = b"\r\n--" + boundary
    buffer = bytearray(b"\r\n")  # so that the first boundary is like all others
    inside, preamble = False, 0

    def more() -> None:
        chunk = next(chunks, b"")
        if not chunk:
            raise PacsSilent("the answer ends in its middle")
        buffer.extend(chunk)

    while True:
        place = buffer.find(delimiter)
        if place < 0:
            kept = len(delimiter) - 1
            if inside and len(buffer) > kept:
                yield bytes(buffer[:-kept])
            preamble += 0 if inside else len(buffer[:-kept])
            if preamble > MAX_PART_HEADER:
                raise PacsError("the answer does not begin with a part")
            del buffer[:-kept]
            more()
            continue
        if inside:
            yield bytes(buffer[:place])
            yield None
        del buffer[: place + len(delimiter)]
        while len(buffer) < 2:
            more()
        if buffer.startswith(b"--"):
            return
        while b"\r\n\r\n" not in buffer[:MAX_PART_HEADER]:
            if len(buffer) >= MAX_PART_HEADER:
                raise PacsError("a part of the answer has no header")
            more()
        del buffer[: buffer.find(b"\r\n\r\n") + 4]
        inside = True


def single_part(chunks: Iterator[bytes], response: requests.Response, host: str) -> Iterator[bytes | None]:
    """The body as one part; raises `PacsError` where it is shorter than announced."""
    size = 0
    for chunk in chunks:
        size += len(chunk)
        yield chunk
    announced = response.headers.get("Content-Length", str(size))
    if "Content-Encoding" not in response.headers and announced != str(size):
        raise PacsSilent(f"{host} ends an answer in its middle")
    yield None


def boundary_of(response: requests.Response, host: str) -> bytes | None:
    """The boundary of a multipart answer; None for a single DICOM object; raises `PacsError` for all else."""
    message = email.message.Message()
    message["Content-Type"] = response.headers.get("Content-Type", "").replace("\r", " ").replace("\n", " ")
    kind = message.get_content_type()
    if kind == "application/dicom":
        return None
    boundary = str(message.get_boundary("") or "")
    if kind != "multipart/related" or not 0 < len(boundary) <= 200:
        response.close()
        raise PacsError(f"{host} answers with {kind} in place of DICOM: is it the address of its DICOMweb service?")
    return boundary.encode("latin-1", "replace")
