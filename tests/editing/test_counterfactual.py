from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ld_common.diffusion.base_model import BaseModel, load_base
from ld_common.editing.base import Editor
from ld_common.editing.counterfactuals import Edit, draw_counterfactuals
from ld_common.metrics.biomarkers import ventricle_areas_mm2
from ld_common.metrics.image import psnr

HEALTHY, ILL = "axial T1 brain MRI, woman, 70 years, healthy", "axial T1 brain MRI, man, 80 years, Alzheimer's disease"


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> BaseModel:
    return load_base(str(tiny_base))


@pytest.fixture
def images(base: BaseModel) -> torch.Tensor:
    return torch.rand(3, 1, base.resolution, base.resolution, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_no_strength_and_an_unchanged_prompt_both_return_the_reconstruction(
    base: BaseModel, images: torch.Tensor
) -> None:
    factual = [HEALTHY] * 3
    still = draw_counterfactuals(base, images, factual, [Edit(1, ILL)], Editor(steps=6, strength=0.0))
    same = draw_counterfactuals(base, images, factual, [Edit(1, HEALTHY)], Editor(steps=6, strength=3.0))
    for drawn in (still, same):
        assert torch.allclose(drawn.images[0], drawn.reconstructions[1], atol=1e-4)


def test_another_prompt_changes_the_image(base: BaseModel, images: torch.Tensor) -> None:
    drawn = draw_counterfactuals(base, images, [HEALTHY] * 3, [Edit(1, ILL)], Editor(steps=6, strength=3.0))
    assert float((drawn.images[0] - drawn.reconstructions[1]).abs().max()) > 1e-3


def test_the_batch_size_changes_nothing(base: BaseModel, images: torch.Tensor) -> None:
    edits = [Edit(0, ILL), Edit(2, ILL), Edit(0, HEALTHY), Edit(1, ILL)]
    drawn = [
        draw_counterfactuals(base, images, [HEALTHY, ILL, HEALTHY], edits, Editor(steps=5, batch_size=size))
        for size in (1, 3)
    ]
    assert torch.allclose(drawn[0].images, drawn[1].images, atol=1e-4)
    assert torch.allclose(drawn[0].reconstructions, drawn[1].reconstructions, atol=1e-4)


def test_progress_counts_every_image_and_edit(base: BaseModel, images: torch.Tensor) -> None:
    done: list[int] = []
    draw_counterfactuals(base, images, [HEALTHY] * 3, [Edit(0, ILL)] * 4, Editor(steps=2, batch_size=2), done.append)
    assert sum(done) == 7


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
