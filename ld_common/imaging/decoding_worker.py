"""The child process of `decoding_process`: decodes image files that others made, within limits, without torch.

A request is its length (`REQUEST`) and JSON: what to read, and a list of paths. Each path is answered by two lengths
(`REPLY`), a JSON object, and the bytes of a float32 array. The parent checks every answer, as a decoder that a file
took over can send anything.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import json
import os
import resource
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ld_common.core.config import from_mapping
from ld_common.imaging.decoding_answers import header_from
from ld_common.imaging.dicom import read_headers
from ld_common.imaging.dicom_header import DicomHeader
from ld_common.imaging.geometry import Scan
from ld_common.imaging.modality import Modality
from ld_common.imaging.rejection import Rejection, ScanRejected
from ld_common.imaging.scan_reader import Source, decode_scan
from ld_common.imaging.volume import Volume, decode_volume

REQUEST, REPLY = struct.Struct("<I"), struct.Struct("<IQ")
MAX_REPLY_JSON = 2**21
"""Of the headers of an enhanced image's frames."""
Answer = tuple[dict[str, Any], np.ndarray | None]


def main(memory_bytes: int, seconds: int) -> None:
    """Answer requests until standard input ends or the parent has gone.

    Args:
        memory_bytes: what decoding may use beyond what the process has at its start; 0 for no limit.
        seconds: of processor time that one path may take, and twice of any time.
    """
    with contextlib.suppress(BrokenPipeError):  # the parent ended while an answer was on its way
        _serve(os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb"), memory_bytes, seconds)


def _serve(requests: BinaryIO, replies: BinaryIO, memory_bytes: int, seconds: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which then closes the pipe
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    _limit(memory_bytes)
    _silence()
    _send(replies, {}, None)  # started
    while head := requests.read(REQUEST.size):
        request = json.loads(requests.read(*REQUEST.unpack(head)))
        for paths, released in request["files"]:
            _start_clock(seconds)
            source = Path(paths[0]) if len(paths) == 1 else [Path(path) for path in paths]
            _send(replies, *_answer(request, source, released, memory_bytes))
        signal.setitimer(signal.ITIMER_REAL, 0)


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _limit(memory_bytes: int) -> None:
    sys.dont_write_bytecode = True
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # it writes no file
    status = Path("/proc/self/status")
    if memory_bytes and status.exists():  # elsewhere than on Linux, RLIMIT_DATA limits nothing
        used = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmData"))
        resource.setrlimit(resource.RLIMIT_DATA, (used * 1024 + memory_bytes,) * 2)


def _silence() -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):  # libraries in C print warnings about a file's content
        os.dup2(null, stream)


def _start_clock(seconds: int) -> None:
    """Let the kernel end this process when a path takes too long, even if a decoder never returns to Python."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime) + 1 + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
    signal.setitimer(signal.ITIMER_REAL, 2 * seconds + 1)


def _send(replies: BinaryIO, content: dict[str, Any], array: np.ndarray | None) -> None:
    text = json.dumps(content).encode()
    if len(text) > MAX_REPLY_JSON:
        text, array = json.dumps(_rejected(Rejection.UNREADABLE, "a value of its header is too long")).encode(), None
    values = b"" if array is None else array.data.cast("B")
    replies.write(REPLY.pack(len(text), len(values)) + text)
    replies.write(values)
    replies.flush()


def _answer(request: dict[str, Any], source: Source, released: bool, memory_bytes: int) -> Answer:
    try:
        return READERS[request["kind"]](source, request, released)
    except ScanRejected as error:
        if not isinstance(error.__cause__, MemoryError):
            name = error.path.name if error.path.parent == source else ""
            return _rejected(error.rejection, error.detail, name), None
    except MemoryError:
        pass
    except Exception as error:
        detail = f"damaged or not what its name says ({type(error).__name__}); export it again"
        return _rejected(Rejection.UNREADABLE, detail), None
    return _rejected(Rejection.TOO_LARGE, f"reading it needs more than {memory_bytes >> 20} MiB of memory"), None


def _rejected(rejection: Rejection, detail: str, name: str = "") -> dict[str, Any]:
    return {"rejection": rejection.value, "detail": detail, "name": name}


@functools.lru_cache(maxsize=8)
def _modality(text: str) -> Modality:
    return from_mapping(Modality, json.loads(text))


def _read_headers(source: Source, request: dict[str, Any], released: bool) -> Answer:
    assert isinstance(source, Path)
    headers = read_headers(source, request["modalities"], released)
    return {"headers": [header_fields(header) for header in headers]}, None


def header_fields(header: DicomHeader) -> dict[str, Any]:
    """A header as JSON holds it, without its path."""
    fields = {field.name: getattr(header, field.name) for field in dataclasses.fields(header) if field.name != "path"}
    fields["study_date"] = None if header.study_date is None else header.study_date.isoformat()
    fields["affine"] = None if header.affine is None else header.affine.tolist()
    return fields


def _read_scan(source: Source, request: dict[str, Any], released: bool) -> Answer:
    known = request["headers"]
    headers = None if known is None else [header_from(fields, Path(fields["path"])) for fields in known]
    scan: Scan = decode_scan(source, _modality(request["modality"]), request["slice_index"], released, headers)
    fields = {
        "shape": scan.pixels.shape,
        "spacing_mm": scan.spacing_mm,
        "attributes": scan.attributes_in_file,
        "affine": None if scan.affine is None else scan.affine.tolist(),
        "orientation": scan.orientation,
        "patient_id": scan.patient_id,
        "study_date": None if scan.study_date is None else scan.study_date.isoformat(),
        "frame_of_reference": scan.frame_of_reference,
    }
    return fields, np.ascontiguousarray(scan.pixels, np.float32)


def _read_volume(source: Source, request: dict[str, Any], released: bool) -> Answer:
    volume: Volume = decode_volume(source, _modality(request["modality"]), released)
    fields = {
        "shape": volume.voxels.shape,
        "attributes": volume.attributes_in_file,
        "affine": volume.affine.tolist(),
        "nifti": None if volume.header is None else base64.b64encode(volume.header.binaryblock).decode(),
        "frame_of_reference": volume.frame_of_reference,
        "patient_id": volume.patient_id,
        "study_date": None if volume.study_date is None else volume.study_date.isoformat(),
    }
    return fields, volume.voxels.ravel("F")  # a view: voxels are in the order of Fortran


READERS: dict[str, Callable[[Source, dict[str, Any], bool], Answer]] = {
    "headers": _read_headers,
    "scan": _read_scan,
    "volume": _read_volume,
}
