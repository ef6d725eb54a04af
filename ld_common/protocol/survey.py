"""A cohort survey: how many patients the sites have, in tables, before there is a study.

Nothing runs for it; people pass small JSON files on, each with its `kind`:

survey.json        the engineer asks: sites, tables, bins
NAME.joined.json   a site's public key for this survey
roster.json        the survey and all keys, whose fingerprint the sites compare
NAME.answer.json   a site's rounded counts under masks that cancel in the sum of all sites

`ld_common.protocol.survey_sum` has the numbers and the masks.
"""

from __future__ import annotations

import base64
import math
import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ld_common.core.config import nearest, require
from ld_common.core.errors import ConfigError, FederationError
from ld_common.core.strict_json import read_json, read_limited
from ld_common.protocol.keys import canonical, is_digest, is_line
from ld_common.protocol.secagg.crypto import digest
from ld_common.protocol.site_name import check_site_name

VERSION = 1
SURVEY, JOINED, ROSTER, ANSWER = "cohort survey", "joined site", "survey roster", "survey answer"
"""Kinds of files."""
VISITS, YEARS_FOLLOWED = "visits", "years_followed"
"""Axes that every modality has: visits of a patient, years between the first and the last."""
FIRST, LAST = "first", "last"
"""The visit whose attributes are counted."""
FEWEST_SITES, MOST_SITES = 3, 100
MOST_AXES, MOST_CUTS, MOST_CATEGORIES, MOST_TABLES, MOST_CELLS = 50, 100, 100, 100, 5000
MOST_COUNT = 10_000_000
"""Largest number that a site reports: the sum over `MOST_SITES` stays below 2**32."""
LARGEST_CUT = 1e9
KINDS = {int: "a whole number", str: "text", list: "a list", dict: "an object"}


@dataclass(frozen=True)
class SurveyAxis:
    """An attribute, or a property of a patient, and the cells into which it falls: by category, or between cuts."""

    name: str
    unit: str = ""
    categories: tuple[str, ...] = ()
    cuts: tuple[float, ...] = ()
    """Ascending. Cuts 60, 70 make the cells below 60, from 60 to below 70, and 70 or more."""

    def __post_init__(self) -> None:
        lines = is_line(self.name) and (not self.unit or is_line(self.unit)) and all(map(is_line, self.categories))
        require(lines, "an axis needs a name, a unit and categories of one line each")
        where = f"axis '{self.name}'"
        require(bool(self.categories) != bool(self.cuts), f"{where} needs either categories or cuts")
        require(len(set(self.categories)) == len(self.categories), f"{where} has a category twice")
        many = len(self.categories) > MOST_CATEGORIES or len(self.cuts) > MOST_CUTS
        require(not many, f"{where} has more than {MOST_CATEGORIES} categories or {MOST_CUTS} cuts")
        finite = all(-LARGEST_CUT <= cut <= LARGEST_CUT for cut in self.cuts)
        require(finite, f"{where} has a cut that is no number from {-LARGEST_CUT:g} to {LARGEST_CUT:g}")
        ascending = all(low < high for low, high in zip(self.cuts, self.cuts[1:], strict=False))
        require(ascending, f"cuts of {where} are {_listed(self.cuts)}: write them in ascending order, each once")
        if self.name == VISITS:
            whole = bool(self.cuts) and self.cuts[0] >= 2 and all(cut == int(cut) for cut in self.cuts)
            require(whole, f"cuts of {VISITS} are {_listed(self.cuts)}: use whole numbers from 2 on")

    @cached_property
    def labels(self) -> list[str]:
        """What each cell is called."""
        if self.categories:
            return list(self.categories)
        inner = list(zip(self.cuts, self.cuts[1:], strict=False))
        if self.name == VISITS:
            ranges = [(low, high - 1) for low, high in [(1.0, self.cuts[0]), *inner]]
            names = [f"{low:.10g}" if low == high else f"{low:.10g} to {high:.10g}" for low, high in ranges]
        else:
            names = [f"below {self.cuts[0]:.10g}", *(f"{low:.10g} to <{high:.10g}" for low, high in inner)]
        return [*names, f"{self.cuts[-1]:.10g} or more"]

    @property
    def title(self) -> str:
        """The name in words, with the unit in brackets."""
        name = self.name.replace("_", " ")
        return f"{name} ({self.unit})" if self.unit else name

    def place(self, value: float | str) -> int:
        """The cell of a value, from 0; raises `ValueError` for one that has none."""
        if self.categories:
            return self.categories.index(str(value))
        number = float(value)
        if not math.isfinite(number):
            raise ValueError(f"{self.name} is {number}")
        return bisect_right(self.cuts, number)


