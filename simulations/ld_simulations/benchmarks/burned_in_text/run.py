"""`ld-benchmark burned-in-text`: images with and without text, searched, and the page."""

from __future__ import annotations

import functools
import textwrap
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console

from ld_common.core.atomic_files import write_bytes
from ld_common.core.config import load_config, require
from ld_common.imaging.burned_in_text import find_text
from ld_common.imaging.scan_table import load_modality
from ld_common.imaging.volume import decode_volume
from ld_simulations.benchmarks.burned_in_text.baselines import longest_row, saturated_share
from ld_simulations.benchmarks.burned_in_text.overlays import PLACES, SIZES_PX, STYLES, burn_in, draw_overlay
from ld_simulations.benchmarks.harness import Harness, ResultStore, claim_plan, json_bytes
from ld_simulations.phantoms.base import Population
from ld_simulations.phantoms.registry import PHANTOMS, find_phantom

HEADS = "configs/modalities/brain_mri.yaml"
NUMBERS, PAGE = "burned_in_text.json", "burned_in_text.md"
DEVICES = {
    "brain": {"rows": 256, "columns": 256, "spacing_mm": 1.0},
    "chest": {"rows": 512, "columns": 512, "spacing_mm": 0.82},
}
FALSE_ALARMS = 0.05
"""Share of the images without text that a rule without a model may flag: its threshold follows from that."""
RULES = {"saturated": "share of pixels at 98 % of the range or above", "row": "letters in a row (connected components)"}


@dataclass
class TextBenchmarkConfig:
    """What is drawn and searched."""

    results: str = "docs/benchmarks"
    output: str = "runs/benchmark_burned_in_text"
    seed: int = 20_000
    """Of patients, texts and places; the thresholds were chosen with seeds below it."""
    patients: int = 20
    """Rendered patients of each phantom."""
    repeats: int = 1
    """Overlays of each phantom, style, size and place."""
    radiographs: str = ""
    """A folder of PNG radiographs; of its files in order of their names, every second is searched. Empty: none."""
    volumes: str = ""
    """A pattern of NIfTI head volumes below the working folder, all of whose slices are searched. Empty: none."""

    notes: str = ""
    """What the page says of the real images where there are some: their source, and what a person saw in them."""

    def __post_init__(self) -> None:
        require(self.patients > 0 and self.repeats > 0, "patients and repeats must be above 0")


def load_text_benchmark(path: Path, overrides: list[str]) -> TextBenchmarkConfig:
    """Read the config; raises `ConfigError`."""
    return load_config(TextBenchmarkConfig, path, overrides)


@dataclass(frozen=True)
class Batch:
    """Images of one kind that are searched one after the other."""

    kind: str
    """`overlay`, `clean`, `radiographs` or `volume`."""
    phantom: str = ""
    style: str = ""
    file: str = ""

    @property
    def name(self) -> str:
        """Name of the result."""
        return "/".join(filter(None, (self.kind, self.phantom, self.style.replace(" ", "_"), Path(self.file).name)))


def batches(config: TextBenchmarkConfig) -> list[Batch]:
    """All that is searched."""
    files = sorted(map(str, Path().glob(config.volumes))) if config.volumes else []
    return [
        *(Batch("clean", name) for name in PHANTOMS),
        *(Batch("overlay", name, style) for name in PHANTOMS for style in STYLES),
        *([Batch("radiographs", file=config.radiographs)] if config.radiographs else []),
        *(Batch("volume", file=file) for file in files),
    ]


@dataclass(frozen=True)
class Searcher:
    """Makes a batch's images and searches them."""

    config: TextBenchmarkConfig

    def search(self, batch: Batch) -> list[dict[str, Any]]:
        """One record for each image."""
        if batch.kind == "clean":
            return [_searched(pixels) for pixels in _patients(batch.phantom, self.config.seed, self.config.patients)]
        if batch.kind == "overlay":
            return list(self._overlays(batch))
        if batch.kind == "radiographs":
            files = sorted(Path(batch.file).glob("*.png"))[1::2]
            return [{"file": file.name, **_searched(np.asarray(Image.open(file), np.float32))} for file in files]
        slices = decode_volume(Path(batch.file), load_modality(HEADS), released=True).upright
        return [{"slice": number, **_searched(pixels)} for number, pixels in enumerate(slices) if np.ptp(pixels) > 0]

    def _overlays(self, batch: Batch) -> Iterable[dict[str, Any]]:
        pictures = _patients(batch.phantom, self.config.seed, self.config.patients)
        rng = np.random.default_rng([self.config.seed, list(PHANTOMS).index(batch.phantom), STYLES.index(batch.style)])
        for size in SIZES_PX:
            for place in PLACES * self.config.repeats:
                overlay = draw_overlay(rng, size, batch.style, place)
                pixels = burn_in(pictures[int(rng.integers(len(pictures)))], overlay, rng)
                yield {"phantom": batch.phantom, **asdict(overlay), **_searched(pixels)}


@functools.cache
def _patients(name: str, seed: int, count: int) -> tuple[np.ndarray, ...]:
    phantom = find_phantom(name)
    device, rng = phantom.device(**DEVICES[name]), np.random.default_rng([seed, len(name)])
    pictures = []
    for number in range(count):
        patient = phantom.draw_patient(rng, str(number), Population())
        rendering = phantom.render(patient, patient.attributes(), device, phantom.shown_view)
        pictures.append(phantom.acquire(rendering, device, patient.noise, rng))
    return tuple(pictures)


