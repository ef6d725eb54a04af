"""Counts the patients of a site's index, trained on and held out, for a cohort survey. No model library is needed."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass

from ld_client.data.store_index import SCHEMA_VERSION, open_index
from ld_client.data.withdrawals import check_consent
from ld_client.site_config import SiteConfig, load_modality
from ld_common.core.errors import FederationError, PolicyError, StoreError
from ld_common.imaging.modality import AttributeConfig, Attributes
from ld_common.protocol.survey import FIRST, VISITS, YEARS_FOLLOWED, CohortSurvey, SurveyAxis, SurveyTable
from ld_common.protocol.survey_sum import SurveyNumbers

DAYS_A_YEAR = 365.25


@dataclass(frozen=True)
class SurveyPatient:
    """One patient's visits in the order of their days."""

    days: tuple[int, ...]
    """Days since the patient's first visit."""
    first: Attributes
    last: Attributes

    def values(self, visit: str) -> Attributes:
        """Attributes at the `first` or `last` visit, and what is counted over all visits."""
        attributes = self.first if visit == FIRST else self.last
        years = (self.days[-1] - self.days[0]) / DAYS_A_YEAR
        return attributes | {VISITS: float(len(self.days)), YEARS_FOLLOWED: years}


def check_questions(site: SiteConfig, survey: CohortSurvey) -> None:
    """Refuse a survey of attributes that the site's modality does not have, or has with other categories or units.

    Raises:
        FederationError: such a question.
        ConfigError: as `load_modality`.
    """
    attributes = load_modality(site).attributes
    for axis in survey.axes:
        if axis.name in (VISITS, YEARS_FOLLOWED):
            if axis.categories:
                raise FederationError(f"the survey has categories of '{axis.name}', which is a number: it was altered")
            continue
        problem = _difference(axis, attributes.get(axis.name))
        if problem:
            raise FederationError(
                f"the survey asks for '{axis.name}', {problem}: agree on one modality file with the study's engineer"
            )


def read_patients(site: SiteConfig) -> list[SurveyPatient]:
    """The patients of the site's index, trained on and held out.

    Raises:
        StoreError: the index is absent, empty, damaged, of another version or modality, or holds a patient who withdrew
            consent.
        PolicyError: fewer patients than `policy.min_patients`.
        ConfigError: as `load_modality`.
    """
    folder, digest = site.store_path, load_modality(site).digest()
    with open_index(folder) as index:
        meta = dict(index.execute("SELECT key, value FROM meta"))
        for what, expected in (("schema", SCHEMA_VERSION), ("modality", digest)):
            if meta.get(what) != expected:
                raise StoreError(f"the store '{folder}' was made with another {what}: run ld-client index again")
        visits: dict[str, list[tuple[int, Attributes]]] = {}
        for pseudonym, day, attributes in index.execute("SELECT pseudonym, day, attributes FROM visits ORDER BY row"):
            visits.setdefault(pseudonym, []).append((int(day), json.loads(attributes)))
    check_consent(folder, visits)
    least = site.policy.min_patients
    if len(visits) < least:
        raise PolicyError(f"the store has fewer patients than policy.min_patients {least}: nothing is counted")
    patients = []
    for rows in visits.values():
        rows.sort(key=lambda row: row[0])
        patients.append(SurveyPatient(tuple(day for day, _ in rows), rows[0][1], rows[-1][1]))
    return patients


def count_patients(survey: CohortSurvey, patients: list[SurveyPatient]) -> SurveyNumbers:
    """The exact numbers of a site, with a step of 1; raises `StoreError` for a value that no axis has."""
    tables = tuple(_count(survey, table, patients) for table in survey.tables)
    return SurveyNumbers(1, len(patients), sum(len(patient.days) for patient in patients), tables)


def _count(survey: CohortSurvey, table: SurveyTable, patients: list[SurveyPatient]) -> tuple[int, ...]:
    axes, counts = [survey.by_name[name] for name in table.axes], Counter[int]()
    for patient in patients:
        values, cell = patient.values(table.visit), 0
        for axis in axes:
            try:
                cell = cell * len(axis.labels) + axis.place(values[axis.name])
            except (KeyError, ValueError, TypeError) as error:
                raise StoreError(
                    f"a visit in the store has no usable '{axis.name}': run ld-client index again"
                ) from error
        counts[cell] += 1
    return tuple(counts[cell] for cell in range(math.prod(survey.shape(table))))


def _difference(axis: SurveyAxis, config: AttributeConfig | None) -> str:
    """How an axis differs from the site's attribute; empty if it does not."""
    if config is None:
        return "which this site's modality lacks"
    if bool(axis.categories) != bool(config.categories):
        return f"as {'categories' if axis.categories else 'numbers'}, which it is not in this site's modality"
    if set(axis.categories) != set(config.categories):
        there, here = ", ".join(axis.categories), ", ".join(config.categories)
        return f"with the categories {there}, and this site's modality has {here}"
    if axis.unit != config.unit:
        return f"in {axis.unit or 'no unit'}, and this site's modality has {config.unit or 'no unit'}"
    return ""
