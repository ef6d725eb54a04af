"""The options of `ld-generate`'s commands, checked as far as they can be without a model library."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ld_common.core.command import TRUST_HELP, UNSIGNED_HELP
from ld_common.core.config import from_mapping, is_number, require
from ld_common.core.errors import ConfigError, ReleaseError, RequestError
from ld_common.editing.registry import EDITORS
from ld_common.imaging.modality import RENDERINGS, Attributes, Modality
from ld_common.protocol.site_name import AUTO, RELEASE

DEVICES, PRECISIONS = ("cpu", "cuda"), ("float32", "bfloat16", "float16")
SAMPLERS = ("ddim", "dpm-solver++", "euler")
MANIFEST = "manifest.json"
MODEL, SCANS, EDITOR, OUTPUT = "Release and model", "Scans", "Editor", "Output"
"""Titles of the help's panels."""

Target = Annotated[
    list[str],
    typer.Option(
        "--target",
        metavar="ATTR=VALUE,...",
        help="What one counterfactual changes, for example age=84,diagnosis=AD. Repeatable.",
        rich_help_panel=SCANS,
    ),
]
Source = Annotated[
    str,
    typer.Option(
        "--source",
        metavar="ATTR=VALUE,...",
        help="What the scans show, as far as the files do not say it.",
        rich_help_panel=SCANS,
    ),
]
SliceIndex = Annotated[
    int | None,
    typer.Option(
        "--slice",
        min=0,
        help="Slice of a volume, from 0, the lowest. By default the one that was trained on.",
        rich_help_panel=SCANS,
    ),
]
NumSeeds = Annotated[
    int,
    typer.Option(
        "--num-seeds",
        min=1,
        help="Number of noise seeds; writes the mean, the standard deviation and each sample.",
        rich_help_panel=EDITOR,
    ),
]


def one_drift(values: list[float] | None) -> list[float] | None:
    """Refuse a repeated `--drift`, of which the last one would count silently."""
    if values and len(values) > 1:
        raise RequestError(f"--drift is given {len(values)} times: this command draws under one drift")
    return values


Delta = Annotated[
    list[float] | None,
    typer.Option(
        "--drift",
        callback=one_drift,
        metavar="DELTA",
        help="Shift δ of the edit's steps, such as -0.1. By default as the release recommends.",
        rich_help_panel=EDITOR,
    ),
]
BurnedInTextChecked = Annotated[
    bool,
    typer.Option(
        "--burned-in-text-checked",
        help="A person has checked the pixels for text; without this, images with text and DERIVED ones are refused.",
        rich_help_panel=SCANS,
    ),
]

Strict = Annotated[
    bool,
    typer.Option(
        "--strict",
        help="Refuse, before anything is drawn, a scan unlike those of the release's sites, and attributes outside "
        "their ranges. Without this, both cause a warning.",
        rich_help_panel=SCANS,
    ),
]

Card = Annotated[
    bool,
    typer.Option(
        "--card",
        help="Also write a patient card, card.png and card.pdf: the scan, the answers with differences and bands, what "
        "the release can do, and hashes, on one page.",
        rich_help_panel=OUTPUT,
    ),
]

Rendering = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="How an answer becomes pixels of the scan: deformation moves the scan's own, difference adds the "
        "change of brightness, decoded writes the model's picture. By default as the modality says.",
        show_default=False,
        rich_help_panel=OUTPUT,
    ),
]


def check_rendering(name: str) -> None:
    """Refuse an unknown `--rendering`; raises `ConfigError`."""
    require(name in ("", *RENDERINGS), f"--rendering is '{name}': use {', '.join(RENDERINGS)}")


@dataclass(frozen=True)
class HistoryFile:
    """An earlier scan of a patient, as a command line names it."""

    path: Path
    age: float | None


