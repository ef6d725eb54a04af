"""Draws counterfactuals of scans and writes their files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ld_common.diffusion.base_model import BaseModel
from ld_common.editing.base import Editor
from ld_common.editing.counterfactuals import Counterfactuals, Edit, draw_several, edit_to, past_of
from ld_common.editing.history import ScanHistory, history_warnings, writing
from ld_common.editing.registry import editor_options
from ld_common.imaging.geometry import Frame, from_model
from ld_common.imaging.image_io import write_difference_png, write_png
from ld_common.imaging.modality import AGE, Attributes, Modality
from ld_common.imaging.nifti import NIFTI, write_nifti
from ld_common.imaging.rendering import picture_of, reference_of, render
from ld_common.imaging.scan_table import shown
from ld_common.imaging.secondary_capture import Place, Provenance, write_synthetic_dicom
from ld_common.release.release import Release, edit_drift
from ld_generate.age_band import age_context, band_entry, visit_areas
from ld_generate.input_digest import describe_input, keyed_digest
from ld_generate.preserve_mask import preserve
from ld_generate.record import file_stem, write_record
from ld_generate.request import EditRequest
from ld_generate.samples import STRIP, SYNTHETIC, write_strip
from ld_generate.sweep_writer import SweepPictures, measure_biomarkers, write_sweep
from ld_generate.watermark import draw_watermark

DIFFERENCE_LIMIT = 1.0
"""Difference, in the model's range of 2, that has the strongest colour in every map."""
UNCERTAINTY_LIMIT = 0.25
"""The same for the standard deviation between seeds."""


def run_edits(
    base: BaseModel,
    release: Release,
    requests: Sequence[EditRequest],
    editor: Editor,
    deltas: Sequence[float],
    progress: Callable[[int], None],
    num_seeds: int = 1,
) -> list[Path]:
    """Draw all requests under each δ in shared batches and write their files; returns what was written.

    With several seeds, the counterfactual is their mean; each of them and their standard deviation by pixel are written
    as well.

    Args:
        base: the base with the release's adapter.
        release: the release.
        requests: scans and targets.
        editor: how edits are drawn.
        deltas: shifts of the reverse steps, in the paper's units.
        progress: called with the number of images finished since the last call.
        num_seeds: number of noise seeds, from the study's seed upwards.
    """
    edits, prompts = edits_of(release.modality, requests, deltas), source_prompts(release.modality, requests)
    images = torch.stack([request.image for request in requests])
    seeds = range(release.study.seed, release.study.seed + num_seeds)
    known = {row: request.history or _without_visits(release.modality, request) for row, request in enumerate(requests)}
    past = past_of(release.modality, known)
    drawn, samples = draw_several(base, images, prompts, edits, editor, seeds, progress, edit_drift(release), past)
    files: list[Path] = []
    for index, request in enumerate(requests):
        rows = [row for row, edit in enumerate(edits) if edit.scan == index]
        counterfactuals = Counterfactuals(drawn.autoencoded[index], drawn.reconstructions[index], drawn.images[rows])
        files += _EditWriter(release, request, editor, deltas).write(counterfactuals, samples[rows])
    return files


def _without_visits(modality: Modality, request: EditRequest) -> ScanHistory:
    side = request.image.shape[-1]
    return ScanHistory.without_visits(writing(request.scan, request.frame, request.rendering, side, modality.image))


def edits_of(modality: Modality, requests: Sequence[EditRequest], deltas: Sequence[float]) -> list[Edit]:
    """Every target of every request under every δ, in that order."""
    return [
        edit_to(modality, index, request.source, target, delta)
        for index, request in enumerate(requests)
        for target in request.targets
        for delta in deltas
    ]


def source_prompts(modality: Modality, requests: Sequence[EditRequest]) -> list[str]:
    """The prompt of each request's scan."""
    return [modality.prompt(request.source) for request in requests]


