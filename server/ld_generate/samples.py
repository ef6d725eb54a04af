"""Pictures of no patient: samples from noise under one prompt, one row a noise, one column a drift."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

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
from ld_generate.watermark import check_room, mark

SYNTHETIC = {"SyntheticData": "YES", "Software": "latent-drift-federation"}
STRIP, RECORD = "strip.png", "record.json"
DECODED_TOGETHER = 16
INCHES = 1.3
"""Side of one picture in a strip."""
TITLE_LETTERS = 17
"""What a strip's title has room for over one picture."""


def draw_samples(
    base: BaseModel,
    release: Release,
    attributes: Attributes,
    choices: Sequence[DriftChoice],
    count: int,
    steps: int,
    sampler: str,
    folder: Path,
    progress: Callable[[int], None] = lambda done: None,
    marked: bool = False,
) -> list[Path]:
    """Draw `count` pictures with each drift, all from the same noise, and write them, a strip and a record.

    Raises:
        RequestError: an attribute is missing, the folder cannot be written, or the pictures are too small to be marked.
        ConfigError: an unknown sampler or too many steps.
    """
    prompt = release.modality.prompt(attributes)
    if marked:
        check_room(base.resolution, base.resolution)
    make_folder(folder)
    with torch.no_grad():
        context = base.embed([prompt]).expand(count, -1, -1)
    noise = torch.randn((count, *base.latent_shape), generator=torch_generator(release.study.seed, "draw"))
    drifts = {choice.name: choice.drift(release, base, attributes) for choice in choices}
    titles = {
        choice.name: f"drift of {choice.name}" if choice.delta is None else f"δ {choice.name}" for choice in choices
    }
    columns = {}
    for name, drift in drifts.items():
        latents = sample(base, context, noise, make_sampler(base.scheduler, sampler, steps), drift)
        columns[name] = torch.cat([base.decode(chunk) for chunk in latents.split(DECODED_TOGETHER)])
        progress(count)
    record = {
        "attributes": attributes,
        "prompt": prompt,
        "drifts": [choice.name for choice in choices],
        "sampler": {"name": sampler, "steps": steps},
        "seed": release.study.seed,
        "marked": marked,
        "release": release_record(release),
        "software": software(),
        "warnings": extrapolated(release, [attributes]),
    }
    files = [
        write_picture(folder / f"sample-{number}_drift-{name}.png", picture, prompt, marked)
        for name, pictures in columns.items()
        for number, picture in enumerate(pictures, start=1)
    ]
    files.append(write_strip(folder / STRIP, {titles[name]: list(shown) for name, shown in columns.items()}, prompt))
    (folder / RECORD).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    return [*files, folder / RECORD]


def extrapolated(release: Release, shown: Iterable[Attributes]) -> list[str]:
    """A sentence for each value that lies outside what the release's sites had scans of, or that this is not known."""
    known = trained_on(release.modality, release.manifest["rounds"])
    if known is None:
        return ["the release does not say what its sites had scans of: nothing tells what is extrapolated"]
    return list(dict.fromkeys(line for one in shown for line in beyond(release.modality, known, one)))


def make_folder(folder: Path) -> None:
    """Make a folder for results; raises `RequestError` when it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"cannot write to '{folder}' ({error.strerror}): choose another --out") from error


def write_picture(path: Path, picture: Tensor, description: str, marked: bool = False) -> Path:
    """Write a picture `(1,S,S)` in [-1, 1] as a PNG that says it is synthetic, in its pixels as well where `marked`."""
    pixels = mark(picture[0].numpy(), -1.0, 1.0) if marked else picture[0].numpy()
    frame = Frame(-1.0, 1.0, pixels.shape, None, len(pixels), None)
    write_png(path, pixels, frame, SYNTHETIC | {"Description": description})
    return path


def write_strip(path: Path, columns: dict[str, list[Tensor]], title: str) -> Path:
    """Write columns of pictures `(1,S,S)` side by side, each under its name."""
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
    figure.savefig(path, dpi=150, metadata=SYNTHETIC | {"Description": title})
    return path