def read_history_options(texts: Sequence[str]) -> list[HistoryFile]:
    """The files and ages of `SCAN@AGE` texts; raises `RequestError` for an age that is no number."""
    files = []
    for text in texts:
        path, at, age = text.rpartition("@")
        if not at:
            files.append(HistoryFile(Path(text), None))
        elif not (is_number(age) and 0 <= float(age) < math.inf):
            raise RequestError(f"--history '{text}' is not of the form SCAN@AGE: '{age}' is no age")
        else:
            files.append(HistoryFile(Path(path), float(age)))
    return files


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Which release is loaded, whether it is trusted, and where its model runs."""

    release: Annotated[Path, typer.Argument(metavar="RELEASE", help="Folder of the release.", show_default=False)]
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Folder or hub id of the base model. By default the one that the release names.",
            rich_help_panel=MODEL,
        ),
    ] = None
    site: Annotated[
        str,
        typer.Option(
            metavar="SITE",
            help="Draw with what the release holds of one site's own: factors (aggregator fedsa) and drift. At a site "
            "that does not release its factors: the file in which it keeps them.",
            rich_help_panel=MODEL,
        ),
    ] = ""
    trust: Annotated[str, typer.Option(metavar="KEY", help=TRUST_HELP, rich_help_panel=MODEL)] = ""
    allow_unsigned: Annotated[bool, typer.Option("--allow-unsigned", help=UNSIGNED_HELP, rich_help_panel=MODEL)] = False
    device: Annotated[str, typer.Option(help=f"{' or '.join(DEVICES)}.", rich_help_panel=MODEL)] = "cpu"
    precision: Annotated[str, typer.Option(help=f"{', '.join(PRECISIONS)}.", rich_help_panel=MODEL)] = "float32"

    def __post_init__(self) -> None:
        require(self.device in DEVICES, f"--device is '{self.device}': use {' or '.join(DEVICES)}")
        require(self.precision in PRECISIONS, f"--precision is '{self.precision}': use {', '.join(PRECISIONS)}")
        if not (self.release / MANIFEST).is_file():
            raise ReleaseError(f"'{self.release}' holds no release: give the folder with {MANIFEST} in it")

    @property
    def modality(self) -> Modality | None:
        """The modality that the manifest names, not verified yet; None where the manifest cannot be read.

        It serves to refuse a typo before a model library is imported.
        """
        try:
            manifest = json.loads((self.release / MANIFEST).read_text(encoding="utf-8"))
            return from_mapping(Modality, manifest["modality"])
        except (OSError, ValueError, LookupError, TypeError, RecursionError, ConfigError):
            return None  # reported when the release is loaded


@dataclass(frozen=True, kw_only=True)
class ScanOptions:
    """Which scans are edited, and what they show."""

    inputs: Annotated[
        list[Path],
        typer.Option(
            "--input",
            metavar="SCAN",
            help="DICOM file, folder of a DICOM series, NIfTI, grey PNG or JPEG. Repeatable.",
            show_default=False,
            rich_help_panel=SCANS,
        ),
    ]
    source: Source = ""
    preserve_mask: Annotated[
        Path | None,
        typer.Option(
            metavar="IMAGE",
            help="Image of the scan's size: where it is not 0 (white), the scan is kept. "
            "This is the opposite of an inpainting mask in diffusers, where white is repainted.",
            rich_help_panel=SCANS,
        ),
    ] = None
    history: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SCAN[@AGE]",
            help="An earlier scan of the same patient, and the age then; DICOM files with dates need no age. It "
            "calibrates the answer to the patient. Repeatable.",
            show_default=False,
            rich_help_panel=SCANS,
        ),
    ] = None
    burned_in_text_checked: BurnedInTextChecked = False
    rendering: Rendering = ""
    strict: Strict = False

    def __post_init__(self) -> None:
        check_rendering(self.rendering)
        read_history_options(self.history or [])
        if self.history and len(self.inputs) > 1:
            raise RequestError(f"--history belongs to one patient's scan, and --input names {len(self.inputs)}")


@dataclass(frozen=True, kw_only=True)
class EditorOptions:
    """Which editor is used, and its options."""

    editor: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help=f"{', '.join(EDITORS)}. By default as the release recommends.",
            show_default=False,
            rich_help_panel=EDITOR,
        ),
    ] = ""
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            help="Scale of the guidance towards the target; 0 returns the reconstruction. "
            "By default as the release recommends.",
            rich_help_panel=EDITOR,
        ),
    ] = None
    noise_fraction: Annotated[
        float | None,
        typer.Option(
            help="Share of the noise schedule that is inverted, above 0 and up to 1. "
            "By default as the release recommends.",
            rich_help_panel=EDITOR,
        ),
    ] = None
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Options of the editor, such as num_inference_steps=80.",
            show_default=False,
        ),
    ] = None

    def __post_init__(self) -> None:
        if self.editor and self.editor not in EDITORS:
            EDITORS.load(self.editor)  # raises, with the nearest or the new name
        for text in self.overrides or []:
            key, equals, _ = text.partition("=")
            require(bool(key and equals), f"'{text}' is not of the form key=value")
        scale, fraction = self.guidance_scale, self.noise_fraction
        require(scale is None or 0 <= scale < math.inf, f"--guidance-scale is {scale}: give a number, 0 or above")
        require(fraction is None or 0 < fraction <= 1, f"--noise-fraction is {fraction}: give a share above 0, up to 1")

    @property
    def changes(self) -> list[str]:
        """All options that differ from the release's editor, as `key=value`."""
        named = {"guidance_scale": self.guidance_scale, "noise_fraction": self.noise_fraction}
        return [*(self.overrides or []), *(f"{key}={value}" for key, value in named.items() if value is not None)]


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Where results go, and how they are marked."""

    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder for the results.", rich_help_panel=OUTPUT)] = Path(
        "counterfactuals"
    )
    watermark: Annotated[
        bool, typer.Option("--watermark", help="Write the word 'synthetic' into the pixels.", rich_help_panel=OUTPUT)
    ] = False
    keep_geometry: Annotated[
        bool,
        typer.Option(
            "--keep-geometry",
            help="Write the scan's position and Frame of Reference UID into DICOM answers, so that viewers can lay "
            "both over each other. It links the answer to the scan and so to the patient.",
            rich_help_panel=OUTPUT,
        ),
    ] = False
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print the files and the biomarkers (mm2) as JSON.", rich_help_panel=OUTPUT),
    ] = False

    def __post_init__(self) -> None:
        check_writable(self.out)


def read_targets(modality: Modality, texts: Sequence[str]) -> list[Attributes]:
    """The attributes that each `--target` changes; raises `RequestError` where one changes nothing."""
    targets = [modality.parse_all(text) for text in texts]
    for text, target in zip(texts, targets, strict=True):
        if not target:
            raise RequestError(f"--target '{text}' changes nothing: give attribute=value")
    return targets


def check_attributes(release: LoadOptions, targets: Sequence[str], source: str) -> None:
    """Refuse attributes and values that the release's modality does not have; raises `RequestError`."""
    modality = release.modality
    if modality is not None:
        read_targets(modality, targets)
        modality.parse_all(source)


