"""Scans in the forms that hospitals and archives have them: what each says is read, and nothing is chosen by chance."""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
from nibabel.nifti1 import Nifti1Image
from PIL import Image
from pydicom import Dataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import EnhancedMRImageStorage, ImplicitVRLittleEndian

from ld_common.imaging.dicom import read_dicom, read_headers
from ld_common.imaging.modality import ImageConfig, Modality
from ld_common.imaging.rejection import Rejection, ScanRejected
from ld_common.imaging.scan_reader import decode_scan
from ld_common.imaging.series import grouped, ordered
from ld_common.imaging.volume import decode_volume
from tests.conftest import write_mr_slice

MR = ["MR"]
GREY = np.arange(80, dtype=np.uint16).reshape(8, 10)


def head(shape: tuple[int, int, int] = (20, 24, 18)) -> np.ndarray:
    """A volume whose values tell where a voxel lies, to the right, to the front and up."""
    right, front, up = np.meshgrid(*(np.arange(length) for length in shape), indexing="ij")
    return (right + 30 * front + 1000 * up + 1).astype(np.uint16)


PLANES = {
    "axial": ([1, 0, 0, 0, 1, 0], 2),
    "coronal": ([1, 0, 0, 0, 0, -1], 1),
    "sagittal": ([0, 1, 0, 0, 0, -1], 0),
}


def write_plane(folder: Path, plane: str, spacing: float = 2.0, **elements: Any) -> Path:
    """The head as a series that was acquired in a plane; its voxels are cubes."""
    volume, (cosines, axis) = head(), PLANES[plane]
    for number in range(volume.shape[axis]):
        image = np.take(volume, number, axis)
        # DICOM counts to the left and to the back; rows of images run along the second cosine
        if plane == "axial":
            pixels, origin = image[::-1, ::-1].T, [-19.0 * spacing, -23.0 * spacing, number * spacing]
        elif plane == "coronal":
            pixels, origin = image[::-1, ::-1].T, [-19.0 * spacing, -number * spacing, 17.0 * spacing]
        else:
            pixels, origin = image[::-1, ::-1].T, [-number * spacing, -23.0 * spacing, 17.0 * spacing]
        place = {"ImageOrientationPatient": cosines, "ImagePositionPatient": origin}
        place |= {"PixelSpacing": [spacing, spacing], "InstanceNumber": number}
        write_mr_slice(folder / f"{number:02}.dcm", np.ascontiguousarray(pixels), **(place | elements))
    return folder


def config(plane: str, **options: Any) -> ImageConfig:
    return ImageConfig(plane=plane, slice_position=0.5, **options)


@pytest.mark.slow
@pytest.mark.parametrize("wanted", PLANES)
@pytest.mark.parametrize("acquired", PLANES)
def test_a_slice_of_any_plane_is_cut_from_any_acquisition(
    acquired: str, wanted: str, brain_mri: Modality, tmp_path: Path
) -> None:
    modality = replace(brain_mri, image=config(wanted))
    folder = write_plane(tmp_path / acquired, acquired)
    nibabel.save(Nifti1Image(head(), np.diag([2.0, 2, 2, 1])), tmp_path / "a.nii.gz")
    scan = decode_scan(folder, modality)
    of_nifti = decode_scan(tmp_path / "a.nii.gz", modality)
    np.testing.assert_array_equal(scan.pixels, of_nifti.pixels)
    assert scan.orientation == {"axial": ("L", "P"), "coronal": ("L", "F"), "sagittal": ("P", "F")}[wanted]
    first, second = scan.pixels[0, 0], scan.pixels[0, 1]
    assert second - first == {"axial": -1, "coronal": -1, "sagittal": -30}[wanted]  # to the left, or to the back
    assert scan.pixels[1, 0] - first == {"axial": -30, "coronal": -1000, "sagittal": -1000}[wanted]
    files = tuple(sorted(folder.iterdir()))
    np.testing.assert_array_equal(decode_scan(files, modality).pixels, scan.pixels)


def test_a_volume_of_slices_that_are_not_axial_is_drawn_for_axial_releases_alone(
    brain_mri: Modality, tmp_path: Path
) -> None:
    folder = write_plane(tmp_path / "sagittal", "sagittal")
    assert decode_volume(folder, brain_mri).upright.shape == (18, 24, 20)
    with pytest.raises(ScanRejected, match="trained on sagittal slices"):
        decode_volume(folder, replace(brain_mri, image=config("sagittal")))


