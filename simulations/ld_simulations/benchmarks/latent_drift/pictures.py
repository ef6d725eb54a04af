"""Images of simulated patients for training and for comparison, drawn once and kept."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ld_common.adapters.state_dict import write_tensors
from ld_common.core.config import to_mapping
from ld_common.diffusion.base_model import BaseModel
from ld_common.imaging.geometry import Scan, to_model
from ld_common.imaging.modality import Attributes, Modality
from ld_simulations.hospitals import draw_visits, scan
from ld_simulations.hospitals_config import HospitalConfig, HospitalsConfig
from ld_simulations.phantoms.registry import find_phantom

TRAINING, TEST, OTHERS = range(3)
"""Parts of a hospital's patients."""
WORTH_A_POOL = 100
"""With fewer patients, starting processes takes longer than drawing."""
ENCODED_TOGETHER = 16
FORMAT = 2
"""Version of the kept files; another number draws them anew."""


@dataclass(frozen=True, eq=False)
class PictureSet:
    """N images of simulated patients, hospital by hospital."""

    images: Tensor
    """`(N,1,S,S)` in [-1, 1]."""
    attributes: list[Attributes]
    hospitals: list[int]
    """Index of each image's hospital."""
    patients: list[int] = field(default_factory=list)
    """Index of each image's patient, over all hospitals."""

    def labels(self, attribute: str, value: str) -> Tensor:
        """Whether each image's attribute has a value, `(N,)` of 0 and 1."""
        return torch.tensor([int(attributes[attribute] == value) for attributes in self.attributes])


def draw_pictures(
    config: HospitalsConfig, modality: Modality, resolution: int, patients: int, part: int, processes: int, folder: Path
) -> PictureSet:
    """All visits of `patients` patients a hospital (`TRAINING`), or the first of as many others.

    Scans are rendered and acquired as in `write_hospitals`, but not written to DICOM files.
    """
    content = [FORMAT, _content(config), to_mapping(modality), resolution, patients, part]
    key = json.dumps(content, sort_keys=True, default=str)
    file = folder / f"pictures-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    if not file.exists():
        tasks = [
            (config.phantom, config.seed + part, replace(hospital, patients=patients), modality, resolution, part, n)
            for hospital in config.hospitals
            for n in range(patients)
        ]
        if len(tasks) < WORTH_A_POOL:
            drawn = list(map(_draw_patient, tasks))
        else:
            with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
                drawn = list(pool.map(_draw_patient, tasks, chunksize=max(1, len(tasks) // (8 * processes))))
        images = torch.cat([images for images, _ in drawn])
        attributes = [visit for _, visits in drawn for visit in visits]
        hospital_indices = [index // patients for index, (_, visits) in enumerate(drawn) for _ in visits]
        patient_indices = [index for index, (_, visits) in enumerate(drawn) for _ in visits]
        lists = {"attributes": attributes, "hospitals": hospital_indices, "patients": patient_indices}
        metadata = {key: json.dumps(values) for key, values in lists.items()}
        write_tensors(file, {"images": images.half()}, metadata)  # a step is a sixteenth of an 8-bit one
    return _read(file)


def _content(config: HospitalsConfig) -> dict[str, Any]:
    """The options of hospitals that decide their images."""
    return {
        "phantom": config.phantom,
        "seed": config.seed,
        "hospitals": [vars(hospital) for hospital in config.hospitals],
    }


def _read(file: Path) -> PictureSet:
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    lists = (json.loads(metadata[key]) for key in ("attributes", "hospitals", "patients"))
    return PictureSet(load_file(file)["images"].float(), *lists)


def _draw_patient(task: tuple[str, int, HospitalConfig, Modality, int, int, int]) -> tuple[Tensor, list[Attributes]]:
    """The images of one patient and their attributes."""
    phantom_name, seed, hospital, modality, resolution, part, number = task
    phantom, device = find_phantom(phantom_name), hospital.scanner
    images, attributes = [], []
    visits = _visits(phantom_name, seed, hospital)[number]
    for visit in visits[:1] if part else visits:
        values, _ = scan(phantom, visit, visit.attributes, phantom.shown_view, device)
        spacing = device.spacing_mm
        images.append(to_model(Scan(values, (spacing, spacing), {}), resolution, modality.image)[0])
        attributes.append(visit.attributes)
    return torch.stack(images), attributes


_CACHE: dict[str, Any] = {}


def _visits(phantom_name: str, seed: int, hospital: HospitalConfig) -> Any:
    """A hospital's patients, drawn once in each process."""
    key = f"{phantom_name}/{seed}/{hospital.name}/{hospital.patients}"
    if key not in _CACHE:
        _CACHE[key] = draw_visits(find_phantom(phantom_name), seed, hospital, held_out=False)
    return _CACHE[key]


@torch.no_grad()
def encode(base: BaseModel, images: Tensor) -> Tensor:
    """Scaled latents `(N,C,h,w)` of pictures, float32 on the CPU."""
    return torch.cat([base.encode(chunk).float().cpu() for chunk in images.split(ENCODED_TOGETHER)])
