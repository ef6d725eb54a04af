"""Files decoded in a child process: the same results, and whatever the child does costs one file."""

from __future__ import annotations

import contextlib
import gzip
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import nibabel
import numpy as np
import psutil
import pytest

from ld_common.imaging import decoding_process, readers, scan_reader, volume
from ld_common.imaging.decoding_process import DecodingProcess, Limits
from ld_common.imaging.decoding_worker import MAX_REPLY_JSON, REPLY, header_fields
from ld_common.imaging.dicom import read_headers
from ld_common.imaging.dicom_header import DicomHeader
from ld_common.imaging.modality import Modality
from ld_common.imaging.rejection import MAX_PIXELS, Rejection, ScanRejected
from tests.conftest import write_mr_slice
from tests.imaging.test_volume import write_series

GREY = np.arange(30, dtype=np.uint16).reshape(5, 6)


@pytest.fixture
def process() -> Iterator[DecodingProcess]:
    """A child that may use 256 MiB and one second of processor time."""
    started = DecodingProcess(Limits(memory_bytes=2**28, seconds=1))
    yield started
    started.close()


def child() -> psutil.Process:
    """The child that was started last."""
    return max(psutil.Process().children(), key=psutil.Process.create_time)


def zeros(
    path: Path, shape: tuple[int, int, int], kind: type = np.float64, up: str = "k", scaled: bool = False
) -> Path:
    """A volume of zeros, each 64 MiB of which are some kilobytes of gzip; one of its axes i, j, k points up."""
    header = nibabel.Nifti1Header()
    header.set_data_shape(shape)
    header.set_data_dtype(kind)
    if scaled:
        header.set_data_shape((*shape, 1))
        header.set_slope_inter(0.5, 1)
    header["vox_offset"], header["magic"], header["pixdim"][1:4] = 352, b"n+1", 1
    affine = np.eye(4)
    affine[:3, :3] = np.roll(affine[:3, :3], "kij".index(up), axis=1)
    header.set_sform(affine, 1)
    size = int(np.prod(shape)) * np.dtype(kind).itemsize
    block = gzip.compress(bytes(2**26), 1)
    path.write_bytes(gzip.compress(bytes(header.binaryblock) + bytes(4)) + block * -(-size // 2**26))
    return path


def test_every_kind_of_file_is_read_as_without_the_child(brain_mri: Modality, tmp_path: Path) -> None:
    series = write_series(tmp_path / "series")
    stored = nibabel.Nifti2Image(np.arange(120, dtype=np.int16).reshape(6, 5, 4), np.diag([-2.0, 2, 2, 1]))
    nibabel.save(stored, tmp_path / "a.nii.gz")
    for path in (series, series / "0.dcm", tmp_path / "a.nii.gz"):
        there, here = (read(path, brain_mri) for read in (readers.read_scan, scan_reader.decode_scan))
        np.testing.assert_array_equal(there.pixels, here.pixels)
        np.testing.assert_array_equal(there.affine, here.affine)
        assert (there.spacing_mm, there.attributes_in_file) == (here.spacing_mm, here.attributes_in_file)
        assert there.orientation == here.orientation
    for path in (series, tmp_path / "a.nii.gz"):
        far, near = (read(path, brain_mri) for read in (readers.read_volume, volume.decode_volume))
        np.testing.assert_array_equal(far.voxels, near.voxels)
        np.testing.assert_array_equal(far.affine, near.affine)
        assert far.attributes_in_file == near.attributes_in_file
        assert type(far.header) is type(near.header)
        assert far.header is None or far.header.binaryblock == near.header.binaryblock


def test_headers_come_in_the_order_of_their_files_with_the_refusals_among_them(tmp_path: Path) -> None:
    write_series(tmp_path / "series")
    (tmp_path / "notes.txt").write_text("no image")
    held_back = write_mr_slice(tmp_path / "text.dcm", GREY, BurnedInAnnotation="YES")
    files = [*sorted((tmp_path / "series").iterdir()), tmp_path / "notes.txt", held_back, held_back]
    released = [False] * (len(files) - 1) + [True]
    found = list(readers.read_headers(list(zip(files, released, strict=True)), ["MR"]))
    for path, headers in zip([*files[:5], held_back], [*found[:5], found[-1]], strict=True):
        assert isinstance(headers, list)
        ((header,), (expected,)) = headers, read_headers(path, ["MR"], True)
        assert isinstance(header, DicomHeader)
        assert (header.path, header_fields(header)) == (path, header_fields(expected))
    refused = [answer.rejection for answer in found[5:7] if isinstance(answer, ScanRejected)]
    assert refused == [Rejection.NOT_AN_IMAGE, Rejection.BURNED_IN]


def test_a_refusal_names_the_file_of_a_series(brain_mri: Modality, tmp_path: Path) -> None:
    write_series(tmp_path / "series")
    write_mr_slice(tmp_path / "series/ct.dcm", GREY, Modality="CT")
    with pytest.raises(ScanRejected, match=r"series/ct.dcm': wrong modality"):
        readers.read_scan(tmp_path / "series", brain_mri)


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGSEGV, signal.SIGKILL])
@pytest.mark.attack
def test_a_child_that_dies_costs_one_file(
    end: signal.Signals, brain_mri: Modality, process: DecodingProcess, tmp_path: Path
) -> None:
    slow, good = zeros(tmp_path / "slow.nii.gz", (2048, 256, 256)), write_mr_slice(tmp_path / "a.dcm", GREY)
    process.read_scan(good, brain_mri)
    threading.Timer(0.2, lambda: child().send_signal(end)).start()
    with pytest.raises(ScanRejected, match=rf"slow.nii.gz': unreadable: its decoder ended by signal {end.value}$"):
        process.read_scan(slow, brain_mri)
    assert process.read_scan(good, brain_mri).pixels.max() == 29


