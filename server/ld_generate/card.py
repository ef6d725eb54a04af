"""The patient card: one page, PNG and PDF, with a scan, its answers and what is known about them.

It is made from a folder of results and the release alone; no model is needed.
"""

from __future__ import annotations

import io
import itertools
import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure, SubFigure

from ld_common.core.atomic_files import write_bytes
from ld_common.imaging.modality import AGE, Attributes, Modality
from ld_common.imaging.rendering import reference_of
from ld_common.imaging.scan_table import in_words
from ld_common.metrics.cohort import CohortCurve
from ld_common.release.age_calibration import read_age_calibration
from ld_common.release.release import Release
from ld_generate.age_curve import JUDGED
from ld_generate.samples import RECORD, SYNTHETIC, save_figure

CARD = "card"
"""Name of both files, without their endings."""
MAX_ANSWERS = 4
"""Answers on a card; of more, as many are taken at even distances, the last among them."""
INCHES = (11.7, 8.3)
"""A4, landscape."""
DIFFERENCE_COLOURS, DIFFERENCE_PERCENT = "RdBu_r", 50
"""As in the difference maps: the strongest colour is this share of the scan's grey range."""
DRAWN, COHORT, INK, SUBDUED = "#1f5fa8", "#8a8a8a", "#1c2126", "#4d5761"
NOTICE = "Synthetic images, for research only: model output, not observations of a patient, not for diagnosis."
GAUGE_COLOURS = LinearSegmentedColormap.from_list("gauge", ["#2e7d4f", "#d9a400", "#c62f21"])
LETTERS = 100
"""Of a line of text on the right of the lower half."""
DIGITS = 16
"""Of each hash."""


@dataclass(frozen=True)
class _Answer:
    """One counterfactual of a record."""

    target: Attributes
    delta: float
    areas_mm2: Mapping[str, float]
    band: Mapping[str, Any] | None
    picture: Path
    difference: Path


def write_card(folder: Path, release: Release) -> list[Path]:
    """Write `card.png` and `card.pdf` of a folder of results; returns both.

    Args:
        folder: of one scan, with `record.json`, as `ld-generate edit` and `sweep` leave it.
        release: the one that drew it; its evaluation has the cohort's curve.
    """
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    figure = _Card(folder, record, release).draw()
    text = SYNTHETIC | {"Description": NOTICE}
    stream = io.BytesIO()
    figure.savefig(stream, format="pdf", metadata={"Title": NOTICE, "Creator": text["Software"], "CreationDate": None})
    write_bytes(folder / f"{CARD}.pdf", stream.getvalue())
    return [save_figure(folder / f"{CARD}.png", figure, text), folder / f"{CARD}.pdf"]


