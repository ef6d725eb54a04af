"""Follow-ups of real chest radiographs: what an answer is worth beside copying and rules that know no patient.

Every patient is answered by what others show (`ld_evaluate.ridge_rules.cross_fitted`). The radiographs are not
registered, differ in size and have no scale, so the truth is compared in the model's picture.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from ld_common.core.atomic_files import write_bytes
from ld_common.core.errors import ConfigError
from ld_common.diffusion.base_model import BaseModel
from ld_common.diffusion.longitudinal import LongitudinalDrift
from ld_common.editing.counterfactuals import draw_counterfactuals, edit_to, past_of
from ld_common.editing.history import ScanHistory, writing
from ld_common.editing.registry import read_editor
from ld_common.imaging.geometry import Scan
from ld_common.imaging.modality import AGE, DECODED, DIFFERENCE, Attributes, Modality
from ld_common.imaging.readers import read_scan
from ld_common.imaging.rendering import render
from ld_common.imaging.scan_table import ScanTable
from ld_evaluate.answers import Answers, copies, perfect, written_as_files
from ld_evaluate.edits import EvaluationEdit, ScanPixels, TrueAnswer
from ld_evaluate.files import COPY, CROSS_SECTIONAL, FOLLOW_UP, LONGITUDINAL, PERFECT
from ld_evaluate.protocol import compare
from ld_evaluate.ridge_rules import cross_fitted, fold_of, ridge_answers

VAE, MEAN, BLEND = "the scan through the VAE", "mean of other patients", "scan and mean of others, blended"
DRIFT, DRIFT_HISTORY = "editor drift", "editor drift, earlier visits"
ROWS = (COPY, VAE, MEAN, BLEND, CROSS_SECTIONAL, LONGITUDINAL, DRIFT, DRIFT_HISTORY, PERFECT)
CRP = "crp"
WORST, BEST = 4, 2
"""Follow-ups that are looked at."""


@dataclass(frozen=True, eq=False)
class Radiograph:
    """One radiograph."""

    patient: str
    scan: Scan
    pixels: ScanPixels
    attributes: Attributes

    @property
    def day(self) -> float:
        """Days since admission; below 0 before it."""
        return float(self.attributes[AGE])


def read_visits(folder: Path, modality: Modality, side: int) -> list[Radiograph]:
    """The first radiograph of each day of each patient, in the order of the days.

    A visit without a value of one of the modality's attributes is left out.

    Raises:
        ConfigError: the table or a picture cannot be read.
    """
    try:
        with (folder / "data.csv").open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
    except OSError as error:
        raise ConfigError(f"cannot read '{folder / 'data.csv'}': {error}") from error
    visits: dict[tuple[str, int], Radiograph] = {}
    for row in rows:
        attributes = _attributes(row, modality)
        key = row["patient_id"], int(row["admission_offset"])
        if attributes is not None and key not in visits:
            scan = read_scan(folder / "png" / f"{row['image_id']}.png", modality, released=True)
            visits[key] = Radiograph(key[0], scan, ScanPixels.of(scan, modality, side), attributes)
    return sorted(visits.values(), key=lambda visit: (visit.patient, visit.day))


def judge(
    base: BaseModel, modality: Modality, visits: Sequence[Radiograph], looked_at: Path | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Gain of each rule at each follow-up: from a visit to the patient's next one.

    `looked_at` gets a picture of the worst and the best answers of editor drift; it shows patients.
    """
    table = ScanTable(
        torch.stack([visit.pixels.picture for visit in visits]),
        [visit.attributes for visit in visits],
        [visit.patient for visit in visits],
    )
    pairs = [
        (first, last) for first, last in pairwise(range(len(visits))) if table.patients[first] == table.patients[last]
    ]
    edits = [_edit(visits, *pair, row) for row, pair in enumerate(pairs)]
    answers = {COPY: copies(edits), PERFECT: perfect(base, modality, edits)}
    answers[VAE] = [_decoded(edit, base.autoencode(edit.scanned.picture[None])[0]) for edit in edits]
    answers |= _by_means(table, pairs, edits)
    drifts = cross_fitted(base, modality, table)
    answers |= ridge_answers(base, modality, edits, table, drifts=drifts)
    answers[DRIFT] = _drawn(base, modality, visits, pairs, edits, drifts, with_history=False)
    answers[DRIFT_HISTORY] = _drawn(base, modality, visits, pairs, edits, drifts, with_history=True)
    days = [visits[last].day - visits[first].day for first, last in pairs]
    found = {}
    for name in ROWS:
        compared = compare(name, modality, edits, answers[name])
        found[name] = [
            {"patient": answer.patient, "days": day, "gain_db": answer.gain_db}
            for answer, day in zip(compared, days, strict=True)
        ]
    if looked_at is not None:
        gains = [float(row["gain_db"] or 0.0) for row in found[DRIFT]]
        write_bytes(looked_at, _pictures(modality, edits, answers, gains))
    return found


