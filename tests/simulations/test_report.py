"""The report's patients: the worst first, each change beside the true one, and differences that can be read."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ld_common.imaging.modality import Modality
from ld_common.imaging.scan_table import in_words
from ld_simulations.report.patients import growth_plots, shown_patients, write_strip
from ld_simulations.report.pictures import DIFFERENCE_LIMIT, difference_legend, difference_url, picture_url

EDITS = {"age_plus_10": {"age": 84.0}, "disease_added": {"diagnosis": "AD"}, "other_sex": {"sex": "M"}}
TITLES = {"age_plus_10": "10 years older", "disease_added": "with Alzheimer's", "other_sex": "of the other sex"}
SOURCE = {"age": 74.0, "sex": "F", "diagnosis": "CN"}


def judged(errors: list[float]) -> Any:
    """Test patients whose answers all miss the true growth by as much."""
    truths, answers = [], []
    for scan in range(len(errors)):
        for number, (edit, target) in enumerate(EDITS.items()):
            truths.append(
                SimpleNamespace(
                    hospital="aster",
                    patient=f"P{scan}",
                    attributes=SOURCE,
                    edit=edit,
                    target=target,
                    scan=scan,
                    scanned=SimpleNamespace(areas_mm2={"ventricles": 1000.0 + scan}),
                    image=torch.full((1, 8, 8), 0.1 * number),
                )
            )
            growth = 100.0 * (number + 1)
            answers.append(
                SimpleNamespace(
                    growth_mm2={"ventricles": growth + errors[scan]}, true_growth_mm2={"ventricles": growth}
                )
            )
    scans = torch.zeros(len(errors), 1, 8, 8)
    drawn = SimpleNamespace(reconstructions=scans - 0.5)
    pictures = torch.ones(len(truths), 1, 8, 8)
    method = SimpleNamespace(patients=answers)
    return SimpleNamespace(truths=truths, scans=scans, drawn=drawn, pictures=pictures, method=method)


def test_the_patient_with_the_largest_error_comes_first(brain_mri: Modality) -> None:
    patients = shown_patients(brain_mri, judged([5.0, 80.0, -20.0]), TITLES)
    assert [patient.name for patient in patients] == ["aster, P1", "aster, P2", "aster, P0"]
    assert [patient.error_mm2 for patient in patients] == pytest.approx([80.0, 20.0, 5.0])
    first = patients[0].answers[0]
    assert (first.title, first.target, first.growth_mm2, first.true_growth_mm2) == (
        "10 years older",
        "84 years",
        180.0,
        100.0,
    )
    assert patients[0].area_mm2 == 1001.0


def test_attributes_are_said_in_words(brain_mri: Modality) -> None:
    assert in_words(brain_mri, SOURCE) == "74 years, woman, healthy"
    assert in_words(brain_mri, {"diagnosis": "AD"}) == "Alzheimer's disease"


def pixels(url: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))


def test_a_difference_is_white_where_nothing_changes_and_as_the_legend_says_at_its_ends() -> None:
    unchanged, darker, brighter = (
        pixels(difference_url(torch.full((1, 2, 2), change)))[0, 0]
        for change in (0.0, -DIFFERENCE_LIMIT, DIFFERENCE_LIMIT)
    )
    legend = difference_legend()
    ends = [legend["gradient"].split(", ")[place] for place in (0, -1)]
    assert [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in (darker, brighter)] == ends
    assert min(unchanged) > 240
    assert darker[2] > darker[0]  # blue
    assert brighter[0] > brighter[2]  # red
    assert (legend["darkest"], legend["brightest"]) == ("−50 %", "+50 %")
    assert pixels(picture_url(torch.full((1, 2, 2), 3.0))).max() == 255


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_figure_has_the_worst_the_median_and_the_best(brain_mri: Modality, tmp_path: Path, count: int) -> None:
    patients = shown_patients(brain_mri, judged([10.0 * number for number in range(count)]), TITLES)
    with Image.open(write_strip(tmp_path / "strip.png", patients, "ventricles")) as strip:
        assert strip.width > 800
        assert strip.height == pytest.approx(130 * 3.6 * min(3, count), abs=2)
    titles = [figure.axes[0].get_title() for figure in growth_plots(patients).values()]
    assert titles == list(TITLES.values())
