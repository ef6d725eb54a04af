"""Talks to a PACS over DICOMweb (PS3.18): QIDO-RS to search, WADO-RS to retrieve, STOW-RS to store.

The PACS is not trusted to behave. No request follows a redirect, uses a proxy or waits without limit, no answer is read
beyond a limit, and what an answer says is never part of a path. Every fault is a `PacsError` without an identity in it.
"""

from __future__ import annotations

import itertools
import logging
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import requests
from dicomweb_client import DICOMwebClient
from pydicom import Dataset
from pydicom.datadict import tag_for_keyword
from requests.auth import HTTPBasicAuth

from ld_common.imaging.dicomweb_errors import PacsError, PacsSilent, closing_answer, translating
from ld_common.imaging.dicomweb_multipart import boundary_of, single_part, split_parts
from ld_common.imaging.dicomweb_options import PacsAccess
from ld_common.imaging.rejection import MAX_FILE_BYTES

CONNECT_S = 10.0
SLOWEST_BYTES_PER_S = 4096
"""An answer may take the time-out and what its bytes take at this rate, so that one that drips does end."""
MAX_SEARCH_BYTES = 16 * 2**20
"""Of one answer to a search; parsed, JSON takes up to fifty times as much."""
CHUNK_BYTES = 2**20
PAGE = 200
MAX_RESULTS = 200_000
PAUSES_S = (0.5, 1.5)
"""Before a request is made again, whose connection broke before an answer or whose service was busy."""
BUSY = (429, 503, 504)
MEDIA_TYPE = 'multipart/related; type="application/dicom"'
AS_STORED = f"{MEDIA_TYPE}; transfer-syntax=*"

UID = re.compile(r"[0-9][0-9.]{0,63}")
"""What is taken as a UID: not as strict as the standard, as PACS hold others, and safe in an address."""

SearchResult = Mapping[str, Any]
"""One match of a search: tag such as `0020000E` -> `{"vr": ..., "Value": [...]}`."""

for library in ("dicomweb_client", "retrying", "urllib3"):
    # their warnings quote addresses, which name the patients that are searched for
    logging.getLogger(library).setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class _Reading:
    """Limits of one answer."""

    host: str
    timeout_s: float

    def chunks(self, response: requests.Response, most_bytes: int) -> Iterator[bytes]:
        """The decoded body as it arrives; raises `PacsError` beyond `most_bytes` or below the slowest rate."""
        started, size = time.monotonic(), 0
        with closing_answer(response), translating(self.host):
            # read1 returns what has arrived, so that the clock is looked at after each piece
            while chunk := response.raw.read1(CHUNK_BYTES, decode_content=True):
                size += len(chunk)
                if size > most_bytes:
                    raise PacsError(f"{self.host} sends more than the {most_bytes:,} bytes that are read")
                if time.monotonic() - started > self.timeout_s + size / SLOWEST_BYTES_PER_S:
                    raise PacsSilent(f"{self.host} sends too slowly: a larger --timeout waits longer")
                yield chunk