def check_edit_drifts(words: Sequence[str]) -> None:
    """Refuse a `--drift` of an edit that is no finite number, `release` or `auto`; raises `RequestError`."""
    for word in words:
        if word not in (RELEASE, AUTO) and not (is_number(word) and math.isfinite(float(word))):
            raise RequestError(f"--drift '{word}': an edit takes a finite number, {RELEASE} or {AUTO}")


def check_writable(folder: Path) -> None:
    """Raise `RequestError` where a folder cannot be made or written to; makes nothing."""
    parent = next((path for path in _ancestors(folder) if path.exists()), Path())
    if not parent.is_dir():
        raise RequestError(f"cannot write to '{folder}': '{parent}' is a file; choose another --out")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise RequestError(f"cannot write to '{folder}': no permission to write in '{parent}'; choose another --out")


def _ancestors(folder: Path) -> Iterator[Path]:
    yield folder
    yield from folder.parents


def read_slice_range(text: str) -> range:
    """`first:last`, the last one included; raises `RequestError`."""
    first, _, last = text.partition(":")
    if not (first.strip().isdecimal() and last.strip().isdecimal() and int(first) <= int(last)):
        raise RequestError(f"--slices '{text}' is not of the form first:last, two numbers from 0")
    return range(int(first), int(last) + 1)
