"""Latents of many simulated patients, encoded once and kept below the benchmark's output folder.

latents/<group>/<hospital>-<first>.safetensors    visits of some patients of a hospital
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load, save

from ld_common.core.atomic_files import write_bytes
from ld_common.core.state import State
from ld_common.diffusion.longitudinal_sums import VisitTable
from ld_common.editing.drift_fitting import mirror_images
from ld_simulations.benchmarks.individual.closed_form import visit_tables
from ld_simulations.benchmarks.individual.people import People, without_mirror_images

LATENTS = "latents"
PATIENTS_IN_FILE = 100


@dataclass(frozen=True)
class EncodingTask:
    """Some patients of one hospital."""

    group: str
    """Name of the hospitals that they are drawn from."""
    hospital: str
    first: int
    last: int

    @property
    def rows(self) -> tuple[int, int]:
        """The first patient, and the one after the last."""
        return self.first, self.last

    @property
    def name(self) -> str:
        """Name of its file below the folder of latents, without the ending."""
        return f"{self.group.replace(' ', '-')}/{self.hospital}-{self.first:05d}"


def encoding_tasks(group: str, hospitals: Sequence[str], patients: int) -> list[EncodingTask]:
    """The files of a group of hospitals, the first patients of all hospitals first."""
    return [
        EncodingTask(group, hospital, first, min(first + PATIENTS_IN_FILE, patients))
        for first in range(0, patients, PATIENTS_IN_FILE)
        for hospital in hospitals
    ]


def latents_file(output: Path, task: EncodingTask) -> Path:
    """Where a task's visits are kept."""
    return output / LATENTS / f"{task.name}.safetensors"


def encode(people: People, seed: int, patients: int, output: Path, task: EncodingTask) -> None:
    """Draw, scan and encode a task's patients, of `patients` in each hospital, and keep their visits.

    Mirror images are those of the decoded latents, as `fit_longitudinal_drift` makes them.
    """
    drawn = [without_mirror_images(person) for person in people.draw_of(task.hospital, seed, patients, *task.rows)]
    table = visit_tables(drawn, people.modality)[0]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(table.patients), start=task.first)}
    state = {
        "latents": table.latents.float(),
        "features": table.features,
        "years": table.years,
        "patients": torch.tensor([numbers[name] for name in table.patients]),
    }
    write_bytes(latents_file(output, task), save(state | mirrored_rows(people, state)))


def mirrored_rows(people: People, state: State) -> State:
    """`mirrored`: the latents of the mirror images `(N,D)`; empty where left and right are not alike."""
    shape = tuple(people.base.latent_shape)
    found = mirror_images(people.base, people.modality, state["latents"].view(-1, *shape))
    return {} if found is None else {"mirrored": found.flatten(1).contiguous()}


def read_tables(output: Path, group: str, hospitals: Sequence[str], patients: int) -> list[VisitTable]:
    """The visits of the first `patients` of each hospital."""
    tables = []
    for hospital in hospitals:
        tasks = encoding_tasks(group, [hospital], patients)
        parts = [load(latents_file(output, task).read_bytes()) for task in tasks]
        tables.append(_table(hospital, parts, patients))
    return tables


def _table(hospital: str, parts: Sequence[State], patients: int) -> VisitTable:
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    kept = whole["patients"] < patients
    numbers = whole["patients"][kept].tolist()
    table = VisitTable(
        whole["latents"][kept].double(),
        whole["features"][kept],
        [f"{hospital}-{number}" for number in numbers],
        whole["years"][kept],
    )
    return table.beside(whole["mirrored"][kept]) if "mirrored" in whole else table
