"""The steps of a modality's `preprocessing`, checked without reading a file or importing an image library.

A step may need a file: the weights of a network, a template. The file's SHA-256 stands in the modality and in its hash,
so that all sites, the server and whoever draws with the release use the same bytes; its name does not count.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ld_common.core.config import nearest, require, to_mapping

ORIENT, RESAMPLE, BIAS_FIELD, STRIP_SKULL, REGISTER = "orient", "resample", "bias_field", "strip_skull", "register"
OPTIONS: dict[str, tuple[str, ...]] = {
    ORIENT: (),
    RESAMPLE: ("spacing_mm",),
    BIAS_FIELD: (),
    STRIP_SKULL: ("weights", "sha256"),
    REGISTER: ("template", "sha256"),
}
"""The options of each step."""
FILE_OPTIONS = ("weights", "template")
SUFFIXES: dict[str, tuple[str, ...]] = {"weights": (".json",), "template": (".nii", ".nii.gz")}
PREPARATION = "preparation"
"""Folder of a release with the files of its modality's steps."""
DEEPBET_SHA256 = "2c915153495c4579410add8d7fca5ef2f64dfa6f30f37f0bef7ce32d6d3f7657"
"""Of the two networks in deepbet 1.0, `bbox_model.pt` and `model.pt`, one after the other."""
LEAST_MM, MOST_MM = 0.3, 10.0
"""Voxel sizes that `resample` may ask for."""
FINEST_LOST_MM = 1.5
"""From voxels resampled to more than this the networks do not find the brain."""
FILE_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,99}", re.ASCII)
DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)


@dataclass
class StepConfig:
    """One step that turns a scan's volume into the one that slices are taken from."""

    step: str = ""
    """`orient` (voxels to the right, to the front, up), `resample`, `bias_field` (N4), `strip_skull` or `register`
    (rigid, onto a template's grid). They run in the order of the list."""
    spacing_mm: float = 0.0
    """Of `resample`: side of the cubic voxels."""
    weights: str = ""
    """Of `strip_skull`: a MeshNet as a tfjs layers model, `NAME.json` with `NAME.bin` beside it, relative to the
    modality's file. Empty takes the network that ships in the package deepbet (extra `skull`)."""
    template: str = ""
    """Of `register`: a NIfTI volume, relative to the modality's file."""
    sha256: str = ""
    """SHA-256 of the file that the step names; for weights, of `NAME.json` and `NAME.bin` one after the other."""

    def __post_init__(self) -> None:
        names = list(OPTIONS)
        require(self.step != "", f"a step of preprocessing has no name: write step: {' or '.join(names)}")
        require(self.step in OPTIONS, f"preprocessing has no step '{self.step}': {nearest(self.step, names)}")
        for field in dataclasses.fields(self):
            unused = field.name == "step" or getattr(self, field.name) == field.default
            allowed = unused or field.name in OPTIONS[self.step]
            require(allowed, f"{field.name} is no option of step '{self.step}': {self._options()}")
        if self.step == RESAMPLE:
            fits = LEAST_MM <= self.spacing_mm <= MOST_MM
            require(fits, f"step 'resample' has spacing_mm {self.spacing_mm:g}: use {LEAST_MM:g} to {MOST_MM:g}")
        require(self.step != REGISTER or self.template != "", "step 'register' needs template: a NIfTI volume")
        self._check_file()

    @property
    def file(self) -> str:
        """The path of the file that the step needs, empty for none."""
        return self.weights or self.template

    @property
    def files(self) -> list[Path]:
        """The file that the step names and, for weights, the one beside it."""
        if self.weights:
            return [Path(self.weights), Path(self.weights).with_suffix(".bin")]
        return [Path(self.template)] if self.template else []

    def located(self, folder: Path) -> StepConfig:
        """The step with its file in `folder`, unless its path is absolute."""
        paths: dict[str, Any] = {name: str(folder / path) for name, path in self._named()}
        return dataclasses.replace(self, **paths)

    def shared(self) -> dict[str, Any]:
        """What another machine needs of the step: the options that are used, without folders."""
        mapping = to_mapping(self) | {name: Path(path).name for name, path in self._named()}
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return {name: value for name, value in mapping.items() if value != defaults[name]}

    def identity(self) -> dict[str, Any]:
        """What decides about the step's result: files count by their hash, not by their name."""
        content = {name: value for name, value in self.shared().items() if name not in FILE_OPTIONS}
        return content | ({"sha256": DEEPBET_SHA256} if self.step == STRIP_SKULL and not self.weights else {})

    def _named(self) -> list[tuple[str, str]]:
        return [(name, getattr(self, name)) for name in FILE_OPTIONS if getattr(self, name)]

    def _options(self) -> str:
        options = OPTIONS[self.step]
        return f"it takes {', '.join(options)}" if options else "it takes none"

    def _check_file(self) -> None:
        if not self.file:
            require(self.sha256 == "", f"step '{self.step}' has sha256 without the file that it belongs to")
            return
        ((option, path),) = self._named()
        name, endings = Path(path).name, SUFFIXES[option]
        require(name.endswith(endings), f"step '{self.step}' has {option} '{path}': use {' or '.join(endings)}")
        plain = FILE_NAME.fullmatch(name) is not None
        require(plain, f"step '{self.step}' names '{name}': use letters, digits, dots and dashes")
        command = " ".join(file.name for file in self.files)
        how = f"sha256sum {command}" if len(self.files) == 1 else f"cat {command} | sha256sum"
        pinned = DIGEST.fullmatch(self.sha256) is not None
        require(pinned, f"step '{self.step}' needs sha256, 64 hex digits that pin its file: run {how}")


def before(name: str, steps: Sequence[StepConfig]) -> Sequence[StepConfig]:
    """The steps before the one of that name; none where there is no such step."""
    names = [step.step for step in steps]
    return steps[: names.index(name)] if name in names else []


def check_steps(steps: Sequence[StepConfig], plane_of_images: bool, stripped: bool) -> None:
    """Refuse a list whose steps do not go together.

    Args:
        steps: the list.
        plane_of_images: whether the modality's scans are two-dimensional images.
        stripped: whether its files hold stripped brains.

    Raises:
        ConfigError: one of the steps cannot follow the others.
    """
    require(not (steps and plane_of_images), "preprocessing is for volumes: leave it out where image.plane is none")
    names = [step.step for step in steps]
    for name in dict.fromkeys(names):
        require(names.count(name) == 1, f"preprocessing has step '{name}' {names.count(name)} times: once is enough")
    if REGISTER in names:
        late = [name for name in names[names.index(REGISTER) :] if name in (ORIENT, RESAMPLE)]
        require(not late, f"step '{''.join(late[:1])}' stands after 'register', which gives the template's grid")
    coarse = [step for step in before(STRIP_SKULL, steps) if step.spacing_mm > FINEST_LOST_MM]
    require(not coarse, f"step 'strip_skull' needs finer voxels than {FINEST_LOST_MM:g} mm: put it before 'resample'")
    both = STRIP_SKULL in names and stripped
    require(not both, "image.head is stripped, so the files need no step 'strip_skull': leave one of them out")
