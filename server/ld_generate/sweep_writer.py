"""A sweep as a strip (PNG), an animation (GIF), a table (CSV) of biomarkers, and over age as a plot (PNG) of them."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ld_common.core.atomic_files import write_bytes
from ld_common.imaging.geometry import Frame
from ld_common.imaging.modality import Attributes, Modality
from ld_common.metrics.registry import BIOMARKERS
from ld_generate.age_curve import AgeContext, AgeCurve, write_age_curve
from ld_generate.attribute_sweep import Sweep
from ld_generate.samples import write_strip

FRAME_MILLISECONDS, FRAME_PIXELS, LABEL_PIXELS = 400, 384, 28
COMMENT = "SyntheticData=YES: drawn by latent-drift-federation, not an observation of a patient"


@dataclass(frozen=True, eq=False)
class SweepPictures:
    """The model's pictures of a sweep, each `(1,S,S)` in [-1, 1]."""

    scan: Tensor
    reconstruction: Tensor
    counterfactuals: Sequence[Tensor]
    """One a value."""
    reference: str = "scan"
    """What changes are counted from, `scan` or `reconstruction`."""

    @property
    def unchanged(self) -> Tensor:
        """The picture of `reference`."""
        return self.scan if self.reference == "scan" else self.reconstruction


def write_sweep(
    folder: Path,
    modality: Modality,
    sweep: Sweep,
    frame: Frame,
    source: Attributes,
    pictures: SweepPictures,
    context: AgeContext | None = None,
) -> list[Path]:
    """Write `sweep_<attribute>.png`, `.gif` and `.csv`, and for a known context `sweep_age_curve.png`, into `folder`.

    Args:
        folder: the scan's results.
        modality: names the biomarkers.
        sweep: the values.
        frame: the scan's; without a spacing the table has no areas.
        source: attributes of the scan.
        pictures: what was drawn.
        context: of a sweep over age; its plot and its columns are of the modality's first biomarker, where the scan
            has a spacing.
    """
    stem, titles = f"sweep_{sweep.attribute}", [f"{value:g}" for value in sweep.values]
    unit = modality.attributes[sweep.attribute].unit
    panels = {title: [image] for title, image in zip(titles, pictures.counterfactuals, strict=True)}
    strip = write_strip(
        folder / f"{stem}.png",
        {pictures.reference: [pictures.unchanged], **panels},
        f"{sweep.attribute} in {unit}" if unit else sweep.attribute,
    )
    animation = folder / f"{stem}.gif"
    labels = [f"{sweep.attribute} {title} {unit}".strip() for title in titles]
    write_bytes(animation, _animate(pictures.counterfactuals, labels))
    files, table = [strip, animation], folder / f"{stem}.csv"
    images = torch.stack([pictures.scan, pictures.reconstruction, *pictures.counterfactuals]).float()
    measured = measure_biomarkers(modality, frame, images)
    columns = _columns(measured)
    if context is not None and columns:
        curve = _age_curve(modality, sweep, source, measured, context)
        columns |= curve.columns()
        files.append(write_age_curve(folder / f"{stem}_curve.png", curve))
    columns["mean_change"] = [
        f"{change:.6g}" for change in ((images - pictures.unchanged).abs().mean((1, 2, 3)) / 2).tolist()
    ]
    write_bytes(table, _table(sweep, source, columns).encode())
    return [*files, table]


def measure_biomarkers(modality: Modality, frame: Frame, pictures: Tensor) -> list[dict[str, float]]:
    """The modality's biomarkers of each picture `(N,1,S,S)` in mm2; empty where the scan has no spacing."""
    if frame.spacing_mm is None:
        return [{} for _ in pictures]
    pixel_mm = frame.field_of_view / pictures.shape[-1]
    areas = {name: BIOMARKERS.load(name)(pictures.float(), pixel_mm).tolist() for name in modality.biomarkers}
    return [{name: values[row] for name, values in areas.items()} for row in range(len(pictures))]


def _columns(measured: list[dict[str, float]]) -> dict[str, list[str]]:
    """Each biomarker in mm2, and its change from the scan and from the reconstruction, the first two rows."""
    columns: dict[str, list[str]] = {}
    for name, area in measured[0].items():
        columns[f"{name}_mm2"] = [f"{row[name]:.6g}" for row in measured]
        columns[f"{name}_change_mm2"] = [f"{row[name] - area:.6g}" for row in measured]
        redrawn = measured[1][name]
        columns[f"{name}_change_from_reconstruction_mm2"] = [f"{row[name] - redrawn:.6g}" for row in measured]
    return columns


def _age_curve(
    modality: Modality, sweep: Sweep, source: Attributes, measured: list[dict[str, float]], context: AgeContext
) -> AgeCurve:
    name, age = modality.biomarkers[0], float(source[sweep.attribute])
    scan, _, *answers = (row[name] for row in measured)
    return AgeCurve(name, (age, scan), sweep.values, answers, context)


def _table(sweep: Sweep, source: Attributes, columns: dict[str, list[str]]) -> str:
    """A row a picture: its value, and the columns, among them the mean change as a share of the grey range."""
    kinds = ["input", "reconstruction", *["counterfactual"] * len(sweep.values)]
    values = [source[sweep.attribute]] * 2 + list(sweep.values)
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["picture", sweep.attribute, *columns])
    for row, (kind, value) in enumerate(zip(kinds, values, strict=True)):
        writer.writerow([kind, value, *(column[row] for column in columns.values())])
    return stream.getvalue()


def _animate(images: Sequence[Tensor], labels: Sequence[str]) -> bytes:
    """A GIF that runs through the pictures and back, each above its label."""
    font = ImageFont.load_default(size=LABEL_PIXELS // 2)
    frames = []
    for image, label in zip(images, labels, strict=True):
        grey = ((image[0].float().clamp(-1, 1) + 1) * 127.5).round().byte().numpy()
        page = Image.new("L", (FRAME_PIXELS, FRAME_PIXELS + LABEL_PIXELS))
        page.paste(Image.fromarray(grey).resize((FRAME_PIXELS, FRAME_PIXELS), Image.Resampling.BICUBIC))
        centre = (FRAME_PIXELS / 2, FRAME_PIXELS + LABEL_PIXELS / 2)
        ImageDraw.Draw(page).text(centre, f"{label}   synthetic", fill=255, font=font, anchor="mm")
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