@pytest.mark.parametrize(("bottom", "top"), [(0, 72), (20, 72), (40, 72), (90, 126)])
def test_in_a_stack_with_neck_or_air_the_middle_of_the_head_counts(
    bottom: int, top: int, brain_mri: Modality, tmp_path: Path
) -> None:
    voxels = np.zeros((10, 12, 128), np.float32)
    voxels[2:8, 2:10, bottom:top] = 100 + np.arange(bottom, top)
    nibabel.save(Nifti1Image(voxels, np.diag([2.0, 2, 2, 1])), tmp_path / "a.nii")
    scan = decode_scan(tmp_path / "a.nii", replace(brain_mri, image=config("axial", part_mm=100.0)))
    lowest = max(bottom, top - 1 - 50)  # the head is 100 mm, 50 slices, long
    assert scan.affine is not None
    assert scan.affine[2, 3] == 2 * np.floor((lowest + top - 1) / 2 + 0.5)
    whole = decode_scan(tmp_path / "a.nii", replace(brain_mri, image=config("axial")))
    assert whole.affine is not None
    assert whole.affine[2, 3] == 2 * 64


def put(path: Path, **elements: bytes) -> Path:
    """Write raw values into a DICOM file, whatever their VR allows."""
    dataset = pydicom.dcmread(path)
    for keyword, value in elements.items():
        number = pydicom.datadict.tag_for_keyword(keyword)
        assert number is not None
        tag = pydicom.tag.Tag(number)
        vr = pydicom.datadict.dictionary_VR(tag)
        dataset._dict[tag] = pydicom.dataelem.RawDataElement(tag, vr, len(value), value, 0, False, True)
    dataset.save_as(path)
    return path


@pytest.mark.parametrize(
    ("elements", "found"),
    [
        ({"PixelSpacing": b"2,0\\1,5 "}, {"spacing_mm": (2.0, 1.5)}),
        ({"SeriesNumber": b"A1"}, {"series_number": None}),
        ({"SeriesNumber": b"12"}, {"series_number": 12}),
        ({"EchoTime": b"2,98"}, {"echo_ms": 2.98}),
        ({"EchoTime": b"short "}, {"echo_ms": None}),
        ({"PatientAge": b"old "}, {"age_years": None}),
        ({"ImageOrientationPatient": b"1\\0\\0\\0\\x\\0"}, {"affine": None}),
        ({"StudyDate": b"", "AcquisitionDate": b"20190304"}, {"year": 2019}),
        ({"StudyDate": b"", "SeriesDate": b"2018.07.09"}, {"year": 2018}),
        ({"StudyDate": b"", "AcquisitionDateTime": b"20170203101500.5"}, {"year": 2017}),
    ],
)
def test_a_wrong_element_costs_that_element(elements: dict[str, bytes], found: dict[str, Any], tmp_path: Path) -> None:
    (header,) = read_headers(put(write_mr_slice(tmp_path / "a.dcm", GREY), **elements), MR)
    for name, value in found.items():
        if name == "year":
            assert header.study_date is not None
            assert header.study_date.year == value
        else:
            assert getattr(header, name) == value


@pytest.mark.parametrize(
    ("elements", "low", "high"),
    [
        ({"RescaleSlope": b"", "RescaleIntercept": b""}, 0, 79),
        ({"RescaleSlope": b"2,5 ", "RescaleIntercept": b""}, 0, 197.5),
        ({"RescaleSlope": b"1 ", "RescaleIntercept": b"-10 "}, -10, 69),
    ],
)
def test_empty_and_comma_rescale(elements: dict[str, bytes], low: float, high: float, tmp_path: Path) -> None:
    _, pixels = read_dicom(put(write_mr_slice(tmp_path / "a.dcm", GREY), **elements), MR)
    assert (pixels.min(), pixels.max()) == (low, high)
    with pytest.raises(ScanRejected, match="RescaleSlope is no number"):
        read_dicom(put(write_mr_slice(tmp_path / "b.dcm", GREY), RescaleSlope=b"steep "), MR)


