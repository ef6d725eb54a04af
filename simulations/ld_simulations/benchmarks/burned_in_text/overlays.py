"""Text drawn into images: names, numbers and dates in several fonts, sizes, inks and places."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZES_PX = (6, 8, 10, 12, 16, 24, 40)
"""Em heights; capital letters are about 0.7 of them."""
STYLES = (
    *("bright", "dark", "box", "outlined", "translucent"),
    *("low contrast", "faint", "upright", "mirrored", "spaced"),
)
CONTRAST = {"low contrast": 0.15, "faint": 0.06}
"""Difference of text and ground, as a share of the image's range."""
FONTS = ("Pillow", "DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono", "STIXGeneral")
PLACES = ("corner", "middle")
FAMILY_NAMES = ("MUELLER", "OKAFOR", "Lindqvist", "GARCIA", "Novak", "ROSSI", "Tanaka", "WEBER", "Dubois", "SMITH")
GIVEN_NAMES = ("ANNA", "Peter", "MARIA", "John", "Ines", "KARL", "Yuki", "EVA", "Luc", "JANE")


@dataclass(frozen=True)
class Overlay:
    """One piece of text and how it is drawn."""

    text: str
    font: str
    size_px: int
    style: str
    place: str
    bits: int


def draw_overlay(rng: np.random.Generator, size_px: int, style: str, place: str) -> Overlay:
    """An overlay with random words, font and depth; the generator state determines it."""
    family, given = (str(rng.choice(names)) for names in (FAMILY_NAMES, GIVEN_NAMES))
    date = f"{rng.integers(1, 29):02d}.{rng.integers(1, 13):02d}.{rng.integers(1930, 2005)}"
    number = f"{rng.integers(10**6, 10**8)}"
    texts = (f"{family}, {given}", f"{given[0]}. {family}", f"*{date}", f"ID {number}", f"{family} {number}", number)
    return Overlay(str(rng.choice(texts)), str(rng.choice(FONTS)), size_px, style, place, int(rng.choice((8, 12, 16))))


def burn_in(pixels: np.ndarray, overlay: Overlay, rng: np.random.Generator) -> np.ndarray:
    """The image `(H,W)` with the text, as integers of `overlay.bits`, float32; its range becomes 0 to 1 before that."""
    low, high = float(pixels.min()), float(pixels.max())
    image = (pixels.astype(np.float64) - low) / (high - low)
    ink = _ink_of(overlay)
    ink = ink[: image.shape[0], : image.shape[1]]
    top, left = _place(image.shape, ink.shape, overlay.place, rng)
    rows, columns = slice(top, top + ink.shape[0]), slice(left, left + ink.shape[1])
    ground = image[rows, columns]
    stroke, around = ink[..., 0], ink[..., 1]
    middle = float(np.median(ground))
    if overlay.style in CONTRAST:
        step = CONTRAST[overlay.style]
        drawn = ground + stroke * (step if middle < 0.5 else -step)
    elif overlay.style == "dark":
        drawn = ground * (1 - around * (0.6 if middle < 0.4 else 0)) + around * (0.6 if middle < 0.4 else 0)
        drawn *= 1 - stroke
    elif overlay.style == "box":
        drawn = 1 - stroke
    elif overlay.style == "outlined":
        drawn = ground * (1 - around)
        drawn = drawn * (1 - stroke) + stroke
    elif overlay.style == "translucent":
        drawn = ground * (1 - stroke / 2) + stroke / 2 * (1 if middle < 0.5 else 0)
    else:
        drawn = ground * (1 - stroke) + stroke
    image[rows, columns] = drawn
    return np.round(np.clip(image, 0, 1) * (2**overlay.bits - 1)).astype(np.float32)


def _ink_of(overlay: Overlay) -> np.ndarray:
    """`(h,w,2)`: share of each pixel that a stroke covers, and that the stroke with one pixel around it covers."""
    font = _font(overlay.font, overlay.size_px)
    text = " ".join(overlay.text) if overlay.style == "spaced" else overlay.text
    left, top, right, bottom = (round(edge) for edge in font.getbbox(text))
    layers = []
    for width in (0, 1):
        layer = Image.new("L", (right - left + 4, bottom - top + 4))
        ImageDraw.Draw(layer).text((2 - left, 2 - top), text, font=font, fill=255, stroke_width=width)
        layers.append(np.asarray(layer, np.float64) / 255)
    ink = np.stack(layers, -1)
    if overlay.style == "mirrored":
        ink = ink[:, ::-1]
    return np.rot90(ink) if overlay.style == "upright" else ink


def _font(name: str, size_px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    if name == "Pillow":
        return ImageFont.load_default(size_px)
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"), size_px)


def _place(shape: tuple[int, ...], size: tuple[int, ...], place: str, rng: np.random.Generator) -> tuple[int, int]:
    """Row and column of the first pixel: near a corner, or in the middle half as far as the text fits."""
    spare = np.array(shape[:2]) - size[:2]
    if place == "corner":
        start = np.minimum(rng.integers(2, 9, 2), spare)
        return tuple(int(at if rng.random() < 0.5 else most - at) for at, most in zip(start, spare, strict=True))  # type: ignore[return-value]
    return tuple(int(most * rng.uniform(0.25, 0.75)) for most in spare)  # type: ignore[return-value]
