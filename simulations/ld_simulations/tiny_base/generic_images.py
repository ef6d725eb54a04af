"""Generic procedural pictures with captions: all that the tiny base model ever sees.

Nothing here is medical. Dead leaves (Ruderman 1997; Lee, Mumford & Huang 2001), 1/f textures, gradients and
single warped shapes with holes give a network edges, occlusion, texture and the meaning of words such as
"dark", "large" or "74": captions hold numbers from 0 to 100 that name a size, a brightness or a share.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Picture:
    """A grey picture `(H, W)`, float32 in [-1, 1], and what it shows in words."""

    pixels: Array
    caption: str


def generic_picture(rng: np.random.Generator, side: int = 64) -> Picture:
    """Draw one picture of a random family; the same generator state gives the same picture."""
    family = rng.choice(5, p=[0.2, 0.08, 0.07, 0.15, 0.5])
    pixels, caption = (_dead_leaves, _texture, _gradient, _maze, _shape)[family](rng, side)
    pixels = np.clip(pixels, 0.0, 1.0)
    blur = rng.uniform(0.3, 1.2)
    pixels = ndimage.gaussian_filter(pixels, blur)
    if blur > 0.8:
        caption += ", soft"
    return Picture((2 * pixels - 1).astype(np.float32), caption)


def amount(rng: np.random.Generator, name: str, share: float) -> str:
    """A share in [0, 1] as a whole number from 0 to 100 before or after its name: "size 74" or "74 size"."""
    number = round(100 * float(np.clip(share, 0, 1)))
    return f"{name} {number}" if rng.random() < 0.5 else f"{number} {name}"


def one_over_f(rng: np.random.Generator, side: int, exponent: float) -> Array:
    """Gaussian noise `(side, side)` of zero mean and unit deviation with amplitude spectrum 1/f^exponent."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None, :])
    frequency[0, 0] = 1.0
    amplitude = frequency**-exponent
    amplitude[0, 0] = 0.0
    field = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((side, side))) * amplitude, s=(side, side))
    return (field / field.std()).astype(np.float32)