@dataclass(frozen=True)
class _EditWriter:
    """Writes the folder of one scan."""

    release: Release
    request: EditRequest
    editor: Editor
    deltas: Sequence[float]

    def write(self, drawn: Counterfactuals, samples: Tensor) -> list[Path]:
        """Images in the scan's geometry, difference maps, strips and the record.

        Args:
            drawn: the reconstruction `(1,S,S)` and the M counterfactuals, the means over the seeds.
            samples: the counterfactuals of each of the K seeds, `(M,K,1,S,S)`.
        """
        request, modality, folder = self.request, self.release.modality, self.request.folder
        reconstruction = from_model(drawn.reconstructions, request.frame)
        files = [folder / "input.png", folder / "reconstruction.png"]
        write_png(files[0], request.scan.pixels.astype(np.float32), request.frame, {})
        write_png(files[1], self._marked(reconstruction), request.frame, SYNTHETIC)
        by_seed = [[self._rendered(image, drawn.reconstructions) for image in images] for images in samples]
        answers = [values[0] if len(values) == 1 else np.mean(values, axis=0) for values in by_seed]
        pictures = self._pictures(answers)
        originals = torch.stack([request.image, drawn.reconstructions])
        of_scan, of_reconstruction, *measured = measure_biomarkers(
            modality, request.frame, torch.cat([originals, pictures])
        )
        entries = []
        targets = [(target, delta) for target in request.targets for delta in self.deltas]
        for row, (target, delta) in enumerate(targets):
            written = self._write_counterfactual(target, delta, answers[row], reconstruction)
            entry = {"target": target, "delta": delta, "prompt": modality.prompt(request.source | target)}
            entry["biomarkers_mm2"] = measured[row]
            entry["band"] = band_entry(self.release, replace(self.editor, delta=delta), request, target, measured[row])
            if len(by_seed[row]) > 1:
                written += self._write_samples(target, delta, by_seed[row])
                by_seed_pictures = self._pictures(by_seed[row])
                entry["biomarkers_mm2_by_seed"] = measure_biomarkers(modality, request.frame, by_seed_pictures)
            entries.append(entry | {"files": [file.name for file in written]})
            files += written
        files += self._write_overviews(drawn, pictures)
        content = self._description() | {
            "counterfactuals": entries,
            "seeds": [self.release.study.seed + number for number in range(samples.shape[1])],
            "biomarkers_mm2": {"scan": of_scan, "reconstruction": of_reconstruction},
        }
        return [*files, write_record(folder, self.release, self.editor, content, self._warnings())]

    def _warnings(self) -> list[str]:
        request = self.request
        history = [] if request.history is None else history_warnings(request.history)
        return request.unfamiliarity_warnings + history

    def _description(self) -> dict[str, Any]:
        request = self.request
        return {
            "input": {
                **describe_input(request.path, [request.scan.pixels], request.preserve_mask),
                "slice": request.slice_index,
            },
            "source": request.source,
            "rendering": request.rendering,
            "history": [
                visit | {"biomarkers_mm2": areas}
                for visit, areas in zip(self._history(), visit_areas(self.release.modality, request), strict=True)
            ],
            "familiarity": None if request.unfamiliarity is None else request.unfamiliarity.record(),
            "watermark": request.watermark,
            "keep_geometry": request.keep_geometry,
        }

    def _history(self) -> list[dict[str, Any]]:
        """The earlier visits: how long before the scan, and a keyed hash of the model's picture."""
        history = self.request.history
        if history is None:
            return []
        return [
            {"years_before": round(years, 3), "hmac_of_picture": keyed_digest([picture.numpy().tobytes()])}
            for years, picture in zip(history.years, history.pictures, strict=True)
        ]

    def _rendered(self, image: Tensor, reconstruction: Tensor) -> np.ndarray:
        """An answer `(1,S,S)` in the scan's grid and real values `(H,W)`."""
        request = self.request
        values = render(request.scan.pixels, request.frame, reconstruction, image, request.rendering)
        return preserve(request.preserve_mask, request.scan, values)

    def _pictures(self, answers: Sequence[np.ndarray]) -> Tensor:
        """The model's pictures `(M,1,S,S)` of what is written, which are measured."""
        frame, side, image = self.request.frame, self.request.image.shape[-1], self.release.modality.image
        return torch.stack([picture_of(values, frame, side, image) for values in answers])

    def _write_overviews(self, drawn: Counterfactuals, pictures: Tensor) -> list[Path]:
        """A strip of several δ, and the files of a sweep; `pictures` are those of what is written."""
        request, files = self.request, []
        if len(self.deltas) > 1:
            reference = reference_of(request.rendering)
            unchanged = request.image if reference == "scan" else drawn.reconstructions
            columns = {reference: [unchanged] * len(request.targets)}
            step = len(self.deltas)
            columns |= {f"δ {delta:+g}": list(pictures[row::step]) for row, delta in enumerate(self.deltas)}
            title = " / ".join(", ".join(f"{k} {shown(v)}" for k, v in target.items()) for target in request.targets)
            files.append(write_strip(request.folder / STRIP, columns, title))
        if request.sweep is not None:
            values = list(pictures[-len(request.sweep.values) :])
            sweep_pictures = SweepPictures(
                request.image, drawn.reconstructions, values, reference_of(request.rendering)
            )
            modality, sweep = self.release.modality, request.sweep
            context = age_context(self.release, self.editor, request) if sweep.attribute == AGE else None
            files += write_sweep(
                request.folder, modality, sweep, request.frame, request.source, sweep_pictures, context
            )
        return files

    def _write_counterfactual(
        self, target: Attributes, delta: float, values: np.ndarray, reconstruction: np.ndarray
    ) -> list[Path]:
        """One counterfactual `(H,W)` in each format, and its difference from the scan, or the reconstruction."""
        request, frame = self.request, self.request.frame
        pixels, stem = self._marked(values), file_stem(target, delta)
        prompt = self.release.modality.prompt(request.source | target)
        files = [request.folder / f"{stem}{ending}" for ending in (".png", "_difference.png", ".dcm")]
        write_png(files[0], pixels, frame, SYNTHETIC | {"Description": prompt})
        before = request.scan.pixels.astype(np.float32)
        if reference_of(request.rendering) == "reconstruction":  # no difference where the scan is kept
            before = preserve(request.preserve_mask, request.scan, reconstruction)
        self._write_map(files[1], values - before, DIFFERENCE_LIMIT)
        write_synthetic_dicom(
            files[2],
            pixels,
            request.scan.spacing_mm,
            prompt,
            Provenance(
                self.release.study.name,
                self.release.adapter_sha256,
                self.release.study.seed,
                self._digest(target, delta),
            ),
            orientation=request.scan.orientation,
            marked=request.watermark,
            place=self._place(pixels),
        )
        if request.path.name.lower().endswith(NIFTI):
            files.append(request.folder / f"{stem}.nii.gz")
            write_nifti(files[-1], pixels, request.scan)
        return files

    def _place(self, pixels: np.ndarray) -> Place | None:
        """Where the scan lies, if the user wants to keep that."""
        scan = self.request.scan
        if not self.request.keep_geometry or scan.affine is None:
            return None
        values = float(pixels.min()), float(pixels.max())
        return Place(1, scan.affine, None, values, "in the scan's position", scan.frame_of_reference)

    def _write_samples(self, target: Attributes, delta: float, samples: Sequence[np.ndarray]) -> list[Path]:
        """The counterfactual of each seed `(H,W)`, and the standard deviation by pixel."""
        request, frame = self.request, self.request.frame
        stem, prompt = file_stem(target, delta), self.release.modality.prompt(request.source | target)
        files = []
        for seed, values in enumerate(samples, start=self.release.study.seed):
            files.append(request.folder / f"{stem}_seed-{seed}.png")
            write_png(files[-1], self._marked(values), frame, SYNTHETIC | {"Description": prompt})
        files.append(request.folder / f"{stem}_uncertainty.png")
        self._write_map(files[-1], np.std(samples, axis=0, ddof=1), UNCERTAINTY_LIMIT)
        return files

    def _write_map(self, path: Path, values: np.ndarray, limit: float) -> None:
        """Real values `(H,W)` in colour; `limit`, in the model's range, has the strongest."""
        shares = values / _half_range(self.request.frame)
        pixels = draw_watermark(shares, 0.0, limit) if self.request.watermark else shares
        write_difference_png(path, pixels, SYNTHETIC, limit=limit)

    def _marked(self, values: np.ndarray) -> np.ndarray:
        frame = self.request.frame
        return draw_watermark(values, frame.low, frame.high) if self.request.watermark else values

    def _digest(self, target: Attributes, delta: float) -> str:
        """Keyed hash of a counterfactual's request: equal requests of an account get equal DICOM identifiers."""
        request = self.request
        options = [request.source, target, editor_options(self.editor), delta, request.rendering, request.watermark]
        options.append(self._history())
        options += ["keep geometry"] if request.keep_geometry else []
        mask = b"" if request.preserve_mask is None else request.preserve_mask.tobytes()
        text = json.dumps(options, sort_keys=True).encode()
        return keyed_digest([request.scan.pixels.tobytes(), mask, text])


def _half_range(frame: Frame) -> float:
    """Real values that are 1 in the model's range of 2."""
    return (frame.high - frame.low) / 2
