from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ld_common.core.errors import RequestError
from ld_evaluate.attribute_classifier import AttributeClassifier, auc, augment, score, train_classifier


def discs(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy bright discs of any brightness with a dark hole, larger where the label is 1, about the middle."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    axis = torch.arange(64.0)
    centre = 32 + 4 * torch.rand(2, count, 1, generator=generator) - 2
    distance = ((axis - centre[0])[:, :, None].square() + (axis - centre[1])[:, None, :].square()).sqrt()
    hole = (7 + 2.5 * labels + 0.8 * torch.randn(count, generator=generator))[:, None, None]
    level = (0.2 + 0.6 * torch.rand(count, 1, 1, generator=generator)) * ((distance < 26) & (distance > hole))
    pictures = level * 2 - 1 + 0.05 * torch.randn(count, 64, 64, generator=generator)
    return pictures[:, None].clamp(-1, 1), labels


def test_the_network_is_small_and_takes_other_sides() -> None:
    model = AttributeClassifier()
    assert 80_000 < sum(parameter.numel() for parameter in model.parameters()) < 120_000
    assert model(torch.zeros(3, 1, 96, 96)).shape == (3,)


@pytest.mark.slow
def test_it_learns_the_size_of_a_hole() -> None:
    pictures, labels = discs(400, seed=0)
    model = train_classifier(pictures, labels, seed=1, steps=120)
    held_out, truth = discs(300, seed=1)
    assert auc(score(model, held_out), truth) > 0.95


def test_it_learns_a_plain_difference() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(80) % 2
    pictures = 0.3 * torch.randn(80, 1, 16, 16, generator=generator).clamp(-1, 1)
    pictures[labels == 1, :, 4:12, 4:12] += 0.5
    model = train_classifier(pictures[:40], labels[:40], seed=1, steps=15)
    assert auc(score(model, pictures[40:]), labels[40:]) > 0.95


@pytest.mark.slow
def test_labels_that_say_nothing_leave_it_at_chance_on_pictures_it_has_not_seen() -> None:
    pictures, _ = discs(300, seed=2)
    labels = torch.rand(300, generator=torch.Generator().manual_seed(5)) < 0.5
    held_out, _ = discs(400, seed=3)
    truth = torch.arange(400) < 200
    shuffled = truth[torch.randperm(400, generator=torch.Generator().manual_seed(6))]
    value = auc(score(train_classifier(pictures, labels, seed=1, steps=60), held_out), shuffled)
    standard_error = (401 / (12 * 200 * 200)) ** 0.5
    assert abs(value - 0.5) < 3 * standard_error


def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_stream_alone() -> None:
    pictures, labels = discs(80, seed=0)
    before = torch.get_rng_state()
    scores = [score(train_classifier(pictures, labels, seed=seed, steps=5), pictures) for seed in (1, 1, 2)]
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(scores[0], scores[1])
    assert not torch.allclose(scores[0], scores[2])


def test_augmented_pictures_are_shifted_copies_that_are_never_flipped() -> None:
    ramp = (torch.arange(64.0) / 64).expand(32, 1, 64, 64)
    augmented = augment(ramp, torch.Generator().manual_seed(0))
    inner = augmented[:, 0, 30, 5:-5]
    assert (inner.diff() > 0).all()
    slopes = inner.diff().mean(1) * 64
    assert 0.8 <= float(slopes.min()) < 0.9 < 1.1 < float(slopes.max()) <= 1.2
    impulse = torch.zeros(200, 1, 64, 64)
    impulse[:, :, 32, 32] = 1
    peaks = augment(impulse, torch.Generator().manual_seed(0)).flatten(1).argmax(1)
    assert set((peaks // 64 - 32).tolist()) == set((peaks % 64 - 32).tolist()) == set(range(-3, 4))


@pytest.mark.parametrize("levels", [4, 1000])  # many ties, hardly any
def test_auc_is_the_share_of_pairs_in_the_right_order(levels: int) -> None:
    generator = torch.Generator().manual_seed(levels)
    scores = torch.randint(levels, (60,), generator=generator).float()
    labels = torch.rand(60, generator=generator) < 0.3
    pairs = [(a, b) for a in scores[labels].tolist() for b in scores[~labels].tolist()]
    expected = sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)
    assert auc(scores, labels) == pytest.approx(expected, rel=1e-12)
    assert auc(-scores, labels) == pytest.approx(1 - expected, rel=1e-12)


def test_one_kind_of_label_tells_nothing_apart() -> None:
    with pytest.raises(RequestError, match="with and without"):
        auc(torch.rand(4), torch.ones(4))
    with pytest.raises(RequestError, match="with and without"):
        train_classifier(torch.zeros(4, 1, 64, 64), torch.zeros(4), seed=0)
