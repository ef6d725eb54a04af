"""Pictures of no patient, drawn from noise under one prompt: one row a noise, one column a drift."""

from __future__ import annotations

import io
import json
import os
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ld_common.core.atomic_files import write_bytes
from ld_common.core.errors import RequestError
from ld_common.core.seeding import torch_generator
from ld_common.diffusion.base_model import BaseModel
from ld_common.diffusion.sampling import make_sampler, sample
from ld_common.imaging.geometry import Frame
from ld_common.imaging.image_io import write_png
from ld_common.imaging.modality import Attributes
from ld_common.release.data_ranges import beyond, trained_on
from ld_common.release.release import Release, release_record, software
from ld_generate.drift_choice import DriftChoice
from ld_generate.watermark import check_watermark_fits, draw_watermark

SYNTHETIC = {"SyntheticData": "YES", "Software": "latent-drift-federation"}
STRIP, RECORD = "strip.png", "record.json"
DECODE_BATCH_SIZE = 16
INCHES = 1.3
"""Side of one picture in a strip."""
TITLE_LETTERS = 17
"""Letters of a strip's title that fit above one picture."""


@dataclass(frozen=True)
class SampleRequest:
    """What is drawn from noise."""

    source: Attributes
    """All attributes of the pictures."""
    drifts: Sequence[DriftChoice]
    count: int
    sampler: str
    num_inference_steps: int
    watermark: bool = False


def draw_samples(
    base: BaseModel,
    release: Release,
    request: SampleRequest,
    folder: Path,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Path]:
    """Draw the pictures with each drift, all from the same noise; write them, a strip and a record.

    Raises:
        RequestError: an attribute is missing, the folder cannot be written, or the pictures are too small for the
            watermark.
        ConfigError: an unknown sampler, or more steps than the noise schedule has timesteps.
    """
    prompt = release.modality.prompt(request.source)
    if request.watermark:
        check_watermark_fits(base.resolution, base.resolution)
    make_folder(folder)
    with torch.no_grad():
        context = base.embed([prompt]).expand(request.count, -1, -1)
    noise = torch.randn((request.count, *base.latent_shape), generator=torch_generator(release.study.seed, "draw"))
    columns: dict[str, list[Tensor]] = {}
    files: list[Path] = []
    for choice in request.drifts:
        sampler = make_sampler(base.scheduler, request.sampler, request.num_inference_steps)
        latents = sample(base, context, noise, sampler, choice.latent_drift(release, base, request.source))
        pictures = torch.cat([base.decode(chunk) for chunk in latents.split(DECODE_BATCH_SIZE)])
        files += [
            write_picture(folder / f"sample-{number}_drift-{choice.name}.png", picture, prompt, request.watermark)
            for number, picture in enumerate(pictures, start=1)
        ]
        title = f"drift of {choice.name}" if choice.delta is None else f"δ {choice.name}"
        columns[title] = list(pictures)
        progress(request.count)
    files.append(write_strip(folder / STRIP, columns, prompt))
    record = {
        "source": request.source,
        "prompt": prompt,
        "drifts": [choice.name for choice in request.drifts],
        "sampler": {"name": request.sampler, "num_inference_steps": request.num_inference_steps},
        "seeds": [release.study.seed],
        "watermark": request.watermark,
        "release": release_record(release),
        "software": software(),
        "warnings": extrapolated(release, [request.source]),
    }
    return [*files, write_record_file(folder, record)]


def extrapolated(release: Release, attributes: Iterable[Attributes]) -> list[str]:
    """A warning for each value outside the range of the training scans, or one where that range is not known."""
    ranges = trained_on(release.modality, release.manifest["rounds"])
    if ranges is None:
        return ["the release does not say what its sites had scans of: extrapolation cannot be detected"]
    return list(dict.fromkeys(line for values in attributes for line in beyond(release.modality, ranges, values)))


def make_folder(folder: Path) -> None:
    """Make a folder for results; raises `RequestError` when it cannot be made or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"cannot write to '{folder}' ({error.strerror}): choose another --out") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise RequestError(f"cannot write to '{folder}' (no permission): choose another --out")


def write_record_file(folder: Path, record: dict[str, Any]) -> Path:
    """Write `record.json`, the last file of a folder."""
    write_bytes(folder / RECORD, (json.dumps(record, indent=2, sort_keys=True) + "\n").encode())
    return folder / RECORD


def write_picture(path: Path, picture: Tensor, description: str, watermark: bool = False) -> Path:
    """Write a picture `(1,S,S)` in [-1, 1] as a PNG whose text chunks say that it is synthetic."""
    pixels = draw_watermark(picture[0].numpy(), -1.0, 1.0) if watermark else picture[0].numpy()
    frame = Frame(-1.0, 1.0, pixels.shape, None, len(pixels), None)
    write_png(path, pixels, frame, SYNTHETIC | {"Description": description})
    return path


def write_strip(path: Path, columns: dict[str, list[Tensor]], title: str) -> Path:
    """Write columns of pictures `(1,S,S)` side by side, each below its name."""
    rows = max(len(pictures) for pictures in columns.values())
    lines = textwrap.wrap(f"synthetic: {title}", TITLE_LETTERS * len(columns))
    height = INCHES * rows + 0.36 + 0.14 * len(lines)
    figure = Figure(figsize=(INCHES * len(columns), height), layout="constrained")
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for column, (name, pictures) in enumerate(columns.items()):
        axes[0, column].set_title(name, fontsize=8)
        for row in range(rows):
            axes[row, column].set_axis_off()
            if row < len(pictures):
                axes[row, column].imshow(pictures[row][0].numpy(), cmap="gray", vmin=-1, vmax=1)
    figure.suptitle("\n".join(lines), fontsize=8)
    return save_figure(path, figure, SYNTHETIC | {"Description": title})


def save_figure(path: Path, figure: Figure, text: dict[str, str]) -> Path:
    """Write a figure as a PNG with `text` in its text chunks; raises `CheckpointError` when it cannot be written."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=150, metadata=text)
    write_bytes(path, stream.getvalue())
    return path
