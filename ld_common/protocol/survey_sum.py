"""The numbers of a cohort survey, the masks that hide one site's, and the sum.

A site's vector holds `CHECK_WORDS` ones, its rounding step, its patients, its visits, then the cells of each table, row
by row. Every site adds a mask for each other site, which that one subtracts, modulo 2**32. No site may drop out: a sum
with an answer missing keeps the masks of that site and says nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from ld_common.core.errors import FederationError
from ld_common.protocol.secagg.crypto import agree, crowd_digest, pair_mask
from ld_common.protocol.survey import MOST_COUNT, CohortSurvey, SurveyAnswer, SurveyRoster

CHECK_WORDS = 4
"""Numbers in front, each 1: unless they sum to the number of sites, some mask was not what was agreed."""


@dataclass(frozen=True)
class SurveyNumbers:
    """What a survey asks for: of one site, or summed over all."""

    step: int
    """Each number of a site is a multiple of it; a number of the site is off by at most half of it. Of a sum, the sum
    of the steps."""
    patients: int
    visits: int
    tables: tuple[tuple[int, ...], ...]
    """Patients in each cell, row by row, in the order of `CohortSurvey.tables`."""

    def rounded(self, step: int) -> SurveyNumbers:
        """Each number as its nearest multiple of `step`; half a step becomes a whole one, less than half becomes 0."""
        tables = tuple(tuple(nearest_multiple(count, step) for count in cells) for cells in self.tables)
        return SurveyNumbers(step, nearest_multiple(self.patients, step), nearest_multiple(self.visits, step), tables)

    def vector(self) -> list[int]:
        """The numbers after the check words, in the order of the wire."""
        return [self.step, self.patients, self.visits, *itertools.chain.from_iterable(self.tables)]


def nearest_multiple(count: int, step: int) -> int:
    """The multiple of `step` nearest to a count of 0 or more, the higher of two."""
    return (2 * count + step) // (2 * step) * step


def vector_length(survey: CohortSurvey) -> int:
    """Numbers of a site's vector."""
    return CHECK_WORDS + 3 + sum(map(survey.cells, survey.tables))


def mask_numbers(roster: SurveyRoster, site: str, key: X25519PrivateKey, numbers: SurveyNumbers) -> SurveyAnswer:
    """A site's answer: its numbers plus a mask for each other site, modulo 2**32.

    Raises:
        FederationError: a number beyond `MOST_COUNT`, or a public key of the roster with which nobody can agree.
    """
    plain = [1] * CHECK_WORDS + numbers.vector()
    if max(plain) > MOST_COUNT:
        raise FederationError(f"a count of {max(plain)}: a survey sums counts up to {MOST_COUNT}")
    masked, crowd = np.array(plain, np.uint32), crowd_digest(roster.session, roster.survey.sites)
    for peer, public in roster.keys.items():
        if peer != site:
            masked += pair_mask(key, bytes.fromhex(public), crowd, site, peer, len(masked))
    return SurveyAnswer(roster.session.hex(), site, tuple(map(int, masked)))


def check_keys(keys: Iterable[tuple[str, str]]) -> list[str]:
    """The sites of pairs (site, public key in hex) with whose key nobody can agree on a secret."""
    private, unusable = X25519PrivateKey.generate(), []
    for site, public in keys:
        try:
            agree(private, bytes.fromhex(public))
        except FederationError:
            unusable.append(site)
    return unusable


def sum_answers(roster: SurveyRoster, answers: Sequence[SurveyAnswer]) -> SurveyNumbers:
    """The sum over all sites.

    Args:
        roster: survey and keys.
        answers: one of each site, in any order.

    Raises:
        FederationError: an answer is missing, stands twice, or is of another roster or length, or the masks do not
            cancel, or the sums do not fit each other.
    """
    survey, length = roster.survey, vector_length(roster.survey)
    if sorted(answer.site for answer in answers) != list(survey.sites):
        raise FederationError("the sum needs one answer of each site")
    for answer in answers:
        check_answer(roster, answer)
    total = np.zeros(length, np.uint32)
    for answer in answers:
        total += np.array(answer.masked, np.uint32)
    sites, sums = len(answers), [int(number) for number in total]
    if sums[:CHECK_WORDS] != [sites] * CHECK_WORDS:
        raise FederationError(
            "the masks of the answers do not cancel: a site answered with another key than the roster's, or an answer "
            "was altered after it was made. No number can be read; make a new survey"
        )
    step, patients, visits, *cells = sums[CHECK_WORDS:]
    tables, at = [], 0
    for table in survey.tables:
        tables.append(tuple(cells[at : at + survey.cells(table)]))
        at += survey.cells(table)
    numbers = SurveyNumbers(step, patients, visits, tuple(tables))
    _check_plausible(survey, numbers, sites)
    return numbers


def check_answer(roster: SurveyRoster, answer: SurveyAnswer) -> None:
    """Raise `FederationError` for an answer to another roster, or of another length."""
    if answer.roster != roster.session.hex():
        raise FederationError(f"the answer of {answer.site} is to another roster: ask for one to this roster")
    if len(answer.masked) != vector_length(roster.survey):
        raise FederationError(
            f"the answer of {answer.site} has {len(answer.masked)} numbers, not {vector_length(roster.survey)}: it was "
            "made by another version of this software"
        )


def _check_plausible(survey: CohortSurvey, numbers: SurveyNumbers, sites: int) -> None:
    """Refuse sums that no rounded counts of real patients give; raises `FederationError`."""
    inconsistent = "the answers do not fit each other: {}. One site's software counts otherwise, or an answer was "
    inconsistent += "altered; which one cannot be seen in a sum"
    if max(numbers.vector()) > sites * MOST_COUNT:
        raise FederationError(inconsistent.format(f"a sum of {max(numbers.vector())} over {sites} sites"))
    if numbers.visits + numbers.step < numbers.patients:
        raise FederationError(inconsistent.format(f"{numbers.patients} patients with {numbers.visits} visits"))
    for table, cells in zip(survey.tables, numbers.tables, strict=True):
        # each patient stands in one cell of a table, and each number of a site is off by half a step at most
        if 2 * abs(sum(cells) - numbers.patients) > (len(cells) + 1) * numbers.step:
            raise FederationError(
                inconsistent.format(f"{table.title} sum to {sum(cells)}, of {numbers.patients} patients in all")
            )