@pytest.mark.parametrize("implicit", [False, True])
@pytest.mark.parametrize("padding", [-2000, 63536])
def test_padding_is_compared_in_the_pixels_own_type(padding: int, implicit: bool, tmp_path: Path) -> None:
    pixels = np.array([[-2000, -2000, 5], [100, 200, 300]], np.int16)
    path = write_mr_slice(tmp_path / "a.dcm", pixels)
    dataset = pydicom.dcmread(path)
    dataset.add_new("PixelPaddingValue", "US" if padding > 0 else "SS", padding)
    if implicit:
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    dataset.save_as(path, implicit_vr=implicit, little_endian=True)
    assert read_dicom(path, MR)[1].tolist() == [[5, 5, 5], [100, 200, 300]]


@pytest.mark.parametrize("preamble", [None, bytes(128)])
@pytest.mark.parametrize("implicit", [True, False])
def test_a_data_set_without_preamble_or_meta_information_is_read(
    implicit: bool, preamble: bytes | None, tmp_path: Path
) -> None:
    whole = write_mr_slice(tmp_path / "a.dcm", GREY)
    stream = io.BytesIO()
    dataset = pydicom.dcmread(whole)
    del dataset.file_meta
    dataset.preamble = preamble
    pydicom.dcmwrite(stream, dataset, implicit_vr=implicit, little_endian=True, enforce_file_format=False)
    (tmp_path / "bare.dcm").write_bytes(stream.getvalue())
    np.testing.assert_array_equal(read_dicom(tmp_path / "bare.dcm", MR)[1], GREY)
    (tmp_path / "text.dcm").write_bytes(b"\x08\x00 is no DICOM" * 20)
    with pytest.raises(ScanRejected) as caught:
        read_headers(tmp_path / "text.dcm", MR)
    assert caught.value.rejection in (Rejection.NOT_AN_IMAGE, Rejection.UNREADABLE)


def enhanced(path: Path, positions: Sequence[float], echoes: Sequence[float] | None = None) -> Path:
    """An Enhanced MR image with a frame at each height, whose values tell it."""
    dataset = pydicom.dcmread(write_mr_slice(path, GREY))
    for name in ("ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing", "SeriesNumber"):
        del dataset[name]
    frames = []
    for number, height in enumerate(positions):
        position, echo, frame = Dataset(), Dataset(), Dataset()
        position.ImagePositionPatient = [0, 0, height]
        frame.PlanePositionSequence = DicomSequence([position])
        if echoes is not None:
            echo.EffectiveEchoTime = echoes[number]
            frame.MREchoSequence = DicomSequence([echo])
        value = Dataset()
        value.RescaleSlope, value.RescaleIntercept, value.RescaleType = 1, 1000 * number, "US"
        frame.PixelValueTransformationSequence = DicomSequence([value])
        frames.append(frame)
    shared, measures, orientation = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing = [2.0, 2.0]
    orientation.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    shared.PixelMeasuresSequence = DicomSequence([measures])
    shared.PlaneOrientationSequence = DicomSequence([orientation])
    dataset.SharedFunctionalGroupsSequence = DicomSequence([shared])
    dataset.PerFrameFunctionalGroupsSequence = DicomSequence(frames)
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = EnhancedMRImageStorage
    dataset.NumberOfFrames = len(positions)
    dataset.PixelData = GREY.tobytes() * len(positions)
    dataset.save_as(path)
    return path


def test_the_frames_of_an_enhanced_image_are_slices(brain_mri: Modality, tmp_path: Path) -> None:
    path = enhanced(tmp_path / "a.dcm", [20.0, 0.0, 10.0])
    assert [header.position_mm for header in read_headers(path, MR)] == [20.0, 0.0, 10.0]
    scan = decode_scan(path, brain_mri)
    assert scan.affine is not None
    assert scan.affine[2, 3] == 10
    assert scan.pixels.min() == 2000  # the third frame's own intercept
    assert decode_volume(tmp_path, brain_mri).upright[:, 0, 0].tolist() == [1000, 2000, 0]
    with pytest.raises(ScanRejected, match=r"at one position \(echo 10 ms; 90 ms\)"):
        decode_scan(enhanced(tmp_path / "b/b.dcm", [0.0, 0.0, 5.0, 5.0], [10, 90, 10, 90]), brain_mri)
    dataset = pydicom.dcmread(path)
    del dataset.PerFrameFunctionalGroupsSequence
    dataset.save_as(path)
    with pytest.raises(ScanRejected, match="without a place for each"):
        read_headers(path, MR)