@pytest.mark.slow
@pytest.mark.attack
def test_a_file_that_takes_too_long_is_refused(brain_mri: Modality, process: DecodingProcess, tmp_path: Path) -> None:
    slow, good = tmp_path / "slow.nii.gz", write_mr_slice(tmp_path / "a.dcm", GREY)
    slow.write_bytes(gzip.compress(b"") * 4_000_000)  # each empty member costs a new decompressor
    with pytest.raises(ScanRejected, match=r"longer than (1 s of processor time|2 s)"):
        process.read_scan(slow, brain_mri)
    process.read_scan(good, brain_mri)
    stopped = child()
    stopped.suspend()
    with pytest.raises(ScanRejected, match="longer than 2 s"):
        process.read_scan(good, brain_mri)
    assert not stopped.is_running()


@pytest.mark.slow
@pytest.mark.attack
def test_a_file_that_needs_too_much_memory_is_refused(
    brain_mri: Modality, process: DecodingProcess, tmp_path: Path
) -> None:
    large = zeros(tmp_path / "large.nii.gz", (512, 512, 512), np.uint8)
    with pytest.raises(ScanRejected, match="too large: reading it needs more than 256 MiB") as caught:
        process.read_volume(large, brain_mri)
    assert caught.value.rejection == Rejection.TOO_LARGE
    assert process.read_scan(large, brain_mri).pixels.shape == (512, 512)


@pytest.mark.slow
def test_a_slice_and_a_volume_are_read_without_copies_of_the_whole(brain_mri: Modality, tmp_path: Path) -> None:
    """Of a small file with many voxels: at most the float32 values and some slabs are in memory."""
    large = zeros(tmp_path / "large.nii.gz", (512, 256, 256), np.int16, scaled=True)
    for limit, read in ((64, "read_scan"), (256, "read_volume")):
        process = DecodingProcess(Limits(memory_bytes=limit * 2**20))
        getattr(process, read)(large, brain_mri)
        process.close()


@pytest.mark.slow
def test_a_child_leaves_no_core_and_ends_with_its_parent(tmp_path: Path) -> None:
    script = """
import os, signal, sys, time
from pathlib import Path
from ld_common.imaging.readers import read_headers
import psutil
list(read_headers([(Path(sys.argv[1]), False)], ["MR"]))
(child,) = psutil.Process().children()
print(child.pid, child.rlimit(psutil.RLIMIT_CORE)[0], child.rlimit(psutil.RLIMIT_DATA)[0] > 0, flush=True)
child.suspend()
os.kill(os.getpid(), signal.SIGKILL)
"""
    file = write_mr_slice(tmp_path / "a.dcm", GREY)
    ended = subprocess.run([sys.executable, "-c", script, str(file)], capture_output=True, text=True, timeout=60)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    pid, core, limited = ended.stdout.split()
    assert (core, limited) == ("0", "True")
    with contextlib.suppress(psutil.NoSuchProcess):
        orphan = psutil.Process(int(pid))
        orphan.resume()
        orphan.wait(60)  # a busy machine lets it wait for its turn


