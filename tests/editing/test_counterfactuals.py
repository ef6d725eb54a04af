from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ld_common.diffusion.base_model import BaseModel, load_base
from ld_common.editing.counterfactuals import Edit, draw_counterfactuals
from ld_common.editing.ddim import DdimInversion

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
    for scale, target in ((0.0, ILL), (3.0, HEALTHY)):
        editor = DdimInversion(num_inference_steps=4, guidance_scale=scale)
        drawn = draw_counterfactuals(base, images, [HEALTHY] * 3, [Edit(1, target)], editor)
        assert torch.allclose(drawn.images[0], drawn.reconstructions[1], atol=1e-4)


def test_another_prompt_changes_the_image(base: BaseModel, images: torch.Tensor) -> None:
    drawn = draw_counterfactuals(
        base, images, [HEALTHY] * 3, [Edit(1, ILL)], DdimInversion(num_inference_steps=6, guidance_scale=3.0)
    )
    assert float((drawn.images[0] - drawn.reconstructions[1]).abs().max()) > 1e-3


def test_the_batch_size_changes_nothing(base: BaseModel, images: torch.Tensor) -> None:
    edits = [Edit(0, ILL), Edit(2, ILL), Edit(0, HEALTHY), Edit(1, ILL)]
    drawn = [
        draw_counterfactuals(
            base, images, [HEALTHY, ILL, HEALTHY], edits, DdimInversion(num_inference_steps=5, batch_size=size)
        )
        for size in (1, 3)
    ]
    assert torch.allclose(drawn[0].images, drawn[1].images, atol=1e-4)
    assert torch.allclose(drawn[0].reconstructions, drawn[1].reconstructions, atol=1e-4)


def test_progress_counts_every_image_and_edit(base: BaseModel, images: torch.Tensor) -> None:
    done: list[int] = []
    draw_counterfactuals(
        base, images, [HEALTHY] * 3, [Edit(0, ILL)] * 4, DdimInversion(num_inference_steps=2, batch_size=2), done.append
    )
    assert sum(done) == 7
