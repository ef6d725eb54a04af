"""Reads the files that steps of `preprocessing` name, and refuses others than the pinned ones."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import nibabel
import numpy as np
from nibabel.nifti1 import Nifti1Image

from ld_common.core.errors import ConfigError, ScanError
from ld_common.imaging.modality_steps import DEEPBET_SHA256, StepConfig
from ld_common.imaging.nifti import affine_mm, read_nifti, read_voxels

MAX_BYTES = 64 * 2**20
DEEPBET = "deepbet"


@dataclass(frozen=True, eq=False)
class Template:
    """A volume that scans are registered to."""

    voxels: np.ndarray
    """float32 `(I,J,K)`."""
    affine: np.ndarray
    """`(4,4)`: voxel -> millimetres to the right, to the front, up in the template's space."""


def read_step_files(step: StepConfig) -> list[bytes]:
    """Content of a step's files, in the order of `StepConfig.files`.

    Raises:
        ConfigError: a file is missing, too large, or not the one whose hash the step has.
    """
    contents = []
    for file in step.files:
        try:
            size = file.stat().st_size
            content = file.read_bytes() if size <= MAX_BYTES else b""
        except OSError as error:
            raise ConfigError(
                f"step '{step.step}' of preprocessing needs '{file}' (SHA-256 {step.sha256[:12]}…): "
                "get it from the study, or from where the study names, and put it there"
            ) from error
        if size > MAX_BYTES:
            raise ConfigError(f"'{file}' has more than the {MAX_BYTES >> 20} MiB of a step's file")
        contents.append(content)
    found = hashlib.sha256(b"".join(contents)).hexdigest()
    if found != step.sha256:
        raise ConfigError(
            f"'{step.file}' has SHA-256 {found[:12]}…, and step '{step.step}' of preprocessing needs "
            f"{step.sha256[:12]}…: it is another version of the file"
        )
    return contents


def step_files(steps: Iterable[StepConfig]) -> dict[str, bytes]:
    """Name -> content of the files that steps name, checked against their hashes; raises `ConfigError`."""
    return {
        file.name: content
        for step in steps
        if step.file
        for file, content in zip(step.files, read_step_files(step), strict=True)
    }


def read_template(step: StepConfig) -> Template:
    """The template of a step `register`; raises `ConfigError`, or `ScanRejected` where it is no volume."""
    return _template(step.template, step.sha256)


@functools.lru_cache(maxsize=2)
def _template(path: str, sha256: str) -> Template:
    read_step_files(StepConfig("register", template=path, sha256=sha256))
    volume = read_nifti(Path(path))
    return Template(read_voxels(volume), affine_mm(volume))


def write_prepared(path: Path, voxels: np.ndarray, affine: np.ndarray) -> Path:
    """Write a prepared scan `(I,J,K)` as NIfTI, with nothing of its file but voxels and place; raises `ScanError`."""
    image = Nifti1Image(voxels.astype(np.float32), affine)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = b"prepared scan"
    try:
        nibabel.save(image, path)
    except OSError as error:
        raise ScanError(f"cannot write '{path}': {error.strerror or error}") from error
    return path


def read_deepbet() -> tuple[bytes, bytes]:
    """The two networks that ship in deepbet, TorchScript: the one that finds the brain, and the one that outlines it.

    Raises:
        ConfigError: the package is missing, or its networks are others than those that this software knows.
    """
    try:
        package = distribution(DEEPBET)
        box, brain = (
            Path(str(package.locate_file(f"data/models/{name}.pt"))).read_bytes() for name in ("bbox_model", "model")
        )
    except (PackageNotFoundError, OSError) as error:
        raise ConfigError(
            "step 'strip_skull' without weights needs the package deepbet, the extra 'skull' of this software: "
            "pip install deepbet==1.0.2"
        ) from error
    if hashlib.sha256(box + brain).hexdigest() != DEEPBET_SHA256:
        raise ConfigError("the networks in the installed deepbet are others than those of 1.0: install deepbet 1.0.2")
    return box, brain
