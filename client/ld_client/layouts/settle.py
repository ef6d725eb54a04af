"""Settles which scans are visits: one of each visit, dated or the only one of its patient, with plausible ages."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from itertools import pairwise

from ld_client.layouts.base import SEX, LayoutImport
from ld_client.layouts.entries import Cause, Conflict, LayoutVisit
from ld_client.layouts.words import age_text
from ld_common.core.config import is_number
from ld_common.imaging.modality import AGE

DAYS_OF_YEAR = 365.25
STANDS_DAYS = 400
"""Days after which nobody has the same age in whole years, and some more."""
PACE_YEARS = 1.5
"""Two ages in whole years and a date by the year differ from the time between by less."""


def settle(run: LayoutImport) -> list[LayoutVisit]:
    """The visits of an import in the order of patients and time; the others are left out, with their reasons."""
    run.leave_out_the_rest()
    visits = _one_scan_of_each_visit(run)
    visits = _dated(run, visits)
    if run.options.baseline_age:
        _add_elapsed_time(run, visits)
    visits = _one_visit_of_each_patient(run, visits)
    for visit in visits:
        if visit.when is None:
            visit.day = 0
    _check_files(run, visits)
    for patient, dated in _by_patient(visits).items():
        _check_patient(run, patient, dated)
    return visits


def _by_patient(visits: Sequence[LayoutVisit]) -> dict[str, list[LayoutVisit]]:
    patients: dict[str, list[LayoutVisit]] = defaultdict(list)
    for visit in sorted(visits, key=lambda visit: (visit.patient, visit.when or 0, visit.order or 0, visit.file)):
        patients[visit.patient].append(visit)
    return patients


def _one_scan_of_each_visit(run: LayoutImport) -> list[LayoutVisit]:
    groups: dict[Hashable, list[LayoutVisit]] = defaultdict(list)
    for visit in run.visits:
        groups[visit.patient, visit.date, visit.day, visit.label if visit.when is None else ""].append(visit)
    kept: list[LayoutVisit] = []
    for scans in groups.values():
        places = {id(visit): (run.tier(visit.file, visit.series) or 0, visit.rank) for visit in scans}
        best = min(places.values())
        chosen = [visit for visit in scans if places[id(visit)] == best]
        if len(chosen) > 1:
            names = ", ".join(sorted(visit.name for visit in scans))
            for visit in scans:
                detail = f"one of {len(scans)}: {names}; --series PATTERN, several times in order, prefers one"
                run.leave_out(visit.name, Cause.AMBIGUOUS, detail, files=visit.files)
            continue
        kept += chosen
        for visit in scans:
            if visit is not chosen[0]:
                detail = f"the visit's scan is {chosen[0].name}"
                run.leave_out(visit.name, Cause.OTHER_SERIES, detail, files=visit.files)
    return kept


def _dated(run: LayoutImport, visits: Sequence[LayoutVisit]) -> list[LayoutVisit]:
    """Visits with a date or a day, those of patients who have only one, and all where one is to be chosen by order."""
    kept: list[LayoutVisit] = []
    for scans in _by_patient(visits).values():
        has_dates = any(visit.date is not None for visit in scans)
        single = len(scans) == 1
        orders = {visit.order for visit in scans}
        by_order = run.options.one_visit and None not in orders and len(orders) == len(scans)
        for visit in scans:
            other_scale = has_dates and visit.date is None
            if single or by_order or (visit.when is not None and not other_scale):
                kept.append(visit)
                continue
            where = "the patient's other visits have dates, it has none" if other_scale else "neither date nor day"
            remedy = (
                ", nor a number of its own in its name"
                if run.options.one_visit
                else ": --one-visit first takes one of each patient"
            )
            run.leave_out(visit.name, Cause.NO_DATE, where + remedy, files=visit.files)
    return kept


def _add_elapsed_time(run: LayoutImport, visits: Sequence[LayoutVisit]) -> None:
    changed = 0
    for scans in _by_patient(visits).values():
        first = scans[0].when
        for visit in scans:
            age = visit.attributes.get(AGE, "")
            if visit.age_of_patient and first is not None and visit.when is not None and is_number(age):
                visit.attributes[AGE] = age_text(float(age) + (visit.when - first) / DAYS_OF_YEAR)
                changed += 1
    run.state(f"age: the table's is the age at the first visit, and the time since is added ({changed} visits)")


def _one_visit_of_each_patient(run: LayoutImport, visits: Sequence[LayoutVisit]) -> list[LayoutVisit]:
    which = run.options.one_visit
    if not which:
        return list(visits)
    run.state(f"the {which} visit of each patient is taken")
    kept: list[LayoutVisit] = []
    for scans in _by_patient(visits).values():
        undated = any(visit.when is None for visit in scans)
        ordered = sorted(scans, key=lambda visit: (visit.order or 0) if undated else (visit.when or 0))
        taken = ordered[0 if which == "first" else -1]
        kept.append(taken)
        for visit in scans:
            if visit is not taken:
                detail = f"the patient's {which} visit is {taken.name}"
                run.leave_out(visit.name, Cause.NOT_CHOSEN, detail, files=visit.files)
    return kept


def _check_files(run: LayoutImport, visits: Sequence[LayoutVisit]) -> None:
    places: dict[tuple[int, int], LayoutVisit] = {}
    for visit in visits:
        if not visit.file:
            continue
        status = (run.root / visit.file).stat()
        earlier = places.setdefault((status.st_dev, status.st_ino), visit)
        if earlier is not visit:
            run.contradict(Conflict.SAME_FILE, visit.patient, f"{earlier.file} and {visit.file} are one file")


def _check_patient(run: LayoutImport, patient: str, visits: Sequence[LayoutVisit]) -> None:
    sexes = {visit.attributes.get(SEX, "") for visit in visits} - {""}
    if len(sexes) > 1:
        run.contradict(Conflict.SEX_CHANGES, patient, " and ".join(sorted(sexes)))
    aged = [
        (visit, float(visit.attributes[AGE]), visit.when)
        for visit in visits
        if is_number(visit.attributes.get(AGE, "")) and visit.when is not None
    ]
    if run.modality.attributes.get(AGE) is None or run.modality.attributes[AGE].unit not in ("", "years"):
        return
    for (earlier, age, _), (later, later_age, _) in pairwise(aged):
        if later_age < age - 0.1:
            detail = f"{age:g} at {earlier.name}, later {later_age:g} at {later.name}"
            run.contradict(Conflict.AGE_FALLS, patient, detail)
    for first, first_age, start in aged[:1]:
        for visit, age, when in aged[1:]:
            years = (when - start) / DAYS_OF_YEAR
            detail = f"{first_age:g} at {first.name}, {age:g} at {visit.name}, {years:.1f} years later"
            if age == first_age and when - start > STANDS_DAYS:
                run.contradict(Conflict.AGE_STANDS, patient, detail)
            elif age >= first_age and abs(age - first_age - years) > PACE_YEARS:
                run.contradict(Conflict.AGE_PACE, patient, detail)
