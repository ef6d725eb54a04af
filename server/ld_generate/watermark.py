"""The word "synthetic", written into the pixels of what `ld-generate --mark` draws."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ld_common.core.errors import RequestError

WORD = "synthetic"
SMALLEST_LETTERS, PICTURE_IN_LETTERS = 10, 20
"""Height of a line in pixels: at least the first, and a share of one in the second of the picture's shorter side."""


def mark(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """`values` `(H,W)` with the word in the lower left corner: letters of `high` in an outline of `low`.

    Raises:
        RequestError: the picture is too small for a word that can be read.
    """
    height, width = values.shape
    check_room(height, width)
    (left, _, _, bottom), edge = _box(height, width)
    place, font = (2 * edge - left, height - 2 * edge - bottom), ImageFont.load_default(size=_line(height, width))
    marked: np.ndarray = values.astype(np.float32)
    for value, stroke in ((low, edge), (high, 0)):
        page = Image.new("L", (width, height))
        ImageDraw.Draw(page).text(place, WORD, fill=255, font=font, stroke_width=stroke)
        share = np.asarray(page, np.float32) / np.float32(255)
        marked = (1 - share) * marked + share * np.float32(value)
    return marked


def check_room(height: int, width: int) -> None:
    """Raise `RequestError` for a picture that is too small for the word."""
    (left, top, right, bottom), edge = _box(height, width)
    if right - left + 2 * edge > width or 3 * (bottom - top) > height:
        raise RequestError(f"a picture of {height} x {width} pixels is too small for --mark: leave it out")


def _box(height: int, width: int) -> tuple[tuple[float, float, float, float], int]:
    """What the outlined word takes, and the width of the outline."""
    edge = max(1, _line(height, width) // 10)
    font, page = ImageFont.load_default(size=_line(height, width)), ImageDraw.Draw(Image.new("L", (1, 1)))
    return page.textbbox((0, 0), WORD, font, stroke_width=edge), edge


def _line(height: int, width: int) -> int:
    return max(SMALLEST_LETTERS, min(height, width) // PICTURE_IN_LETTERS)