def _pictures(
    modality: Modality, edits: Sequence[EvaluationEdit], answers: Mapping[str, Answers], gains: Sequence[float]
) -> bytes:
    """Scan, follow-up and answers of the follow-ups with the least and the largest gain, PNG."""
    order = np.argsort(gains)
    shown = [*order[:WORST], *order[-BEST:]]
    columns = (DRIFT, DRIFT_HISTORY, BLEND)
    figure = Figure(figsize=(2 * (2 + len(columns)), 2.2 * len(shown)), layout="constrained")
    for line, row in zip(figure.subplots(len(shown), 2 + len(columns)), shown, strict=True):
        edit = edits[row]
        pictures = {"scan": edit.scanned.picture, f"follow-up, {edit.years:.0f} days": edit.truth.picture}  # type: ignore[union-attr]
        for name in columns:
            pixels = answers[name][row]
            if pixels is not None:
                pictures[f"{name}" if name != DRIFT else f"{name} {gains[row]:+.1f} dB"] = edit.scanned.picture_of(
                    pixels, modality
                )
        for axis, (title, picture) in zip(line, pictures.items(), strict=True):
            axis.imshow(picture[0], cmap="gray", vmin=-1, vmax=1)
            axis.set_title(title, fontsize=7)
            axis.axis("off")
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=90)
    return stream.getvalue()


def _attributes(row: Mapping[str, str], modality: Modality) -> Attributes | None:
    """A row's attributes; None where one is missing or out of range."""
    values: Attributes = {
        AGE: float(row["admission_offset"]),
        "sex": row["sex"].upper(),
        "projection": row["projection"],
    }
    if CRP in modality.attributes:
        crp = float(row["crp_val"] or "nan")
        if not (math.isfinite(crp) and modality.attributes[CRP].minimum <= crp <= modality.attributes[CRP].maximum):
            return None
        values[CRP] = crp
    return values if all(values[name] != "" for name in modality.attributes) else None


def _edit(visits: Sequence[Radiograph], first: int, last: int, row: int) -> EvaluationEdit:
    before, after = visits[first], visits[last]
    truth = TrueAnswer(None, after.pixels.picture, {})
    return EvaluationEdit(before.patient, row, FOLLOW_UP, before.attributes, after.attributes, before.pixels, truth)


def _decoded(edit: EvaluationEdit, picture: Tensor) -> np.ndarray:
    scan = edit.scanned
    return render(scan.pixels, scan.frame, scan.picture, picture, DECODED)


def _by_means(
    table: ScanTable, pairs: Sequence[tuple[int, int]], edits: Sequence[EvaluationEdit]
) -> dict[str, Answers]:
    """Rules that know other patients' pictures and no change.

    They are the mean of the other patients' pictures, and w · scan + (1 - w) · mean with the w that fits the other
    patients' follow-ups best, by least squares.
    """
    folds = np.array([fold_of(patient) for patient in table.patients])
    answers: dict[str, list[np.ndarray]] = {MEAN: [], BLEND: []}
    fitted: dict[int, tuple[Tensor, float]] = {}
    for fold in set(folds.tolist()):
        mean = table.images[folds != fold].mean(0)
        learned = [(table.images[a] - mean, table.images[b] - mean) for a, b in pairs if folds[a] != fold]
        products, squares = (
            sum(float((x * y).sum()) for x, y in terms) for terms in (learned, [(x, x) for x, _ in learned])
        )
        fitted[fold] = mean, products / squares
    for (first, _), edit in zip(pairs, edits, strict=True):
        (mean, share), scan = fitted[int(folds[first])], edit.scanned
        answers[MEAN].append(_decoded(edit, mean))
        blended = share * scan.picture + (1 - share) * mean
        answers[BLEND].append(render(scan.pixels, scan.frame, scan.picture, blended, DIFFERENCE))
    return dict(answers)


def _drawn(
    base: BaseModel,
    modality: Modality,
    visits: Sequence[Radiograph],
    pairs: Sequence[tuple[int, int]],
    edits: Sequence[EvaluationEdit],
    drifts: Mapping[str, LongitudinalDrift | None],
    with_history: bool,
) -> Answers:
    """The product's answers, each by the drift of other patients."""
    editor, side, written = read_editor({"name": "drift"}), base.resolution, []
    for (first, _), edit in zip(pairs, edits, strict=True):
        visit, drift = visits[first], drifts[edit.patient]
        if drift is None:
            raise ConfigError("no patient has two visits: there is nothing to learn change from")
        write = writing(visit.scan, edit.scanned.frame, modality.image.rendering, side, modality.image)
        earlier = [seen for seen in visits[:first] if seen.patient == visit.patient]
        known = ScanHistory.without_visits(write)
        if with_history and earlier:
            pictures = torch.stack([seen.pixels.picture for seen in earlier])
            known = ScanHistory(pictures, [visit.day - seen.day for seen in earlier], write)
        asked = edit_to(modality, 0, edit.source, edit.target)
        prompts, images = [modality.prompt(edit.source)], edit.scanned.picture[None]
        past = past_of(modality, {0: known})
        drawn = draw_counterfactuals(base, images, prompts, [asked], editor, drift=drift, past=past)
        alone = EvaluationEdit(edit.patient, 0, edit.name, edit.source, edit.target, edit.scanned, edit.truth)
        written += written_as_files(modality, [alone], drawn.reconstructions, drawn.images[:, None])
    return written