def maze(rng: np.random.Generator, side: int, period: float) -> Array:
    """A labyrinth of bands `(side, side)` in [0, 1]: noise of one wavelength, `period` pixels, made steep."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None, :])
    band = np.exp(-(((frequency - 1 / period) * 3 * period) ** 2))
    waves = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((side, side))) * band, s=(side, side))
    return (1 / (1 + np.exp(-rng.uniform(1, 6) * waves / waves.std()))).astype(np.float32)


def _maze(rng: np.random.Generator, side: int) -> tuple[Array, str]:
    low, high = np.sort(rng.uniform(0, 1, 2))
    period = rng.uniform(2.5, 12)
    pixels = low + (high - low) * maze(rng, side, period)
    amounts = {"size": period / 12, "darkest": float(low), "brightest": float(high)}
    return pixels, ", ".join(["maze", *(amount(rng, name, share) for name, share in amounts.items())])


def _dead_leaves(rng: np.random.Generator, side: int) -> tuple[Array, str]:
    brightness, contrast = rng.uniform(0.15, 0.85), rng.uniform(0.05, 0.3)
    smallest = rng.uniform(1.5, 8)
    pixels = np.full((side, side), brightness, np.float32)
    leaves = int(rng.integers(20, 120))
    for _ in range(leaves):
        # p(r) ~ r^-3 between the smallest and a third of the picture: scale invariant, as in natural scenes
        low, high = smallest**-2, (side / 3) ** -2
        radius = (low + rng.random() * (high - low)) ** -0.5
        cy, cx = rng.uniform(-radius, side + radius, 2)
        top, left = max(int(cy - 1.6 * radius), 0), max(int(cx - 1.6 * radius), 0)
        bottom, right = min(int(cy + 1.6 * radius) + 2, side), min(int(cx + 1.6 * radius) + 2, side)
        if top >= bottom or left >= right:
            continue
        y, x = np.mgrid[top:bottom, left:right].astype(np.float32)
        angle, stretch = rng.uniform(0, np.pi), rng.uniform(0.65, 1.5)
        u = (np.cos(angle) * (y - cy) + np.sin(angle) * (x - cx)) * stretch
        v = (-np.sin(angle) * (y - cy) + np.cos(angle) * (x - cx)) / stretch
        cover = np.clip(radius - np.hypot(u, v) + 0.5, 0, 1)
        grey = brightness + contrast * rng.standard_normal()
        shade = grey + rng.uniform(-0.1, 0.1) * u / radius
        patch = pixels[top:bottom, left:right]
        patch += cover * (shade - patch)
    amounts = {"size": smallest / 8, "brightness": brightness, "contrast": contrast}
    return pixels, ", ".join(["dead leaves", *(amount(rng, name, share) for name, share in amounts.items())])


def _texture(rng: np.random.Generator, side: int) -> tuple[Array, str]:
    exponent, brightness = rng.uniform(0.9, 2.2), rng.uniform(0.15, 0.85)
    contrast = rng.uniform(0.03, 0.25)
    pixels = brightness + contrast * one_over_f(rng, side, exponent)
    word = "clouds" if exponent > 1.4 else "rough texture"
    return pixels, f"{word}, {amount(rng, 'brightness', brightness)}, {amount(rng, 'contrast', contrast)}"


def _gradient(rng: np.random.Generator, side: int) -> tuple[Array, str]:
    angle = rng.uniform(0, 2 * np.pi)
    low, high = np.sort(rng.uniform(0, 1, 2))
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    ramp = 0.5 + 0.5 * (np.cos(angle) * x + np.sin(angle) * y) / 1.42
    words = "gradient"
    if rng.random() < 0.4:
        cy, cx = rng.uniform(-0.5, 0.5, 2)
        ramp, words = np.clip(np.hypot(y - cy, x - cx) / 1.6, 0, 1), "radial gradient"
    if rng.random() < 0.3:
        periods = rng.uniform(1, 10)
        ramp, words = 0.5 + 0.5 * np.sin(2 * np.pi * periods * ramp), f"{int(periods)} stripes"
    pixels = (low + (high - low) * ramp).astype(np.float32)
    return pixels, f"{words}, {amount(rng, 'darkest', low)}, {amount(rng, 'brightest', high)}"


def _shape(rng: np.random.Generator, side: int) -> tuple[Array, str]:
    """One or a few warped shapes, with texture inside and holes, on a ground of any brightness."""
    dark_ground = rng.random() < 0.25
    ground = 0.0 if dark_ground else rng.uniform(0.0, 1.0)
    y, x = _warped_grid(rng, side)
    pixels = np.full((side, side), ground, np.float32)
    if not dark_ground and rng.random() < 0.4:
        pixels += rng.uniform(0.02, 0.12) * one_over_f(rng, side, rng.uniform(0.8, 2))
    count = 1 if rng.random() < 0.65 else int(rng.integers(2, 5))
    words: list[str] = []
    for index in range(count):
        size = rng.uniform(0.45, 0.95) if count == 1 else rng.uniform(0.15, 0.45)
        reach = max(0.0, 0.95 - size) if count == 1 else 0.7
        centre = rng.uniform(-reach, reach, 2)
        inside, name = _silhouette(rng, y - centre[0], x - centre[1], size, side)
        brightness = _apart_from(rng, ground)
        surface = np.full((side, side), brightness, np.float32)
        parts = [name, amount(rng, "size", size), amount(rng, "brightness", brightness)]
        if rng.random() < 0.3:
            period = rng.uniform(2.5, 12)
            surface = surface + (_apart_from(rng, brightness) - brightness) * maze(rng, side, period)
            parts.append(amount(rng, "maze", period / 12))
        elif rng.random() < 0.5:
            roughness = rng.uniform(0.02, 0.15)
            surface = surface + roughness * one_over_f(rng, side, rng.uniform(0.8, 1.8))
            parts.append(amount(rng, "rough", roughness / 0.15))
        if rng.random() < 0.5:
            surface, phrase = _edge_band(rng, surface, inside, side)
            parts.append(phrase)
        if count == 1 and rng.random() < 0.7:
            surface, phrase = _holes(rng, surface, y - centre[0], x - centre[1], size, side)
            parts.append(phrase)
        pixels += np.clip(inside * side / 2 + 0.5, 0, 1) * (surface - pixels)
        if index < 2:
            words.append(", ".join(parts if count == 1 else parts[:2]))
    ground_words = "black ground" if dark_ground else amount(rng, "ground", ground)
    prefix = "" if count == 1 else f"{count} shapes, "
    return pixels, prefix + ", ".join([*words, ground_words])


def _warped_grid(rng: np.random.Generator, side: int) -> tuple[Array, Array]:
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j].astype(np.float32)
    strength = rng.uniform(0, 0.08)
    dy, dx = (one_over_f(rng, side, 2.5) for _ in range(2))
    return y + strength * dy, x + strength * dx


def _silhouette(rng: np.random.Generator, y: Array, x: Array, size: float, side: int) -> tuple[Array, str]:
    """Signed depth below the edge (positive inside), in units of half the picture, and the shape's name."""
    angle, squeeze = rng.uniform(0, np.pi), rng.uniform(0.7, 1.0)
    u = np.cos(angle) * y + np.sin(angle) * x
    v = (-np.sin(angle) * y + np.cos(angle) * x) / squeeze
    kind = rng.choice(["ellipse", "box", "polygon", "flower", "diamond"], p=[0.4, 0.15, 0.15, 0.2, 0.1])
    if kind == "ellipse":
        return size - np.hypot(u, v), kind
    if kind == "box":
        return 0.85 * size - np.maximum(np.abs(u), np.abs(v)), kind
    if kind == "diamond":
        return (size - np.abs(u) - np.abs(v)) * 0.8, kind
    theta = np.arctan2(v, u)
    corners = int(rng.integers(3, 9))
    if kind == "polygon":
        wedge = 2 * np.pi / corners
        return size * 0.9 - np.hypot(u, v) * np.cos((theta + np.pi) % wedge - wedge / 2), kind
    lobes = 1 + rng.uniform(0.05, 0.25) * np.cos(corners * theta)
    return size * 0.85 * lobes - np.hypot(u, v), f"flower of {corners}"


