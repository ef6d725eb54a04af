"""The word "synthetic" in the pixels of a picture, as `--watermark` writes it."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ld_common.core.errors import RequestError

WORD = "synthetic"
MIN_FONT_PIXELS, FONTS_PER_SIDE = 10, 20
"""The font's size in pixels: at least the first, and the picture's shorter side divided by the second."""


def draw_watermark(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """`values` `(H,W)` with the word in the lower left corner: letters of value `high`, outlined in `low`.

    Raises:
        RequestError: the picture is too small for a legible word.
    """
    height, width = values.shape
    check_watermark_fits(height, width)
    (left, _, _, bottom), edge = _bounding_box(height, width)
    corner, font = (2 * edge - left, height - 2 * edge - bottom), ImageFont.load_default(size=_font_size(height, width))
    marked: np.ndarray = values.astype(np.float32)
    for value, stroke in ((low, edge), (high, 0)):
        page = Image.new("L", (width, height))
        ImageDraw.Draw(page).text(corner, WORD, fill=255, font=font, stroke_width=stroke)
        opacity = np.asarray(page, np.float32) / np.float32(255)
        marked = (1 - opacity) * marked + opacity * np.float32(value)
    return marked


def check_watermark_fits(height: int, width: int) -> None:
    """Raise `RequestError` for a picture that is too small for the word."""
    (left, top, right, bottom), edge = _bounding_box(height, width)
    if right - left + 2 * edge > width or 3 * (bottom - top) > height:
        raise RequestError(f"a picture of {height} x {width} pixels is too small for --watermark: leave it out")


def _bounding_box(height: int, width: int) -> tuple[tuple[float, float, float, float], int]:
    """The outlined word's box, and the width of the outline."""
    edge = max(1, _font_size(height, width) // 10)
    font, page = ImageFont.load_default(size=_font_size(height, width)), ImageDraw.Draw(Image.new("L", (1, 1)))
    return page.textbbox((0, 0), WORD, font, stroke_width=edge), edge


def _font_size(height: int, width: int) -> int:
    return max(MIN_FONT_PIXELS, min(height, width) // FONTS_PER_SIDE)