def test_slices_with_a_series_uid_of_their_own_are_one_series(tmp_path: Path) -> None:
    headers = []
    for number in range(4):
        uids = {"SeriesInstanceUID": f"1.2.{number}", "StudyInstanceUID": "1.3", "SeriesDescription": "T1"}
        place = {"ImagePositionPatient": [0, 0, 5.0 * number]}
        headers += read_headers(write_mr_slice(tmp_path / f"{number}.dcm", GREY, **uids, **place), MR)
    (series,) = grouped(headers)
    assert ordered(tmp_path, series).at(tmp_path, 0.5).path.name == "2.dcm"
    other = read_headers(
        write_mr_slice(tmp_path / "o.dcm", GREY, SeriesInstanceUID="1.9", StudyInstanceUID="1.3", SeriesNumber=2), MR
    )
    assert sorted(map(len, grouped([*headers, *other]))) == [1, 4]
    scout = {"ImageOrientationPatient": [0, 1, 0, 0, 0, -1], "ImagePositionPatient": [0, 0, 0]}
    uids = {"SeriesInstanceUID": "1.2.9", "StudyInstanceUID": "1.3", "SeriesDescription": "T1"}
    line = read_headers(write_mr_slice(tmp_path / "line.dcm", GREY, **uids, **scout), MR)
    (together,) = grouped([*headers, *line])
    assert [header.path.name for header in ordered(tmp_path, together).left_out] == ["line.dcm"]


def test_images_of_one_uid_at_several_places_are_several(tmp_path: Path) -> None:
    headers = []
    for number in range(3):
        place = {"ImagePositionPatient": [0, 0, 5.0 * number], "SOPInstanceUID": "1.2.3"}
        headers += read_headers(write_mr_slice(tmp_path / f"{number}.dcm", GREY, **place), MR)
    assert len(ordered(tmp_path, headers).headers) == 3


def test_a_slice_of_padding_alone_costs_no_volume(brain_mri: Modality, tmp_path: Path) -> None:
    folder = write_plane(tmp_path / "sagittal", "sagittal", PixelPaddingValue=0)
    empty = pydicom.dcmread(folder / "00.dcm")
    empty.PixelData = bytes(len(empty.PixelData))
    empty.save_as(folder / "00.dcm")
    assert decode_scan(folder, brain_mri).pixels.shape == (24, 20)
    with pytest.raises(ScanRejected, match="no finite number"):
        decode_scan(folder / "00.dcm", replace(brain_mri, image=config("sagittal")))


def test_a_mosaic_is_no_slice(tmp_path: Path) -> None:
    path = write_mr_slice(tmp_path / "a.dcm", GREY, ImageType=["ORIGINAL", "PRIMARY", "M", "MOSAIC"])
    with pytest.raises(ScanRejected, match="mosaic"):
        read_headers(path, MR)


def test_a_missing_slice_is_no_reason_to_take_its_neighbour(brain_mri: Modality, tmp_path: Path) -> None:
    folder = write_plane(tmp_path / "axial", "axial")
    (folder / "09.dcm").unlink()
    with pytest.raises(ScanRejected, match="one is missing"):
        decode_scan(folder, brain_mri)


