"""What a site's table, its scans' headers and a patient's visits say of each other that cannot all be true.

A scan whose table and header disagree is left out: one of them is of another patient or visit. What may also be an odd
but true record (`DOUBTS`) is kept and counted.
"""

from __future__ import annotations

import datetime
import hashlib
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ld_client.data.exclusions import Reason
from ld_client.data.table import DAYS_IN_YEAR, TableRow
from ld_client.data_config import Contradiction
from ld_common.imaging.dicom_header import DicomHeader
from ld_common.imaging.modality import AGE, Attributes

SEX = "sex"
AGE_TOLERANCE_YEARS = 1.5
"""Between a header's age, in whole years, and the table's."""
PASSED_TOLERANCE_YEARS = 2.0
"""Between the years by two visits' ages, each perhaps rounded, and those by their dates."""


DOUBTS = frozenset((Contradiction.AGE_OVER_VISITS, Contradiction.ONE_SCAN))
SHORT_STACK, NO_DATES = "short-stack", "no-dates"
"""Kinds of doubts that contradict nothing."""


@dataclass(frozen=True)
class Doubt:
    """Something unusual of a scan that is kept. It names files of the site and never leaves it."""

    kind: str
    name: str
    detail: str


@dataclass
class Contradictions:
    """Judges visits, and counts those that are kept in spite of a contradiction that the site accepts."""

    accept: Sequence[str]
    accepted: Counter[str] = field(default_factory=Counter)
    doubts: list[Doubt] = field(default_factory=list)

    def problem(self, kind: Contradiction, detail: str, name: str = "") -> tuple[Reason, str] | None:
        """The exclusion's reason and detail, or None where the scan is kept: `name` is then noted with a doubt."""
        if kind in self.accept:
            self.accepted[kind.value] += 1
            return None
        if kind in DOUBTS:
            self.doubts.append(Doubt(kind.value, name, detail))
            return None
        return Reason.CONTRADICTION, f"{kind.value}: {detail}; correct it, or set data.accept: [{kind.value}]"

    def of_header(
        self,
        row: TableRow,
        header: DicomHeader,
        dated: bool,
        tolerance_days: int,
        attributes: Attributes,
    ) -> tuple[Reason, str] | None:
        """What a row and its scan's header say differently; `dated` where the table has dates."""
        found = None
        if header.patient_id and header.patient_id.casefold() != row.patient.casefold():
            found = found or self.problem(
                Contradiction.PATIENT, f"row {row.line} names another patient than the header"
            )
        if dated and header.study_date is not None and abs((header.study_date - row.date).days) > tolerance_days:
            days = abs((header.study_date - row.date).days)
            found = found or self.problem(Contradiction.DATE, f"the header's date is {days} days from row {row.line}'s")
        sex = attributes.get(SEX)
        if header.sex in ("F", "M") and sex in ("F", "M") and header.sex != sex:
            detail = f"{header.sex} in the header and {sex} in row {row.line}"
            found = found or self.problem(Contradiction.SEX, detail)
        age = attributes.get(AGE)
        if (
            header.age_years is not None
            and isinstance(age, float)
            and abs(header.age_years - age) > AGE_TOLERANCE_YEARS
        ):
            detail = f"{header.age_years:g} years in the header and {age:g} in row {row.line}"
            found = found or self.problem(Contradiction.AGE, detail)
        return found

    def over_visits(self, visits: Mapping[datetime.date, Attributes], name: str) -> tuple[Reason, str] | None:
        """What the visits of one patient say differently; `name` is a scan of the patient."""
        found = None
        sexes = sorted({str(attributes[SEX]) for attributes in visits.values() if SEX in attributes})
        if len(sexes) > 1:
            found = self.problem(Contradiction.SEX_OVER_VISITS, f"the patient is {' and '.join(sexes)}")
        aged = sorted((date, attributes[AGE]) for date, attributes in visits.items() if AGE in attributes)
        for (first, earlier), (last, later) in itertools.pairwise(aged):
            if isinstance(earlier, float) and isinstance(later, float):
                years = (last - first).days / DAYS_IN_YEAR
                if abs(later - earlier - years) > PASSED_TOLERANCE_YEARS:
                    detail = f"{later - earlier:+.1f} years of age in {years:.1f} years between two visits"
                    if later == earlier:
                        detail += " (perhaps the age at baseline: data.columns.age_at_baseline)"
                    found = found or self.problem(Contradiction.AGE_OVER_VISITS, detail, name)
                    break
        return found


def content_digest(path: Path) -> str:
    """SHA-256 of a file's content, hex; raises `OSError`."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def shared_files(patients_of: Mapping[Path, str], digest: Callable[[Path], str] = content_digest) -> set[Path]:
    """Files with the same content under two patients; only files of one size are read.

    Args:
        patients_of: files and their patients.
        digest: digest of a file's content; it may raise `OSError`.
    """
    by_size: dict[int, list[Path]] = defaultdict(list)
    for path in patients_of:
        with suppress(OSError):  # it cannot be read: `read_visits` says so
            by_size[path.stat().st_size].append(path)
    shared: set[Path] = set()
    for files in by_size.values():
        if len({patients_of[path] for path in files}) > 1:
            shared |= _of_several(files, patients_of, digest)
    return shared


def _of_several(files: Iterable[Path], patients_of: Mapping[Path, str], digest: Callable[[Path], str]) -> set[Path]:
    by_content: dict[str, list[Path]] = defaultdict(list)
    for path in files:
        with suppress(OSError):
            by_content[digest(path)].append(path)
    several = (same for same in by_content.values() if len({patients_of[path] for path in same}) > 1)
    return {path for same in several for path in same}
