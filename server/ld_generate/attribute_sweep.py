"""A scan along one attribute: what `ld-generate --trajectory age=60:90:5` asks, and its strip, animation and table."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ld_common.core.atomic_files import write_bytes
from ld_common.core.errors import RequestError
from ld_common.imaging.geometry import Frame
from ld_common.imaging.modality import Attributes, Modality
from ld_common.metrics.registry import BIOMARKERS
from ld_generate.samples import write_strip

MOST_VALUES = 100
FRAME_MILLISECONDS, FRAME_PIXELS, LABEL_PIXELS = 400, 384, 28
COMMENT = "SyntheticData=YES: drawn by latent-drift-federation, not an observation of a patient"


@dataclass(frozen=True)
class Sweep:
    """The values of one attribute at which a scan is drawn."""

    attribute: str
    values: list[float]

    @property
    def targets(self) -> list[Attributes]:
        """What each value changes."""
        return [{self.attribute: value} for value in self.values]


def read_sweep(modality: Modality, text: str) -> Sweep:
    """`attribute=first:last:step`, the last one included where a step meets it.

    Raises:
        RequestError: not of that form, an attribute of words, a value out of bounds, too many of them, or several that
            prompts say alike.
    """
    name, _, spoken = text.partition("=")
    known = modality.attributes.get(name)
    if known is not None and known.categories:
        raise RequestError(f"{name} is one of {', '.join(known.categories)}: ask for each with --set")
    try:
        first, last, step = (float(part) for part in spoken.split(":"))
        count = int(np.floor((last - first) / step + 1e-9)) + 1
    except (ValueError, ZeroDivisionError, OverflowError):
        raise RequestError(f"--trajectory '{text}' is not of the form attribute=first:last:step") from None
    if not 2 <= count <= MOST_VALUES:
        raise RequestError(f"--trajectory '{text}' has {max(count, 0)} values: ask for 2 to {MOST_VALUES}")
    values = [float(modality.parse(name, f"{first + row * step:.10g}")) for row in range(count)]
    if len({round(value) for value in values}) < count:
        raise RequestError(f"--trajectory '{text}': prompts say whole numbers, so several of these are one: step by 1")
    return Sweep(name, values)


def write_sweep(
    folder: Path,
    modality: Modality,
    trajectory: Sweep,
    frame: Frame,
    factual: Attributes,
    scan: Tensor,
    reconstruction: Tensor,
    images: Sequence[Tensor],
) -> list[Path]:
    """Write `trajectory_<attribute>` as a strip (PNG), an animation (GIF) and a table (CSV) of what is measured.

    Args:
        folder: of the input.
        modality: says what is measured.
        trajectory: the values.
        frame: the scan's, which knows its size.
        factual: what the scan shows.
        scan: the model's picture of it, `(1,S,S)` in [-1, 1].
        reconstruction: what no edit returns, alike.
        images: the answers, one a value, alike.
    """
    stem, titles = f"trajectory_{trajectory.attribute}", [f"{value:g}" for value in trajectory.values]
    unit = modality.attributes[trajectory.attribute].unit
    columns = {"reconstruction": [reconstruction], **{title: [own] for title, own in zip(titles, images, strict=True)}}
    strip = write_strip(
        folder / f"{stem}.png", columns, f"{trajectory.attribute} in {unit}" if unit else trajectory.attribute
    )
    animation = folder / f"{stem}.gif"
    labels = [f"{trajectory.attribute} {title} {unit}".strip() for title in titles]
    write_bytes(animation, _animated(images, labels))
    table = folder / f"{stem}.csv"
    shown = [
        ("input", factual[trajectory.attribute], scan),
        ("reconstruction", factual[trajectory.attribute], reconstruction),
    ]
    shown += [("counterfactual", value, image) for value, image in zip(trajectory.values, images, strict=True)]
    write_bytes(table, _table(modality, trajectory.attribute, frame, shown, reconstruction).encode())
    return [strip, animation, table]


def areas_mm2(modality: Modality, frame: Frame, pictures: Tensor) -> list[dict[str, float]]:
    """What the modality measures on the model's pictures `(N,1,S,S)`, in mm2; nothing where the scan says no scale."""
    if frame.spacing_mm is None:
        return [{} for _ in pictures]
    pixel_mm = frame.field_of_view / pictures.shape[-1]
    found = {name: BIOMARKERS.load(name)(pictures.float(), pixel_mm).tolist() for name in modality.biomarkers}
    return [{name: values[row] for name, values in found.items()} for row in range(len(pictures))]


def _table(
    modality: Modality,
    attribute: str,
    frame: Frame,
    shown: Sequence[tuple[str, float | str, Tensor]],
    reconstruction: Tensor,
) -> str:
    """One row a picture: its value, the areas in mm2 where the scan says its scale, the change as a share of white."""
    pictures = torch.stack([image for _, _, image in shown]).float()
    areas = areas_mm2(modality, frame, pictures)
    columns = {f"{name}_mm2": [own[name] for own in areas] for name in areas[0]}
    columns["mean_change"] = ((pictures - reconstruction).abs().mean((1, 2, 3)) / 2).tolist()
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["picture", attribute, *columns])
    for row, (what, value, _) in enumerate(shown):
        writer.writerow([what, value, *(f"{values[row]:.6g}" for values in columns.values())])
    return stream.getvalue()


def _animated(images: Sequence[Tensor], labels: Sequence[str]) -> bytes:
    """The pictures there and back again, each over its label."""
    font = ImageFont.load_default(size=LABEL_PIXELS // 2)
    frames = []
    for image, label in zip(images, labels, strict=True):
        grey = ((image[0].float().clamp(-1, 1) + 1) * 127.5).round().byte().numpy()
        page = Image.new("L", (FRAME_PIXELS, FRAME_PIXELS + LABEL_PIXELS))
        page.paste(Image.fromarray(grey).resize((FRAME_PIXELS, FRAME_PIXELS), Image.Resampling.BICUBIC))
        place = (FRAME_PIXELS / 2, FRAME_PIXELS + LABEL_PIXELS / 2)
        ImageDraw.Draw(page).text(place, f"{label}   synthetic", fill=255, font=font, anchor="mm")
        frames.append(page)
    stream, order = io.BytesIO(), [*frames, *frames[-2:0:-1]]
    order[0].save(
        stream,
        "GIF",
        save_all=True,
        append_images=order[1:],
        duration=FRAME_MILLISECONDS,
        loop=0,
        comment=COMMENT.encode(),
    )
    return stream.getvalue()