class _Card:
    """Draws the card of one record."""

    def __init__(self, folder: Path, record: Mapping[str, Any], release: Release) -> None:
        self._folder, self._record, self._release = folder, record, release
        self._modality: Modality = release.modality
        self._biomarker = next(iter(record["biomarkers_mm2"]["scan"]), None)
        self._answers = [self._answer(entry) for entry in record["counterfactuals"]]
        self._reference = reference_of(record["rendering"])

    def draw(self) -> Figure:
        """The page: title and notice, pictures, areas beside text, and names and hashes at the foot."""
        figure = Figure(figsize=INCHES, facecolor="white")
        parts: Any = figure.subfigures(4, 1, height_ratios=(0.1, 0.52, 0.35, 0.03))
        head, pictures, lower, foot = parts
        title = f"Patient card: {in_words(self._modality, self._record['source'])}"
        head.text(0.02, 0.68, title, fontsize=14, weight="bold", color=INK, va="center")
        head.text(0.022, 0.18, NOTICE, fontsize=9, color="white", va="center", backgroundcolor="#7a4100")
        self._draw_pictures(pictures)
        left, right = lower.subfigures(1, 2, width_ratios=(1, 1.25))
        self._draw_areas(left)
        self._draw_text(right)
        foot.text(0.02, 0.6, self._origin(), fontsize=7, color=SUBDUED, family="monospace", va="center")
        return figure

    def _answer(self, entry: Mapping[str, Any]) -> _Answer:
        difference = next(name for name in entry["files"] if name.endswith("_difference.png"))
        picture = next(name for name in entry["files"] if name == difference.replace("_difference.png", ".png"))
        return _Answer(
            entry["target"],
            entry["delta"],
            entry["biomarkers_mm2"],
            entry["band"],
            self._folder / picture,
            self._folder / difference,
        )

    def _draw_pictures(self, part: SubFigure) -> None:
        """The scan and the answers, and below each answer its difference from the reference."""
        answers = _spread(self._answers, MAX_ANSWERS)
        axes = part.subplots(2, 1 + len(answers), squeeze=False)
        part.subplots_adjust(left=0.02, right=0.9, top=0.9, bottom=0.02, wspace=0.06, hspace=0.14)
        for axis in axes.flat:
            axis.axis("off")
        _show(axes[0, 0], self._folder / "input.png", "the scan")
        if self._reference == "reconstruction":
            _show(axes[1, 0], self._folder / "reconstruction.png", "its reconstruction")
        else:
            axes[1, 0].text(0.5, 0.9, self._scan_text(), fontsize=9, color=INK, ha="center", va="top")
        for column, answer in enumerate(answers, start=1):
            title = in_words(self._modality, self._changes(answer)) + (f", δ {answer.delta:+g}" if answer.delta else "")
            _show(axes[0, column], answer.picture, f"{title}\n{self._change(answer)}".strip())
            _show(axes[1, column], answer.difference, f"minus the {self._reference}")
        scale = ScalarMappable(Normalize(-DIFFERENCE_PERCENT, DIFFERENCE_PERCENT), DIFFERENCE_COLOURS)
        bar = part.colorbar(scale, cax=part.add_axes((0.925, 0.04, 0.013, 0.36)))
        bar.set_label("difference, % of the grey range\n(blue darker, red brighter)", fontsize=7)
        bar.ax.tick_params(labelsize=7)
        if len(answers) < len(self._answers):
            part.text(0.915, 0.6, f"{len(answers)} of {len(self._answers)}\nanswers", fontsize=8, color=SUBDUED)

    def _changes(self, answer: _Answer) -> Attributes:
        """What an answer shows otherwise than the scan; all that was asked where that is nothing."""
        source = self._record["source"]
        return {name: value for name, value in answer.target.items() if value != source[name]} or answer.target

    def _scan_text(self) -> str:
        if self._biomarker is None:
            return ""
        return (
            f"{self._biomarker.replace('_', ' ')}\n{self._record['biomarkers_mm2']['scan'][self._biomarker]:,.0f} mm²"
        )

    def _change(self, answer: _Answer) -> str:
        """Change of the biomarker, and its band where there is one."""
        if self._biomarker is None:
            return ""
        before = self._record["biomarkers_mm2"][self._reference][self._biomarker]
        text = f"{answer.areas_mm2[self._biomarker] - before:+,.0f} mm²"
        if answer.band is None:
            return text
        low, high = (answer.band[key] - before for key in ("low_mm2", "high_mm2"))
        sure = "" if answer.band["kind"] == JUDGED else " (extrapolated)"
        return f"{text}\n{answer.band['level']:.0%} band: {low:+,.0f} to {high:+,.0f}{sure}".replace("%", " %")

    def _draw_areas(self, part: SubFigure) -> None:
        """The biomarker against age, or a bar for each answer where the age does not change."""
        axes = part.subplots()
        part.subplots_adjust(left=0.14, right=0.97, top=0.9, bottom=0.3)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        if self._biomarker is None:
            axes.axis("off")
            axes.text(0, 0.9, "The scan does not say its pixel spacing, so no area is known.", fontsize=9, va="top")
            return
        axes.set_ylabel(f"{self._biomarker.replace('_', ' ')}, mm²", fontsize=8)
        ageing = [answer for answer in self._answers if set(self._changes(answer)) == {AGE} and not answer.delta]
        if ageing and not self._modality.attributes[AGE].categories:
            self._draw_curve(axes, self._biomarker, ageing)
        else:
            self._draw_bars(axes, self._biomarker)

    def _draw_curve(self, axes: Axes, name: str, answers: Sequence[_Answer]) -> None:
        age = float(self._record["source"][AGE])
        start = self._record["biomarkers_mm2"]["scan"][name]
        visits = [
            (age - visit["years_before"], visit["biomarkers_mm2"][name])
            for visit in self._record["history"]
            if name in visit["biomarkers_mm2"]
        ]
        points = sorted((float(answer.target[AGE]), answer.areas_mm2[name], answer.band) for answer in answers)
        ages = [age, *(year for year, *_ in points), *(year for year, _ in visits)]
        margin = 0.04 * (max(ages) - min(ages))
        cohort = read_age_calibration(self._release.manifest.get("evaluation", {})).curve_of(self._record["source"])
        if cohort is not None:
            _draw_cohort(axes, cohort, np.linspace(min(ages) - margin, max(ages) + margin, 100))
        line = sorted([(age, start), *((year, area) for year, area, _ in points)])
        axes.plot(*zip(*line, strict=True), color=DRAWN, linewidth=1.6, zorder=3)
        axes.plot(*zip(*((year, area) for year, area, _ in points), strict=True), "o", color=DRAWN, label="answers")
        banded = [(year, area, band) for year, area, band in points if band is not None]
        if banded:
            years, areas, bands = zip(*banded, strict=True)
            reach = [[area - band["low_mm2"] for area, band in zip(areas, bands, strict=True)]]
            reach += [[band["high_mm2"] - area for area, band in zip(areas, bands, strict=True)]]
            label = f"{bands[0]['level']:.0%} band".replace("%", " %")
            axes.errorbar(years, areas, reach, fmt="none", ecolor=DRAWN, elinewidth=1, capsize=4, label=label)
        if visits:
            axes.plot(*zip(*visits, strict=True), "s", color=INK, markerfacecolor="white", label="earlier scans")
        axes.plot(age, start, "D", color=INK, label="the scan", zorder=4)
        axes.set_xlabel("age, years", fontsize=8)
        axes.set_ylim(bottom=max(axes.get_ylim()[0], 0))
        _legend_below(axes)

    def _draw_bars(self, axes: Axes, name: str) -> None:
        labels = [self._reference, *(in_words(self._modality, self._changes(answer)) for answer in self._answers)]
        areas = [self._record["biomarkers_mm2"][self._reference][name]]
        areas += [answer.areas_mm2[name] for answer in self._answers]
        axes.bar(range(len(areas)), areas, color=[COHORT] + [DRAWN] * len(self._answers), width=0.6)
        axes.set_xticks(range(len(areas)), [textwrap.fill(label, 18) for label in labels], fontsize=8)

    def _draw_text(self, part: SubFigure) -> None:
        """How familiar the scan is, the history, what was evaluated, and warnings."""
        blocks = [("How it was drawn", [self._how()]), ("Earlier scans", [self._visits()])]
        said = self._record["evaluation"] or ["Nothing: the release has no evaluation of such edits."]
        blocks.append(("What this release can do, on test patients", list(said)))
        if self._record["warnings"]:
            blocks.append(("Warnings", list(self._record["warnings"])))
        height = 0.94
        if self._record["familiarity"] is not None:
            _draw_gauge(part, self._record["familiarity"])
            height = 0.76
        for title, lines in blocks:
            part.text(0.02, height, title, fontsize=8.5, weight="bold", color=INK, va="top")
            height -= 0.05
            for line in itertools.chain.from_iterable(textwrap.wrap(text, LETTERS) for text in lines):
                part.text(0.02, height, line, fontsize=7.5, color=INK, va="top")
                height -= 0.042
            height -= 0.018

    def _how(self) -> str:
        edit, written = self._record["edit"], self._record["rendering"]
        return f"Editor {edit['name']}, written by {written}; seed {self._record['seeds'][0]}."

    def _visits(self) -> str:
        visits = self._record["history"]
        if not visits:
            return "None: the answer rests on this scan alone."
        years = ", ".join(f"{visit['years_before']:.1f}" for visit in visits)
        return f"{len(visits)}, taken {years} years before this one."

    def _origin(self) -> str:
        """Names and hashes by which everything on the card can be found again."""
        release, adapter = self._release, self._release.adapter_sha256[:DIGITS]
        signed = f"signed by {release.signed_by}" if release.signed_by else "not signed"
        scan = str(self._record["input"]["hmac_of_pixels"])[:DIGITS]
        return (
            f"{self._modality.name}, release {release.study.name} ({signed}), adapter {adapter}, "
            f"base {release.base_digest[:DIGITS]}, scan (keyed) {scan}, {SYNTHETIC['Software']}"
        )


