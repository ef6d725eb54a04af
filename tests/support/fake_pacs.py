"""A small DICOMweb service on loopback, which serves DICOM files and can be made to lie."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from pydicom import Dataset, dcmread

BOUNDARY = "the-boundary"
STUDY_TAGS = ("StudyInstanceUID", "StudyDate", "PatientID", "PatientName")
SERIES_TAGS = (*STUDY_TAGS, "SeriesInstanceUID", "SeriesDescription", "Modality")

Answer = Callable[["Handler"], None]


@dataclass
class FakePacs:
    """What the service holds, what it was asked, and the paths on which it lies."""

    url: str
    files: list[Path] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    """`GET /path?query`, in order."""
    lies: dict[str, Answer] = field(default_factory=dict)
    """Regular expression of `METHOD /path?query` -> the answer in place of the true one."""
    stored: list[Dataset] = field(default_factory=list)
    alter: Callable[[list[dict[str, Any]]], Any] = lambda results: results
    """Changes what a search answers."""

    def asked(self, pattern: str) -> list[str]:
        """The requests that match a regular expression."""
        return [request for request in self.requests if re.search(pattern, request)]


class Handler(BaseHTTPRequestHandler):
    """One request; the service hangs on the server."""

    protocol_version = "HTTP/1.1"
    pacs: FakePacs

    def log_message(self, *_: Any) -> None:
        """Write nothing."""

    def do_GET(self) -> None:
        if not self._lie():
            self._get()

    def do_POST(self) -> None:
        self.received = self._body()
        if not self._lie():
            self.pacs.stored.append(self.sent())
            self.reply(200, "application/dicom+json", json.dumps(confirmation(self.sent())).encode())

    def sent(self) -> Dataset:
        """The object that a request stores."""
        return dcmread(BytesIO(self.received[self.received.index(b"DICM") - 128 : self.received.rindex(b"\r\n--")]))

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        return body

    def _lie(self) -> bool:
        asked = f"{self.command} {self.path}"
        self.pacs.requests.append(asked)
        for pattern, answer in self.pacs.lies.items():
            if re.search(pattern, asked):
                answer(self)
                return True
        return False

    def _get(self) -> None:
        parts = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        words = parts.path.strip("/").split("/")[1:]  # without the service's own
        at = {level: uid for level, uid in zip(words[::2], words[1::2], strict=False)}
        datasets = [dcmread(file) for file in self.pacs.files]
        matching = [
            (file, dataset) for file, dataset in zip(self.pacs.files, datasets, strict=True) if _is_at(dataset, at)
        ]
        if len(words) % 2 == 0:
            parts_of = [file.read_bytes() for file, _ in matching]
            self.reply_objects(parts_of)
            return
        results = _results(words[-1], [dataset for _, dataset in matching])
        page = results[int(query.get("offset", 0)) :][: int(query["limit"])]
        self.reply(200, "application/dicom+json", json.dumps(self.pacs.alter(page)).encode())

    def reply(self, status: int, kind: str, body: bytes, **headers: str) -> None:
        """Send a whole answer."""
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def reply_objects(self, objects: Sequence[bytes], end: bool = True) -> None:
        """Send a multipart answer, and break off without its end if `end` is not set."""
        body = b"".join(part(content) for content in objects) + (f"\r\n--{BOUNDARY}--\r\n".encode() if end else b"")
        self.reply(200, multipart(), body.removeprefix(b"\r\n"))

    def start(self, kind: str) -> None:
        """Start an answer without a length, which ends with the connection."""
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True


def confirmation(dataset: Dataset) -> dict[str, Any]:
    """What a service answers that stored an object."""
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = dataset.SOPClassUID, dataset.SOPInstanceUID
    answer = Dataset()
    answer.ReferencedSOPSequence = [item]
    return answer.to_json_dict()


def multipart() -> str:
    """The content type of objects."""
    return f'multipart/related; type="application/dicom"; boundary={BOUNDARY}'


def part(content: bytes) -> bytes:
    """One part of a multipart body."""
    return f"\r\n--{BOUNDARY}\r\nContent-Type: application/dicom\r\n\r\n".encode() + content


def _is_at(dataset: Dataset, at: dict[str, str]) -> bool:
    keywords = {"studies": "StudyInstanceUID", "series": "SeriesInstanceUID", "instances": "SOPInstanceUID"}
    return all(dataset[keywords[level]].value == uid for level, uid in at.items())


def _results(level: str, datasets: list[Dataset]) -> list[dict[str, Any]]:
    """Results of a search that heeds no filter."""
    names = {"studies": STUDY_TAGS, "series": SERIES_TAGS, "instances": (*SERIES_TAGS, "SOPInstanceUID")}[level]
    key = {"studies": "StudyInstanceUID", "series": "SeriesInstanceUID", "instances": "SOPInstanceUID"}[level]
    groups: dict[str, list[Dataset]] = {}
    for dataset in datasets:
        groups.setdefault(str(dataset[key].value), []).append(dataset)
    results = []
    for members in groups.values():
        result = Dataset()
        for name in names:
            if name in members[0]:
                setattr(result, name, members[0][name].value)
        if level == "studies":
            result.ModalitiesInStudy = sorted({member.Modality for member in members})
        if level == "series":
            result.NumberOfSeriesRelatedInstances = len(members)
        results.append(result.to_json_dict())
    return results


@contextmanager
def fake_pacs(files: Sequence[Path] = ()) -> Iterator[FakePacs]:
    """A service that holds DICOM files and heeds no filter of a search, as some do."""
    handler = type("HandlerOfOne", (Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    handler.pacs = FakePacs(f"http://127.0.0.1:{server.server_address[1]}/dicom-web", list(files))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield handler.pacs
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
