from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ld_common.core.errors import RequestError
from ld_common.metrics.histogram import (
    background_error,
    background_mask,
    condition_regression,
    histogram_match,
    match_grey_levels,
    sharpness,
    size_slope,
)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bodies(count: int, seed: int = 0) -> Tensor:
    """Pictures of 32 pixels: grey texture in a square on a ground of exactly -1."""
    texture = F.interpolate(noise(count, 1, 6, 6, seed=seed), (16, 16), mode="bicubic")
    pictures = torch.full((count, 1, 32, 32), -1.0)
    pictures[:, :, 8:24, 8:24] = (0.2 + 0.25 * texture).clamp(-0.9, 1)
    return pictures


def test_matched_pictures_have_the_pooled_histogram_of_the_references() -> None:
    pictures, references = noise(3, 1, 32, 32) * 0.1, noise(7, 1, 32, 32, seed=1).tanh()
    matched = histogram_match(pictures, references)
    shares = torch.linspace(0.02, 0.98, 25)
    wanted = references.flatten().quantile(shares)
    for picture in matched:
        assert torch.allclose(picture.flatten().quantile(shares), wanted, atol=0.01)


def test_matching_keeps_the_order_of_grey_levels_and_undoes_monotone_changes() -> None:
    pictures, references = bodies(4), bodies(9, seed=1)
    matched = histogram_match(pictures, references)
    for before, after in zip(pictures.flatten(1), matched.flatten(1), strict=True):
        order = before.argsort(stable=True)
        steps = after[order].diff()
        assert (steps >= 0).all()
        assert (steps[before[order].diff() == 0] == 0).all()  # ties stay ties
    assert torch.equal(histogram_match(pictures * 0.5 + 0.25, references), matched)
    assert (matched[pictures == -1] == -1).all()


def test_with_both_sets_matched_a_gamma_leaves_no_trace() -> None:
    pictures, references = noise(4, 1, 32, 32).tanh(), bodies(9, seed=1)
    gamma = ((pictures + 1) / 2).double() ** 0.5 * 2 - 1
    assert torch.allclose(histogram_match(gamma.float(), references), histogram_match(pictures, references), atol=1e-4)


def test_a_single_picture_matched_to_itself_stays() -> None:
    picture = noise(1, 1, 32, 32).tanh()
    assert torch.allclose(histogram_match(picture, picture), picture, atol=1e-6)


def test_one_map_for_all_gives_a_set_the_references_histogram_and_leaves_a_matching_set_alone() -> None:
    pictures, references = noise(6, 1, 32, 32) * 0.1 + 0.4, noise(7, 1, 32, 32, seed=1).tanh()
    matched = match_grey_levels(pictures, references)
    shares = torch.linspace(0.02, 0.98, 25)
    assert torch.allclose(matched.flatten().quantile(shares), references.flatten().quantile(shares), atol=0.01)
    order = pictures.flatten().argsort(stable=True)
    assert (matched.flatten()[order].diff() >= 0).all()
    assert torch.allclose(match_grey_levels(references, references), references, atol=1e-6)
    tied = bodies(4)
    assert (match_grey_levels(tied, references)[tied == -1].unique().numel()) == 1


def test_sharpness_forgets_scale_and_offset_and_falls_with_blur() -> None:
    pictures = noise(4, 1, 64, 64)
    value = sharpness(pictures)
    assert value.shape == (4,)
    assert torch.allclose(value, torch.full((4,), 4.0), atol=0.2)  # white noise: two directions of twice the variance
    assert torch.allclose(sharpness(pictures * 0.1 - 0.5), value, rtol=1e-4)
    blurred = F.avg_pool2d(pictures, 3, stride=1)
    assert (sharpness(blurred) < 0.5 * value).all()
    assert sharpness(torch.full((1, 1, 8, 8), 0.3)).tolist() == [0.0]


def test_the_background_is_the_black_border_of_a_brain_or_the_stillest_part_of_a_radiograph() -> None:
    pictures = bodies(12)
    assert torch.equal(background_mask(pictures), (pictures == -1).all(0)[0])
    radiographs = noise(40, 1, 32, 32) * torch.linspace(0.05, 1, 32)[:, None]  # no border; still at the top
    mask = background_mask(radiographs, share=0.25)
    assert int(mask.sum()) == 256
    assert mask[:5].all()
    assert not mask[12:].any()


def test_background_error_is_the_signed_shift_there_and_nowhere_else() -> None:
    references = bodies(12)
    mask = background_mask(references)
    assert background_error(references, references, mask).abs().max() < 1e-6
    generated = bodies(5, seed=3)
    generated[:, :, mask] += 0.1
    generated[:, :, ~mask] -= 0.3
    error = background_error(generated, references, mask)
    assert error.shape == (5,)
    assert torch.allclose(error, torch.full((5,), 0.1), atol=1e-5)


def test_real_scans_have_the_slope_one_on_their_own_regression() -> None:
    design = noise(200, 2).double()
    sizes = 30 + design @ torch.tensor([2.0, -1.0]).double() + noise(200, seed=1)
    regression = condition_regression(sizes, design)
    assert torch.allclose(regression.coefficients, torch.tensor([30.0, 2.0, -1.0]).double(), atol=0.25)
    assert torch.allclose(regression.predict(design), regression.prediction)
    residual = sizes - regression.prediction
    assert (design.T @ residual).abs().max() < 1e-9
    assert size_slope(sizes, regression.prediction) == pytest.approx(1)


def test_the_slope_tells_how_far_pictures_follow_their_condition() -> None:
    predicted = torch.linspace(20, 40, 50)
    assert size_slope(0.4 * predicted + 7, predicted) == pytest.approx(0.4, rel=1e-6)
    assert size_slope(torch.full((50,), 25.0), predicted) == pytest.approx(0)
    assert abs(size_slope(predicted[torch.randperm(50, generator=torch.Generator().manual_seed(0))], predicted)) < 0.5
    with pytest.raises(RequestError, match="vary the conditions"):
        size_slope(predicted, torch.full((50,), 30.1))


def test_a_design_with_redundant_columns_still_predicts() -> None:
    column = noise(60, 1)
    sizes = 5 + 3 * column[:, 0]
    regression = condition_regression(sizes, torch.cat([column, 2 * column, torch.ones(60, 1)], 1))
    assert torch.allclose(regression.prediction.float(), sizes, atol=1e-4)