def _spread(answers: Sequence[_Answer], most: int) -> list[_Answer]:
    """As many answers as a card has room for, at even distances."""
    if len(answers) <= most:
        return list(answers)
    return [answers[round(place)] for place in np.linspace(0, len(answers) - 1, most)]


def _show(axes: Axes, file: Path, title: str) -> None:
    picture = matplotlib.image.imread(file)
    axes.imshow(picture, cmap="gray", vmin=0, vmax=1)
    axes.set_title(title, fontsize=8, color=INK, pad=3)


def _draw_cohort(axes: Axes, cohort: CohortCurve, ages: np.ndarray) -> None:
    ages = ages[np.isfinite(cohort.at(ages))]
    mean = cohort.at(ages)
    axes.plot(ages, mean, color=COHORT, linewidth=1.3, label="cohort")
    low, high = np.maximum(mean + cohort.low_mm2, 0), mean + cohort.high_mm2
    label = f"{cohort.level:.0%} of the cohort".replace("%", " %")
    axes.fill_between(ages, low, high, color=COHORT, alpha=0.16, linewidth=0, label=label)


def _legend_below(axes: Axes) -> None:
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, fontsize=7.5, frameon=False)


def _draw_gauge(part: SubFigure, familiarity: Mapping[str, Any]) -> None:
    """How unlike the sites' scans the scan is; the limit is in the middle."""
    share = max(familiarity[name] / limit for name, limit in familiarity["limits"].items())
    words = "Outside what the release's sites had: do not trust this card." if familiarity["unfamiliar"] else ""
    title = words or "Familiar scan: within what the release's sites had."
    part.text(0.02, 0.94, title, fontsize=8.5, weight="bold", color="#a5281b" if words else INK, va="top")
    axes = part.add_axes((0.02, 0.83, 0.5, 0.045))
    axes.imshow(np.linspace(0, 1, 100)[None], cmap=GAUGE_COLOURS, aspect="auto", extent=(0, 2, 0, 1))
    axes.axvline(1, color="white", linewidth=1.5)
    axes.plot(min(share, 2), 0.5, marker="|", markersize=16, markeredgewidth=3, color=INK, clip_on=False)
    axes.set_yticks([])
    axes.set_xticks([0, 1, 2], ["like the sites' scans", "limit", "unlike"], fontsize=7)
    first, _, last = axes.get_xticklabels()
    first.set_horizontalalignment("left")
    last.set_horizontalalignment("right")
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
