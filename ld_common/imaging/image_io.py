"""Writes grey PNGs and coloured difference maps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ld_common.core.errors import ScanError
from ld_common.imaging.geometry import Frame


def write_png(path: Path, pixels: np.ndarray, frame: Frame, text: Mapping[str, str]) -> None:
    """Write real values `(H,W)` as 8-bit grey, from the frame's low value (black) to its high value (white).

    `text` becomes the file's text chunks; those of a synthetic image hold `SyntheticData=YES`.
    """
    shares = np.clip((pixels.astype(np.float64) - frame.low) / (frame.high - frame.low), 0, 1)
    _save_png(path, np.round(255 * shares).astype(np.uint8), text)


def write_difference_png(
    path: Path, difference: Tensor | np.ndarray, text: Mapping[str, str] | None = None, limit: float | None = None
) -> None:
    """Write a signed difference `(1,H,W)` or `(H,W)`: blue below 0, white at 0, red above.

    Args:
        path: file to write.
        difference: signed values.
        text: further text chunks.
        limit: absolute difference of the full colours, kept in the text chunk `DifferenceLimit`; None takes the
            largest absolute difference.
    """
    values = difference.detach().cpu().numpy() if isinstance(difference, Tensor) else np.asarray(difference)
    values = values.reshape(values.shape[-2:]).astype(np.float64)
    limit = float(np.abs(values).max()) if limit is None else limit
    scaled = np.clip(values / limit, -1, 1) / 2 + 0.5 if limit > 0 else np.full_like(values, 0.5)
    colours = matplotlib.colormaps["RdBu_r"](scaled, bytes=True)[..., :3]
    _save_png(path, colours, {**(text or {}), "DifferenceLimit": f"{limit:.6g}"})


def _save_png(path: Path, pixels: np.ndarray, text: Mapping[str, str]) -> None:
    chunks = PngInfo()
    for key, value in text.items():
        chunks.add_text(key, value)
    with _writing(path):
        Image.fromarray(pixels).save(path, format="PNG", pnginfo=chunks)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ScanError(f"cannot write '{path}': {error.strerror or error}") from error
