"""The watermark: legible, in a corner, and refused where it would not be legible."""

from __future__ import annotations

import numpy as np
import pytest

from ld_common.core.errors import RequestError
from ld_generate.watermark import draw_watermark


@pytest.mark.parametrize("shape", [(64, 64), (128, 128), (110, 100), (512, 300), (1024, 1024)])
def test_it_stands_in_a_corner_and_leaves_the_middle(shape: tuple[int, int]) -> None:
    height, width = shape
    grey = np.full(shape, 40.0, np.float32)
    marked = draw_watermark(grey, -100.0, 300.0)
    rows, columns = np.nonzero(marked != grey)
    assert rows.min() > height * 0.75
    assert columns.max() < min(width, max(0.5 * width, 52))
    assert rows.max() - rows.min() >= max(8, min(shape) // 25)  # tall enough to be read
    assert marked.max() > 250
    assert marked.min() < -50
    assert (grey == 40).all()


def test_letters_show_on_black_and_on_white() -> None:
    for value in (0.0, 1.0):
        marked = draw_watermark(np.full((128, 128), value, np.float32), 0.0, 1.0)
        assert (np.abs(marked - value) > 0.6).sum() > 50


@pytest.mark.parametrize("shape", [(32, 32), (20, 400), (400, 40)])
def test_a_picture_that_is_too_small_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(RequestError, match="too small for --watermark"):
        draw_watermark(np.zeros(shape, np.float32), 0.0, 1.0)
