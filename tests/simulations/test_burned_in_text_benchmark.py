"""The drawn text and the rules that the search is compared with."""

from __future__ import annotations

import numpy as np
import pytest

from ld_simulations.benchmarks.burned_in_text.baselines import longest_row, saturated_share
from ld_simulations.benchmarks.burned_in_text.overlays import PLACES, STYLES, Overlay, burn_in, draw_overlay
from ld_simulations.benchmarks.burned_in_text.run import summarise


def ground() -> np.ndarray:
    return np.random.default_rng(0).normal(100, 1, (128, 192)) + np.linspace(0, 60, 192)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("place", PLACES)
def test_an_overlay_follows_from_its_seed_and_stays_in_its_range(style: str, place: str) -> None:
    drawn = [
        burn_in(ground(), draw_overlay(rng, 14, style, place), rng)
        for rng in (np.random.default_rng(5), np.random.default_rng(5))
    ]
    np.testing.assert_array_equal(*drawn)
    assert drawn[0].shape == (128, 192)
    assert drawn[0].min() >= 0
    assert drawn[0].max() <= 2**16 - 1
    assert (drawn[0] == np.round(drawn[0])).all()


def test_the_rules_without_a_model_see_bright_letters_in_a_row() -> None:
    rng = np.random.default_rng(1)
    written = burn_in(ground(), Overlay("WEBER", "DejaVuSans", 16, "spaced", "corner", 8), rng)
    assert longest_row(written) >= 5 > longest_row(ground())
    assert saturated_share(written) > saturated_share(ground())


def test_recall_and_false_alarms_count_what_was_found() -> None:
    overlay = {"style": "bright", "place": "corner", "phantom": "brain", "font": "Pillow", "bits": 8}
    clean = {"found": False, "saturated": 0.0, "row": 1, "cpu_seconds": 1.0}
    results = {
        "clean/brain": [clean] * 3 + [clean | {"found": True}],
        "overlay/brain/bright": [
            overlay | clean | {"found": True, "size_px": 6, "row": 5},
            overlay | clean | {"found": False, "size_px": 8},
            overlay | clean | {"found": True, "size_px": 8, "row": 5},
        ],
    }
    numbers = summarise(results)
    assert (numbers["recall"], numbers["recall_from_8_px"], numbers["false_alarms"]) == (0.667, 0.5, 0.25)
    assert numbers["by"]["size_px"] == {"6": 1.0, "8": 0.5}
    assert (numbers["rules"]["row"]["recall"], numbers["rules"]["row"]["false_alarms"]) == (0.667, 0.0)
    assert numbers["radiographs_flagged"] is None