@pytest.mark.parametrize(
    ("elements", "taken"),
    [
        ({}, True),
        ({"ViewPosition": "PA"}, True),
        ({"ViewPosition": "LL"}, False),
        ({"PatientOrientation": ["A", "F"]}, False),
        ({"PatientOrientation": ["L", "F"]}, True),
        ({"SeriesDescription": "Thorax seitlich"}, False),
        ({"SeriesDescription": "CHEST LAT"}, False),
        ({"SeriesDescription": "PLATE"}, True),
        ({"SeriesDescription": "Thorax_lat"}, False),
        ({"SeriesDescription": "CHEST LAT1"}, False),
        ({"SeriesDescription": "CHEST PA AND LATERAL"}, True),
        ({"PatientOrientation": ["F", "A"]}, False),
        ({"PresentationIntentType": "FOR PROCESSING"}, False),
        ({"ViewCodeSequence": "left lateral"}, False),
        ({"ViewCodeSequence": "postero-anterior"}, True),
        ({"BodyPartExamined": "HAND"}, False),
        ({"BodyPartExamined": "CHEST"}, True),
        ({"BodyPartExamined": "Thorax"}, True),
    ],
)
def test_a_radiograph_of_another_view_or_part_is_left_out(
    elements: dict[str, Any], taken: bool, write_dicom: Callable[..., Path], tmp_path: Path
) -> None:
    view = elements.pop("ViewCodeSequence", None)
    if view is not None:
        item = Dataset()
        item.CodeMeaning = view
        elements["ViewCodeSequence"] = DicomSequence([item])
    image = ImageConfig(plane="none", view_positions=["PA", "AP"], body_parts=["*CHEST*", "*THORA*"])
    place = {"ImagePositionPatient": None, "ImageOrientationPatient": None, "Modality": "CR"}
    path = write_dicom(tmp_path / "a.dcm", GREY, **place, **elements)
    modality = Modality(dicom_modalities=["CR"], prompt_template="a", image=image)
    if taken:
        assert decode_scan(path, modality).pixels.shape == GREY.shape
    else:
        with pytest.raises(ScanRejected, match=r"its (view|Body Part)|raw values"):
            decode_scan(path, modality)


def test_spacing_has_several_names_and_pixels_that_are_not_square_none(tmp_path: Path) -> None:
    none = {"PixelSpacing": None}
    nominal = write_mr_slice(tmp_path / "a.dcm", GREY, NominalScannedPixelSpacing=[1.4, 1.4], **none)
    assert read_headers(nominal, MR)[0].spacing_mm == (1.4, 1.4)
    flat = write_mr_slice(tmp_path / "b.dcm", GREY, PixelAspectRatio=[2, 1], **none)
    with pytest.raises(ScanRejected, match="not square"):
        read_headers(flat, MR)


def test_processed_images_of_mr_cr_and_dx_are_no_suspicion(tmp_path: Path) -> None:
    path = write_mr_slice(tmp_path / "a.dcm", GREY, ImageType=["DERIVED", "PRIMARY", "M", "ND"])
    assert read_headers(path, MR)[0].image_type == "DERIVED/PRIMARY/M/ND"
    for elements in ({"ImageType": ["DERIVED", "SECONDARY"]}, {"ImageType": ["DERIVED", "PRIMARY"], "Modality": "CT"}):
        with pytest.raises(ScanRejected) as caught:
            read_headers(write_mr_slice(tmp_path / "b.dcm", GREY, **elements), ["MR", "CT"])
        assert caught.value.rejection == Rejection.BURNED_IN
    with pytest.raises(ScanRejected) as caught:
        read_headers(write_mr_slice(tmp_path / "c.dcm", GREY, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), MR)
    assert caught.value.rejection == Rejection.LOCALIZER


def nifti(path: Path, qform: int, sform: int, flip: bool = False) -> Path:
    image = Nifti1Image(head(), None)
    affine = np.diag([2.0, 2, 2, 1])
    image.set_sform(affine @ np.diag([-1 if flip else 1, 1, 1, 1]), sform)
    image.set_qform(affine, qform)
    nibabel.save(image, path)
    return path


def test_a_nifti_must_say_how_it_lies(brain_mri: Modality, tmp_path: Path) -> None:
    for name, codes in (("q", (1, 0)), ("s", (0, 1)), ("both", (1, 4))):
        assert decode_scan(nifti(tmp_path / f"{name}.nii", *codes), brain_mri).pixels.size
    for name, path in (
        ("gives no orientation", nifti(tmp_path / "none.nii", 0, 0)),
        ("qform and sform disagree", nifti(tmp_path / "two.nii", 1, 1, flip=True)),
    ):
        for read in (decode_scan, decode_volume):
            with pytest.raises(ScanRejected, match=name) as caught:
                read(path, brain_mri)
            assert caught.value.rejection == Rejection.NO_ORIENTATION


