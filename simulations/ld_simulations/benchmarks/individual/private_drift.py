"""Fits longitudinal drifts with and without differential privacy, and judges their answers in raw pixels.

The sites' vectors are those that `ld-client` sends (`noised_vector`, with noise of the operating system), and they are
solved as the server does. Every drift answers the same test patients.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ld_client.privacy.dp_longitudinal import noised_vector
from ld_common.core.config import load_config
from ld_common.diffusion.base_model import BaseModel, load_base
from ld_common.diffusion.longitudinal import LongitudinalDrift
from ld_common.diffusion.longitudinal_fit import fit_tables
from ld_common.diffusion.longitudinal_sums import VisitTable
from ld_common.diffusion.private_longitudinal import noise_deviations
from ld_common.diffusion.private_longitudinal_fit import SumNoise, fit_private
from ld_common.diffusion.public_basis import TYPICAL_NORM, PublicBasis
from ld_common.editing.base import Editor
from ld_common.editing.counterfactuals import LatentEditor, edit_to
from ld_common.imaging.rendering import render
from ld_common.imaging.scan_table import load_modality
from ld_common.protocol.dp_accounting import DpConfig
from ld_simulations.benchmarks.individual.answers import Choice, Record, gain_db
from ld_simulations.benchmarks.individual.closed_form import SEED, drift_editor
from ld_simulations.benchmarks.individual.people import People, Question, ScannedVisit
from ld_simulations.benchmarks.individual.plan import IndividualConfig
from ld_simulations.benchmarks.individual.private_plan import NO_NOISE, PrivateSetting, noise_multiplier
from ld_simulations.benchmarks.individual.private_tables import EncodingTask, encode, encoding_tasks, read_tables
from ld_simulations.benchmarks.individual.report import EDITS
from ld_simulations.hospitals_config import HospitalsConfig

TRAINING = "training"
"""Group of the sites' patients; the others are the public starts by name."""
HARDLY_ANY = 1e-9
"""Noise multiplier where there is none."""


@dataclass(frozen=True, eq=False)
class AskedPatient:
    """A test patient's first visit, the edits that are asked of it, and what the VAE makes of it `(1,S,S)`."""

    name: str
    visit: ScannedVisit
    questions: list[Question]
    reconstruction: Tensor


