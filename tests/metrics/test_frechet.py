from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ld_common.core.errors import RequestError
from ld_common.metrics.frechet import frechet_distance, kernel_distance


def normal(count: int, width: int, seed: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def exactly_normal(count: int, deviations: Tensor, mean: float, seed: int) -> Tensor:
    """Features whose sample mean and covariance are exactly `mean` and the squares of `deviations`."""
    draw = normal(count, len(deviations), seed).double()
    left, _, right = torch.linalg.svd(draw - draw.mean(0), full_matrices=False)
    return left @ right * (count - 1) ** 0.5 * deviations + mean


def test_frechet_distance_of_gaussians_is_the_analytic_one() -> None:
    deviations_a, deviations_b = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([3.0, 2.0, 1.0])
    a, b = exactly_normal(50, deviations_a, 0.0, 0), exactly_normal(80, deviations_b, 0.5, 1)
    expected = 3 * 0.5**2 + float((deviations_a - deviations_b).square().sum())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_covariances_that_do_not_commute() -> None:
    mix = normal(4, 4, 5).double()
    a = normal(300, 4, 0).double()
    b = normal(300, 4, 1).double() @ mix
    product = torch.cov(a.T) @ torch.cov(b.T)
    root_trace = torch.linalg.eigvals(product).real.sqrt().sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + torch.cov(a.T).trace() + torch.cov(b.T).trace() - 2 * root_trace
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("count", [20, 400])  # fewer and more than the 100 features
@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
def test_distances_are_symmetric_and_do_not_see_a_rotation(distance: object, count: int) -> None:
    assert callable(distance)
    a, b = normal(count, 100, 0), 1.5 * normal(count + 10, 100, 1) + 0.2
    rotation = torch.linalg.qr(normal(100, 100, 2).double()).Q
    value = distance(a, b)
    assert value > 0
    assert distance(b, a) == pytest.approx(value, rel=1e-9)
    assert distance(a.double() @ rotation, b.double() @ rotation) == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("count", [20, 400])
def test_identical_sets_have_no_frechet_distance(count: int) -> None:
    features = normal(count, 100, 0) * torch.logspace(2, -4, 100)
    features[:, 7] = 3.0  # a feature that never varies
    assert frechet_distance(features, features.flip(0)) < 1e-9 * float(features.var(0).sum())


def test_frechet_bias_falls_with_the_number_of_pictures() -> None:
    biases = [frechet_distance(normal(n, 32, 0), normal(n, 32, 1)) for n in (50, 200, 800, 3200)]
    assert biases[0] > 2 * biases[1] > 4 * biases[2] > 8 * biases[3] > 0


def test_frechet_distance_of_fewer_pictures_than_features_agrees_with_its_covariances() -> None:
    a, b = normal(30, 100, 0), normal(40, 100, 1) * 2
    # further dimensions without variance change nothing, but make the covariances singular in both orders
    padded = [torch.cat([features, torch.zeros(len(features), 50)], 1) for features in (a, b)]
    assert frechet_distance(*padded) == pytest.approx(frechet_distance(a, b), rel=1e-9)


def test_kernel_distance_is_the_textbook_sum_over_pairs() -> None:
    a, b = normal(5, 3, 0).double(), normal(4, 3, 1).double()

    def kernel(x: Tensor, y: Tensor) -> float:
        return (float(x @ y) / 3 + 1) ** 3

    within_a = sum(kernel(a[i], a[j]) for i in range(5) for j in range(5) if i != j) / 20
    within_b = sum(kernel(b[i], b[j]) for i in range(4) for j in range(4) if i != j) / 12
    between = sum(kernel(x, y) for x in a for y in b) / 20
    assert kernel_distance(a, b) == pytest.approx(within_a + within_b - 2 * between, rel=1e-12)


def test_kernel_distance_of_one_distribution_is_zero_on_average_however_small_the_sets() -> None:
    values = torch.tensor([kernel_distance(normal(20, 8, 2 * s), normal(30, 8, 2 * s + 1)) for s in range(400)])
    standard_error = values.std() / 400**0.5
    assert values.mean().abs() < 3 * standard_error
    assert (values < 0).any()


def test_kernel_distance_sees_a_shift() -> None:
    assert kernel_distance(normal(300, 8, 0), normal(300, 8, 1) + 0.5) > 0.2


def test_one_picture_has_no_distance() -> None:
    for distance in (frechet_distance, kernel_distance):
        with pytest.raises(RequestError, match="two rows or more"):
            distance(torch.zeros(1, 4), torch.zeros(5, 4))
