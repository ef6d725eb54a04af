"""A query of a PACS by attributes, and the series that match it.

A service may ignore an attribute that it cannot search by, so every result is matched here as well.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pydicom.datadict import dictionary_VR, keyword_dict, keyword_for_tag

from ld_common.core.errors import ConfigError
from ld_common.imaging.dicomweb import UID, PacsService, SearchResult, result_text, result_values

STUDY_ATTRIBUTES = (
    *("StudyInstanceUID", "StudyDate", "StudyTime", "StudyID", "StudyDescription", "AccessionNumber"),
    *("ModalitiesInStudy", "ReferringPhysicianName", "PatientName", "PatientID", "PatientBirthDate", "PatientSex"),
    "PatientAge",
)
"""Attributes by which studies are searched; all others are taken to be of series."""
INSTANCE_ATTRIBUTES = ("SOPInstanceUID", "SOPClassUID", "InstanceNumber", "Rows", "Columns", "NumberOfFrames")
RANGES = ("DA", "TM", "DT")
"""Value representations that are searched by `first-last`."""
WITHOUT_WILDCARDS = (*RANGES, "UI", "IS", "DS", "AS")


@dataclass(frozen=True)
class RemoteSeries:
    """A series that a PACS has."""

    study_uid: str
    series_uid: str
    modality: str
    description: str
    images: int | None
    """As the PACS counts them; None where it does not."""


@dataclass(frozen=True)
class SeriesQuery:
    """Attribute keyword -> the value that it is searched by."""

    of_study: Mapping[str, str]
    of_series: Mapping[str, str]


@dataclass
class SeriesFound:
    """What matches a query, and what the PACS gave besides."""

    series: list[RemoteSeries] = field(default_factory=list)
    studies: int = 0
    ignored: Counter[str] = field(default_factory=Counter)
    """Reason -> results that were ignored for it."""


def read_query(texts: Sequence[str]) -> SeriesQuery:
    """The query of `ATTRIBUTE=VALUE` texts; raises `ConfigError` for what cannot be searched by."""
    query: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name, value = _keyword(name.strip()), value.strip()
        if not equals or not value:
            raise ConfigError(f"--query '{text}' is not of the form ATTRIBUTE=VALUE, such as Modality=MR")
        if name in query:
            raise ConfigError(f"--query names {name} twice: fetch once for each value, into the same folder")
        query[name] = value
    if not query:
        raise ConfigError("--query is missing, and the whole PACS is never fetched: give ATTRIBUTE=VALUE")
    return SeriesQuery(
        {name: value for name, value in query.items() if name in STUDY_ATTRIBUTES},
        {name: value for name, value in query.items() if name not in STUDY_ATTRIBUTES},
    )


def _keyword(name: str) -> str:
    """The keyword of an attribute that is given by keyword or as eight hexadecimal digits."""
    keyword = keyword_for_tag(int(name, 16)) if re.fullmatch("[0-9A-Fa-f]{8}", name) else name
    if not keyword or keyword not in keyword_dict:
        near = difflib.get_close_matches(name, keyword_dict, 1)
        remedy = f"did you mean {near[0]}?" if near else "give a DICOM keyword, such as SeriesDescription"
        raise ConfigError(f"--query '{name}' is no DICOM attribute: {remedy}")
    if keyword in INSTANCE_ATTRIBUTES or dictionary_VR(keyword) == "SQ":
        raise ConfigError(
            f"--query {keyword}: only attributes of studies and series with a plain value are searched by"
        )
    return keyword


def search(
    pacs: PacsService, query: SeriesQuery, progress: Callable[[int, int], None] = lambda *_: None
) -> SeriesFound:
    """All series that match.

    Args:
        pacs: where they are searched.
        query: what they must match.
        progress: called with the studies whose series were searched, and all.

    Raises:
        PacsError: the search failed.
    """
    found = SeriesFound()
    series: dict[tuple[str, str], RemoteSeries] = {}
    for result in _series_results(pacs, query, found, progress):
        match = _remote_series(result)
        if match is None:
            found.ignored["no valid UID"] += 1
        else:
            series[match.study_uid, match.series_uid] = match
    found.series = list(series.values())
    found.studies = len({match.study_uid for match in found.series})
    return found


def _series_results(
    pacs: PacsService, query: SeriesQuery, found: SeriesFound, progress: Callable[[int, int], None]
) -> Iterator[SearchResult]:
    """Matching series, with the UID of their study.

    A study's attributes are searched in studies, as services need not search series by them.
    """
    if not query.of_study:
        yield from _matching(pacs.search_series(for_service(query.of_series)), query.of_series, found)
        return
    uids = []
    for study in _matching(pacs.search_studies(for_service(query.of_study)), query.of_study, found):
        uid = result_text(study, "StudyInstanceUID")
        if UID.fullmatch(uid):
            uids.append(uid)
        else:
            found.ignored["no valid UID"] += 1
    for done, uid in enumerate(uids, start=1):
        results = pacs.search_series(for_service(query.of_series), uid)
        for result in _matching(results, query.of_series, found):
            if result_text(result, "StudyInstanceUID") not in ("", uid):
                found.ignored["series of another study"] += 1
            else:
                yield {**result, "0020000D": {"vr": "UI", "Value": [uid]}}
        progress(done, len(uids))


def _matching(results: Iterator[SearchResult], wanted: Mapping[str, str], found: SeriesFound) -> Iterator[SearchResult]:
    for result in results:
        problem = mismatch(result, wanted)
        if problem:
            found.ignored[problem] += 1
        else:
            yield result


def mismatch(result: SearchResult, wanted: Mapping[str, str]) -> str:
    """Why a search result does not match; empty where it does."""
    for keyword, pattern in wanted.items():
        values = result_values(result, keyword)
        if values is None:  # the standard makes a service return what it matched by
            return f"the PACS does not say its {keyword}, so it cannot search by it"
        if not any(value_matches(dictionary_VR(keyword), pattern, value) for value in values or [""]):
            return f"another {keyword}"
    return ""


def value_matches(vr: str, pattern: str, value: str) -> bool:
    """Whether a value matches a pattern as in a search (PS3.4 C.2.2.2), upper and lower case alike."""
    value = value.strip(" \0")
    if vr in RANGES and "-" in pattern:
        first, _, last = (part.replace(":", "") for part in pattern.partition("-"))
        return bool(value) and value.replace(":", "") >= first and (not last or value[: len(last)] <= last)
    if vr == "UI":
        return value in re.split(r"[,\\]", pattern)
    if vr == "PN":
        value, pattern = value.rstrip("^"), pattern.rstrip("^")
    signs = {"*": ".*", "?": "."}
    regular = "".join(signs.get(sign) or re.escape(sign) for sign in pattern)
    return re.fullmatch(regular, value, re.IGNORECASE | re.DOTALL) is not None


def for_service(wanted: Mapping[str, str]) -> dict[str, str]:
    """The values as they are sent: what needs an escape in an address becomes a wildcard, as some services decode none.

    Results are matched by the value itself.
    """
    sent = {}
    for keyword, value in wanted.items():
        if dictionary_VR(keyword) not in WITHOUT_WILDCARDS:
            value = re.sub(r"[^\x00-\x7f]+", "*", value)
            value = re.sub(r"[^A-Za-z0-9_.*?~-]", "?", value)
        sent[keyword] = value
    return sent


def _remote_series(result: SearchResult) -> RemoteSeries | None:
    """The series of a result; None without valid UIDs."""
    study, series = result_text(result, "StudyInstanceUID"), result_text(result, "SeriesInstanceUID")
    if not UID.fullmatch(study) or not UID.fullmatch(series):
        return None
    images = result_text(result, "NumberOfSeriesRelatedInstances")
    return RemoteSeries(
        study,
        series,
        result_text(result, "Modality")[:16],
        result_text(result, "SeriesDescription")[:64],
        int(images) if re.fullmatch("[0-9]{1,6}", images) and int(images) else None,
    )
