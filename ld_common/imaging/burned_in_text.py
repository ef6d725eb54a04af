"""Finds text that is burned into the pixels of a scan, by RapidOCR with the PP-OCRv6 models of its package.

The detector proposes boxes. A box counts as text where at least `LEAST_CHARACTERS` letters or digits are read in it, as
it is, mirrored or turned, or where it is long and narrow as a line of text is. So a side marker (`L`, `R`) and an arrow
are not text, and neither are the words in `PROJECTION_WORDS`. docs/benchmarks/burned_in_text.md has the recall.
"""

from __future__ import annotations

import functools
import hashlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from skimage.exposure import equalize_adapthist

from ld_common.imaging.rejection import Rejection, ScanRejected

if TYPE_CHECKING:
    from rapidocr import RapidOCR

LEAST_CHARACTERS = 3
LEAST_CONFIDENCE = 0.65
"""Of the reading of a box's characters."""
LEAST_ELONGATION = 4.0
LEAST_DETECTION = 0.5
"""Score of a box that counts by its shape alone."""
PROPOSAL = 0.3
"""Least score of a box that is read."""
SHORT_SIDE, LONG_SIDE, MOST_ENLARGED = 736, 1600, 4
"""Pixels of the image that the detector sees: the shorter side is enlarged to the first, at most by the third."""
REMEMBERED = 4096
LEAST_SIDE = 12
"""Pixels of a side that can hold a line of text."""
READ_HEIGHT = 48
"""Height of a line for the model that reads it."""
CLIP_LIMIT = 0.02
"""Of the adaptive histogram equalisation, which lifts faint text."""
OUTLIERS = 0.1
"""Percent of the pixels at either end that a second look leaves out, where they take half of the range."""
PROJECTION_WORDS = frozenset(
    (
        *("ap", "pa", "lat", "left", "right", "erect", "upright", "supine", "prone", "portable", "mobile", "bedside"),
        *("sitting", "standing", "links", "rechts", "liegend", "stehend", "sitzend", "bettaufnahme", "auf", "station"),
    )
)
"""What radiographers write beside a side marker, English and German; a line of nothing else is not text."""


_found: dict[bytes, tuple[TextLine, ...]] = {}
_remembering, _reading = threading.Lock(), threading.Lock()


