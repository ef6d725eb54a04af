"""The scans of a table, drawn in groups; a row that fails does not stop the others.

`batch.csv` in the folder of the results holds each row's outcome and is written anew after every group, so that an
interrupted run continues where it stopped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ld_common.core.errors import LdError, RequestError
from ld_common.diffusion.base_model import BaseModel
from ld_common.editing.base import Editor
from ld_common.editing.registry import editor_options
from ld_common.imaging.scan_table import shown
from ld_common.release.release import Release
from ld_generate.batch_table import (
    DRAWN,
    OUTCOMES,
    VISIT,
    BatchRow,
    Outcome,
    read_outcomes,
    read_rows,
    write_outcomes,
)
from ld_generate.batch_visits import PatientVisits
from ld_generate.options import read_history_options, read_targets
from ld_generate.request import EditRequest, RequestOptions, make_folders, read_requests
from ld_generate.samples import RECORD
from ld_generate.writer import run_edits


def draw_batch(
    model: BaseModel,
    release: Release,
    table: Path,
    options: RequestOptions,
    editor: Editor,
    progress: Callable[[int], None],
) -> list[Outcome]:
    """Draw every row that was not drawn yet; returns the outcomes of all rows, in their order.

    Args:
        model: the base with the release's adapter.
        release: the release.
        table: the table of scans.
        options: as for every row; a row's `source` is added to theirs. Each row gets a folder in `options.out`.
        editor: how edits are drawn; `batch_size` scans are read and drawn together.
        progress: called with the number of rows finished since the last call.

    Raises:
        RequestError: the table cannot be read.
        CheckpointError: the folder cannot be written.
    """
    rows = read_rows(table)
    visits = PatientVisits(rows, table.parent, release.modality, options)
    drawer = _BatchDrawer(model, release, table.parent, options, editor, visits)
    digests = {row.number: drawer.digest(row) for row in rows}
    outcomes = {
        outcome.row: outcome
        for outcome in read_outcomes(options.out / OUTCOMES)
        if digests.get(outcome.row) == outcome.request
        and (
            outcome.outcome == VISIT or (outcome.outcome == DRAWN and (options.out / outcome.folder / RECORD).exists())
        )
    }
    progress(len(outcomes))
    pending = [row for row in rows if row.number not in outcomes]
    for first in range(0, len(pending), editor.batch_size):
        group = pending[first : first + editor.batch_size]
        for row, result in drawer.draw(group).items():
            outcomes[row.number] = _outcome(options.out, row, result, digests[row.number])
        write_outcomes(options.out / OUTCOMES, [outcomes[number] for number in sorted(outcomes)])
        progress(len(group))
    return [outcomes[row.number] for row in rows]


@dataclass(frozen=True)
class _BatchDrawer:
    """What all rows of a table have in common."""

    model: BaseModel
    release: Release
    folder: Path
    """The table's; paths of scans are relative to it."""
    options: RequestOptions
    editor: Editor
    visits: PatientVisits

    def draw(self, group: Sequence[BatchRow]) -> dict[BatchRow, str]:
        """Draw rows together; if that fails, one by one, so that each gets its own outcome."""
        requests: dict[BatchRow, EditRequest] = {}
        results: dict[BatchRow, str] = {}
        for row in group:
            try:
                _clear(self.options.out / row.folder)
                if row.only_visit:
                    self.visits.read(row)
                    results[row] = VISIT
                else:
                    requests[row] = self._request(row)
            except LdError as error:
                results[row] = _one_line(error)
        pending = [list(requests)] if requests else []
        for rows in pending:
            try:
                run_edits(
                    self.model,
                    self.release,
                    [requests[row] for row in rows],
                    self.editor,
                    [self.editor.delta],
                    lambda done: None,
                )
            except (LdError, OSError) as error:
                if len(rows) > 1:
                    pending += [[row] for row in rows]
                else:
                    results[rows[0]] = _one_line(error)
            else:
                results |= dict.fromkeys(rows, DRAWN)
        return results

    def digest(self, row: BatchRow) -> str:
        """Hash of all that a row's results depend on, except the scans."""
        options = self.options
        content = [
            dataclasses.asdict(row),
            self.release.adapter_sha256,
            options.source,
            editor_options(self.editor),
            self.release.study.seed,
            options.watermark,
            options.rendering or self.release.modality.image.rendering,
        ]
        content += ["strict"] if options.strict else []  # a row that was drawn without it may be refused
        content += ["keep geometry"] if options.keep_geometry else []
        if row.target:
            content += [[visit.input, visit.slice, visit.source, visit.date] for visit in self.visits.candidates(row)]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _request(self, row: BatchRow) -> EditRequest:
        modality = self.release.modality
        targets = read_targets(modality, [text for text in row.target.split(";") if text.strip()])
        row.check()
        if not row.input or not targets:
            raise RequestError("the row lacks its input or its target")
        options = dataclasses.replace(
            self.options,
            source=self.options.source | modality.parse_all(row.source),
            slice_index=row.slice_index,
            study_date=row.study_date,
            earlier=self.visits.before(row),
            history=[
                dataclasses.replace(file, path=self.folder / file.path)
                for file in read_history_options([text.strip() for text in row.history.split(";") if text.strip()])
            ],
        )
        (request,) = read_requests(self.model, self.release, [self.folder / row.input], targets, options)
        request = dataclasses.replace(request, folder=options.out / row.folder)
        make_folders([request])
        return request


def answer_cells(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """Cells of each counterfactual of a `record.json`.

    They are the attributes of the scan (`source_<attribute>`) and of the answer (`target_<attribute>`), the file, and
    of each biomarker its area, its change against the scan and against the reconstruction, and the ends of its band.
    """
    source, before = record["source"], record["biomarkers_mm2"]
    return [
        {f"source_{name}": shown(value) for name, value in source.items()}
        | {f"target_{name}": shown(value) for name, value in (source | entry["target"]).items()}
        | {"file": next(name for name in entry["files"] if name.endswith(".dcm")).removesuffix(".dcm") + ".png"}
        | _area_cells(entry, before)
        for entry in record["counterfactuals"]
    ]


def _area_cells(entry: Mapping[str, Any], before: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    cells: dict[str, str] = {}
    for name, area in entry["biomarkers_mm2"].items():
        cells |= {f"{name}_mm2": f"{area:.6g}", f"{name}_change_mm2": f"{area - before['scan'][name]:.6g}"}
        cells[f"{name}_change_from_reconstruction_mm2"] = f"{area - before['reconstruction'][name]:.6g}"
    if entry["band"] is not None:
        name = entry["band"]["biomarker"]
        cells |= {f"{name}_mm2_{end}": f"{entry['band'][f'{end}_mm2']:.6g}" for end in ("low", "high")}
    return cells


def _clear(folder: Path) -> None:
    """Remove the results of an earlier table from a row's folder; a folder without a record is left alone."""
    try:
        has_record = (folder / RECORD).exists()
    except OSError:
        return  # the name is too long; reading the row's input reports it
    try:
        if has_record:
            shutil.rmtree(folder)
    except OSError as error:
        raise RequestError(f"cannot write to '{folder}' ({error.strerror}): choose another --out") from error


def _outcome(out: Path, row: BatchRow, result: str, digest: str) -> Outcome:
    if result != DRAWN:
        return Outcome(row.number, row.input, row.folder, result, "", digest)
    record = json.loads((out / row.folder / RECORD).read_text(encoding="utf-8"))
    return Outcome(
        row.number, row.input, row.folder, result, "; ".join(record["warnings"]), digest, answer_cells(record)
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