def _edge_band(rng: np.random.Generator, surface: Array, inside: Array, side: int) -> tuple[Array, str]:
    """A band along the edge, of another brightness, straight or folded."""
    width = rng.uniform(0.04, 0.3)
    depth = inside
    folded = rng.random() < 0.5
    if folded:
        depth = inside + rng.uniform(0.03, 0.12) * one_over_f(rng, side, rng.uniform(0.8, 1.6))
    level = _apart_from(rng, float(surface.mean()), gap=0.12)
    band = np.clip((width - depth) * side / 2 + 0.5, 0, 1)
    name = "folded rim" if folded else "rim"
    return surface + band * (level - surface), amount(rng, name, width / 0.3)


def _holes(rng: np.random.Generator, surface: Array, y: Array, x: Array, size: float, side: int) -> tuple[Array, str]:
    """One hole, or a mirrored pair, of a size that the caption names; lighter or darker than the surface."""
    share = rng.uniform(0.0, 1.0)
    radius = size * (0.06 + 0.34 * share)
    level = _apart_from(rng, float(surface.mean()), gap=0.2)
    squeeze, lean = rng.uniform(0.35, 1.0), rng.uniform(-0.9, 0.9)
    pair = rng.random() < 0.5
    offset = radius * rng.uniform(0.6, 1.2) if pair else 0.0
    across = np.abs(x) - offset if pair else x
    bend = across - lean * y
    hole = radius - np.hypot(y * squeeze, bend / np.sqrt(squeeze))
    cover = np.clip(hole * side / 2 + 0.5, 0, 1)
    tone = "dark" if level < float(surface.mean()) else "bright"
    name = f"two {tone} holes" if pair else f"{tone} hole"
    return surface + cover * (level - surface), amount(rng, name, share)


def _apart_from(rng: np.random.Generator, level: float, gap: float = 0.15) -> float:
    """A brightness in [0, 1] at least `gap` away from `level`."""
    while True:
        value = rng.uniform(0, 1)
        if abs(value - level) >= gap:
            return float(value)