@dataclass(frozen=True)
class SurveyTable:
    """A table of patients by one or more axes; each patient stands in one cell."""

    axes: tuple[str, ...]
    visit: str = FIRST
    """Which visit's attributes count: `first` or `last`."""

    def __post_init__(self) -> None:
        require(bool(self.axes) and len(set(self.axes)) == len(self.axes), "a table needs axes, each once")
        require(self.visit in (FIRST, LAST), f"visit of a table is '{self.visit}': use {FIRST} or {LAST}")

    @property
    def title(self) -> str:
        """What is counted, in words."""
        words = [name.replace("_", " ") for name in self.axes]
        names = f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]
        attributes = set(self.axes) - {VISITS, YEARS_FOLLOWED}
        return f"patients by {names}" + (f", at the {self.visit} visit" if attributes else "")


@dataclass(frozen=True)
class CohortSurvey:
    """What is asked, and of which sites.

    Raises:
        ConfigError: too few sites, a name that cannot be used, or more cells than `MOST_CELLS`.
    """

    id: str
    """32 hex digits, drawn at random."""
    modality: str
    """The modality's name, for people."""
    sites: tuple[str, ...]
    """Sorted."""
    axes: tuple[SurveyAxis, ...]
    tables: tuple[SurveyTable, ...]

    def __post_init__(self) -> None:
        require(bool(re.fullmatch(r"[0-9a-f]{32}", self.id)), "the survey's id is not 32 hex digits")
        require(is_line(self.modality), "the modality's name is not one line")
        for site in self.sites:
            check_site_name(site)
        folded = {site.lower() for site in self.sites}  # names of files, on some disks without case
        require(self.sites == tuple(sorted(self.sites)) and len(folded) == len(self.sites), "a site is named twice")
        fits = FEWEST_SITES <= len(self.sites) <= MOST_SITES
        few = f"a survey over {len(self.sites)} sites: name {FEWEST_SITES} to {MOST_SITES}, as in a sum of two each "
        require(fits, f"{few}knows the other's counts")
        require(0 < len(self.axes) <= MOST_AXES, f"a survey has {len(self.axes)} axes: use 1 to {MOST_AXES}")
        require(len(self.by_name) == len(self.axes), "an axis is named twice")
        require(0 < len(self.tables) <= MOST_TABLES, f"a survey has {len(self.tables)} tables: use 1 to {MOST_TABLES}")
        require(len(set(self.tables)) == len(self.tables), "a table is asked for twice")
        for table in self.tables:
            for name in table.axes:
                require(name in self.by_name, f"no axis '{name}' for a table: {nearest(name, list(self.by_name))}")
        cells = sum(map(self.cells, self.tables))
        require(cells <= MOST_CELLS, f"the tables have {cells} cells: use coarser bins, {MOST_CELLS} cells at most")

    @cached_property
    def by_name(self) -> Mapping[str, SurveyAxis]:
        """The axes by name."""
        return {axis.name: axis for axis in self.axes}

    def shape(self, table: SurveyTable) -> list[int]:
        """Number of cells along each axis of a table."""
        return [len(self.by_name[name].labels) for name in table.axes]

    def cells(self, table: SurveyTable) -> int:
        """Number of cells of a table."""
        return math.prod(self.shape(table))

    def content(self) -> dict[str, Any]:
        """The content of survey.json."""
        axes = [
            {"name": axis.name, "unit": axis.unit, "categories": list(axis.categories), "cuts": list(axis.cuts)}
            for axis in self.axes
        ]
        tables = [{"axes": list(table.axes), "visit": table.visit} for table in self.tables]
        named = {"id": self.id, "modality": self.modality, "sites": list(self.sites)}
        return {**_head(SURVEY), **named, "axes": axes, "tables": tables}

    def digest(self) -> str:
        """SHA-256 of all of it, hex."""
        return digest("cohort survey", canonical(self.content())).hex()