def _searched(pixels: np.ndarray) -> dict[str, Any]:
    started = time.process_time()
    lines = find_text(pixels)
    seconds = time.process_time() - started
    return {
        "found": bool(lines),
        "lines": [asdict(line) for line in lines],
        "cpu_seconds": round(seconds, 3),
        "saturated": saturated_share(pixels),
        "row": longest_row(pixels),
    }


def run(config: TextBenchmarkConfig, only_report: bool, console: Console) -> list[Path]:
    """Search what has no result yet, and write the numbers and the page; returns the files."""
    store, planned = ResultStore(Path(config.output)), batches(config)
    if not only_report:
        kept = {key: value for key, value in asdict(config).items() if key in ("seed", "patients", "repeats")}
        claim_plan(Path(config.output), kept)
        searcher = functools.partial(Searcher, config)
        Harness(store, console).run("searching images", planned, searcher, Searcher.search)
    numbers = summarise(store.collect(batch.name for batch in planned))
    files = [Path(config.results) / name for name in (NUMBERS, PAGE)]
    write_bytes(files[0], json_bytes(numbers))
    write_bytes(files[1], _page(numbers, config.notes).encode())
    return files


def summarise(results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Recall and false alarms with the numbers behind them."""

    def records(*kinds: str) -> list[dict[str, Any]]:
        return [record for name, found in results.items() if name.split("/")[0] in kinds for record in found]

    clean, overlays = records("clean"), records("overlay")
    by = {key: _shares_by(overlays, key) for key in ("style", "size_px", "place", "phantom", "font", "bits")}
    rules = {}
    for rule in RULES:
        limit = float(np.quantile([record[rule] for record in clean], 1 - FALSE_ALARMS)) if clean else 0.0
        rules[rule] = {
            "limit": limit,
            "recall": _share(record[rule] > limit for record in overlays),
            "false_alarms": _share(record[rule] > limit for record in clean),
            "radiographs_flagged": _share(record[rule] > limit for record in records("radiographs")),
        }
    seconds = [record["cpu_seconds"] for record in (*clean, *overlays)]
    return {
        "overlays": len(overlays),
        "recall": _share(record["found"] for record in overlays),
        "recall_from_8_px": _share(record["found"] for record in overlays if record["size_px"] >= 8),
        "by": by,
        "clean": len(clean),
        "false_alarms": _share(record["found"] for record in clean),
        "radiographs": len(records("radiographs")),
        "radiographs_flagged": _share(record["found"] for record in records("radiographs")),
        "head_slices": len(records("volume")),
        "head_slices_flagged": _share(record["found"] for record in records("volume")),
        "cpu_seconds": round(float(np.median(seconds)), 2) if seconds else None,
        "rules": rules,
    }


def _share(flags: Iterable[bool]) -> float | None:
    listed = list(flags)
    return round(sum(listed) / len(listed), 3) if listed else None


def _shares_by(records: Sequence[dict[str, Any]], key: str) -> dict[str, float | None]:
    values = dict.fromkeys(record[key] for record in records)
    return {str(value): _share(record["found"] for record in records if record[key] == value) for value in values}


def _page(numbers: dict[str, Any], notes: str) -> str:
    def percent(share: float | None) -> str:
        return "" if share is None else f"{100 * share:.1f} %"

    rules = numbers["rules"]
    lines = [
        "# Text burned into pixels",
        "",
        "Written by `make benchmark-burned-in-text`. The search is that of `ld-client index` and `ld-generate`: the",
        f"PP-OCRv6 models of RapidOCR and the rules of `burned_in_text.py`. It searched {numbers['overlays']} rendered",
        f"images with one drawn text and {numbers['clean']} without, of patients and texts with which no threshold was",
        "chosen. A name, number or date is drawn at 6 to 40 pixels (em height) in six fonts, near a corner or in the",
        "middle, in ten styles. *Low contrast* differs from its ground by 15 % of the image's range, *faint* by 6 %.",
        "",
        "| Rule | Recall | False alarms on clean images | Real radiographs flagged |",
        "|---|---|---|---|",
        f"| **search for text** | {percent(numbers['recall'])} | {percent(numbers['false_alarms'])} | "
        f"{percent(numbers['radiographs_flagged'])} |",
        *(
            f"| {label} | {percent(rules[rule]['recall'])} | {percent(rules[rule]['false_alarms'])} | "
            f"{percent(rules[rule]['radiographs_flagged'])} |"
            for rule, label in RULES.items()
        ),
        "| flag nothing | 0.0 % | 0.0 % | 0.0 % |",
        "| flag everything | 100.0 % | 100.0 % | 100.0 % |",
        "",
        f"The two rules without a model flag at most {percent(FALSE_ALARMS)} of the clean images by their thresholds.",
        f"From 8 pixels on, the recall of the search is {percent(numbers['recall_from_8_px'])}. One image takes",
        f"{numbers['cpu_seconds']} s of processor time (median).",
        "",
    ]
    for key, title in (("style", "Style"), ("size_px", "Em height, pixels"), ("place", "Place"), ("font", "Font")):
        shares = numbers["by"][key]
        lines += [f"| {title} | {' | '.join(shares)} |", f"|---{'|---' * len(shares)}|"]
        lines += [f"| recall | {' | '.join(map(percent, shares.values()))} |", ""]
    if numbers["head_slices"]:
        share = percent(numbers["head_slices_flagged"])
        lines += [
            f"Of {numbers['head_slices']} slices of real T1w volumes, none of which has text, {share} are flagged.",
            "",
        ]
    if notes and (numbers["radiographs"] or numbers["head_slices"]):
        lines += [*textwrap.wrap(notes, 120), ""]
    return "\n".join(lines)
