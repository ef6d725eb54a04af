"""Reads the file meta information at the start of a DICOM file, of which one value is needed: the transfer syntax.

It is read of every file, and pydicom's own reader takes a hundred times as long. Where the elements do not lie as they
should, the answer is that nothing is known, and pydicom is asked.
"""

from __future__ import annotations

from dataclasses import dataclass

from pydicom.uid import (
    AllTransferSyntaxes,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

HEAD_BYTES = 2**12
"""The start of a file, in which the file meta information usually ends."""
PREFIX_AT, META_AT = 128, 132
LONG_VRS = (b"OB", b"OW", b"UN", b"UT", b"SQ")
SHORT_VRS = (b"UL", b"UI", b"SH", b"AE", b"US", b"LO", b"CS", b"DA", b"TM")
PLAIN = frozenset(
    (
        *(str(ImplicitVRLittleEndian), str(ExplicitVRLittleEndian)),
        *(str(syntax) for syntax in AllTransferSyntaxes if syntax.is_encapsulated),
    )
)
"""Transfer syntaxes whose headers are written in little endian and not compressed."""


@dataclass(frozen=True)
class MetaInformation:
    """What a file says before its data set begins."""

    syntax: str
    """Transfer Syntax UID."""
    end: int
    """Where the data set begins, in bytes."""

    @property
    def is_deflated(self) -> bool:
        """Whether the data set is compressed as a whole."""
        return self.syntax == DeflatedExplicitVRLittleEndian

    @property
    def is_implicit(self) -> bool:
        """Whether the elements of the data set do not say their kind."""
        return self.syntax == ImplicitVRLittleEndian


def read_meta(head: bytes) -> MetaInformation | None:
    """The file meta information in the first bytes of a file; None where it is longer, damaged or absent."""
    at, syntax = META_AT if head[PREFIX_AT:META_AT] == b"DICM" else len(head), ""
    while at + 12 <= len(head):
        if head[at : at + 2] != b"\x02\0":
            return MetaInformation(syntax, at) if syntax else None
        element, kind = int.from_bytes(head[at + 2 : at + 4], "little"), head[at + 4 : at + 6]
        long = kind in LONG_VRS
        if not long and kind not in SHORT_VRS:
            return None
        start = at + (12 if long else 8)
        end = start + int.from_bytes(head[at + 8 : start] if long else head[at + 6 : start], "little")
        if element == 0x10:
            syntax = head[start:end].strip(b"\0 ").decode("latin-1")
        at = end
    return None