class PrivateAnswers:
    """Encodes patients, fits drifts to them and judges their answers.

    Args:
        config: of the benchmark, with `private`.
        choice: options of editor `drift`, chosen on the tuning patients without privacy.
        output: where latents are kept.
    """

    def __init__(self, config: IndividualConfig, choice: Choice, output: Path) -> None:
        self.config, self.private, self.choice, self.output = config, config.private, choice, output
        self.base: BaseModel = load_base(config.base_model)
        self.people = functools.cache(self._people)
        self.basis = functools.cache(self._basis)
        self.tables = functools.lru_cache(1)(self._tables)

    def encode(self, task: EncodingTask) -> None:
        """Keep the latents of some patients."""
        seed, patients = self._drawn(task.group)
        encode(self.people(task.group), seed, patients, self.output, task)

    def encoding_tasks(self) -> list[EncodingTask]:
        """The files that the settings need."""
        needed = {start: chosen.patients for start, chosen in self.private.starts.items()}
        needed[TRAINING] = max(self.private.patients)
        return [
            task
            for group, patients in needed.items()
            for task in encoding_tasks(group, self._hospitals(group), patients)
        ]

    def judge(self, setting: PrivateSetting) -> list[Record]:
        """What the answers of a setting's drift are worth: each test patient and edit."""
        drift, editor = self._fitted(setting), drift_editor(self.choice.drift)
        records: list[Record] = []
        for patient in self._test_patients:
            visit, rendering = patient.visit, self.choice.drift_rendering
            for question, answer in zip(patient.questions, self._answers(patient, drift, editor), strict=True):
                values = render(visit.scan.pixels, visit.frame, patient.reconstruction, answer, rendering)
                gain = gain_db(values, visit, question)
                records.append({"patient": patient.name, "question": question.name, "gain_db": gain})
        return records

    def _answers(self, patient: AskedPatient, drift: LongitudinalDrift, editor: Editor) -> Tensor:
        """Pictures `(M,1,S,S)`; as `draw_counterfactuals` draws them, with the scan encoded and decoded only once."""
        modality, source = self.people(TRAINING).modality, patient.visit.attributes
        edits = [edit_to(modality, 0, source, question.target) for question in patient.questions]
        prompts = [modality.prompt(source)]
        drawer = LatentEditor(self.base, sorted({*prompts, *(edit.target for edit in edits)}), editor, drift)
        return self.base.decode(drawer.edit(drawer.invert(patient.visit.latent[None], prompts), edits))

    @functools.cached_property
    def _test_patients(self) -> list[AskedPatient]:
        seed, count = self.private.test_seed, self.private.test_patients
        asked = []
        for person in self.people(TRAINING).draw(seed, count, 0, count, questions=True):
            questions = [question for question in person.questions if question.name in EDITS]
            visit = person.visits[0]
            reconstruction = self.base.decode(visit.latent[None])[0]
            asked.append(AskedPatient(f"{person.hospital}/{person.identity}", visit, questions, reconstruction))
        return asked

    def _fitted(self, setting: PrivateSetting) -> LongitudinalDrift:
        if not setting.start:
            return self._fit_exactly(self.tables(setting.patients), TRAINING)
        basis = self.basis(setting.start)
        if not setting.patients:
            return basis.public
        noise = noise_multiplier(setting.epsilon, setting.patients) if setting.epsilon else NO_NOISE
        return private_fit(self.tables(setting.patients), basis, noise)

    def _fit_exactly(self, tables: Sequence[VisitTable], group: str) -> LongitudinalDrift:
        numeric = self.people(group).modality.numeric_columns
        return fit_tables(tables, numeric, self.base.latent_mean, self.base.latent_shape, SEED)[0]

    def _basis(self, start: str) -> PublicBasis:
        tables = read_tables(self.output, start, self._hospitals(start), self._drawn(start)[1])
        return PublicBasis.of(self._fit_exactly(tables, start))

    def _tables(self, patients: int) -> list[VisitTable]:
        return read_tables(self.output, TRAINING, self._hospitals(TRAINING), patients)

    def _people(self, group: str) -> People:
        chosen: Any = self.private.starts[group] if group != TRAINING else self._anatomy
        hospitals = load_config(HospitalsConfig, Path(chosen.hospitals))
        return People(hospitals, load_modality(chosen.modality), self.base)

    @property
    def _anatomy(self) -> Any:
        return next(iter(self.config.anatomies.values()))

    def _hospitals(self, group: str) -> list[str]:
        return [hospital.name for hospital in self.people(group).hospitals.hospitals]

    def _drawn(self, group: str) -> tuple[int, int]:
        """Seed, and patients of each hospital."""
        if group == TRAINING:
            return self.private.training_seed, self.private.drawn_patients
        return self.private.starts[group].seed, self.private.starts[group].patients


def private_fit(tables: Sequence[VisitTable], basis: PublicBasis, noise: float) -> LongitudinalDrift:
    """The drift of sites that each send one clipped, noised vector.

    Args:
        tables: a site's visits each.
        basis: of the public start.
        noise: noise multiplier; 0 clips and adds nothing.
    """
    privacy = DpConfig(drift_noise_multiplier=noise or HARDLY_ANY, drift_clip_norm=TYPICAL_NORM)
    vectors: list[Tensor] = [noised_vector(table, basis, privacy) for table in tables]
    means, regressions = noise_deviations(noise, TYPICAL_NORM)
    sites = len(tables) ** 0.5
    return fit_private(torch.stack(vectors).sum(0), basis, SumNoise(sites * means, sites * regressions))
