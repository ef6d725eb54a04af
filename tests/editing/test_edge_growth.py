"""A change with the years is scaled until the structure grows as the scan's own edge tells."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ld_common.diffusion.base_model import BaseModel, load_base
from ld_common.diffusion.longitudinal import LongitudinalDrift
from ld_common.diffusion.longitudinal_sums import feature_columns
from ld_common.editing.counterfactuals import Past, draw_counterfactuals, edit_to
from ld_common.editing.drift import DriftEditor
from ld_common.editing.history import ScanHistory
from ld_common.imaging.modality import Modality
from tests.support.longitudinal import random_drift

NOW = {"age": 60.0, "sex": "F", "diagnosis": "CN"}


@pytest.fixture(scope="module")
def base(smallest_base: Path) -> BaseModel:
    return load_base(str(smallest_base))


@pytest.fixture(scope="module")
def drift(base: BaseModel, brain_mri: Modality) -> LongitudinalDrift:
    """One that tells growth: the edge moves by 0.002 of the picture's side a year, whatever the scan."""
    fitted = random_drift(brain_mri, base.latent_shape)
    speed = torch.zeros_like(fitted.edge_speed)
    speed[0] = 0.002
    return replace(fitted, edge_speed=speed)


def brightness(pictures: Tensor) -> Tensor:
    return pictures.mean((1, 2, 3))


def drawn_growth(
    base: BaseModel, drift: LongitudinalDrift, modality: Modality, years: float, edge: float, editor: DriftEditor
) -> float:
    """How much brighter the answer is than the reconstruction."""
    scan = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    edits = [edit_to(modality, 0, NOW, {"age": 60.0 + years})]
    known = Past({0: ScanHistory.without_visits()}, brightness, lambda pictures: torch.full((len(pictures),), edge))
    prompts = [modality.prompt(NOW)]
    drawn = draw_counterfactuals(base, scan, prompts, edits, editor, drift=drift, past=known)
    return float(brightness(drawn.images)[0] - brightness(drawn.reconstructions)[0])


def test_the_answer_grows_by_the_scans_own_edge(base: BaseModel, drift: LongitudinalDrift, brain_mri: Modality) -> None:
    plain = drawn_growth(base, drift, brain_mri, 10.0, 1.0, DriftEditor(edge_share=0.0))
    toward = replace(drift, edge_speed=drift.edge_speed * (plain / (10 * 0.002)))
    for wanted in (0.7, 1.5):  # times what the drift draws by itself
        grown = drawn_growth(base, toward, brain_mri, 10.0, wanted, DriftEditor(edge_share=1.0))
        assert grown == pytest.approx(wanted * plain, rel=0.05)
        half = drawn_growth(base, toward, brain_mri, 10.0, wanted, DriftEditor(edge_share=0.5))
        assert half == pytest.approx((0.5 * wanted + 0.5) * plain, rel=0.05)


def test_a_drift_that_tells_no_growth_and_an_edge_that_would_shrink_change_nothing(
    base: BaseModel, drift: LongitudinalDrift, brain_mri: Modality
) -> None:
    plain = drawn_growth(base, drift, brain_mri, 10.0, 1.0, DriftEditor(edge_share=0.0))
    silent = replace(drift, edge_speed=torch.zeros_like(drift.edge_speed))
    assert drawn_growth(base, silent, brain_mri, 10.0, 1.0, DriftEditor()) == plain
    against = replace(drift, edge_speed=-drift.edge_speed * plain / abs(plain))
    assert drawn_growth(base, against, brain_mri, 10.0, 1.0, DriftEditor()) == plain


def test_a_disease_that_acts_like_years_is_scaled_half_way_to_its_edge(
    base: BaseModel, drift: LongitudinalDrift, brain_mri: Modality
) -> None:
    columns = feature_columns(brain_mri.numeric_columns)
    names = [name for name in brain_mri.attributes]
    years = torch.zeros_like(drift.years)
    years[columns.index((names.index("diagnosis"),))] = -8.0  # of the healthy
    ageing = replace(drift, years=years)

    def growth(sick: str, speed: float, share: float) -> float:
        moving = replace(ageing, edge_speed=drift.edge_speed * speed)
        scan = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
        source = NOW | {"diagnosis": "AD" if sick == "CN" else "CN"}
        edits = [edit_to(brain_mri, 0, source, {**source, "diagnosis": sick})]
        known = Past({0: ScanHistory.without_visits()}, brightness, lambda pictures: torch.ones(len(pictures)))
        drawn = draw_counterfactuals(
            base, scan, [brain_mri.prompt(source)], edits, DriftEditor(edge_share=share), drift=moving, past=known
        )
        return float(brightness(drawn.images)[0] - brightness(drawn.reconstructions)[0])

    for sick, sign in (("AD", 1.0), ("CN", -1.0)):
        plain = growth(sick, 1.0, 0.0)
        speed = sign * plain / (8 * 0.002)
        for wanted in (0.8, 1.4):
            half = growth(sick, wanted * speed, 1.0)
            assert half == pytest.approx((0.5 * wanted + 0.5) * plain, rel=0.05)
