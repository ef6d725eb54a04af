from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ld_common.core.config import load_config
from ld_common.core.errors import ConfigError
from ld_common.metrics.biomarkers import (
    HEART_AREA_OF_WIDTH,
    heart_areas_mm2,
    heart_edges_mm,
    ventricle_areas_mm2,
    ventricle_edges_mm,
)
from ld_common.metrics.image import psnr
from ld_common.metrics.registry import BIOMARKERS, EDGES
from ld_simulations.hospitals import draw_visits, scan
from ld_simulations.hospitals_config import HospitalsConfig
from ld_simulations.phantoms.registry import find_phantom

ROOT = Path(__file__).parents[2]


def test_psnr_is_of_the_range_of_two() -> None:
    assert float(psnr(torch.full((1, 1, 4, 4), 0.2), torch.zeros(1, 1, 4, 4))[0]) == pytest.approx(20.0)


@pytest.mark.parametrize("contrast", [0.7, 1.0, 1.4])
def test_the_ventricle_area_follows_a_drawn_ventricle_at_any_contrast(contrast: float) -> None:
    """A bright disc with a dark ellipse of known area, brought to 64 pixels from a four times finer drawing."""
    y, x = torch.meshgrid(*[torch.linspace(-100, 100, 257)[:-1] + 100 / 256] * 2, indexing="ij")
    areas, images = [], []
    for radius in (8.0, 12.0, 18.0):
        drawing = 0.9 * ((x / 65) ** 2 + (y / 80) ** 2 < 1).float()
        drawing[(x / radius) ** 2 + (y / (1.4 * radius)) ** 2 < 1] = 0.12
        images.append(torch.nn.functional.avg_pool2d(drawing[None, None], 4)[0] ** contrast * 2 - 1)
        areas.append(torch.pi * 1.4 * radius**2)
    measured = ventricle_areas_mm2(torch.stack(images), 200 / 64)
    assert torch.allclose(measured, torch.tensor(areas), atol=110)  # eleven pixels of a wall's partial volume
    assert torch.allclose(measured.diff(), torch.tensor(areas).diff(), rtol=0.06)


def test_a_blank_image_has_no_ventricle() -> None:
    assert ventricle_areas_mm2(torch.full((1, 1, 64, 64), -1.0), 3.0).tolist() == [0.0]


def test_an_unknown_biomarker_is_named() -> None:
    with pytest.raises(ConfigError, match="did you mean 'heart'"):
        BIOMARKERS.load("hart")


def test_an_edge_is_as_long_as_the_drawn_one_and_a_blank_image_has_none() -> None:
    y, x = torch.meshgrid(*[torch.linspace(-100, 100, 257)[:-1] + 100 / 256] * 2, indexing="ij")
    lengths, images = [], []
    for radius in (12.0, 18.0):
        drawing = 0.9 * ((x / 65) ** 2 + (y / 80) ** 2 < 1).float()
        drawing[(x / radius) ** 2 + (y / radius) ** 2 < 1] = 0.12
        images.append(torch.nn.functional.avg_pool2d(drawing[None, None], 4)[0] * 2 - 1)
        lengths.append(2 * torch.pi * radius)
    measured = ventricle_edges_mm(torch.stack(images), 200 / 64)
    assert torch.allclose(measured, torch.tensor(lengths), rtol=0.1)
    assert ventricle_edges_mm(torch.full((1, 1, 64, 64), -1.0), 3.0).tolist() == [0.0]


def test_a_heart_grows_by_its_edge_when_both_borders_move_out_by_a_millimetre() -> None:
    hospitals = load_config(HospitalsConfig, ROOT / "configs/chest_hospitals.yaml", ["patients=1", "test_patients=0"])
    visit = draw_visits(find_phantom("chest"), 0, hospitals.hospitals[0], held_out=False)[0][0]
    device = hospitals.hospitals[0].scanner
    values = scan(find_phantom("chest"), visit, visit.attributes, 0, device)[0]
    picture = torch.tensor(values / values.max() * 2 - 1).float()[None, None]
    area, edge = (float(measure(picture, 2.0)[0]) for measure in (heart_areas_mm2, heart_edges_mm))
    width = (area / HEART_AREA_OF_WIDTH) ** 0.5
    assert HEART_AREA_OF_WIDTH * (width + 2) ** 2 - area == pytest.approx(edge, rel=0.02)


def test_every_edge_belongs_to_a_biomarker() -> None:
    assert set(EDGES) <= set(BIOMARKERS)
