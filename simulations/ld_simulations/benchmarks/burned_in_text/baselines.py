"""Rules without a model, for comparison: bright pixels, and rows of parts of one height."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

SATURATED = 0.98
"""Share of the image's range from which on a pixel is saturated."""
HEIGHTS_PX = (4, 40)
STANDS_OUT = 0.12
"""Least difference from the opened or closed image, as a share of the range."""


def saturated_share(pixels: np.ndarray) -> float:
    """Share of the pixels that are near the image's highest value."""
    return float((_shares(pixels) >= SATURATED).mean())


def longest_row(pixels: np.ndarray) -> int:
    """Most thin parts of one height that follow each other on a line, as the letters of a word do.

    The parts are the connected components of what a morphological opening (bright) or closing (dark) removes.
    """
    shares = _shares(pixels)
    size = (9, 9)
    bright = shares - ndimage.grey_opening(shares, size) >= STANDS_OUT
    dark = ndimage.grey_closing(shares, size) - shares >= STANDS_OUT
    return max(_longest_row(parts) for parts in (bright, dark))


def _longest_row(mask: np.ndarray) -> int:
    labels, _ = ndimage.label(mask, np.ones((3, 3)))
    boxes = [(rows.start, rows.stop, columns.start, columns.stop) for rows, columns in ndimage.find_objects(labels)]
    letters = [
        (top, bottom, left, right)
        for top, bottom, left, right in boxes
        if HEIGHTS_PX[0] <= bottom - top <= HEIGHTS_PX[1] and right - left <= 1.5 * (bottom - top)
    ]
    lengths: list[int] = []
    letters.sort(key=lambda box: box[2])
    for number, (top, bottom, left, right) in enumerate(letters):
        length, height = 1, bottom - top
        for previous in range(number):
            other_top, other_bottom, _, other_right = letters[previous]
            near = -0.5 * height <= left - other_right <= 0.8 * height
            same = abs(other_bottom - bottom) <= 0.25 * height and abs(other_top - top) <= 0.5 * height
            if near and same and right > other_right:
                length = max(length, lengths[previous] + 1)
        lengths.append(length)
    return max(lengths, default=0)


def _shares(pixels: np.ndarray) -> np.ndarray:
    low, high = float(pixels.min()), float(pixels.max())
    return (pixels.astype(np.float64) - low) / max(high - low, 1e-12)
