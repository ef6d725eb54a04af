"""Files that are built to hurt: small ones that unpack to gigabytes, and those that a parser climbs into."""

from __future__ import annotations

import functools
import gzip
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable
from functools import partial

import nibabel
import numpy as np
from pydicom import Dataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence as ItemSequence
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from ld_simulations.benchmarks.security.corpus import mr_slice, written
from ld_simulations.benchmarks.security.mutations import PNG_START, png_chunk

ZEROS = 2**30
"""Length of a file of zeros, which takes no space on the disk."""
DEEP = 200_000
Content = bytes | int
"""Bytes, or the length of a file of zeros."""


def hostile() -> dict[str, list[Callable[[], Content]]]:
    """What makes each file, by the name that `readers.READERS` has; some take a second."""
    volumes: list[Callable[[], Content]] = [
        partial(_volume, shape, kind, scaled, up)
        for shape, kind, scaled, up in (
            ((512, 512, 512, 1), np.int16, True, "k"),
            ((512, 512, 512), np.float64, True, "i"),
            ((512, 512, 512), np.float64, False, "j"),
            ((8192, 4096, 4), np.float64, True, "k"),
            ((2, 8192, 8192), np.uint8, True, "i"),
            ((32767, 2, 2048), np.float32, False, "j"),
            ((1, 1, 32767), np.uint8, False, "k"),
        )
    ]
    tables: list[Callable[[], Content]] = [
        lambda: ZEROS,
        lambda: b"patient,date,file,age,sex\n" + b"x" * 60_000_000,
        lambda: b"," * 60_000_000,
        lambda: b"patient,date,file,age,sex\n" + b"," * 60_000_000,
        lambda: b"patient,date,file,age,sex\n" + b"P,2020-01-01,,70,F\n" * 2_000_000,
        lambda: b",".join(b"c%d" % number for number in range(1_000_000)),
        lambda: b'patient,date,file,age,sex\n"' + b'""' * 1_000_000,
        lambda: b"patient,date\nP\0,2020-01-01\n",
        lambda: b"patient,input,age,sex\nP,a\0b,70,F\n",
        lambda: b"patient,input,age,sex\nP," + b"a" * 5000 + b",70,F\n",
        lambda: b"patient,input,age,sex\nP,/dev/zero,70,F\n",
        lambda: b"input,target\n/dev/zero,age=8\n" + b"x,y,z\n" * 100_000,
        lambda: b"\n" * 30_000_000,
    ]
    texts: list[Callable[[], Content]] = [
        lambda: ZEROS,
        lambda: b"[" * DEEP,
        lambda: b'{"a":' * DEEP,
        lambda: b'{"format": ' + b"9" * 1_000_000 + b"}",
        lambda: b'{"format": 1e999}',
        lambda: b'{"format": NaN, "public_key": [], "study": {}}',
        lambda: b'{"format": 1, "format": 1}',
        lambda: b'"' + b"\\u0000" * 5_000_000 + b'"',
        lambda: b"[" + b"0," * 30_000_000 + b"0]",
        lambda: b"{" + b",".join(b'"%d":{}' % number for number in range(1_000_000)) + b"}",
        lambda: b"x" * 100_000_000 + b"\n",
        lambda: b"{}\n" * 5_000_000,
    ]
    yamls: list[Callable[[], Content]] = [
        lambda: ZEROS,
        _laughs,
        lambda: b"a: &a [*a]\n",
        lambda: b"name: &a {b: *a}\n",
        lambda: b"[" * DEEP,
        lambda: b"- " * DEEP,
        lambda: b"name: " + b"9" * 100_000,
        lambda: b"name: 2024-13-45\n",
        lambda: b"name: !!python/object/apply:os.system ['true']\n",
        lambda: b"name: ${oc.env:HOME}\n",
        lambda: b"<<: {name: x}\n<<: [{a: 1}, {b: 2}]\n",
        lambda: b"? [a, b]\n: c\n",
        lambda: b"name: x\n" * 300_000,
        lambda: b"name: '" + b"x" * 5_000_000 + b"'\n",
        lambda: b"attributes: {age: {categories: {" + b"a: b, " * 100_000 + b"}}}\n",
    ]
    archives: list[Callable[[], Content]] = [
        lambda: ZEROS,
        partial(_archive, zipfile.ZIP_DEFLATED),
        partial(_archive, zipfile.ZIP_LZMA),
        partial(_archive, zipfile.ZIP_BZIP2),
        _many_files,
        _understated,
    ]
    return {
        "scan.dcm": [
            lambda: ZEROS,
            lambda: _frame(RLELossless, _rle()),
            partial(
                _frame, JPEG2000Lossless, b"\xff\x4f\xff\x51" + struct.pack(">2H8L", 47, 0, 40000, 30000, *[0] * 6)
            ),
            lambda: _frame(JPEGLSLossless, b"\xff\xd8\xff\xf7\x00\x0b\x08" + struct.pack(">2H", 30000, 40000)),
            lambda: _deflated(bytes(2**27)),
            partial(_nested, 5000),
            _wide,
            lambda: written(_changed(Rows=65535, Columns=65535)),
            lambda: written(_changed(NumberOfFrames=2**31 - 1)),
            lambda: written(_changed(PixelSpacing=["1e-300", "1e300"])),
            lambda: written(_changed(SeriesNumber="9" * 12, PatientAge="999Y", StudyDate="99999999")),
            lambda: written(_changed(SeriesDescription="x" * 2**20)),
        ],
        "scan.nii": [
            lambda: ZEROS,
            *[partial(_plain_header, shape) for shape in ((32767,) * 7, (-1, 2, 3), (0, 0, 0))],
        ],
        "scan.nii.gz": [*volumes, lambda: _zeros() * 32, lambda: gzip.compress(b"") * 100_000],
        "scan.png": [
            lambda: ZEROS,
            partial(_png, 65535, 65535, 0),
            partial(_png, 5792, 5792, 0),
            partial(_png, 5792, 5792, 1),
            lambda: _png_chunks(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2**26)), 1),
            lambda: _png_chunks(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2**19), 9), 5000),
            lambda: _png_chunks(b"iTXt", b"C\0\1\0\0\0" + zlib.compress(bytes(2**26)), 1),
            lambda: _png_chunks(b"iCCP", b"profile\0\0" + zlib.compress(bytes(2**26)), 3),
            lambda: _png_chunks(b"abCd", b"", 1_000_000),
            lambda: _png_chunks(b"tEXt", b"a\0b", 500_000),
        ],
        "adapter.safetensors": [
            lambda: ZEROS,
            lambda: _tensors({}, 100_000_000),
            lambda: _tensors({f"t{number}": _span(0, 4) for number in range(1_000_000)}, 0),
            lambda: _tensors({"a": _span(0, 16), "b": _span(0, 16)}, 0),
            lambda: _tensors({"a": _span(0, 2**60)}, 0),
            lambda: _tensors({"a": {"dtype": "F32", "shape": [2**32, 2**32], "data_offsets": [0, 16]}}, 0),
            lambda: _tensors({"a": {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}}, 0),
            lambda: _tensors({"a": {"dtype": "F99", "shape": [4], "data_offsets": [0, 16]}}, 0),
            lambda: struct.pack("<Q", 2**63) + b"{}",
            lambda: struct.pack("<Q", DEEP) + b"[" * DEEP,
            lambda: (
                struct.pack("<Q", 90)
                + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{}}'.ljust(90)
                + bytes(4)
            ),
        ],
        **dict.fromkeys(("site.ldkit", "bundle.fab", "scans.zip"), archives),
        **dict.fromkeys(("visits.csv", "visits.tsv", "batch.csv", "scans.csv"), tables),
        **dict.fromkeys(
            ("kit.json", "manifest.json", "manifest.sig", "sealed.json", "trust.json", "study.json", "audit.log"), texts
        ),
        **dict.fromkeys(("study.yaml", "modality.yaml", "site.yaml"), yamls),
    }


