"""Answers enter the scan's own pixels as a movement, as a change of brightness, or as the model's picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from ld_common.imaging.geometry import Scan, from_model, to_model
from ld_common.imaging.modality import RENDERINGS, ImageConfig
from ld_common.imaging.rendering import deform, displacement, render, stretch

CONFIG = ImageConfig(field_of_view_mm=96.0, high_percentile=100.0)
SIDE = 64


def disc(radius_mm: float, pixels: int, level: float = 800.0) -> np.ndarray:
    """A dark disc in a bright square of 96 mm, anti-aliased."""
    step = 96.0 / pixels
    rows = (np.arange(pixels) + 0.5 - pixels / 2) * step
    distance = np.hypot(rows[:, None], rows[None, :])
    inside = np.clip((radius_mm - distance) / step + 0.5, 0, 1)
    head = np.clip((40 - distance) / step + 0.5, 0, 1)
    return (level * head * (1 - inside)).astype(np.float32)


def picture(pixels: np.ndarray) -> Tensor:
    return to_model(Scan(pixels, (96.0 / len(pixels),) * 2, {}), SIDE, CONFIG)[0]


def test_a_growing_structure_grows_in_a_finer_scan_and_stays_sharp() -> None:
    scan, truth = Scan(disc(10, 192), (0.5, 0.5), {}), disc(12, 192)
    before, frame = to_model(scan, SIDE, CONFIG)
    written = {
        name: render(scan.pixels, frame, before, picture(disc(12, 192)), name) for name in (*RENDERINGS, "deformation")
    }
    errors = {name: float(np.abs(values - truth).mean()) for name, values in written.items()}
    copied = float(np.abs(scan.pixels - truth).mean())
    assert errors["deformation"] < 0.25 * copied
    assert errors["deformation"] < errors["difference"]
    edge = written["deformation"][96, 96:130]
    assert np.abs(np.diff(edge)).max() > 0.6 * np.abs(np.diff(truth[96, 96:130])).max()
    assert np.abs(np.diff(written["decoded"][96, 96:130])).max() < np.abs(np.diff(edge)).max()


def test_a_change_of_brightness_is_added() -> None:
    scan = Scan(disc(10, 128), (0.75, 0.75), {})
    before, frame = to_model(scan, SIDE, CONFIG)
    brighter = (before + 0.1).clamp(-1, 1)
    change = render(scan.pixels, frame, before, brighter, "difference") - scan.pixels
    assert change[64, 64] == pytest.approx(0.05 * (frame.high - frame.low), rel=0.01)
    np.testing.assert_array_equal(render(scan.pixels, frame, before, brighter, "decoded"), from_model(brighter, frame))


@pytest.mark.parametrize("rendering", ["deformation", "difference"])
def test_an_answer_that_changes_nothing_is_the_scan_itself(rendering: str) -> None:
    noise = np.random.default_rng(0).normal(0, 20, (100, 80)).astype(np.float32)
    scan = Scan(disc(10, 100)[:, 10:90] + noise, (1.0, 1.0), {})
    before, frame = to_model(scan, SIDE, CONFIG)
    np.testing.assert_allclose(render(scan.pixels, frame, before, before, rendering), scan.pixels, atol=1e-3)


def test_no_tissue_folds_however_different_the_answer_is() -> None:
    generator = torch.Generator().manual_seed(0)
    before, after = torch.rand((2, 1, SIDE, SIDE), generator=generator) * 2 - 1
    field = displacement(before, after)
    assert stretch(field).min() > 0
    assert np.abs(field).max() > 0
    grown = displacement(picture(disc(10, 192)), picture(disc(14, 192)))
    assert stretch(grown).min() >= 0.2
    middle = stretch(grown)[30:34, 30:34].mean()
    assert middle < 1  # the structure grows: each of its pixels comes from less than a pixel


def test_a_shift_is_found_in_pixels_of_the_picture_and_applied_in_millimetres() -> None:
    moved = np.roll(disc(10, 192), 6, axis=1)  # 3 mm, 2 pixels of the picture
    field = displacement(picture(disc(10, 192)), picture(moved))
    disc_edge = np.abs(picture(moved)[0].numpy() - picture(disc(10, 192))[0].numpy()) > 0.5
    assert field[1][disc_edge].mean() == pytest.approx(-2, abs=0.5)
    scan = Scan(np.arange(60 * 60, dtype=np.float32).reshape(60, 60), (2.0, 1.0), {})
    frame = to_model(scan, SIDE, CONFIG)[1]
    shifted = deform(scan.pixels, frame, np.stack([np.zeros((SIDE, SIDE)), np.full((SIDE, SIDE), 2.0)]))
    assert shifted[30, 30] == pytest.approx(scan.pixels[30, 33], abs=0.01)  # 3 mm in columns of 1 mm
    down = deform(scan.pixels, frame, np.stack([np.full((SIDE, SIDE), 2.0), np.zeros((SIDE, SIDE))]))
    assert down[30, 30] == pytest.approx(scan.pixels[31, 30] + 30, abs=0.01)  # 3 mm in rows of 2 mm
