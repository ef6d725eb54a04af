"""Small files that would take the machine: what unpacks to more than it says is refused before it is unpacked."""

from __future__ import annotations

import gzip
import io
import resource
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel
import numpy as np
import pytest
from pydicom import dcmread
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit, JPEGLSLossless, RLELossless

from ld_common.core.archives import archive_problem
from ld_common.imaging.codestreams import codestream_shape, rle_lengths
from ld_common.imaging.dicom import read_dicom
from ld_common.imaging.nifti import read_nifti
from ld_common.imaging.rejection import ScanRejected
from tests.conftest import write_mr_slice


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """A gigabyte more than the process has: a bomb that goes off raises MemoryError, which says nothing of a size."""
    used = int(next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmData" in line).split()[1])
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (used * 1024 + 2**30, hard))
    yield
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def compressed(path: Path, frame: bytes, syntax: str) -> Path:
    """An MR slice of 16 x 16 pixels whose compressed frame is `frame`."""
    write_mr_slice(path, np.zeros((16, 16), np.uint16))
    dataset = dcmread(path)
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.PixelData = encapsulate([frame])
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    dataset.save_as(path, enforce_file_format=True)
    return path


def rle(*segments: bytes) -> bytes:
    starts = [64 + sum(map(len, segments[:number])) for number in range(len(segments))]
    return struct.pack("<16L", len(segments), *starts, *[0] * (15 - len(segments))) + b"".join(segments)


@pytest.mark.attack
def test_an_rle_frame_that_unpacks_to_gigabytes_is_refused(tmp_path: Path) -> None:
    run = bytes([129, 7]) * 5_000_000  # 10 MB, each pair 128 bytes
    with pytest.raises(ScanRejected, match="size that its header gives"):
        read_dicom(compressed(tmp_path / "bomb.dcm", rle(run[:5_000_000], run), RLELossless), ["MR"])


def test_an_honest_rle_frame_is_read(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 900, (16, 16)).astype(np.uint16)
    write_mr_slice(tmp_path / "honest.dcm", pixels)
    dataset = dcmread(tmp_path / "honest.dcm")
    dataset.compress(RLELossless)
    dataset.save_as(tmp_path / "honest.dcm", enforce_file_format=True)
    assert (read_dicom(tmp_path / "honest.dcm", ["MR"])[1] == pixels).all()


@pytest.mark.parametrize("frame", [rle(bytes([0])), rle(b""), struct.pack("<16L", 3, 9999, 64, 64, *[0] * 12), b"x"])
@pytest.mark.attack
def test_broken_rle_frames_have_a_length_or_are_refused(frame: bytes) -> None:
    try:
        assert all(length <= 300 for length in rle_lengths(frame, 256))
    except ValueError as error:
        assert "RLE" in str(error)


J2K = b"\xff\x4f\xff\x51" + struct.pack(">2H8L", 47, 0, 40000, 30000, 0, 0, 40000, 30000, 0, 0)
JPEG = b"\xff\xd8\xff\xe0\x00\x04ab\xff\xc0\x00\x0b\x08" + struct.pack(">2H", 30000, 40000) + bytes(20)
JPEG_LS = b"\xff\xd8\xff\xf7\x00\x0b\x08" + struct.pack(">2H", 30000, 40000) + bytes(20)


@pytest.mark.parametrize("frame", [J2K, JPEG, JPEG_LS])
def test_the_size_of_a_stream_is_read_from_its_bytes(frame: bytes) -> None:
    assert codestream_shape(frame) == (30000, 40000)
    assert codestream_shape(frame[:6]) is None


@pytest.mark.attack
def test_a_stream_larger_than_its_header_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ScanRejected, match="size that its header gives"):
        read_dicom(compressed(tmp_path / "bomb.dcm", J2K, JPEG2000Lossless), ["MR"])
    for syntax, frame in ((JPEGBaseline8Bit, JPEG), (JPEGLSLossless, JPEG_LS)):  # without a decoder, the reason is that
        with pytest.raises(ScanRejected):
            read_dicom(compressed(tmp_path / "other.dcm", frame, syntax), ["MR"])


def nifti_header(offset: float = 352.0) -> bytes:
    header = nibabel.Nifti1Header()
    header.set_data_shape((4, 4, 4))
    header["vox_offset"] = offset
    header["magic"] = b"n+1"
    return bytes(header.binaryblock)


@pytest.mark.parametrize("offset", [4e9, 2.0**31, -5.0])
@pytest.mark.attack
def test_voxels_that_begin_far_away_are_refused(tmp_path: Path, offset: float) -> None:
    file = tmp_path / "far.nii.gz"
    file.write_bytes(gzip.compress(nifti_header(offset) + bytes(4 + 64 * 4)))
    with pytest.raises(ScanRejected, match="begin at byte"):
        read_nifti(file)


@pytest.mark.slow
@pytest.mark.parametrize("length", [1_500_000_000, 0, -1, 100])
@pytest.mark.attack
def test_an_extension_that_does_not_fit_is_refused(tmp_path: Path, length: int) -> None:
    file, stated = tmp_path / "extended.nii.gz", struct.pack("<2i", length, 4) + bytes(24)
    content = io.BytesIO()
    with gzip.GzipFile(fileobj=content, mode="wb", compresslevel=1) as stream:
        stream.write(nifti_header(352.0 + 32) + b"\1\0\0\0" + stated)
        for _ in range(1500 if length > 1e9 else 1):
            stream.write(bytes(2**20))
    file.write_bytes(content.getvalue())
    with pytest.raises(ScanRejected, match="does not fit"):
        read_nifti(file)


def test_an_honest_extension_is_skipped(tmp_path: Path) -> None:
    volume = nibabel.Nifti1Image(np.arange(64, dtype=np.float32).reshape(4, 4, 4), np.diag([2.0, 2.0, 2.0, 1.0]))
    volume.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"a protocol"))
    for kind in (nibabel.Nifti1Image, nibabel.Nifti2Image):
        file = tmp_path / f"{kind.__name__}.nii.gz"
        nibabel.save(kind(volume.dataobj, volume.affine, volume.header), file)
        assert (np.asarray(read_nifti(file).dataobj) == np.asarray(volume.dataobj)).all()


def zipped(change: Callable[[zipfile.ZipFile], None], compression: int = zipfile.ZIP_DEFLATED) -> zipfile.ZipFile:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", compression) as archive:
        change(archive)
    return zipfile.ZipFile(content)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.attack
def test_what_no_archive_may_hold() -> None:
    def one(archive: zipfile.ZipFile) -> None:
        archive.writestr("a", bytes(1000))

    def twice(archive: zipfile.ZipFile) -> None:
        one(archive)
        one(archive)

    def many(archive: zipfile.ZipFile) -> None:
        for number in range(11):
            archive.writestr(str(number), b"")

    assert archive_problem(zipped(one), 1000, 10) is None
    problems = {
        "unpacks to 1000 bytes": archive_problem(zipped(one), 999, 10),
        "a file twice": archive_problem(zipped(twice), 10_000, 10),
        "holds 11 files": archive_problem(zipped(many), 1000, 10),
    }
    for method in (zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2):
        assert "another compression" in str(archive_problem(zipped(one, method), 1000, 10))
    assert all(problem is not None and words in problem for words, problem in problems.items())