def _changed(**elements: object) -> Dataset:
    dataset = mr_slice(ExplicitVRLittleEndian)
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    return dataset


def _frame(syntax: UID, frame: bytes) -> bytes:
    """A slice of 64 x 48 pixels whose compressed frame is another one."""
    dataset = mr_slice(ExplicitVRLittleEndian)
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.PixelData = encapsulate([frame])
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    return written(dataset)


def _rle() -> bytes:
    run = bytes([129, 7]) * 5_000_000  # each pair is 128 bytes
    return struct.pack("<16L", 2, 64, 64 + 5_000_000, *[0] * 13) + run


def _deflated(appended: bytes) -> bytes:
    plain = written(mr_slice(ExplicitVRLittleEndian))
    whole = written(mr_slice(DeflatedExplicitVRLittleEndian))
    start = 144 + struct.unpack_from("<I", whole, 140)[0]  # behind the file's meta information
    packer = zlib.compressobj(9, wbits=-15)
    return whole[:start] + packer.compress(plain[start:] + appended) + packer.flush()


def _nested(depth: int) -> bytes:
    """Sequences in sequences, of undefined length, before the pixels."""
    opening = struct.pack("<2H2s2xI", 0x0008, 0x2218, b"SQ", 2**32 - 1) + struct.pack("<2HI", 0xFFFE, 0xE000, 2**32 - 1)
    closing = struct.pack("<2HI", 0xFFFE, 0xE00D, 0) + struct.pack("<2HI", 0xFFFE, 0xE0DD, 0)
    whole = written(mr_slice(ExplicitVRLittleEndian))
    at = whole.index(struct.pack("<2H", 0x0008, 0x2218))
    return whole[:at] + opening * depth + closing * depth