@dataclass(frozen=True)
class TextLine:
    """A line of text in an image."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    """First and last pixel."""
    characters: int
    """Letters and digits that were read; 0 where the box counts by its shape."""


def check_burned_in_text(path: Path, pixels: np.ndarray, where: str = "the pixels") -> None:
    """Raise `ScanRejected` where `pixels` `(H,W)`, real values, hold text; the message does not repeat it."""
    lines = find_text(pixels)
    if not lines:
        return
    line = max(lines, key=lambda found: found.characters)
    others = f" and {len(lines) - 1} more" if len(lines) > 1 else ""
    detail = (
        f"text in {where}, {describe_place(line, pixels.shape)}{others}: look at it, then blank the text in a copy, or "
        "confirm that it names nobody (data.burned_in_text_checked of a site, --burned-in-text-checked of ld-generate, "
        "a column burned_in_text_checked in a table of scans)"
    )
    raise ScanRejected(path, Rejection.BURNED_IN, detail)


def describe_place(line: TextLine, shape: tuple[int, ...]) -> str:
    """Where a line is, for a person: a ninth of the image, and its pixels."""
    thirds = [
        words[min(2, 3 * sum(span) // (2 * length))]
        for words, span, length in (
            (("top", "middle", "bottom"), line.rows, shape[0]),
            (("left", "centre", "right"), line.columns, shape[1]),
        )
    ]
    rows, columns = (f"{first} to {last}" for first, last in (line.rows, line.columns))
    return f"{' '.join(thirds)} (rows {rows}, columns {columns} of {shape[0]} x {shape[1]}, upright)"


def find_text(pixels: np.ndarray) -> list[TextLine]:
    """Lines of text in an image `(H,W)` of real values; an image without contrast has none.

    What was found in the last `REMEMBERED` images is remembered by their content.
    """
    if min(pixels.shape) < LEAST_SIDE:
        return []
    content = hashlib.blake2b(pixels.tobytes(), key=str((pixels.shape, pixels.dtype)).encode()).digest()
    with _remembering:
        lines = _found.pop(content, None)
    if lines is None:
        lines = tuple(_search(pixels))
    with _remembering:
        _found[content] = lines  # the newest comes last
        if len(_found) > REMEMBERED:
            del _found[next(iter(_found))]
    return list(lines)


def _search(pixels: np.ndarray) -> list[TextLine]:
    for grey in _looks(pixels):
        lines = _lines(grey)
        if lines:
            return lines
    return []


def _looks(pixels: np.ndarray) -> Iterator[np.ndarray]:
    """8-bit images of even local contrast: the whole range, then that without outliers where those take half of it."""
    ends = np.percentile(pixels, (0, OUTLIERS, 100 - OUTLIERS, 100))
    spans = [(float(ends[0]), float(ends[3]))]
    if ends[2] - ends[1] < (ends[3] - ends[0]) / 2:
        spans.append((float(ends[1]), float(ends[2])))
    for low, high in spans:
        if high > low:
            shares = np.clip((pixels.astype(np.float64) - low) / (high - low), 0, 1)
            yield np.round(255 * equalize_adapthist(shares, clip_limit=CLIP_LIMIT)).astype(np.uint8)


def _lines(grey: np.ndarray) -> list[TextLine]:
    seen, scale = _enlarged(grey)
    lines = []
    for box, score in _proposals(seen):
        characters = _characters(seen, box, score)
        if characters is not None:
            (left, top), (right, bottom) = np.floor(box.min(0) / scale), np.ceil(box.max(0) / scale)
            rows = max(0, int(top)), min(grey.shape[0], int(bottom)) - 1
            columns = max(0, int(left)), min(grey.shape[1], int(right)) - 1
            lines.append(TextLine(rows, columns, characters))
    return lines


def _enlarged(grey: np.ndarray) -> tuple[np.ndarray, float]:
    """The image at the size in which it is searched, and that size over its own."""
    scale = min(MOST_ENLARGED, max(1.0, SHORT_SIDE / min(grey.shape)), LONG_SIDE / max(grey.shape))
    height, width = (max(1, round(scale * length)) for length in grey.shape)
    return np.asarray(Image.fromarray(grey).resize((width, height), Image.Resampling.BICUBIC)), scale


def _proposals(seen: np.ndarray) -> list[tuple[np.ndarray, float]]:
    """Corners `(4,2)` as (column, row), and score, of each box that may hold text."""
    with _reading:  # RapidOCR keeps the size of an image while it works on it
        found = _engine()(np.stack([seen] * 3, -1), use_det=True, use_rec=False)
    return [] if found.boxes is None else list(zip(found.boxes, found.scores, strict=True))


def _characters(seen: np.ndarray, box: np.ndarray, score: float) -> int | None:
    """Letters and digits in a box, 0 for one that counts by its shape, None for one that holds no text."""
    for text, confidence in _readings(seen, box):
        if confidence >= LEAST_CONFIDENCE:
            if set(text.lower().split()) <= PROJECTION_WORDS:
                return None
            characters = sum(letter.isalnum() for letter in text)
            if characters >= LEAST_CHARACTERS:
                return characters
    return 0 if _elongation(box) >= LEAST_ELONGATION and score >= LEAST_DETECTION else None


def _readings(seen: np.ndarray, box: np.ndarray) -> Iterator[tuple[str, float]]:
    """Text and confidence of a box as it is, or both ways up if it is tall, then mirrored: slices are turned."""
    (left, top), (right, bottom) = np.maximum(0, np.floor(box.min(0))).astype(int), np.ceil(box.max(0)).astype(int)
    crop = seen[top : bottom + 1, left : right + 1]
    turned = [np.rot90(crop), np.rot90(crop, -1)] if crop.shape[0] > 1.5 * crop.shape[1] else [crop]
    for view in (*turned, *(view[:, ::-1] for view in turned)):
        width = min(LONG_SIDE, max(READ_HEIGHT, round(READ_HEIGHT * view.shape[1] / view.shape[0])))
        line = np.asarray(Image.fromarray(view).resize((width, READ_HEIGHT), Image.Resampling.BICUBIC))
        with _reading:
            read = _engine()(np.stack([line] * 3, -1), use_det=False, use_rec=True)
        if read.txts:
            yield read.txts[0], float(read.scores[0])


def _elongation(box: np.ndarray) -> float:
    sides = np.linalg.norm(np.diff(box, axis=0), axis=1)[:2]
    return float(sides.max() / max(1.0, sides.min()))


@functools.cache
def _engine() -> RapidOCR:
    import rapidocr  # seconds

    models = Path(rapidocr.__file__).parent / "models"
    options: dict[str, Any] = {
        "Global.log_level": "critical",
        "Global.use_cls": False,
        "Global.text_score": 0.0,
        "Global.max_side_len": LONG_SIDE,
        "Global.min_side_len": LEAST_SIDE,
        "Det.model_path": str(models / "PP-OCRv6_det_small.onnx"),  # named: no download is tried
        "Det.limit_type": "max",
        "Det.limit_side_len": LONG_SIDE,
        "Det.thresh": 0.2,
        "Det.box_thresh": PROPOSAL,
        "Rec.model_path": str(models / "PP-OCRv6_rec_small.onnx"),
        "EngineConfig.onnxruntime.intra_op_num_threads": int(os.environ.get("OMP_NUM_THREADS", -1)),
    }
    return rapidocr.RapidOCR(params=options)