class _Session(requests.Session):
    """Asks one server and nobody else."""

    def __init__(self, access: PacsAccess) -> None:
        super().__init__()
        self._reading = _Reading(access.host, access.timeout_s)
        self.trust_env = False  # no proxy, no .netrc, no other authorities than --ca
        self.verify = True if access.ca is None else str(access.ca)
        if access.certificate is not None:
            self.cert = (str(access.certificate[0]), str(access.certificate[1]))
        if access.login is not None:
            user, password = access.login
            self.auth = HTTPBasicAuth(user.encode(), password.encode())
        self.headers["Accept"] = "application/dicom+json"

    def send(self, request: requests.PreparedRequest, **options: Any) -> requests.Response:
        """Send a request; the body of its answer is read within limits, and only when it is asked for."""
        address, mark, query = str(request.url).partition("?")
        # these are legal in a query, and some servers (Orthanc 1.10) do not decode them
        for code, sign in (("%2A", "*"), ("%3F", "?"), ("%2C", ",")):
            query = query.replace(code, sign)
        request.url = address + mark + query
        response = self._sent(request, options | {"stream": True})
        response.iter_content = partial(self._limited, response)  # type: ignore[method-assign]
        return response

    def _sent(self, request: requests.PreparedRequest, options: dict[str, Any]) -> requests.Response:
        for pause_s in PAUSES_S:
            try:
                response = super().send(request, **options)
            except (requests.exceptions.SSLError, requests.exceptions.Timeout):
                raise
            except requests.exceptions.ConnectionError:
                # the service may have closed a connection that was kept from the last request; the last try raises
                time.sleep(pause_s)
            else:
                if response.status_code not in BUSY:
                    return response
                response.close()
                time.sleep(pause_s)
        return super().send(request, **options)

    def _limited(self, response: requests.Response, *_: Any, **__: Any) -> Iterator[bytes]:
        return self._reading.chunks(response, MAX_SEARCH_BYTES)

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        """None; raises `PacsError` for a redirect, which could lead logins and patients to another host."""
        if resp.is_redirect or resp.is_permanent_redirect:
            resp.close()
            raise PacsError(f"{self._reading.host} redirects to another address: give the service's own address")
        return None


