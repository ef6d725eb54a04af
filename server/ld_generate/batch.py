"""Many scans at once: `ld-generate --batch rows.csv`, where one bad row does not end the others.

The table has a row a scan: `input` (a path, relative to the table), `set` (edits, `age=84;age=90,diagnosis=AD`), and,
where files do not say it, `given` (`sex=F`) and `slice`. What became of each row is in `batch.csv` in the folder of the
results, written anew after every group that was denoised together; a run that was cut short goes on after those.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ld_common.core.atomic_files import write_bytes
from ld_common.core.errors import LdError, RequestError
from ld_common.diffusion.base_model import BaseModel
from ld_common.editing.base import Editor
from ld_common.editing.registry import editor_options
from ld_common.imaging.modality import Attributes
from ld_common.release.release import Release
from ld_generate.request import EditRequest, make_folders, read_requests, read_target
from ld_generate.samples import RECORD
from ld_generate.writer import run_edits

OUTCOMES, DRAWN = "batch.csv", "drawn"
COLUMNS, NEEDED = ("input", "set", "given", "slice"), ("input", "set")


@dataclass(frozen=True)
class BatchRow:
    """One scan of the table, as it is written there."""

    number: int
    input: str
    set: str
    given: str = ""
    slice: str = ""
    beyond: str = ""
    """Cells without a column."""

    @property
    def folder(self) -> str:
        """Of its results."""
        return f"{self.number:05d}_{Path(self.input).name}"


@dataclass(frozen=True)
class Outcome:
    """What became of a row."""

    row: int
    input: str
    folder: str
    outcome: str
    """`drawn`, or why not."""
    warnings: str
    """Of its record, with semicolons between them."""
    request: str
    """Hash of the row, the release and how it was drawn: another one is drawn again."""


def read_rows(table: Path) -> list[BatchRow]:
    """The table's rows; raises `RequestError` for one that cannot be read, or lacks a column."""
    try:
        with table.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            columns = [name.strip() for name in reader.fieldnames or []]
            reader.fieldnames = columns
            for name in NEEDED:
                if name not in columns:
                    raise RequestError(f"'{table}' has no column '{name}': it needs {', '.join(COLUMNS)}")
            if unknown := sorted(set(columns) - set(COLUMNS)):
                raise RequestError(f"'{table}' has columns that mean nothing here: {', '.join(unknown)}")
            rows = [
                BatchRow(
                    number,
                    **{name: (values.get(name) or "").strip() for name in columns},
                    beyond=",".join(values.get(None) or []),
                )
                for number, values in enumerate(reader, start=1)
            ]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RequestError(f"cannot read the table '{table}': {error}") from error
    if not rows:
        raise RequestError(f"'{table}' has no row")
    return rows


def draw_batch(
    model: BaseModel,
    release: Release,
    table: Path,
    given: Attributes,
    released: bool,
    editor: Editor,
    out: Path,
    progress: Callable[[int, int], None],
    mark: bool = False,
) -> list[Outcome]:
    """Draw every row that was not drawn yet; returns what became of all, in their order.

    Args:
        model: the base with the release's adapter.
        release: the release.
        table: the table of scans.
        given: what holds for every row that does not say otherwise.
        released: as in `read_requests`.
        editor: how edits are drawn; `batch_size` scans are read and drawn together.
        out: folder of the results, one folder a row.
        progress: told the rows that are done and all of them.
        mark: as in `read_requests`.

    Raises:
        RequestError: the table cannot be read, or the folder not be written.
    """
    rows = read_rows(table)
    known = {row.number: _request(row, release, given, editor, mark) for row in rows}
    done = {
        one.row: one
        for one in _read_outcomes(out / OUTCOMES)
        if one.outcome == DRAWN and known.get(one.row) == one.request and (out / one.folder / RECORD).exists()
    }
    left = [row for row in rows if row.number not in done]
    progress(len(done), len(rows))
    for first in range(0, len(left), editor.batch_size):
        group = left[first : first + editor.batch_size]
        for row, said in _draw(model, release, table.parent, group, given, released, editor, out, mark).items():
            warned = _warned(out / row.folder) if said == DRAWN else ""
            done[row.number] = Outcome(row.number, row.input, row.folder, said, warned, known[row.number])
        _write_outcomes(out / OUTCOMES, [done[number] for number in sorted(done)])
        progress(len(done), len(rows))
    return [done[row.number] for row in rows]


