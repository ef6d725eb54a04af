"""The engineer's folder of one survey.

survey.json        the questions, for each site
NAME.joined.json   each site's public key, as the site sent it
roster.json        all keys, for each site
NAME.answer.json   each site's masked numbers, as the site sent them
counts.json        the sums
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ld_common.core.atomic_files import write_bytes
from ld_common.core.errors import FederationError
from ld_common.protocol.survey import (
    CohortSurvey,
    JoinedSite,
    SurveyAnswer,
    SurveyRoster,
    file_bytes,
    read_answer,
    read_joined,
    read_roster,
    read_survey,
)
from ld_common.protocol.survey_sum import SurveyNumbers, check_answer, check_keys, sum_answers


@dataclass(frozen=True)
class SurveyFolder:
    """The folder that `ld-server survey new` made."""

    path: Path

    @property
    def survey_file(self) -> Path:
        """The questions, which each site gets."""
        return self.path / "survey.json"

    @property
    def roster_file(self) -> Path:
        """All sites' keys, which each site gets."""
        return self.path / "roster.json"

    @property
    def counts_file(self) -> Path:
        """What `sum` writes."""
        return self.path / "counts.json"

    def joined_file(self, site: str) -> Path:
        """What a site's `ld-client survey join` wrote."""
        return self.path / f"{site}.joined.json"

    def answer_file(self, site: str) -> Path:
        """What a site's `ld-client survey answer` wrote."""
        return self.path / f"{site}.answer.json"

    def write_survey(self, survey: CohortSurvey) -> None:
        """Write a new survey; raises `FederationError` where the folder has one."""
        if self.survey_file.exists():
            raise FederationError(f"'{self.path}' has a survey already: choose another folder")
        write_bytes(self.survey_file, file_bytes(survey.content()))

    def survey(self) -> CohortSurvey:
        """The survey; raises `FederationError`."""
        if not self.survey_file.exists():
            raise FederationError(f"'{self.path}' has no survey.json: make one with ld-server survey new")
        return read_survey(self.survey_file)

    def make_roster(self) -> SurveyRoster:
        """Collect the keys of all sites, and write roster.json.

        Raises:
            FederationError: keys that are missing or cannot be used, each named, or another roster in the folder, which
                sites may have answered.
        """
        survey = self.survey()
        joined, problems = self._each_site(survey, read_joined, self.joined_file, "key")
        problems += _misplaced(joined)
        for entry in joined.values():
            if entry.survey != survey.digest():
                problems.append(f"the key of {entry.site} is for another survey: send the site this survey.json")
        keys = {site: entry.public_key for site, entry in joined.items()}
        problems += [f"the key of {site} cannot be used: the site must join a new survey" for site in _bad(keys)]
        _raise_all(problems)
        roster = SurveyRoster(survey, keys)
        if self.roster_file.exists() and read_roster(self.roster_file) != roster:
            raise FederationError(
                f"'{self.roster_file}' has other keys, and sites that answered it refuse another one: make a new "
                "survey. If no site has it yet, remove it"
            )
        write_bytes(self.roster_file, file_bytes(roster.content()))
        return roster

    def sum(self) -> tuple[SurveyRoster, SurveyNumbers]:
        """Add up the answers of all sites, and write counts.json.

        Raises:
            FederationError: answers that are missing or cannot be used, each named, or that do not fit each other.
        """
        survey = self.survey()
        if not self.roster_file.exists():
            raise FederationError(f"'{self.path}' has no roster.json: make it with ld-server survey roster")
        roster = read_roster(self.roster_file)
        if roster.survey != survey:
            raise FederationError(f"'{self.roster_file}' is of another survey than '{self.survey_file}'")
        answers, problems = self._each_site(survey, read_answer, self.answer_file, "answer")
        problems += _misplaced(answers)
        for answer in answers.values():
            try:
                check_answer(roster, answer)
            except FederationError as error:
                problems.append(str(error))
        _raise_all(problems)
        numbers = sum_answers(roster, list(answers.values()))
        content = json.dumps(counts_content(roster, numbers), indent=2, ensure_ascii=False) + "\n"
        write_bytes(self.counts_file, content.encode())
        return roster, numbers

    def _each_site(self, survey: CohortSurvey, read: Any, file: Any, what: str) -> tuple[dict[str, Any], list[str]]:
        """What the sites sent, by the site in the file's name, and a sentence for each problem."""
        found, problems = {}, []
        for site in survey.sites:
            path = file(site)
            if not path.exists():
                problems.append(f"the {what} of {site} is missing: put {path.name} into '{self.path}'")
                continue
            try:
                found[site] = read(path)
            except FederationError as error:
                problems.append(str(error))
        return found, problems


def counts_content(roster: SurveyRoster, numbers: SurveyNumbers) -> dict[str, Any]:
    """The content of counts.json; the cells of a table are nested lists, one level for each axis."""
    survey, tables = roster.survey, []
    for table, cells in zip(survey.tables, numbers.tables, strict=True):
        axes = [survey.by_name[name] for name in table.axes]
        described = [{"name": axis.name, "unit": axis.unit, "cells": axis.labels} for axis in axes]
        shape = survey.shape(table)
        tables.append({"axes": described, "visit": table.visit, "patients": _nested(list(cells), shape)})
    return {
        "survey": survey.id,
        "roster": roster.fingerprint,
        "modality": survey.modality,
        "sites": list(survey.sites),
        "largest_error": 0 if numbers.step == len(survey.sites) else numbers.step // 2,
        "patients": numbers.patients,
        "visits": numbers.visits,
        "tables": tables,
    }


def counts_lines(roster: SurveyRoster, numbers: SurveyNumbers) -> Iterator[str]:
    """What the sums are, in words; the tables follow."""
    sites = roster.survey.sites
    yield f"{numbers.patients} patients with {numbers.visits} visits at {len(sites)} sites: {', '.join(sites)}"
    if numbers.step == len(sites):
        yield "every number is exact: each site's policy.count_step is 1"
    else:
        yield f"each number is off by at most {numbers.step // 2}: every site rounds, and small cells become 0"


def _nested(cells: Sequence[Any], shape: Sequence[int]) -> list[Any]:
    rows = list(cells)
    for size in reversed(shape[1:]):
        rows = [rows[start : start + size] for start in range(0, len(rows), size)]
    return rows


def _misplaced(entries: dict[str, JoinedSite] | dict[str, SurveyAnswer]) -> list[str]:
    return [
        f"the file of {site} is of site '{entry.site}': put each under its own name"
        for site, entry in entries.items()
        if entry.site != site
    ]


def _bad(keys: dict[str, str]) -> Iterable[str]:
    twice = [site for site, key in keys.items() if list(keys.values()).count(key) > 1]
    return sorted({*twice, *check_keys(keys.items())})


def _raise_all(problems: Sequence[str]) -> None:
    if problems:
        raise FederationError("; ".join(problems))
