"""The summary of an import, for a data manager who decides whether it was read as meant."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ld_client.layouts.base import LayoutImport
from ld_client.layouts.entries import Cause, Conflict, LayoutVisit
from ld_common.core.config import is_number

SHOWN = 5
"""Contradictions and words of each kind that the summary shows; the files have all."""


REMEDIES = {
    Conflict.AGE_STANDS.value: "if the table has the age at the first visit, --baseline-age adds the time since",
    Conflict.SESSION_ORDER.value: "the days between their visits may be wrong; --one-visit first does without them",
}


@dataclass(frozen=True)
class CauseCount:
    """What was left out for one reason."""

    cause: str
    files: int
    rows: int
    example: str


@dataclass(frozen=True)
class ImportSummary:
    """What an import made. It names patients and files in its examples, and stays at the site."""

    layout: str
    root: str
    patients: int
    visits: int
    visits_of_patients: dict[int, int]
    """Number of visits -> number of patients who have as many."""
    numbers: dict[str, tuple[float, float, float]]
    """Attribute -> lowest, median and highest number."""
    categories: dict[str, dict[str, int]]
    """Attribute -> value -> number of visits; of the sex, number of patients."""
    words: dict[str, dict[str, str]]
    """Attribute -> word of the tables -> `AD (12)`, or `left out (3)`."""
    statements: list[str]
    left_out: list[CauseCount]
    contradictions: dict[str, int]
    """Kind -> number of patients."""
    examples: dict[str, list[str]]
    """Kind -> the first contradictions."""
    written: list[str]
    """Files."""


def summarize(layout: str, run: LayoutImport, visits: Sequence[LayoutVisit], written: Sequence[str]) -> ImportSummary:
    """Count an import's visits, what was left out, and its contradictions."""
    sizes = Counter(Counter(visit.patient for visit in visits).values())
    numbers: dict[str, tuple[float, float, float]] = {}
    categories: dict[str, dict[str, int]] = {}
    for name, attribute in run.modality.attributes.items():
        if attribute.categories:
            categories[name] = _counted(name, visits)
        else:
            found = [float(text) for visit in visits if is_number(text := visit.attributes.get(name, ""))]
            if found:
                numbers[name] = (min(found), statistics.median(found), max(found))
    words: dict[str, dict[str, str]] = {}
    for (name, word, value), count in run.words.most_common():
        words.setdefault(name, {})[word] = f"{value or 'left out'} ({count})"
    kinds = Counter(entry.kind.value for entry in run.contradictions)
    examples: dict[str, list[str]] = {kind: [] for kind in kinds}
    for entry in run.contradictions:
        examples[entry.kind.value] += [f"{entry.patient}: {entry.detail}"][: SHOWN - len(examples[entry.kind.value])]
    return ImportSummary(
        layout=layout,
        root=str(run.root),
        patients=len({visit.patient for visit in visits}),
        visits=len(visits),
        visits_of_patients=dict(sorted(sizes.items())),
        numbers=numbers,
        categories=categories,
        words=words,
        statements=run.statements,
        left_out=_causes(run),
        contradictions=dict(kinds.most_common()),
        examples=examples,
        written=list(written),
    )


def _counted(name: str, visits: Sequence[LayoutVisit]) -> dict[str, int]:
    if name == "sex":
        pairs = {(visit.patient, visit.attributes.get(name, "")) for visit in visits}
        return dict(sorted(Counter(value or "from the header" for _, value in pairs).items()))
    return dict(sorted(Counter(visit.attributes.get(name, "") or "from the header" for visit in visits).items()))


def _causes(run: LayoutImport) -> list[CauseCount]:
    files: Counter[str] = Counter()
    rows: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for entry in run.left_out:
        files[entry.cause.value] += entry.files
        rows[entry.cause.value] += entry.rows
        examples.setdefault(entry.cause.value, f"{entry.name}: {entry.detail}" if entry.detail else entry.name)
    order = sorted(examples, key=lambda cause: (cause == Cause.NOT_A_SCAN.value, -files[cause] - rows[cause]))
    return [CauseCount(cause, files[cause], rows[cause], examples[cause]) for cause in order]


def summary_lines(summary: ImportSummary) -> Iterator[str]:
    """The summary as lines, without what was left out."""
    yield f"{summary.layout} in {summary.root}"
    yield f"{summary.patients} patients, {summary.visits} visits: " + ", ".join(
        f"{patients} with {visits}" for visits, patients in summary.visits_of_patients.items()
    )
    for name, (low, middle, high) in summary.numbers.items():
        yield f"  {name}: {low:g} to {high:g}, median {middle:g}"
    for name, counts in summary.categories.items():
        unit = "patients" if name == "sex" else "visits"
        yield f"  {name}: {', '.join(f'{value} {count}' for value, count in counts.items())} {unit}"
    yield "read as:"
    yield from (f"  {line}" for line in summary.statements)
    for name, words in summary.words.items():
        shown = [f"'{word}' is {value}" for word, value in list(words.items())[: 3 * SHOWN]]
        more = f", and {len(words) - len(shown)} more words" if len(words) > len(shown) else ""
        yield f"  {name}: {', '.join(shown)}{more}"


def contradiction_lines(summary: ImportSummary, file: str) -> Iterator[str]:
    """The contradictions as lines, none if there are none."""
    if not summary.contradictions:
        return
    yield f"CONTRADICTIONS, which {file} lists; the visits are kept unless they are among those left out:"
    for kind, patients in summary.contradictions.items():
        yield f"  {kind}: {patients} patients" + (f" ({REMEDIES[kind]})" if kind in REMEDIES else "")
        yield from (f"    {example}" for example in summary.examples[kind])
