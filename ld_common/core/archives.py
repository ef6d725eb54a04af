"""What is wrong with a zip archive that others made, before a byte of it is unpacked."""

from __future__ import annotations

import zipfile

COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""`zipfile` unpacks no more of these than an entry declares. LZMA reserves up to 4 GiB for a file of some bytes."""
ENCRYPTED = 0x1


def archive_problem(archive: zipfile.ZipFile, most_bytes: int, most_files: int) -> str | None:
    """Why an archive must not be unpacked, as the rest of a sentence; None where it may be.

    Args:
        archive: opened for reading.
        most_bytes: of all its files together, unpacked.
        most_files: number of its files and folders.
    """
    entries = archive.infolist()
    total = sum(entry.file_size for entry in entries)
    if len(entries) > most_files:
        return f"holds {len(entries)} files, at most {most_files} are read"
    if total > most_bytes:
        return f"unpacks to {total} bytes, at most {most_bytes} are read"
    if len({entry.filename for entry in entries}) < len(entries):
        return "holds a file twice"
    if any(entry.flag_bits & ENCRYPTED for entry in entries):
        return "is encrypted"
    if any(entry.compress_type not in COMPRESSIONS for entry in entries):
        return "uses another compression than deflate"
    return None
