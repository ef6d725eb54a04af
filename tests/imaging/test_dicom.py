from __future__ import annotations

import datetime
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEGLosslessSV1, SecondaryCaptureImageStorage

from ld_common.core.errors import ScanError
from ld_common.imaging.decoding_worker import header_fields
from ld_common.imaging.dicom import MAX_NESTING, read_dicom, read_frames, read_headers
from ld_common.imaging.dicom_header import DicomHeader
from ld_common.imaging.modality import Modality
from ld_common.imaging.rejection import MAX_FILE_BYTES, Rejection, ScanRejected
from ld_common.imaging.scan_reader import decode_scan
from ld_common.imaging.series import ordered

RAMP = np.arange(12, dtype=np.uint16).reshape(3, 4)
WriteDicom = Callable[..., Path]


def real(name: str) -> Path:
    return Path(str(get_testdata_file(name, download=False)))


def refusal(path: Path, modality: str = "MR") -> Rejection:
    with pytest.raises(ScanError) as caught:
        read_dicom(path, (modality,))
    assert isinstance(caught.value, ScanRejected)
    return caught.value.rejection


@pytest.mark.parametrize(
    "name",
    ["small", "small_RLE", "small_bigendian", "small_implicit", "small_jp2klossless", "small_jpeg_ls_lossless"],
)
def test_every_encoding_of_one_real_slice_reads_the_same(name: str) -> None:
    header, pixels = read_dicom(real(f"MR_{name}.dcm"), ("MR",), released=True)
    assert (pixels.shape, pixels.dtype) == ((64, 64), np.float32)
    assert (pixels.min(), pixels.max()) == (127, 2145)
    assert header.spacing_mm == (0.3125, 0.3125)
    assert (header.sex, header.study_date) == ("F", datetime.date(2004, 8, 26))


def test_a_real_ct_comes_in_hounsfield_units() -> None:
    _, pixels = read_dicom(real("CT_small.dcm"), ("CT",))
    stored = pydicom.dcmread(real("CT_small.dcm")).pixel_array
    np.testing.assert_array_equal(pixels, stored.astype(np.float32) - 1024)


@pytest.mark.parametrize("signed", [False, True])
def test_monochrome1_is_turned_round_within_its_stored_range(
    signed: bool, tmp_path: Path, write_dicom: WriteDicom
) -> None:
    stored = RAMP.astype(np.int16) - 6 if signed else RAMP
    rescale = {"RescaleSlope": 2, "RescaleIntercept": 5, "BitsStored": 12, "HighBit": 11}
    path = write_dicom(tmp_path / "a.dcm", stored, PhotometricInterpretation="MONOCHROME1", **rescale)
    _, pixels = read_dicom(path, ("MR",))
    ends = (-2048, 2047) if signed else (0, 4095)
    np.testing.assert_array_equal(pixels, 2 * (sum(ends) - stored.astype(np.float32)) + 5)


def test_padding_becomes_the_lowest_real_value(tmp_path: Path, write_dicom: WriteDicom) -> None:
    for name, padding in (("one", {"PixelPaddingValue": 11}), ("many", {"PixelPaddingValue": 9})):
        limit = {"PixelPaddingRangeLimit": 11} if name == "many" else {}
        _, pixels = read_dicom(write_dicom(tmp_path / f"{name}.dcm", RAMP, **padding, **limit), ("MR",))
        assert pixels.min() == 0
        assert pixels.max() == (8 if limit else 10)
    pad = {"PixelPaddingValue": 0, "PixelPaddingRangeLimit": 11}
    nothing = read_dicom(write_dicom(tmp_path / "all.dcm", RAMP, **pad), ("MR",))[1]
    assert np.isnan(nothing).all()  # a slice beside a head; the readers refuse a scan of it alone


