"""Counterfactuals of simulated test patients, drawn, written and measured against the truth."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ld_common.diffusion.base_model import BaseModel
from ld_common.editing.base import EditDrift, Editor
from ld_common.editing.counterfactuals import Counterfactuals, draw_counterfactuals, edit_to, past_of
from ld_common.editing.history import ScanHistory
from ld_common.imaging.modality import Modality
from ld_common.metrics.image import psnr
from ld_evaluate.answers import written_as_files
from ld_evaluate.calibration import HISTORY, TimedErrors, bands_section, cohort_section, history_band
from ld_evaluate.calibration import ONE_SCAN as ONE_SCAN_BAND
from ld_evaluate.comparison import ComparedMethod, Comparison
from ld_evaluate.edits import EvaluationEdit
from ld_evaluate.files import LAST_VISITS
from ld_evaluate.public import public_evaluation
from ld_evaluate.truth import TrueCounterfactual, read_earlier, read_truths, through_vae, validate_area
from ld_simulations.side_by_side import side_by_side

SCANS_OF_PART = 2
"""Scans that are drawn together: small parts end at the same time on all processors."""
REDRAWN = 8
"""Scans on which the inversion is measured."""
ONE_SCAN, ALL_VISITS = "this release, last scan", "this release, all visits"


@dataclass(frozen=True)
class JudgedAnswers:
    """Scans of test patients `(N,1,S,S)`, an editor's answers, and how far each is from the truth."""

    truths: Sequence[TrueCounterfactual]
    scans: Tensor
    drawn: Counterfactuals
    """Its images are in the order of `truths`."""
    pictures: Tensor
    """What a file of each answer holds, as a model sees it, `(M,1,S,S)`."""
    method: ComparedMethod
    """The editor's, in the order of `truths`."""


@dataclass(frozen=True)
class SimulatedEvaluation:
    """What an editor's answers to the test patients are worth."""

    judged: JudgedAnswers
    rows: list[dict[str, Any]]
    """Each answer of the editor and of the rules to each patient's edit."""
    summary: dict[str, Any]


class TestPatients:
    """Scans of test patients with their true counterfactuals, and what any editor is compared with."""

    __test__ = False  # no test class of pytest

    def __init__(self, base: BaseModel, modality: Modality, folder: Path) -> None:
        """Read `held_out.json` of a folder and judge the rules; every editor is then judged on the same."""
        self.base, self.modality = base, modality
        self.first = EditedScans(base, modality, *read_truths(folder, modality, base.resolution))
        self.last = EditedScans(base, modality, *read_truths(folder, modality, base.resolution, LAST_VISITS))
        """The last visits of patients with a history."""
        self.histories = read_earlier(folder, modality, base.resolution) if len(self.last.scans) else []


class EditedScans:
    """Scans `(N,1,S,S)`, and edits of them whose answers are known."""

    def __init__(
        self, base: BaseModel, modality: Modality, scans: Tensor, truths: Sequence[TrueCounterfactual]
    ) -> None:
        self.base, self.modality, self.scans, self.truths = base, modality, scans, truths
        self.asked = [truth.question(modality) for truth in truths]
        prompts = {edit.scan: modality.prompt(edit.source) for edit in self.asked}
        self.source = [prompts[row] for row in range(len(scans))]

    @functools.cached_property
    def comparison(self) -> Comparison:
        """The rules' answers, judged."""
        return Comparison(self.base, self.modality, self.asked)

    @functools.cached_property
    def seen_truths(self) -> Tensor:
        """The true answers after the VAE, `(M,1,S,S)`."""
        return self.base.autoencode(torch.stack([truth.image for truth in self.truths]))

    def judged(
        self,
        editor: Editor,
        drift: EditDrift | None,
        histories: Mapping[int, ScanHistory] | None = None,
        progress: Callable[[int], None] = lambda done: None,
    ) -> JudgedAnswers:
        """An editor's answers, written as `ld-generate` writes them, and measured; drawn in a process a processor.

        Args:
            editor: draws them.
            drift: the adapter's, if it was trained with one.
            histories: by the scan's row; without them no earlier visit is known.
            progress: as in `draw_counterfactuals`.
        """
        if histories is None:
            histories = {edit.scan: edit.scanned.without_visits(self.modality) for edit in self.asked}
        count = len(self.scans)
        rows = [range(first, min(count, first + SCANS_OF_PART)) for first in range(0, count, SCANS_OF_PART)]
        parts = [self._part(some, histories) for some in rows]
        drawn: list[Counterfactuals] = []
        written: list[np.ndarray] = []
        pairs = zip(parts, side_by_side(lambda part: part.draw(editor, drift), parts, self.base.device), strict=True)
        for part, (images, files) in pairs:
            drawn.append(images)
            written += files
            progress(len(part.scans) + len(files))
        fields = [[getattr(one, name) for one in drawn] for name in ("autoencoded", "reconstructions", "images")]
        grids = zip(self.asked, written, strict=True)
        pictures = torch.stack([edit.scanned.picture_of(pixels, self.modality) for edit, pixels in grids])
        together = Counterfactuals(*(torch.cat(field) for field in fields))
        return JudgedAnswers(self.truths, self.scans, together, pictures, self.comparison.of(editor.name, written))

    def _part(self, rows: range, histories: Mapping[int, ScanHistory]) -> AskedPart:
        """Some of the scans, numbered from 0."""
        first, last = rows.start, rows.stop
        asked = [replace(edit, scan=edit.scan - first) for edit in self.asked if edit.scan in rows]
        known = {row - first: histories[row] for row in rows if row in histories}
        return AskedPart(self.base, self.modality, self.scans[first:last], self.source[first:last], asked, known)


