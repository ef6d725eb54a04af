from __future__ import annotations

import pytest
import torch

from ld_common.core.errors import ConfigError
from ld_common.metrics.biomarkers import ventricle_areas_mm2
from ld_common.metrics.image import psnr
from ld_common.metrics.registry import BIOMARKERS


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