def _draw(
    model: BaseModel,
    release: Release,
    place: Path,
    group: Sequence[BatchRow],
    given: Attributes,
    released: bool,
    editor: Editor,
    out: Path,
    mark: bool,
) -> dict[BatchRow, str]:
    """Draw a group together; where that fails, its rows one by one, so that each says what ails it."""
    questions: dict[BatchRow, EditRequest] = {}
    said: dict[BatchRow, str] = {}
    for row in group:
        try:
            _clear(out / row.folder)
            questions[row] = _question(model, release, place, row, given, released, out, mark)
        except LdError as error:
            said[row] = _one_line(error)
    together = [list(questions)] if questions else []
    for rows in together:
        try:
            run_edits(model, release, [questions[row] for row in rows], editor, [editor.delta], lambda done: None)
        except (LdError, OSError) as error:
            if len(rows) > 1:
                together += [[row] for row in rows]
            else:
                said[rows[0]] = _one_line(error)
        else:
            said |= dict.fromkeys(rows, DRAWN)
    return said


def _clear(folder: Path) -> None:
    """Remove what an earlier table's row left in a row's folder, and nothing that is not ours."""
    try:
        ours = (folder / RECORD).exists()
    except OSError:
        return  # no folder can have this name: what reads the row's input says so
    try:
        if ours:
            shutil.rmtree(folder)
    except OSError as error:
        raise RequestError(f"cannot write to '{folder}' ({error.strerror}): choose another --out") from error


def _warned(folder: Path) -> str:
    """What a row's record warns of."""
    return "; ".join(json.loads((folder / RECORD).read_text())["warnings"])


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _question(
    model: BaseModel,
    release: Release,
    place: Path,
    row: BatchRow,
    given: Attributes,
    released: bool,
    out: Path,
    mark: bool,
) -> EditRequest:
    targets = [read_target(release.modality, text) for text in row.set.split(";") if text.strip()]
    if row.beyond:
        raise RequestError(
            f"the row has more cells than columns, '{row.beyond}': put quotes round a cell that has commas"
        )
    if not row.input or not targets:
        raise RequestError("the row lacks its input or its set")
    own = given | release.modality.parse_all(row.given)
    if row.slice and not row.slice.isdecimal():
        raise RequestError(f"slice is '{row.slice}': give the number of a slice, from 0")
    index = int(row.slice) if row.slice else None
    (question,) = read_requests(
        release.modality, model.resolution, [place / row.input], targets, own, index, released, out, mark=mark
    )
    question = dataclasses.replace(question, folder=out / row.folder)
    make_folders([question])
    return question


def _request(row: BatchRow, release: Release, given: Attributes, editor: Editor, mark: bool) -> str:
    adapter = release.adapter_sha256
    said = [dataclasses.asdict(row), adapter, given, editor_options(editor), release.study.seed, mark]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _read_outcomes(path: Path) -> list[Outcome]:
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            return [
                Outcome(int(one["row"]), one["input"], one["folder"], one["outcome"], one["warnings"], one["request"])
                for one in csv.DictReader(stream)
            ]
    except (OSError, ValueError, KeyError, TypeError):
        return []  # of no run, or of no run of ours: everything is drawn


def _write_outcomes(path: Path, outcomes: Sequence[Outcome]) -> None:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, [field.name for field in dataclasses.fields(Outcome)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(dataclasses.asdict(one) for one in outcomes)
    write_bytes(path, stream.getvalue().encode())