@dataclass(frozen=True)
class JoinedSite:
    """A site's public key (X25519) for one survey."""

    survey: str
    """Digest of the survey, hex."""
    site: str
    public_key: str
    """64 hex digits."""

    def __post_init__(self) -> None:
        check_site_name(self.site)
        require(is_digest(self.survey), "the digest of its survey is not 64 hex digits")
        require(is_digest(self.public_key), "its public key is not 64 hex digits")

    def content(self) -> dict[str, Any]:
        """The content of NAME.joined.json."""
        return {**_head(JOINED), "survey": self.survey, "site": self.site, "public_key": self.public_key}


@dataclass(frozen=True)
class SurveyRoster:
    """A survey and the public key of each of its sites. All sites must have the same, or no mask cancels."""

    survey: CohortSurvey
    keys: Mapping[str, str] = field(default_factory=dict)
    """Site -> public key, hex."""

    def __post_init__(self) -> None:
        require(sorted(self.keys) == list(self.survey.sites), "the roster does not hold a key of each site")
        require(all(map(is_digest, self.keys.values())), "a public key of the roster is not 64 hex digits")
        require(len(set(self.keys.values())) == len(self.keys), "two sites of the roster have one key")

    def content(self) -> dict[str, Any]:
        """The content of roster.json."""
        return {**_head(ROSTER), "survey": self.survey.content(), "keys": dict(sorted(self.keys.items()))}

    @cached_property
    def session(self) -> bytes:
        """Digest of survey and keys, 32 bytes, to which all masks are bound."""
        return digest("survey roster", canonical(self.content()))

    @property
    def fingerprint(self) -> str:
        """`session` as people compare it."""
        return "SHA256:" + base64.b64encode(self.session).decode().rstrip("=")


@dataclass(frozen=True)
class SurveyAnswer:
    """One site's masked numbers. Alone, or with all but one of the others, they are uniform over 32 bits."""

    roster: str
    """`SurveyRoster.session`, hex."""
    site: str
    masked: tuple[int, ...]
    """Each from 0 to 2**32 - 1; `ld_common.protocol.survey_sum` says in which order."""

    def __post_init__(self) -> None:
        check_site_name(self.site)
        require(is_digest(self.roster), "the digest of its roster is not 64 hex digits")
        require(all(0 <= number < 2**32 for number in self.masked), "a number is not from 0 to 2**32 - 1")

    def content(self) -> dict[str, Any]:
        """The content of NAME.answer.json, with a checksum against damage."""
        body = {**_head(ANSWER), "roster": self.roster, "site": self.site, "masked": list(self.masked)}
        return {**body, "checksum": _checksum(body)}


def read_survey(path: Path) -> CohortSurvey:
    """Read survey.json; raises `FederationError` for a file that cannot be used."""
    try:
        return _survey(_content(path, SURVEY))
    except (ConfigError, ValueError) as error:
        raise _unusable(path, error) from error


def read_joined(path: Path) -> JoinedSite:
    """Read NAME.joined.json; raises `FederationError` for a file that cannot be used."""
    try:
        return JoinedSite(**_fields(_content(path, JOINED), {"survey": str, "site": str, "public_key": str}))
    except (ConfigError, ValueError) as error:
        raise _unusable(path, error) from error


def read_roster(path: Path) -> SurveyRoster:
    """Read roster.json; raises `FederationError` for a file that cannot be used."""
    try:
        fields = _fields(_content(path, ROSTER), {"survey": dict, "keys": dict})
        _check_head(fields["survey"], SURVEY)
        return SurveyRoster(_survey(_body(fields["survey"])), fields["keys"])
    except (ConfigError, ValueError) as error:
        raise _unusable(path, error) from error