class PacsService:
    """A DICOMweb service; raises `PacsError` for whatever goes wrong there."""

    def __init__(self, access: PacsAccess) -> None:
        self.host = access.host
        self._url, self._reading, self._session = access.url, _Reading(access.host, access.timeout_s), _Session(access)
        self._timeout = (min(CONNECT_S, access.timeout_s), access.timeout_s)
        with translating(self.host):
            # `check_uid` checks them, less strictly than the standard
            self._client = DICOMwebClient(
                access.url,
                session=self._session,
                timeout=self._timeout,
                permissive_uid=True,
                chunk_size=2 * MAX_FILE_BYTES,  # objects are stored with a length, which every service takes
            )
        self._client.host = access.host  # the library leaves the port out of the Host header
        self._client.set_http_retry_params(retry=False)  # the session retries, and not whatever happens

    def __enter__(self) -> PacsService:
        return self

    def __exit__(self, *_: object) -> None:
        self._session.close()

    def search_studies(self, filters: Mapping[str, str]) -> Iterator[SearchResult]:
        """The studies that match attribute keywords and values as QIDO-RS writes them."""
        return self._pages(self._client.search_for_studies, "StudyInstanceUID", filters)

    def search_series(self, filters: Mapping[str, str], study_uid: str | None = None) -> Iterator[SearchResult]:
        """The series that match, of one study or of all."""
        if study_uid is not None:
            check_uid(study_uid)
        search = partial(self._client.search_for_series, study_uid)
        return self._pages(search, "SeriesInstanceUID", filters)

    def instance_uids(self, study_uid: str, series_uid: str) -> list[str]:
        """The SOP Instance UIDs of a series."""
        check_uid(study_uid, series_uid)
        search = partial(self._client.search_for_instances, study_uid, series_uid)
        return [result_text(result, "SOPInstanceUID") for result in self._pages(search, "SOPInstanceUID", {})]

    def retrieve(self, study_uid: str, series_uid: str, sop_uid: str, file: Path) -> Iterator[None]:
        """Retrieve the objects of a series, or one of them, byte by byte as the PACS holds them.

        Each is written to `file` in turn; the iterator stops after each one, so that it can be checked and moved away.

        Args:
            study_uid: the study's.
            series_uid: the series'.
            sop_uid: the object's; empty for all of the series.
            file: where each object is written.

        Raises:
            PacsError: as `PacsService`; an object may be at most `MAX_FILE_BYTES`.
            OSError: the file cannot be written.
        """
        check_uid(study_uid, series_uid, *([sop_uid] if sop_uid else []))
        # DICOMwebClient would unpack each object in memory, whatever its size, and write it anew
        path = f"{self._url}/studies/{study_uid}/series/{series_uid}" + (f"/instances/{sop_uid}" if sop_uid else "")
        response = self._get(path, AS_STORED)
        if response.status_code in (400, 406, 415):  # some services know no wildcard
            response.close()
            response = self._get(path, MEDIA_TYPE)
        with closing_answer(response), translating(self.host):
            response.raise_for_status()
            boundary = boundary_of(response, self.host)
        chunks = self._reading.chunks(response, 2**63)
        parts = single_part(chunks, response, self.host) if boundary is None else split_parts(chunks, boundary)
        stream: BinaryIO | None = None
        size = 0
        try:
            for piece in parts:
                if stream is None:
                    stream, size = file.open("wb"), 0
                if piece is not None:
                    size += len(piece)
                    if size > MAX_FILE_BYTES:
                        raise PacsError(f"an object of more than the {MAX_FILE_BYTES:,} bytes that are read")
                    stream.write(piece)
                    continue
                stream.close()
                stream = None
                yield
            for _ in itertools.islice(chunks, 2):  # so that the connection can be used again
                pass
        finally:
            if stream is not None:
                stream.close()
            response.close()

    def store(self, dataset: Dataset) -> None:
        """Store one object; raises `PacsError` unless the PACS confirms it."""
        uid = str(dataset.SOPInstanceUID)
        with translating(self.host):
            answer = self._client.store_instances([dataset])
            failed = [str(item.get("FailureReason", "")) for item in answer.get("FailedSOPSequence") or []]
            stored = [
                str(item.get("ReferencedSOPInstanceUID", "")) for item in answer.get("ReferencedSOPSequence") or []
            ]
        if failed and uid not in stored:
            raise PacsError(f"{self.host} refuses it (failure reason {failed[0] or 'not given'})")
        if uid not in stored and uid not in self._found(uid):  # some services answer in no form that is known
            raise PacsError(f"{self.host} does not confirm that it was stored")

    def _found(self, sop_uid: str) -> list[str]:
        with translating(self.host):
            results = self._client.search_for_instances(search_filters={"SOPInstanceUID": sop_uid}, limit=1)
        return [result_text(result, "SOPInstanceUID") for result in _mappings(results)]

    def _get(self, url: str, accept: str) -> requests.Response:
        with translating(self.host):
            headers = {"Accept": accept, "Accept-Encoding": "identity"}
            return self._session.get(url, headers=headers, timeout=self._timeout)

    def _pages(self, search: Any, uid: str, filters: Mapping[str, str]) -> Iterator[SearchResult]:
        """All results, each once, until a page brings no new one: not every service heeds `limit` and `offset`."""
        seen: set[str] = set()
        offset = 0
        while True:
            with translating(self.host):
                page = _mappings(search(search_filters=dict(filters), limit=PAGE, offset=offset))
            fresh = {result_text(result, uid): result for result in page}
            fresh = {key: result for key, result in fresh.items() if key not in seen}
            if not fresh:
                return
            seen |= fresh.keys()
            offset += len(page)
            if len(seen) > MAX_RESULTS:
                raise PacsError(f"more than {MAX_RESULTS:,} results: narrow the query")
            yield from fresh.values()


def check_uid(*uids: str) -> None:
    """Raise `PacsError` for what is no UID, and could lead to another address."""
    for uid in uids:
        if not UID.fullmatch(uid):
            raise PacsError(f"the PACS gives '{uid[:64]}' as a UID, which is none")


def result_values(result: SearchResult, keyword: str) -> list[str] | None:
    """The values of an attribute in a search result as text; None where the result does not have the attribute."""
    element = result.get(f"{tag_for_keyword(keyword):08X}")
    if not isinstance(element, Mapping):
        return None
    values = element.get("Value", [])
    texts = []
    for value in values if isinstance(values, list) else []:
        if isinstance(value, Mapping):  # a person's name
            value = value.get("Alphabetic", "")
        if isinstance(value, str | int | float):
            texts.append(str(value))
    return texts


def result_text(result: SearchResult, keyword: str) -> str:
    """The first value of an attribute in a search result; empty where there is none."""
    return next(iter(result_values(result, keyword) or []), "").strip(" \0")


def _mappings(results: Any) -> list[SearchResult]:
    if not isinstance(results, list) or not all(isinstance(result, Mapping) for result in results):
        raise ValueError("no list of results")
    return results