@dataclass(frozen=True, eq=False)
class AskedPart:
    """Scans `(N,1,S,S)` with their prompts, what is asked of them, and what is known of their patients."""

    base: BaseModel
    modality: Modality
    scans: Tensor
    source: Sequence[str]
    asked: Sequence[EvaluationEdit]
    histories: Mapping[int, ScanHistory]

    def draw(self, editor: Editor, drift: EditDrift | None) -> tuple[Counterfactuals, list[np.ndarray]]:
        """All answers, and as `ld-generate` writes them."""
        edits = [edit_to(self.modality, edit.scan, edit.source, edit.target, editor.delta) for edit in self.asked]
        past = past_of(self.modality, self.histories)
        drawn = draw_counterfactuals(self.base, self.scans, self.source, edits, editor, drift=drift, past=past)
        return drawn, written_as_files(self.modality, self.asked, drawn.reconstructions, drawn.images[:, None])


def evaluate(
    tests: TestPatients,
    editor: Editor,
    drift: EditDrift | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> SimulatedEvaluation:
    """Draw, write and measure every true counterfactual.

    Args:
        tests: the test patients, with the base and the release's adapter in it.
        editor: draws the counterfactuals.
        drift: the adapter's, if it was trained with one.
        progress: as in `draw_counterfactuals`.
    """
    first, modality, comparison = tests.first, tests.modality, tests.first.comparison
    asked, scans = first.asked, first.scans
    judged = first.judged(editor, drift, progress=progress)
    drawn, method = judged.drawn, judged.method
    answers = [*method.patients, *(row for rule in comparison.rules.values() for row in rule.patients)]
    summary: dict[str, Any] = comparison.headline(method)
    summary |= through_vae(scans, first.truths, first.seen_truths, drawn)
    summary["by_edit"] = method.by_edit
    summary["rules"] = comparison.rule_numbers()
    counts = {"patients": len(scans)}
    run = {"editor": editor.name, "biomarkers": modality.biomarkers, "by_edit": method.by_edit, "counts": counts}
    history = evaluate_history(tests, editor, drift)
    bands = {ONE_SCAN_BAND: TimedErrors.of(modality, asked, method.patients).band(), HISTORY: history.band}
    run |= {"bands": bands_section(modality, bands), "cohort": cohort_section(modality, asked)}
    summary["public"] = public_evaluation(run | {"metrics": {}}, asked)
    summary["with_history"] = history.numbers
    few = slice(0, REDRAWN)
    redrawn = draw_counterfactuals(tests.base, scans[few], first.source[few], [], editor, drift=drift, redraw=True)
    summary["inversion_psnr_db"] = float(psnr(redrawn.reconstructions, redrawn.autoencoded).mean())
    summary["vae_psnr_db"] = float(psnr(drawn.autoencoded, scans).mean())
    summary["area_validation"] = validate_area(modality, scans, first.truths)
    return SimulatedEvaluation(judged, [answer.row() for answer in answers], summary)


@dataclass(frozen=True)
class HistoryEvaluation:
    """What answers with a history are worth; empty where no test patient has three visits, or the editor takes none."""

    numbers: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    """By row and kind of edit, the rules among them."""
    band: dict[str, Any] | None = None
    """As `ld_evaluate.calibration.history_band`."""


def evaluate_history(tests: TestPatients, editor: Editor, drift: EditDrift | None) -> HistoryEvaluation:
    """Answers to what comes after a patient's last visit, from that scan alone and with the visits before it."""
    last, modality, histories = tests.last, tests.modality, tests.histories
    if not len(last.scans) or not editor.takes_move:
        return HistoryEvaluation()
    rows = {}
    for title, known in ((ONE_SCAN, None), (ALL_VISITS, dict(enumerate(histories)))):
        method = last.judged(editor, drift, known).method
        rows[title] = method.by_edit
    errors = TimedErrors.of(modality, last.asked, method.patients)
    band = history_band(errors, [history.spread for history in histories])
    return HistoryEvaluation({**last.comparison.rule_numbers(), **rows}, band)
