"""A scan that cannot be used is one clear line, and the rest of the batch is drawn."""

from __future__ import annotations

import csv
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from ld_common.imaging.modality import Modality
from ld_common.imaging.rejection import ScanRejected
from ld_common.imaging.scan_reader import decode_scan
from tests.conftest import write_mr_slice
from tests.support.releases import SOURCE, GenerateRunner

PIXELS = np.random.default_rng(0).integers(0, 900, (64, 60)).astype(np.uint16)
VOXELS = np.repeat(PIXELS.astype(np.float32)[..., None], 3, -1)


def nifti(path: Path, voxels: np.ndarray = VOXELS, size: float = 3.0, unit: str = "mm") -> None:
    volume = nibabel.Nifti1Image(voxels, np.diag([size, size, size, 1.0]))
    volume.header.set_xyzt_units(unit)
    path.write_bytes(volume.to_bytes())


def png(path: Path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels).save(path, format="PNG")


def png_claiming(path: Path, side: int) -> None:
    """A small PNG whose header says that it is a square of `side` pixels."""
    png(path, np.zeros((16, 16), np.uint8))
    content = path.read_bytes()
    header = b"IHDR" + struct.pack(">II", side, side) + content[24:29]
    path.write_bytes(content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:])


def folder_of(path: Path, name: str) -> None:
    path.mkdir()
    (path / name).write_text("not a scan")


def cut(path: Path, share: float) -> None:
    whole = write_mr_slice(path, PIXELS).read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "ct.dcm": (lambda path: write_mr_slice(path, PIXELS, Modality="CT"), "Modality is not MR"),
    "colour.png": (lambda path: png(path, np.full((64, 64, 3), (200, 90, 90), np.uint8)), "mode RGB: 8 or 16 bit grey"),
    "colour.dcm": (lambda path: write_mr_slice(path, PIXELS, PhotometricInterpretation="RGB"), "not a grey image"),
    "time.nii": (lambda path: nifti(path, np.stack([VOXELS] * 2, -1)), "one volume is expected"),
    "empty.dcm": (lambda path: path.touch(), "the file is empty"),
    "empty.nii.gz": (lambda path: path.touch(), "the file is empty"),
    "empty.png": (lambda path: path.touch(), "the file is empty"),
    "tiny.dcm": (lambda path: write_mr_slice(path, PIXELS[:4, :4].copy()), "4 x 4 pixels, at least 16 x 16"),
    "tiny.png": (lambda path: png(path, np.eye(4, dtype=np.uint8)), "4 x 4 pixels, at least 16 x 16"),
    "line.nii": (lambda path: nifti(path, VOXELS[:2]), "60 x 2 pixels"),
    "huge.dcm": (lambda path: write_mr_slice(path, PIXELS, Rows=9000, Columns=9000), "9000 x 9000 pixels"),
    "huge.png": (lambda path: png_claiming(path, 6000), "6000 x 6000 pixels"),
    "bomb.png": (lambda path: png_claiming(path, 14000), "more pixels than"),
    "nan.nii": (lambda path: nifti(path, VOXELS * np.nan), "finite number"),
    "flat.dcm": (lambda path: write_mr_slice(path, np.full((64, 64), 7, np.uint16)), "flat.dcm': the image has no"),
    "metres.nii": (lambda path: nifti(path, size=0.003), "0.003 mm apart"),
    "metres.dcm": (lambda path: write_mr_slice(path, PIXELS, PixelSpacing=[0.003, 0.003]), "0.003 mm apart"),
    "coronal.dcm": (
        lambda path: write_mr_slice(path, PIXELS, ImageOrientationPatient=[1, 0, 0, 0, 0, -1]),
        "not axial",
    ),
    "cut.dcm": (lambda path: cut(path, 0.6), "damaged or not what its name says"),
    "head.dcm": (lambda path: cut(path, 0.03), "without pixels"),
    "text.dcm": (lambda path: path.write_text("hello"), "not a DICOM file"),
    "png.nii.gz": (lambda path: png(path, PIXELS.astype(np.uint8)), "not a NIfTI volume, but a PNG image"),
    "volume.png": (nifti, "damaged or not what its name says"),
    "words": (lambda path: folder_of(path, "notes.txt"), "holds no DICOM image"),
    "absent.nii.gz": (lambda path: None, "no regular file"),
    "absent": (lambda path: None, "no regular file"),
    "n" * 300: (lambda path: None, "damaged or not what its name says"),
}


def test_each_is_one_line_of_a_batch_that_goes_on(
    run: GenerateRunner,
    tmp_path: Path,
) -> None:
    for name, (make, _) in BAD.items():
        make(tmp_path / name)
    write_mr_slice(tmp_path / "good.dcm", PIXELS)
    nifti(tmp_path / "good.nii", unit="micron", size=3000)
    rows = [*((name, "age=80") for name in BAD), ("good.dcm", "weight=80")]
    rows += [("good.dcm", "age=80"), ("good.nii", "age=80")]
    with (tmp_path / "rows.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("input", "target"), *rows])
    code, printed = run("batch", tmp_path / "rows.csv", "--source", SOURCE, "--out", tmp_path / "out")
    assert (code, f"drew 2 of {len(rows)} rows" in printed) == (1, True)
    outcomes = [row["outcome"] for row in csv.DictReader((tmp_path / "out" / "batch.csv").read_text().splitlines())]
    for (name, (_, words)), outcome in zip(BAD.items(), outcomes, strict=False):
        assert words in outcome, name
        assert name in outcome
        assert "\n" not in outcome
        assert "Traceback" not in outcome
    assert "unknown attribute 'weight'" in outcomes[-3]
    assert outcomes[-2:] == ["drawn", "drawn"]


def test_an_input_is_refused_with_one_line_on_its_own(
    run: GenerateRunner,
    tmp_path: Path,
) -> None:
    options = ["--target", "age=80", "--source", SOURCE, "--out", tmp_path / "out"]
    code, printed = run("edit", "--input", tmp_path / "absent.dcm", *options)
    assert (code, printed.count("\n"), "error: cannot use '" in printed) == (2, 2, True)


@contextmanager
def forbidden(path: Path) -> Iterator[None]:
    """Nobody may read what lies here, not even a test that root runs."""
    mode, root = path.stat().st_mode, os.geteuid() == 0
    path.chmod(0)
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        path.chmod(mode)


def test_what_may_not_be_read_says_so(brain_mri: Modality, tmp_path: Path) -> None:
    write_mr_slice(tmp_path / "closed" / "series" / "a.dcm", PIXELS)
    nifti(tmp_path / "closed" / "a.nii")
    with forbidden(tmp_path / "closed"):
        for name in ("a.nii", "series", "series/a.dcm"):
            with pytest.raises(ScanRejected, match="permission"):
                decode_scan(tmp_path / "closed" / name, brain_mri)