def test_compression_is_told_by_content_and_checked_to_its_end(brain_mri: Modality, tmp_path: Path) -> None:
    plain = nifti(tmp_path / "a.nii", 1, 1)
    expected = decode_scan(plain, brain_mri).pixels
    (tmp_path / "b.nii.gz").write_bytes(plain.read_bytes())
    (tmp_path / "c.nii").write_bytes(gzip.compress(plain.read_bytes()))
    for name in ("b.nii.gz", "c.nii"):
        np.testing.assert_array_equal(decode_scan(tmp_path / name, brain_mri).pixels, expected)
        np.testing.assert_array_equal(
            decode_volume(tmp_path / name, brain_mri).voxels, decode_volume(plain, brain_mri).voxels
        )
    packed = bytearray(gzip.compress(plain.read_bytes()))
    (tmp_path / "cut.nii.gz").write_bytes(packed[:-20])
    (tmp_path / "cut.nii").write_bytes(plain.read_bytes()[:-600])
    (tmp_path / "was_cut.nii.gz").write_bytes(gzip.compress(plain.read_bytes()[:-600]))
    (tmp_path / "longer.nii.gz").write_bytes(packed + b"rest")
    packed[-6] ^= 1  # in the checksum
    (tmp_path / "flipped.nii.gz").write_bytes(packed)
    for name, words in (
        ("cut.nii.gz", "cut off"),
        ("cut.nii", "cut off"),
        ("was_cut.nii.gz", "cut off"),
        ("longer.nii.gz", "other bytes follow"),
        ("flipped.nii.gz", "checksum is wrong"),
    ):
        for read in (decode_scan, decode_volume):
            with pytest.raises(ScanRejected, match=words):
                read(tmp_path / name, brain_mri)


def test_voxels_of_other_types_and_values_that_mask(brain_mri: Modality, tmp_path: Path) -> None:
    affine = np.diag([2.0, 2, 2, 1])
    nibabel.save(Nifti1Image(head().astype(np.int64), affine, dtype=np.int64), tmp_path / "long.nii")
    assert decode_scan(tmp_path / "long.nii", brain_mri).pixels.max() > 1000
    nibabel.save(Nifti1Image(head().astype(np.float64) * 1e38, affine), tmp_path / "huge.nii")
    with pytest.raises(ScanRejected, match=r"above 3\.4e38"):
        decode_scan(tmp_path / "huge.nii", brain_mri)
    masked = head().astype(np.int16) % 500
    masked[:5] = -32768
    nibabel.save(Nifti1Image(masked, affine), tmp_path / "masked.nii")
    assert decode_scan(tmp_path / "masked.nii", brain_mri).pixels.min() >= 0
    real = head().astype(np.float32) % 7 - 3  # as after a normalisation: its lowest value is signal
    nibabel.save(Nifti1Image(real, affine), tmp_path / "real.nii")
    assert decode_scan(tmp_path / "real.nii", brain_mri).pixels.min() == -3
    nibabel.save(Nifti1Image(head()[:, :, 0], affine), tmp_path / "flat.nii")
    assert decode_scan(tmp_path / "flat.nii", brain_mri).pixels.shape == (24, 20)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.mgz", b"\x1f\x8b\x08", "mri_convert"),
        ("a.hdr", bytes(348), "pair"),
        ("a.nrrd", b"NRRD0004", "NRRD"),
        ("a.tif", b"II*\0rest", "TIFF"),
        ("a.zip", b"PK\x03\x04rest", "unpack"),
        ("a.dcm", b"\xff\xd8\xff\xe0rest", "JPEG"),
        ("a.nii", b"PK\x03\x04" + bytes(600), "unpack"),
        ("a.png", b"\xff\xd8\xff\xe0rest", "JPEG image named .png"),
    ],
)
def test_what_is_not_read_is_named(name: str, content: bytes, words: str, brain_mri: Modality, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ScanRejected, match=words):
        decode_scan(tmp_path / name, brain_mri)


def test_a_jpeg_is_read_upright_and_grey(brain_mri: Modality, tmp_path: Path) -> None:
    grey = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1))
    Image.fromarray(grey).save(tmp_path / "a.jpg", quality=95)
    Image.fromarray(np.stack([grey] * 3, -1)).save(tmp_path / "b.jpeg", quality=95, subsampling=0)
    for name in ("a.jpg", "b.jpeg"):
        scan = decode_scan(tmp_path / name, brain_mri)
        assert scan.spacing_mm is None
        np.testing.assert_allclose(scan.pixels, grey, atol=6)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(grey).save(tmp_path / "turned.jpg", exif=exif)
    with pytest.raises(ScanRejected, match="turned"):
        decode_scan(tmp_path / "turned.jpg", brain_mri)
