"""What a file is that is not read here, by its first bytes and its name, and how to make it one that is."""

from __future__ import annotations

from pathlib import Path

HEAD_BYTES = 352
BY_NAME = {
    ".mgz": "a FreeSurfer volume (.mgz), which is not read: convert it to NIfTI (mri_convert)",
    ".mgh": "a FreeSurfer volume (.mgh), which is not read: convert it to NIfTI (mri_convert)",
    ".hdr": "a header of a pair (.hdr and .img), which is not read: convert it to one NIfTI file (.nii)",
    ".img": "voxels of a pair (.hdr and .img), which is not read: convert it to one NIfTI file (.nii)",
    ".mnc": "a MINC volume, which is not read: convert it to NIfTI (mnc2nii)",
    ".nrrd": "an NRRD volume, which is not read: convert it to NIfTI",
    ".mha": "a MetaImage volume, which is not read: convert it to NIfTI",
    ".mhd": "a MetaImage volume, which is not read: convert it to NIfTI",
    ".par": "a Philips PAR/REC volume, which is not read: convert it to NIfTI (dcm2niix)",
    ".rec": "a Philips PAR/REC volume, which is not read: convert it to NIfTI (dcm2niix)",
}
BY_CONTENT = {
    b"\xff\xd8\xff": "a JPEG image",
    b"\x89PNG\r\n\x1a\n": "a PNG image",
    b"GIF8": "a GIF image, which is not read: write it as PNG",
    b"BM": "a BMP image, which is not read: write it as PNG",
    b"II*\0": "a TIFF image, which is not read: write it as PNG",
    b"MM\0*": "a TIFF image, which is not read: write it as PNG",
    b"\0\0\0\x0cjP": "a bare JPEG 2000 image, which is not read: write it as DICOM or PNG",
    b"PK\x03\x04": "a zip archive: unpack it",
    b"Rar!": "an archive: unpack it",
    b"7z\xbc\xaf": "an archive: unpack it",
    b"%PDF": "a PDF",
    b"NRRD": BY_NAME[".nrrd"],
}
NIFTI_MAGIC = (b"n+1\0", b"n+2\0")


def foreign_kind(path: Path) -> str:
    """What an unusable file is, as words after "it is"; empty where nothing tells."""
    try:
        with path.open("rb") as stream:
            head = stream.read(HEAD_BYTES)
    except OSError:
        return ""
    if head[:2] == b"\x1f\x8b" and path.suffix.lower() not in BY_NAME:
        return "compressed by gzip: unpack it, or name it .nii.gz if it is a NIfTI volume"
    if is_nifti(head):
        return "a NIfTI volume: name it .nii or .nii.gz"
    return BY_NAME.get(path.suffix.lower(), "") or next(
        (kind for start, kind in BY_CONTENT.items() if head.startswith(start)), ""
    )


def is_nifti(head: bytes) -> bool:
    """Whether a file's first bytes are those of a NIfTI volume in one file."""
    return head[344:348] in NIFTI_MAGIC or head[4:8] in NIFTI_MAGIC


def is_jpeg(path: Path) -> bool:
    """Whether a file's content is JPEG, whatever its name."""
    with path.open("rb") as stream:
        return stream.read(3) == b"\xff\xd8\xff"
