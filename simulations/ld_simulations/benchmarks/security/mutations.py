"""Damage to a file's bytes, the same for the same generator."""

from __future__ import annotations

import gzip
import io
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence

import numpy as np

EXTREMES = (0, 1, 2**7, 2**8 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1, 2**63 - 1, 2**64 - 1)
HEAD = 1024
"""Most length fields stand in the first bytes; half of the edits are made there."""
WORDS = (
    *(b"", b"\0", b"\xff\xff\xff\xff", b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"-1", b"null", b"true", b'"'),
    *(b"[" * 2000, b"{" * 500, b'{"a":' * 2000, b"\n", b",", b";\t,", b"'", b"&a ", b"*a ", b"${x}", b"../../x"),
    *(b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\xc3\x28", b"2024-13-45", b"0x", b"!!python/object:os.system ", b"%s%n"),
)
PNG_START = b"\x89PNG\r\n\x1a\n"


def mutate(content: bytes, others: Sequence[bytes], rng: np.random.Generator) -> bytes:
    """Damage a file once or several times; about half of the compressed ones are damaged inside and packed again.

    Args:
        content: the whole file.
        others: files of the same kind, of which parts are spliced in.
        rng: decides all.
    """
    for start, inside in ((b"\x1f\x8b", _inside_gzip), (b"PK\3\4", _inside_zip), (PNG_START, _inside_png)):
        if content.startswith(start) and rng.random() < 0.5:
            return inside(content, others, rng)
    return _damage(content, others, rng)


def _damage(content: bytes, others: Sequence[bytes], rng: np.random.Generator) -> bytes:
    for _ in range(1 + rng.geometric(0.5)):
        content = MUTATIONS[rng.integers(len(MUTATIONS))](content, others, rng)
    return content


def _place(content: bytes, rng: np.random.Generator) -> int:
    length = len(content) if rng.random() < 0.5 else min(len(content), HEAD)
    return int(rng.integers(length + 1))


def _flip(content: bytes, others: Sequence[bytes], rng: np.random.Generator) -> bytes:
    changed = bytearray(content)
    for _ in range(int(rng.integers(1, 17)) if changed else 0):
        changed[min(_place(content, rng), len(changed) - 1)] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def _truncate(content: bytes, others: Sequence[bytes], rng: np.random.Generator) -> bytes:
    return content[: _place(content, rng)]


def _edit_length(content: bytes, others: Sequence[bytes], rng: np.random.Generator) -> bytes:
    at, width = _place(content, rng), int(rng.choice([1, 2, 4, 8]))
    value = int(EXTREMES[rng.integers(len(EXTREMES))]) % 256**width
    order = "little" if rng.random() < 0.7 else "big"
    return content[:at] + value.to_bytes(width, order) + content[at + width :]


def _repeat(content: bytes, others: Sequence[bytes], rng: np.random.Generator) -> bytes:
    start, end = sorted((_place(content, rng), _place(content, rng)))
    return content[:end] + content[start:end] * int(rng.integers(1, 5)) + content[end:]


def _remove(content: bytes, others: Sequence[bytes], rng: np.random.Generator) -> bytes:
    at = _place(content, rng)
    return content[:at] + content[at + int(rng.integers(1, 65)) :]


def _splice(content: bytes, others: Sequence[bytes], rng: np.random.Generator) -> bytes:
    other = others[int(rng.integers(len(others)))]
    return content[: _place(content, rng)] + other[_place(other, rng) :]


def _insert(content: bytes, others: Sequence[bytes], rng: np.random.Generator) -> bytes:
    at, word = _place(content, rng), WORDS[rng.integers(len(WORDS))]
    return content[:at] + word + content[at + int(rng.integers(9)) :]


MUTATIONS: tuple[Callable[[bytes, Sequence[bytes], np.random.Generator], bytes], ...] = (
    *(_flip, _truncate, _edit_length, _edit_length, _repeat, _remove, _splice, _insert),
)


def _inside_gzip(content: bytes, others: Sequence[bytes], rng: np.random.Generator) -> bytes:
    unpacked = [gzip.decompress(other) for other in others if other.startswith(b"\x1f\x8b")]
    return gzip.compress(_damage(gzip.decompress(content), unpacked, rng), 1, mtime=0)


def _inside_zip(content: bytes, others: Sequence[bytes], rng: np.random.Generator) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = [(entry, archive.read(entry)) for entry in archive.infolist()]
    which = int(rng.integers(len(entries)))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for number, (entry, unpacked) in enumerate(entries):
            damaged = _damage(unpacked, [unpacked], rng) if number == which else unpacked
            archive.writestr(zipfile.ZipInfo(entry.filename), damaged)
    return buffer.getvalue()


def _inside_png(content: bytes, others: Sequence[bytes], rng: np.random.Generator) -> bytes:
    """Damage one chunk, and state its new length and checksum."""
    chunks, at = [], len(PNG_START)
    while at < len(content):
        (length,) = struct.unpack_from(">I", content, at)
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
        at += 12 + length
    which = int(rng.integers(len(chunks)))
    kind, data = chunks[which]
    if kind in (b"IDAT", b"zTXt", b"iCCP") and rng.random() < 0.5:
        start = 0 if kind == b"IDAT" else data.index(b"\0") + 2
        data = data[:start] + zlib.compress(_damage(zlib.decompress(data[start:]), [data], rng))
    else:
        data = _damage(data, [data], rng)
    chunks[which] = kind, data
    return PNG_START + b"".join(png_chunk(kind, data) for kind, data in chunks)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG with its length and checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
