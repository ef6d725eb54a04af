"""Counterfactuals in Python: load a release, ask for a scan under other attributes, get arrays in the scan's grid."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import ld_common.core.offline  # noqa: F401  (before any model library)
from ld_common.core.atomic_files import write_bytes
from ld_common.core.errors import RequestError
from ld_common.diffusion.base_model import BaseModel
from ld_common.diffusion.longitudinal import LongitudinalDrift
from ld_common.diffusion.unfamiliarity import Unfamiliarity
from ld_common.editing.base import EditDrift, Editor
from ld_common.editing.counterfactuals import draw_several, edit_to, past_of
from ld_common.editing.drift import DriftEditor
from ld_common.editing.familiarity import history_unfamiliarity, unfamiliarity_of, unfamiliarity_warnings
from ld_common.editing.history import EarlierScan, ScanHistory, history_warnings, read_history, writing
from ld_common.editing.registry import change_editor, editor_options, read_editor
from ld_common.imaging.geometry import Frame, Scan, from_model, to_model
from ld_common.imaging.modality import AGE, DECODED, RENDERINGS, Attributes, Modality, Value
from ld_common.imaging.readers import read_scan
from ld_common.imaging.rendering import picture_of, reference_of, render
from ld_common.imaging.scan_table import agree, load_modality, shown
from ld_common.metrics.registry import BIOMARKERS
from ld_common.release.data_ranges import beyond, trained_on
from ld_common.release.release import Release, edit_drift, load_release_base, release_editor, release_record, software
from ld_common.release.trusted_keys import read_trusted_release

Pixels = NDArray[np.float32]
SYNTHETIC = {"SyntheticData": "YES", "Software": "latent-drift-federation"}


@dataclass(frozen=True, eq=False)
class CounterfactualResult:
    """A counterfactual in the grid `(H,W)` and the real values of its scan."""

    scan: Pixels
    image: Pixels
    """The counterfactual; the mean over the seeds if there are several."""
    reconstruction: Pixels
    """What inversion and denoising without an edit return: what differs from the scan was lost, not edited."""
    samples: Pixels
    """The counterfactual of each seed, `(K,H,W)`."""
    attributes: Attributes
    """All attributes of the counterfactual."""
    source: Attributes
    """All attributes of the scan."""
    biomarkers: dict[str, dict[str, float]]
    """Area in mm2 by biomarker, in `scan`, `reconstruction` and `image`; empty if the scan's spacing is not known."""
    warnings: list[str]
    """A sentence for each attribute outside the range that the sites had scans of, and for a scan unlike theirs."""
    record: dict[str, Any]
    """Release, editor, rendering and seeds: what is needed to draw it again."""
    frame: Frame = field(repr=False)
    rendering: str = DECODED
    """How the answer became pixels of the scan, as `ImageConfig.rendering`."""
    unfamiliarity: Unfamiliarity | None = None
    """How unlike the sites' scans the scan is; None without a longitudinal drift, which alone can tell."""

    @property
    def difference(self) -> Pixels:
        """The effect of the edit in real values: `image` minus `scan`, minus `reconstruction` where it is decoded."""
        pixels: Pixels = getattr(self, reference_of(self.rendering))
        return self.image - pixels

    def save(self, folder: Path | str) -> list[Path]:
        """Write `scan`, `reconstruction`, `image` and `difference` as PNG and `result.json`; returns the files.

        All but the scan carry the text `SyntheticData=YES`.

        Raises:
            RequestError: the folder cannot be made.
        """
        from ld_common.imaging.image_io import write_difference_png, write_png  # imports matplotlib

        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RequestError(f"cannot make the folder '{folder}': {error.strerror or error}") from error
        images = {"scan": self.scan, "reconstruction": self.reconstruction, "image": self.image}
        for name, pixels in images.items():
            write_png(folder / f"{name}.png", pixels, self.frame, {} if name == "scan" else SYNTHETIC)
        half_range = (self.frame.high - self.frame.low) / 2
        write_difference_png(folder / "difference.png", self.difference / half_range, SYNTHETIC, limit=1.0)
        content = {
            "source": self.source,
            "attributes": self.attributes,
            "biomarkers_mm2": self.biomarkers,
            "warnings": self.warnings,
            **self.record,
        }
        write_bytes(folder / "result.json", (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())
        return [folder / f"{name}.png" for name in (*images, "difference")] + [folder / "result.json"]


class CounterfactualPipeline:
    """Draws counterfactuals of scans with a base, an adapter in it, and an editor.

    Use `from_release` for a release. The constructor takes the parts, for example those of `train`:

        model = train(base, adapters.Lora(rank=8), data, drift=drift)
        pipe = CounterfactualPipeline(model.model, "configs/modalities/brain_mri.yaml", drift=model.drift)

    or a longitudinal drift, which needs no training:

        drift = fit_longitudinal_drift(latents, attributes, patients, days, modality=modality, base=base)
        pipe = CounterfactualPipeline(base, modality, drift=drift)
    """

    def __init__(
        self,
        base: BaseModel,
        modality: Modality | Path | str,
        editor: Editor | None = None,
        drift: EditDrift | None = None,
        release: Release | None = None,
        strict: bool = False,
    ) -> None:
        """Take the parts as they are.

        Args:
            base: the base with the adapter in it.
            modality: attributes, prompts and image settings, or the YAML file of a modality.
            editor: default of each call; if None, `drift` with a longitudinal drift and else `ddim`, with their
                defaults.
            drift: the latent drift that the adapter was trained with, or a longitudinal one.
            release: where the parts come from, for `CounterfactualResult.record`.
            strict: refuse scans and attributes that the sites' scans do not cover, in place of a warning.
        """
        self.base, self.drift, self.release, self.strict = base, drift, release, strict
        self.modality = load_modality(modality)
        default = {"name": DriftEditor.name} if isinstance(drift, LongitudinalDrift) else {}
        self.editor = read_editor(default) if editor is None else editor

    @classmethod
    def from_release(
        cls,
        folder: Path | str,
        base: str | None = None,
        *,
        trust: str = "",
        allow_unsigned: bool = True,
        device: str = "cpu",
        precision: str = "float32",
        strict: bool = False,
        site: str = "",
    ) -> CounterfactualPipeline:
        """Load a release and its base.

        Args:
            folder: the release.
            base: path or hub id of the base; needed if it is not where the release looks for it.
            trust: public key of the study, or a file or kit.json with it; it is remembered for the study.
            allow_unsigned: accept a release without a signature, with a warning. A signature that there is must hold.
            device: `cpu` or `cuda`.
            precision: `float32`, `bfloat16` or `float16`.
            strict: refuse scans and attributes that the sites' scans do not cover, in place of a warning.
            site: one whose own factors and drift are used, as `Release.of_site`; empty for those of all sites.

        Raises:
            ReleaseError: no complete release, nothing of this site's own, or the base is missing or another one.
            SignatureError: altered, signed by a key that is not trusted, or unsigned where that is not accepted.
            ModelError: the base cannot be loaded, or the device is not available.
        """
        release, messages = read_trusted_release(Path(folder), trust, allow_unsigned and not trust)
        for message in messages:
            warnings.warn(message, stacklevel=2)
        if site:
            release = release.of_site(site)
        model = load_release_base(release, base, device, precision)
        return cls(model, release.modality, release_editor(release), edit_drift(release), release, strict)

    def __call__(
        self,
        scan: Path | str | Scan | Tensor,
        source: Mapping[str, Value] | None = None,
        *,
        target: Mapping[str, Value],
        editor: str | Editor | None = None,
        seed: int = 0,
        num_seeds: int = 1,
        slice_index: int | None = None,
        rendering: str = "",
        history: Sequence[tuple[Path | str | Scan, float | None]] = (),
        **options: Any,
    ) -> CounterfactualResult:
        """Draw a scan as it would look under other attributes.

        Args:
            scan: path of a DICOM file or series, a NIfTI volume or a PNG; a `Scan`; or `(1,S,S)` in [-1, 1].
            source: attributes of the scan; those that its file holds may be left out.
            target: the attributes that change.
            editor: name or instance; the pipeline's if None.
            seed: first seed of editors that draw noise.
            num_seeds: number of seeds; `image` is the mean over them.
            slice_index: slice of a volume, from the lowest; the modality's position if None.
            rendering: how the answer becomes pixels of the scan, `deformation`, `difference` or `decoded`; the
                modality's if empty.
            history: earlier visits of the patient, each with the age then, or None where both scans have dates. They
                calibrate the answer to the patient, if the editor follows a longitudinal drift.
            options: options of the editor, such as `guidance_scale`.

        Raises:
            RequestError: an unknown or missing attribute, or a value out of range; with `strict`, also what the sites'
                scans do not cover.
            ScanError: the scan cannot be used.
            ConfigError: an unknown editor or option, or a value out of range.
        """
        if num_seeds < 1:
            raise RequestError(f"num_seeds is {num_seeds}: use 1 or more")
        rendering = rendering or self.modality.image.rendering
        if rendering not in RENDERINGS:
            raise RequestError(f"rendering is '{rendering}': use {', '.join(RENDERINGS)}")
        chosen = self._editor(editor, options)
        changes = self._parse("target", target)
        read, picture, frame = self._read(scan, slice_index)
        pixels = np.asarray(read.pixels, np.float32)
        attributes = self._source(read.attributes_in_file, self._parse("source", source or {}))
        earlier = self._history(read, attributes, history, slice_index)
        known = replace(
            earlier or ScanHistory.without_visits(),
            write=writing(read, frame, rendering, self.base.resolution, self.modality.image),
        )
        unfamiliarity = unfamiliarity_of(self.base, self.drift, self.modality, picture, attributes)
        unlike = history_unfamiliarity(self.base, self.drift, self.modality, earlier, attributes)
        doubts = self._doubts([attributes, attributes | changes], unfamiliarity_warnings(unfamiliarity, unlike))
        edit = edit_to(self.modality, 0, attributes, changes)
        prompts, seeds = [self.modality.prompt(attributes)], range(seed, seed + num_seeds)
        past = past_of(self.modality, {0: known})
        drawn, samples = draw_several(
            self.base, picture[None], prompts, [edit], chosen, seeds, drift=self.drift, past=past
        )
        rendered = [render(pixels, frame, drawn.reconstructions[0], image, rendering) for image in samples[0]]
        image = np.mean(rendered, axis=0)
        written = picture_of(image, frame, self.base.resolution, self.modality.image)
        images = torch.stack([picture, drawn.reconstructions[0], written])
        return CounterfactualResult(
            scan=pixels,
            image=image,
            reconstruction=from_model(drawn.reconstructions[0], frame),
            samples=np.stack(rendered),
            attributes=attributes | changes,
            source=attributes,
            biomarkers=self._biomarkers(images, frame),
            warnings=[*doubts, *([] if earlier is None else history_warnings(earlier))],
            record=self._record(chosen, list(seeds))
            | {
                "rendering": rendering,
                "history_years": [] if earlier is None else list(earlier.years),
                "familiarity": None if unfamiliarity is None else unfamiliarity.record(),
            },
            frame=frame,
            rendering=rendering,
            unfamiliarity=unfamiliarity,
        )

    def _editor(self, editor: str | Editor | None, options: Mapping[str, Any]) -> Editor:
        if isinstance(editor, str):
            editor = self.editor if editor == self.editor.name else change_editor(self.editor, editor)
        chosen = self.editor if editor is None else editor
        return read_editor({**editor_options(chosen), **options}, prefix="") if options else chosen

    def _parse(self, argument: str, attributes: Mapping[str, Value]) -> Attributes:
        if argument == "target" and not attributes:
            raise RequestError("target is empty: name an attribute that changes, for example target={'age': 84}")
        return {name: self.modality.parse(name, str(value)) for name, value in attributes.items()}

    def _read(self, scan: Path | str | Scan | Tensor, slice_index: int | None) -> tuple[Scan, Tensor, Frame]:
        """The scan, the model's image `(1,S,S)`, and their geometry."""
        if isinstance(scan, Tensor):
            side = self.base.resolution
            if scan.shape != (1, side, side):
                raise RequestError(f"the tensor has shape {tuple(scan.shape)}: this base needs (1, {side}, {side})")
            if not bool(torch.isfinite(scan).all()) or float(scan.abs().max()) > 1:
                raise RequestError("the tensor has values outside [-1, 1]: scale it to this range")
            picture = scan.detach().float().cpu()
            frame = Frame(-1.0, 1.0, (side, side), None, float(side), None)
            return Scan(picture[0].numpy(), None, {}), picture, frame
        read = scan if isinstance(scan, Scan) else read_scan(Path(scan), self.modality, slice_index)
        picture, frame = to_model(read, self.base.resolution, self.modality.image)
        return read, picture, frame

    def _history(
        self,
        scan: Scan,
        attributes: Attributes,
        history: Sequence[tuple[Path | str | Scan, float | None]],
        slice_index: int | None,
    ) -> ScanHistory | None:
        if history and AGE not in attributes:
            raise RequestError(f"a history needs the attribute {AGE}, which {self.modality.name} lacks")
        earlier = [
            EarlierScan(
                visit if isinstance(visit, Scan) else read_scan(Path(visit), self.modality, slice_index),
                age,
                "an earlier scan" if isinstance(visit, Scan) else f"'{visit}'",
            )
            for visit, age in history
        ]
        age = float(attributes.get(AGE, 0.0))
        return read_history(scan, age, earlier, self.base.resolution, self.modality.image)

    def _source(self, in_file: Attributes, given: Attributes) -> Attributes:
        for name in sorted(set(in_file) & set(given)):
            if not agree(in_file[name], given[name]):
                raise RequestError(f"{name} is {shown(in_file[name])} in the scan and {shown(given[name])} in source")
        attributes = {name: value for name, value in (in_file | given).items() if name in self.modality.attributes}
        missing = [name for name in self.modality.attributes if name not in attributes]
        if missing:
            raise RequestError(f"the scan's {', '.join(missing)} is not known: add it to source")
        return attributes

    def _biomarkers(self, images: Tensor, frame: Frame) -> dict[str, dict[str, float]]:
        if frame.spacing_mm is None:
            return {}
        pixel_mm = frame.field_of_view / images.shape[-1]
        names = ("scan", "reconstruction", "image")
        areas = {name: BIOMARKERS.load(name)(images.float(), pixel_mm).tolist() for name in self.modality.biomarkers}
        return {name: dict(zip(names, values, strict=True)) for name, values in areas.items()}

    def _doubts(self, attributes: Sequence[Attributes], unlike: Sequence[str]) -> list[str]:
        """What speaks against an answer, before it is drawn; raises `RequestError` for any of it if `strict`."""
        ranges = None if self.release is None else trained_on(self.modality, self.release.manifest["rounds"])
        lines = [line for values in attributes for line in beyond(self.modality, ranges, values)]
        doubts = [*dict.fromkeys(lines), *unlike]
        if self.strict and ranges is None:
            doubts.append("nothing says what the sites had scans of: extrapolation cannot be detected")
        if self.strict and doubts:
            raise RequestError(f"strict refuses this scan: {'; '.join(doubts)}")
        return doubts

    def _record(self, editor: Editor, seeds: list[int]) -> dict[str, Any]:
        release = None if self.release is None else release_record(self.release)
        return {"edit": editor_options(editor), "seeds": seeds, "release": release, "software": software()}