def read_answer(path: Path) -> SurveyAnswer:
    """Read NAME.answer.json; raises `FederationError` for a file that cannot be used or was damaged."""
    try:
        return answer_of(_content(path, ANSWER))
    except (ConfigError, ValueError) as error:
        raise _unusable(path, error) from error


def answer_of(content: dict[str, Any]) -> SurveyAnswer:
    """An answer of its content without kind and version; raises `ConfigError` or `ValueError`."""
    fields = _fields(content, {"roster": str, "site": str, "masked": list, "checksum": str})
    checksum = fields.pop("checksum")
    masked = tuple(_items(fields["masked"], int, "masked"))
    answer = SurveyAnswer(**{**fields, "masked": masked})
    require(answer.content()["checksum"] == checksum, "it was damaged: its checksum is wrong; ask for it again")
    return answer


def file_bytes(content: Mapping[str, Any]) -> bytes:
    """A content as it is written to a file."""
    return canonical(content) + b"\n"


def _survey(content: dict[str, Any]) -> CohortSurvey:
    fields = _fields(content, {"id": str, "modality": str, "sites": list, "axes": list, "tables": list})
    axes = []
    for entry in _items(fields["axes"], dict, "axes"):
        axis = _fields(entry, {"name": str, "unit": str, "categories": list, "cuts": list})
        cuts = axis["cuts"]
        require(all(type(cut) in (int, float) for cut in cuts), "a cut is not a number")
        # an integer of a thousand digits is no float: the axis refuses infinity
        cuts = tuple(float(cut) if abs(cut) <= LARGEST_CUT else math.inf for cut in cuts)
        axes.append(SurveyAxis(axis["name"], axis["unit"], tuple(_items(axis["categories"], str, "categories")), cuts))
    tables = []
    for entry in _items(fields["tables"], dict, "tables"):
        table = _fields(entry, {"axes": list, "visit": str})
        tables.append(SurveyTable(tuple(_items(table["axes"], str, "axes")), table["visit"]))
    sites = tuple(_items(fields["sites"], str, "sites"))
    return CohortSurvey(fields["id"], fields["modality"], sites, tuple(axes), tuple(tables))


def _head(kind: str) -> dict[str, Any]:
    return {"kind": kind, "version": VERSION}


def _checksum(body: Mapping[str, Any]) -> str:
    return digest("survey answer", canonical(body)).hex()


def _content(path: Path, kind: str) -> dict[str, Any]:
    """A file's content without kind and version; raises `FederationError` or `ValueError`."""
    try:
        raw = read_limited(path)
    except OSError as error:
        raise FederationError(f"cannot read '{path}': {error.strerror or error}") from error
    try:
        content = read_json(raw)
    except ValueError as error:
        raise ValueError(f"it is no JSON of this software ({error})") from error
    _check_head(content, kind)
    return _body(content)


def _check_head(content: object, kind: str) -> None:
    require(isinstance(content, dict), f"it is no {kind}")
    found, version = (content.get(name) if isinstance(content, dict) else None for name in ("kind", "version"))
    known = isinstance(found, str) and found in (SURVEY, JOINED, ROSTER, ANSWER)
    require(found == kind, f"it is a {found}, not a {kind}" if known else f"it is no {kind}")
    require(type(version) is int and version == VERSION, "another version of this software made it")


def _body(content: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name not in ("kind", "version")}


def _fields(content: Mapping[str, Any], kinds: Mapping[str, type]) -> dict[str, Any]:
    require(set(content) == set(kinds), f"it needs the keys {', '.join(kinds)} and no others")
    for name, kind in kinds.items():
        require(type(content[name]) is kind, f"'{name}' is not {KINDS[kind]}")
    return dict(content)


def _items(values: Sequence[Any], kind: type, name: str) -> Sequence[Any]:
    require(all(type(value) is kind for value in values), f"an entry of '{name}' is not {KINDS[kind]}")
    return values


def _unusable(path: Path, error: Exception) -> FederationError:
    return FederationError(f"cannot use '{path}': {error}")


def _listed(cuts: Iterable[float]) -> str:
    return ", ".join(f"{cut:g}" for cut in cuts)
