"""Test patients with all their answers, the worst first, and the figure of three of them."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from ld_common.imaging.modality import Modality
from ld_common.imaging.scan_table import in_words
from ld_simulations.evaluation import JudgedAnswers
from ld_simulations.report.pictures import DIFFERENCE_COLOURS, DIFFERENCE_LIMIT

matplotlib.use("Agg")
TITLE_LETTERS = 22
"""That fit above a picture of the figure."""
STRIP_EDITS = 3
"""The last edits of a patient in the figure: the strongest change of age, the disease and the sex."""


@dataclass(frozen=True, eq=False)
class ShownAnswer:
    """One written answer beside the truth."""

    edit: str
    title: str
    target: str
    """What it should show, in words, for example "82 years"."""
    picture: Tensor
    """What the written file holds, `(1,S,S)` in [-1, 1], as the two that follow."""
    truth: Tensor
    scan: Tensor
    growth_mm2: float
    true_growth_mm2: float

    @property
    def error_mm2(self) -> float:
        """Absolute error of growth."""
        return abs(self.growth_mm2 - self.true_growth_mm2)


@dataclass(frozen=True, eq=False)
class ShownPatient:
    """A test patient."""

    name: str
    source: str
    """What the scan shows, in words."""
    scan: Tensor
    reconstruction: Tensor
    area_mm2: float
    answers: Sequence[ShownAnswer]

    @property
    def error_mm2(self) -> float:
        """Mean absolute error of growth over the answers."""
        return float(np.mean([answer.error_mm2 for answer in self.answers]))


def shown_patients(modality: Modality, judged: JudgedAnswers, titles: Mapping[str, str]) -> list[ShownPatient]:
    """All test patients; the largest mean error of growth comes first."""
    truths, measured, structure, patients = judged.truths, judged.method.patients, modality.biomarkers[0], []
    for scan, image in enumerate(judged.scans):
        rows = [row for row, truth in enumerate(truths) if truth.scan == scan]
        answers = [
            ShownAnswer(
                edit=truths[row].edit,
                title=titles.get(truths[row].edit, truths[row].edit),
                target=in_words(modality, truths[row].target),
                picture=judged.pictures[row],
                truth=truths[row].image,
                scan=image,
                growth_mm2=measured[row].growth_mm2[structure],
                true_growth_mm2=measured[row].true_growth_mm2[structure],
            )
            for row in rows
        ]
        first = truths[rows[0]]
        patients.append(
            ShownPatient(
                name=f"{first.hospital}, {first.patient}",
                source=in_words(modality, first.attributes),
                scan=image,
                reconstruction=judged.drawn.reconstructions[scan],
                area_mm2=first.scanned.areas_mm2[structure],
                answers=answers,
            )
        )
    return sorted(patients, key=lambda patient: -patient.error_mm2)


def write_strip(path: Path, patients: Sequence[ShownPatient], structure: str) -> Path:
    """A figure of the worst, the median and the best patient: answers, truths and differences; returns `path`.

    Args:
        path: PNG to write.
        patients: of `shown_patients`.
        structure: what is measured, in words.
    """
    places = dict.fromkeys([0, len(patients) // 2, len(patients) - 1])
    ranks = ("worst", "median", "best") if len(places) == 3 else ("",) * len(places)
    edits = min(STRIP_EDITS, min(len(patient.answers) for patient in patients))
    figure = Figure(figsize=(1.55 * (1 + 2 * edits) + 0.5, 3.6 * len(places)), layout="constrained")
    axes = figure.subplots(2 * len(places), 1 + 2 * edits, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for place, rank, (upper, lower) in zip(places, ranks, zip(axes[::2], axes[1::2], strict=True), strict=True):
        patient = patients[place]
        heading = f"{rank} of {len(patients)} patients:\n" if rank else ""
        _grey(upper[0], patient.scan, textwrap.fill(f"scan: {patient.source}", TITLE_LETTERS))
        lower[0].text(
            0.5,
            0.9,
            f"{heading}mean error\n{patient.error_mm2:.0f} mm²\n\n{structure}\n{patient.area_mm2:.0f} mm²\nin the scan",
            ha="center",
            va="top",
            fontsize=9,
            transform=lower[0].transAxes,
        )
        for number, answer in enumerate(patient.answers[-edits:]):
            column = 1 + 2 * number
            _grey(upper[column], answer.picture, f"{answer.title}:\nanswer {_signed(answer.growth_mm2)} mm²")
            _grey(upper[column + 1], answer.truth, f"{answer.target}:\ntruth {_signed(answer.true_growth_mm2)} mm²")
            _difference(lower[column], answer.picture - answer.scan, "answer − scan")
            _difference(lower[column + 1], answer.truth - answer.scan, "truth − scan")
    scale = ScalarMappable(Normalize(-50 * DIFFERENCE_LIMIT, 50 * DIFFERENCE_LIMIT), DIFFERENCE_COLOURS)
    bar = figure.colorbar(scale, ax=axes, shrink=0.4, aspect=30, pad=0.01)
    bar.set_label("difference from the scan,\n% of the grey range\n(blue darker, red brighter)", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    figure.savefig(path, dpi=130)
    return path


def growth_plots(patients: Sequence[ShownPatient]) -> dict[str, Figure]:
    """Drawn against true growth of each patient, a figure for each kind of edit, by its title."""
    by_edit: dict[str, list[ShownAnswer]] = {}
    for patient in patients:
        for answer in patient.answers:
            by_edit.setdefault(answer.edit, []).append(answer)
    return {answers[0].title: _growth_plot(answers) for answers in by_edit.values()}


def _growth_plot(answers: Sequence[ShownAnswer]) -> Figure:
    true, drawn = ([getattr(answer, key) for answer in answers] for key in ("true_growth_mm2", "growth_mm2"))
    ends = [min(*true, *drawn, 0), max(*true, *drawn, 0)]
    figure = Figure(figsize=(3.4, 3.3), layout="constrained")
    axis = figure.subplots()
    axis.plot(ends, ends, color="#56606a", lw=0.8, ls="--")
    axis.scatter(true, drawn, s=18, color="#1b6ca8")
    axis.set_title(answers[0].title, fontsize=10)
    axis.locator_params(nbins=4)
    axis.set(xlabel="true growth, mm²", ylabel="growth in the answer, mm²")
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def _signed(value: float) -> str:
    return f"{value:+.0f}".replace("-", "−")


def _grey(axis: matplotlib.axes.Axes, image: Tensor, title: str) -> None:
    axis.imshow(image[0], cmap="gray", vmin=-1, vmax=1, interpolation="bilinear")
    axis.set_title(title, fontsize=9, pad=3)


def _difference(axis: matplotlib.axes.Axes, image: Tensor, title: str) -> None:
    axis.imshow(image[0], cmap=DIFFERENCE_COLOURS, vmin=-DIFFERENCE_LIMIT, vmax=DIFFERENCE_LIMIT)
    axis.set_title(title, fontsize=9, pad=3)
