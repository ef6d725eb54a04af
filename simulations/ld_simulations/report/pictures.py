"""Pictures inside an HTML file: scans, signed differences with their scale, and plots, as data URLs."""

from __future__ import annotations

import base64
import io

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

DIFFERENCE_LIMIT = 1.0
"""Difference, in the model's range of 2, that is drawn in the strongest colour."""
DIFFERENCE_COLOURS = "RdBu_r"
"""Blue is darker, red is brighter, white is unchanged."""
LEGEND_STOPS = 9


def picture_url(image: Tensor) -> str:
    """An image `(1,S,S)` in [-1, 1] as a grey PNG."""
    grey = ((image[0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
    return _image_url(Image.fromarray(grey))


def difference_url(difference: Tensor) -> str:
    """A signed difference `(1,S,S)` of two images in [-1, 1], as `difference_legend` says."""
    shade = matplotlib.colormaps[DIFFERENCE_COLOURS]((difference[0].numpy() / DIFFERENCE_LIMIT + 1) / 2, bytes=True)
    return _image_url(Image.fromarray(shade[..., :3]))


def difference_legend() -> dict[str, str]:
    """The scale of `difference_url`: a CSS gradient from left to right, and its ends in % of the grey range."""
    shares = np.linspace(0, 1, LEGEND_STOPS)
    colours = [matplotlib.colors.to_hex(colour) for colour in matplotlib.colormaps[DIFFERENCE_COLOURS](shares)]
    ends = f"{100 * DIFFERENCE_LIMIT / 2:.0f} %"
    return {"gradient": ", ".join(colours), "darkest": f"−{ends}", "brightest": f"+{ends}"}


def figure_url(figure: Figure) -> str:
    """A plot as a PNG."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=160)
    return _png_url(stream)


def _image_url(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, format="PNG", optimize=True)
    return _png_url(stream)


def _png_url(stream: io.BytesIO) -> str:
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
