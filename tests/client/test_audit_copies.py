"""Copies of training scans are found, and pictures that copy nobody are not."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch import Tensor

from ld_client.audit.copies import Reference, find_copies
from ld_client.audit.statistics import AuditError


def references(seed: int, sizes: tuple[int, int] = (30, 20), visits: int = 2) -> tuple[Reference, Reference]:
    """Training and held-out pictures of patients who look alike over their visits, channels of unlike scale."""
    generator = torch.Generator().manual_seed(seed)
    sides = []
    for side, count in zip("th", sizes, strict=True):
        patients = torch.randn((count, 3, 6, 6), generator=generator).repeat_interleave(visits, 0)
        pictures = patients + 0.3 * torch.randn(patients.shape, generator=generator)
        names = [f"{side}{number}" for number in range(count) for _ in range(visits)]
        sides.append(Reference(pictures * torch.tensor([1.0, 100.0, 0.01])[:, None, None], names))
    return sides[0], sides[1]


def independent(seed: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((count, 3, 6, 6), generator=generator) * torch.tensor([1.0, 100.0, 0.01])[:, None, None]


def test_copies_are_found() -> None:
    training, held_out = references(0, sizes=(20, 20))
    rows = torch.randperm(40, generator=torch.Generator().manual_seed(1))[:25]
    copies = training.pictures[rows] * 1.02 + 0.05 * independent(2, 25)
    report = find_copies(torch.cat([independent(3, 15), copies]), training, held_out)
    assert report.nearer_to_training.value > 0.75
    assert report.chance < 0.01
    assert report.nearer_to_training.value > report.chance_high
    assert report.closer_than_real is not None
    assert 25 <= report.closer_than_real.count <= 30
    shown = {(pair.generated, pair.training) for pair in report.pairs}
    assert shown <= {(15 + place, int(row)) for place, row in enumerate(rows)}
    assert all(pair.training_distance < 0.2 for pair in report.pairs)
    assert json.loads(json.dumps(asdict(report)))["pairs"][0]["training"] == report.pairs[0].training


def test_independent_pictures_are_nearer_to_either_side_half_of_the_time() -> None:
    small, values = 0, []
    for seed in range(60):
        training, held_out = references(seed)
        report = find_copies(independent(1000 + seed, 50), training, held_out, splits=199, seed=seed)
        assert report.patients_on_each_side == 20
        assert report.chance_low < 0.5 < report.chance_high
        values.append(report.nearer_to_training.value)
        small += report.chance <= 0.05
    assert np.mean(values) == pytest.approx(0.5, abs=0.06)
    assert small <= 9  # 5 %, and over three standard deviations


def test_all_of_a_patients_visits_are_searched() -> None:
    training, held_out = references(7, sizes=(20, 20), visits=3)
    for visit in range(3):
        report = find_copies(training.pictures[visit::3], training, held_out, shown=20)
        assert report.nearer_to_training.value == 1.0
        assert {pair.training for pair in report.pairs} == set(range(visit, 60, 3))
        assert all(pair.training_distance == 0 for pair in report.pairs)


def test_the_scale_of_a_channel_does_not_matter() -> None:
    training, held_out = references(8)
    scale = torch.tensor([50.0, 0.3, 7.0])[:, None, None]
    scaled = [Reference(side.pictures * scale, side.pseudonyms) for side in (training, held_out)]
    first = find_copies(independent(9, 20), training, held_out, seed=4)
    second = find_copies(independent(9, 20) * scale, scaled[0], scaled[1], seed=4)
    assert first.nearer_to_training == second.nearer_to_training
    assert [pair.training for pair in first.pairs] == [pair.training for pair in second.pairs]
    assert first.threshold == pytest.approx(second.threshold, rel=1e-5)


def test_too_few_held_out_pictures_give_no_threshold() -> None:
    training, held_out = references(10, sizes=(10, 5), visits=1)
    report = find_copies(independent(11, 8), training, held_out, quantile=0.05)
    assert (report.threshold, report.closer_than_real) == (None, None)
    assert "needs 20 held-out pictures, there are 5" in report.note


def test_pictures_that_cannot_be_compared_are_refused() -> None:
    training, held_out = references(12)
    with pytest.raises(AuditError, match="shapes"):
        find_copies(torch.zeros(2, 3, 5, 5), training, held_out)
    with pytest.raises(AuditError, match="split by patient"):
        find_copies(independent(13, 2), training, training)
    with pytest.raises(AuditError, match="NaN"):
        find_copies(independent(13, 2) * math.nan, training, held_out)
    with pytest.raises(AuditError, match="give one each"):
        Reference(training.pictures, training.pseudonyms[1:])