def answer(content: object, values: bytes = b"", stated: int | None = None) -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return REPLY.pack(len(text), len(values) if stated is None else stated) + text + values


SCAN = {"shape": [1, 2], "spacing_mm": None, "attributes": {}, "affine": None, "orientation": None}
PIXELS = np.array([1, 2], np.float32).tobytes()


@pytest.mark.parametrize(
    "sent",
    [
        answer(b"no json"),
        answer([SCAN], PIXELS),
        answer(b"[" * 50_000, PIXELS),
        answer(SCAN | {"shape": [2**40, 2**40]}, PIXELS),
        answer(SCAN | {"shape": [-1, -2]}, PIXELS),
        answer(SCAN | {"shape": [1.0, 2.0]}, PIXELS),
        answer(SCAN | {"shape": [1, 2, 1]}, PIXELS),
        answer(SCAN, PIXELS[:4]),
        answer(SCAN, PIXELS[:7]),
        answer(SCAN, np.array([1, np.nan], np.float32).tobytes()),
        answer(SCAN | {"affine": [[1.0]]}, PIXELS),
        answer(SCAN | {"affine": [[1e999] * 4] * 4}, PIXELS),
        answer(SCAN | {"spacing_mm": [0, -1]}, PIXELS),
        answer(SCAN | {"spacing_mm": ["1", "2"]}, PIXELS),
        answer(SCAN | {"orientation": ["<b>", "L"]}, PIXELS),
        answer(SCAN | {"attributes": {"age": 1e9}}, PIXELS),
        answer(SCAN | {"attributes": {"ward": "7"}}, PIXELS),
        answer({"rejection": "a new reason", "detail": "", "name": ""}),
        answer({"rejection": "unreadable", "detail": 7, "name": ""}),
        answer({}, b"", 4 * MAX_PIXELS + 4),
        REPLY.pack(MAX_REPLY_JSON + 1, 0),
    ],
)
@pytest.mark.attack
def test_an_answer_that_no_decoder_gives_is_refused(
    sent: bytes, brain_mri: Modality, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    taken_over = f"import sys; sys.stdout.buffer.write({answer({}) + sent!r}); sys.stdout.flush(); sys.stdin.read()"
    monkeypatch.setattr(decoding_process, "RUN", taken_over)
    process = DecodingProcess()
    with pytest.raises(ScanRejected, match="an answer that no decoder gives"):
        process.read_scan(write_mr_slice(tmp_path / "a.dcm", GREY), brain_mri)
    process.close()


@pytest.mark.attack
def test_a_refusal_cannot_lead_to_another_folder(
    brain_mri: Modality, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sent = answer({"rejection": "unreadable", "detail": "x" * 9999, "name": "../../etc/passwd"})
    taken_over = f"import sys; sys.stdout.buffer.write({answer({}) + sent!r}); sys.stdout.flush(); sys.stdin.read()"
    monkeypatch.setattr(decoding_process, "RUN", taken_over)
    process = DecodingProcess()
    with pytest.raises(ScanRejected) as caught:
        process.read_scan(tmp_path, brain_mri)
    assert (caught.value.path, len(caught.value.detail)) == (tmp_path, 500)
    process.close()


@pytest.mark.attack
def test_a_module_in_the_folder_of_the_scans_is_not_run(
    brain_mri: Modality, monkeypatch: pytest.MonkeyPatch, process: DecodingProcess, tmp_path: Path
) -> None:
    for name in ("numpy", "json", "nibabel", "ld_common"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    write_mr_slice(tmp_path / "a.dcm", GREY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    process.read_scan(Path("a.dcm"), brain_mri)
    assert not (tmp_path / "run").exists()