@pytest.mark.parametrize(
    ("elements", "expected"),
    [
        ({"PatientAge": "074Y"}, 74),
        ({"PatientAge": "006M"}, 0.5),
        ({"PatientBirthDate": "19500101", "StudyDate": "20200101"}, 70),
        ({"PatientAge": "old", "PatientBirthDate": "19500101"}, 70),
        ({"PatientBirthDate": "20300101"}, None),
        ({}, None),
    ],
)
def test_age_is_said_or_counted_from_the_dates(
    elements: dict[str, str], expected: float | None, tmp_path: Path, write_dicom: WriteDicom
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = write_dicom(tmp_path / "a.dcm", RAMP, **elements)
    age = read_headers(path, ("MR",))[0].age_years
    assert age == (None if expected is None else pytest.approx(expected, abs=0.01))


@pytest.mark.parametrize(
    ("elements", "expected"),
    [
        ({"Modality": "CT"}, Rejection.WRONG_MODALITY),
        ({"Rows": 60000, "Columns": 60000}, Rejection.TOO_LARGE),
        ({"NumberOfFrames": 2**30}, Rejection.TOO_LARGE),
        ({"NumberOfFrames": 2}, Rejection.UNSUPPORTED),
        ({"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}, Rejection.UNSUPPORTED),
        ({"BitsAllocated": 64}, Rejection.UNSUPPORTED),
        ({"BitsStored": 40}, Rejection.UNSUPPORTED),
        ({"Rows": None}, Rejection.NOT_AN_IMAGE),
        ({"PixelData": None}, Rejection.UNREADABLE),
        ({"Rows": 30}, Rejection.UNREADABLE),
        ({"RescaleSlope": [1, 2], "RescaleIntercept": 0}, Rejection.UNREADABLE),
        ({"SOPClassUID": SecondaryCaptureImageStorage}, Rejection.BURNED_IN),
        ({"BurnedInAnnotation": "YES"}, Rejection.BURNED_IN),
        ({"ImageType": ["DERIVED", "SECONDARY"]}, Rejection.BURNED_IN),
        ({"SyntheticData": "YES"}, Rejection.SYNTHETIC),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_reason(
    elements: dict[str, object], expected: Rejection, tmp_path: Path, write_dicom: WriteDicom
) -> None:
    assert refusal(write_dicom(tmp_path / "a.dcm", RAMP, **elements)) == expected


def test_suspected_text_can_be_released_by_hand(tmp_path: Path, write_dicom: WriteDicom) -> None:
    path = write_dicom(tmp_path / "a.dcm", RAMP, ImageType=["DERIVED", "PRIMARY"])
    assert read_dicom(path, ("MR",), released=True)[1].max() == 11


def test_a_refusal_tells_no_value_of_the_header(tmp_path: Path, write_dicom: WriteDicom) -> None:
    path = write_dicom(tmp_path / "a.dcm", RAMP, Rows=30, PatientID="SECRET-7", PatientName="Secret^Name")
    with pytest.raises(ScanRejected) as caught:
        read_dicom(path, ("MR",))
    assert "SECRET" not in f"{caught.value}{caught.value.detail}".upper()
    assert str(tmp_path) not in caught.value.detail


def test_a_missing_decoder_is_named(tmp_path: Path, write_dicom: WriteDicom, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_dicom(tmp_path / "a.dcm", RAMP)
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    dataset.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8\xff\xd9"])
    dataset.save_as(path)
    monkeypatch.setattr(get_decoder(JPEGLosslessSV1), "_available", {})
    with pytest.raises(ScanRejected, match="needs a decoder: pylibjpeg") as caught:
        read_dicom(path, ("MR",))
    assert caught.value.rejection == Rejection.NO_DECODER


@pytest.mark.parametrize("process", ["JPEGLosslessProcess14", "JPEGLosslessProcess14_1"])
def test_lossless_jpeg_is_read(process: str, tmp_path: Path, write_dicom: WriteDicom) -> None:
    import gdcm

    source, packed = write_dicom(tmp_path / "a.dcm", RAMP), tmp_path / "packed.dcm"
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(source))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, process)))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFileName(str(packed))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    assert pydicom.dcmread(packed).file_meta.TransferSyntaxUID.is_compressed
    np.testing.assert_array_equal(read_dicom(packed, ("MR",), released=True)[1], RAMP)


def test_lossy_jpeg_of_12_bits_is_refused_for_what_it_is() -> None:
    path = real("JPGExtended.dcm")
    with pytest.raises(ScanRejected, match="JPEG of 12 bits with loss") as caught:
        read_dicom(path, (pydicom.dcmread(path).Modality,), released=True)
    assert caught.value.rejection == Rejection.UNSUPPORTED


@pytest.mark.slow
@pytest.mark.attack
def test_a_deflated_bomb_is_refused_before_it_expands(tmp_path: Path, write_dicom: WriteDicom) -> None:
    path = write_dicom(tmp_path / "a.dcm", RAMP)
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    dataset.save_as(path)
    np.testing.assert_array_equal(read_dicom(path, ("MR",))[1], RAMP)
    dataset = pydicom.dcmread(path)
    head = path.read_bytes()[: 132 + 12 + dataset.file_meta.FileMetaInformationGroupLength]
    bomb = zlib.compress(bytes(MAX_FILE_BYTES + 2**20), level=1, wbits=-15)
    path.write_bytes(head + bomb)
    assert refusal(path) == Rejection.TOO_LARGE
    plain = b"\x02\0\x10\0UI\x14\0" + b"1.2.840.10008.1.2.1\0"
    for hidden in (head[:144] + plain + head[144:], head[:144] + b"\x02\0\x02\1OB\0\0" + (2**13).to_bytes(4, "little")):
        rest = b"" if plain in hidden else bytes(2**13) + head[144:]
        meta = hidden + rest
        length = len(meta) - 144
        path.write_bytes(meta[:140] + length.to_bytes(4, "little") + meta[144:] + bomb)
        assert refusal(path) == Rejection.TOO_LARGE  # a second syntax, and one behind a long element


@pytest.mark.attack
def test_deep_nesting_is_refused(tmp_path: Path, write_dicom: WriteDicom) -> None:
    path = write_dicom(tmp_path / "a.dcm", RAMP)
    plain = path.read_bytes()
    item, close = b"\xfe\xff\x00\xe0\xff\xff\xff\xff", b"\xfe\xff\x0d\xe0\0\0\0\0\xfe\xff\xdd\xe0\0\0\0\0"
    sequence = b"\x08\x00\x40\x11SQ\0\0\xff\xff\xff\xff"
    start = 132 + 12 + pydicom.dcmread(path).file_meta.FileMetaInformationGroupLength
    for depth in (MAX_NESTING + 2, 3000):
        nested = (sequence + item) * depth + close * depth
        path.write_bytes(plain[:start] + nested + plain[start:])
        assert refusal(path) in (Rejection.TOO_LARGE, Rejection.UNREADABLE)


@pytest.mark.attack
def test_no_damage_is_more_than_a_scan_error(tmp_path: Path) -> None:
    whole = real("MR_small.dcm").read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / "a.dcm"
    for cut in rng.integers(0, len(whole), 40):
        path.write_bytes(whole[:cut])
        with pytest.raises(ScanError):
            read_dicom(path, ("MR",), released=True)
    for _ in range(300):
        content = bytearray(whole)
        for place in rng.integers(132, 1600, 4):
            content[place] = rng.integers(256)
        path.write_bytes(content)
        try:
            read_dicom(path, ("MR",), released=True)
        except ScanError:
            continue


def test_objects_that_are_no_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.dcm").write_text("hello")
    (tmp_path / "empty.dcm").write_bytes(b"")
    assert refusal(tmp_path / "text.dcm") == Rejection.NOT_AN_IMAGE
    assert refusal(tmp_path / "empty.dcm") == Rejection.NOT_AN_IMAGE
    assert refusal(tmp_path) == Rejection.UNREADABLE
    for name in ("reportsi.dcm", "rtplan.dcm", "waveform_ecg.dcm"):
        assert refusal(real(name)) == Rejection.NOT_AN_IMAGE
    assert refusal(real("rtdose.dcm")) == Rejection.WRONG_MODALITY
    with pytest.raises(ScanRejected, match="damaged"):
        read_dicom(real("MR_truncated.dcm"), ("MR",), released=True)


ALL = ("MR", "CT", "CR", "DX", "US", "OT", "NM", "PT")


def told(read: Callable[[], list[DicomHeader]]) -> object:
    """The fields of the headers that are read, or the refusal."""
    try:
        return [header_fields(header) for header in read()]
    except ScanRejected as error:
        return error.rejection, error.detail


@pytest.mark.parametrize("damage", [None, 0, 1, 2, 3])
def test_a_header_alone_says_what_the_whole_file_says(damage: int | None, tmp_path: Path) -> None:
    """Headers are read by a shorter way than files with their pixels, which pydicom's `dcmread` reads whole."""
    folder, rng = Path(pydicom.data.__file__).parent / "test_files", np.random.default_rng(damage)
    for file in sorted(path for path in folder.glob("*.dcm") if path.stat().st_size < 40_000):
        copy, content = tmp_path / file.name, bytearray(file.read_bytes())
        if damage is not None:
            content[rng.integers(132, min(len(content), 1500))] = rng.integers(256)
        copy.write_bytes(content)
        alone = told(lambda path=copy: read_headers(path, ALL, released=True))
        whole = told(lambda path=copy: read_frames(path, ALL, released=True)[0])
        assert alone == whole or not isinstance(whole, list), file.name  # pixels may be refused where the header is not


def test_the_index_of_a_disc_is_called_one() -> None:
    with pytest.raises(ScanRejected, match=r"the index of a disc \(DICOMDIR\)"):
        read_headers(real("DICOMDIR"), ("MR",))


@pytest.mark.parametrize(
    ("syntax", "name"),
    [("1.2.840.10008.1.2.4.110", "JPEG XL Lossless"), ("1.2.840.10008.1.2.8.1", "Deflated Image Frame Compression")],
)
def test_a_transfer_syntax_without_a_decoder_is_named(
    syntax: str, name: str, tmp_path: Path, write_dicom: WriteDicom
) -> None:
    path = write_dicom(tmp_path / "a.dcm", RAMP)
    content = path.read_bytes().replace(b"1.2.840.10008.1.2.1\0", syntax.encode() + b"\0" * (len(syntax) % 2))
    at = content.index(syntax.encode()) - 2
    length = len(syntax) + len(syntax) % 2
    path.write_bytes(content[:at] + length.to_bytes(2, "little") + content[at + 2 :])
    with pytest.raises(ScanRejected, match=f"no decoder exists for '{name}': have it sent uncompressed"):
        read_dicom(path, ("MR",))


def test_slices_are_sorted_along_a_tilted_normal(tmp_path: Path, write_dicom: WriteDicom) -> None:
    tilt = np.deg2rad(20)
    normal = np.array([0, -np.sin(tilt), np.cos(tilt)])
    orientation = [1, 0, 0, 0, float(np.cos(tilt)), float(np.sin(tilt))]
    headers = []
    for number, distance in enumerate([6.0, 0.0, 9.0, 3.0]):
        origin = [float(value) for value in normal * distance]
        elements = {"ImageOrientationPatient": orientation, "ImagePositionPatient": origin}
        headers += read_headers(write_dicom(tmp_path / f"{number}.dcm", RAMP, **elements), ("MR",))
    series = ordered(tmp_path, headers)
    assert [series.at(tmp_path, 0, index).path.name for index in range(4)] == ["1.dcm", "3.dcm", "0.dcm", "2.dcm"]
    assert series.at(tmp_path, 1.0).path.name == "2.dcm"
    assert ordered(tmp_path, headers[::-1]).at(tmp_path, 0.5) is series.at(tmp_path, 0.5)


@pytest.mark.parametrize(
    "elements",
    [
        {"ImageOrientationPatient": None},
        {"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]},
        {"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]},
        {"PixelSpacing": [0, 2]},
        {"PixelSpacing": None},
    ],
)
def test_an_axial_modality_refuses_other_planes_and_unknown_ones(
    elements: dict[str, object], brain_mri: Modality, tmp_path: Path, write_dicom: WriteDicom
) -> None:
    with pytest.raises(ScanRejected) as caught:
        decode_scan(write_dicom(tmp_path / "a.dcm", RAMP, **elements), brain_mri)
    assert caught.value.rejection == Rejection.WRONG_GEOMETRY


def test_only_attributes_that_the_modality_knows_are_read(
    brain_mri: Modality, tmp_path: Path, write_dicom: WriteDicom
) -> None:
    path = write_dicom(tmp_path / "a.dcm", RAMP, PatientAge="074Y", PatientSex="F", PatientWeight=70)
    assert decode_scan(path, brain_mri).attributes_in_file == {"age": 74.0, "sex": "F"}
    path = write_dicom(tmp_path / "b.dcm", RAMP, PatientAge="012Y", PatientSex="O")
    assert decode_scan(path, brain_mri).attributes_in_file == {}