def _wide() -> bytes:
    dataset = mr_slice(ExplicitVRLittleEndian)
    item = Dataset()
    item.CodeValue = "x"
    dataset.AnatomicRegionSequence = ItemSequence([item] * 100_000)
    return written(dataset)


def _header(shape: tuple[int, ...], kind: type) -> bytearray:
    header = nibabel.Nifti1Header()
    header.set_data_dtype(kind)
    header["vox_offset"], header["magic"], header["pixdim"][1:4] = 352, b"n+1", 1
    header["dim"][0], header["dim"][1 : 1 + len(shape)] = len(shape), shape
    return bytearray(header.binaryblock)


@functools.cache
def _zeros() -> bytes:
    """64 MiB of zeros as gzip, some of which in a row are one file."""
    return gzip.compress(bytes(2**26), 1)


def _plain_header(shape: tuple[int, ...]) -> bytes:
    return bytes(_header(shape, np.float64)) + bytes(1000)


def _volume(shape: tuple[int, ...], kind: type, scaled: bool, up: str) -> bytes:
    """A volume of zeros, each 64 MiB of which are some kilobytes of gzip; one of its axes i, j, k points up."""
    header = nibabel.Nifti1Header(bytes(_header(shape, kind)))
    affine = np.eye(4)
    affine[:3, :3] = np.roll(affine[:3, :3], "kij".index(up), axis=1)
    header.set_sform(affine, 1)
    if scaled:
        header.set_slope_inter(0.5, 1)
    size = int(np.prod(shape)) * np.dtype(kind).itemsize
    return gzip.compress(bytes(header.binaryblock) + bytes(4)) + _zeros() * -(-size // 2**26)


def _png(width: int, height: int, interlaced: int) -> bytes:
    head = struct.pack(">2I5B", width, height, 8, 0, 0, 0, interlaced)
    pixels = zlib.compress(bytes(min(height * (width + 1), 2**26)), 9)
    return PNG_START + png_chunk(b"IHDR", head) + png_chunk(b"IDAT", pixels) + png_chunk(b"IEND", b"")


def _png_chunks(kind: bytes, data: bytes, count: int) -> bytes:
    """A picture of 16 x 16 with chunks before its pixels."""
    head = png_chunk(b"IHDR", struct.pack(">2I5B", 16, 16, 8, 0, 0, 0, 0))
    pixels = png_chunk(b"IDAT", zlib.compress(bytes(range(16)) * 17)) + png_chunk(b"IEND", b"")
    return PNG_START + head + png_chunk(kind, data) * count + pixels


def _span(start: int, end: int) -> dict[str, object]:
    return {"dtype": "F32", "shape": [(end - start) // 4], "data_offsets": [start, end]}


def _tensors(header: dict[str, object], padding: int) -> bytes:
    text = json.dumps(header).encode() + b" " * max(0, padding - 2)
    return struct.pack("<Q", len(text)) + text + bytes(16)


def _laughs() -> bytes:
    """Each line is ten of the line before: a billion at the end."""
    lines = [b"a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    for number in range(1, 10):
        lines.append(b"a%d: &a%d [%s]" % (number, number, b", ".join([b"*a%d" % (number - 1)] * 10)))
    return b"\n".join(lines)


def _archive(method: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive, archive.open("pyproject.toml", "w") as entry:
        for _ in range(2**10):
            entry.write(bytes(2**20))
    return buffer.getvalue()


def _many_files() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for number in range(65_000):
            archive.writestr(f"{number}", b"")
    return buffer.getvalue()


def _understated() -> bytes:
    """Its lists say that a file of 256 MiB has 10 bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("pyproject.toml", bytes(2**28))
    return buffer.getvalue().replace(struct.pack("<I", 2**28), struct.pack("<I", 10))
