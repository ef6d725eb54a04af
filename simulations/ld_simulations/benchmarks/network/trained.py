"""Trains the study's adapter on simulated patients at hand: rounds, draws and averages are a federation's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ld_common.adapters.base import AdaptedModel, inject
from ld_common.adapters.registry import read_adapter
from ld_common.adapters.state_dict import read_tensors, write_tensors
from ld_common.diffusion.base_model import BaseModel, load_base
from ld_common.diffusion.drift import LatentDrift
from ld_common.diffusion.longitudinal import LongitudinalDrift
from ld_common.diffusion.training import TrainingData
from ld_common.imaging.modality import Modality
from ld_common.protocol.study_config import StudyConfig
from ld_simulations.benchmarks.counterfactuals.training import train_in_rounds
from ld_simulations.benchmarks.individual.people import Person, with_mirror_images
from ld_simulations.benchmarks.network.plan import CENTRED, MIRRORED


def train(
    study: StudyConfig, modality: Modality, people: Sequence[Person], drift: LongitudinalDrift, training: str
) -> AdaptedModel[BaseModel]:
    """The study's adapter after all rounds.

    Args:
        study: its adapter, options and rounds.
        modality: of the scans.
        people: of all sites.
        drift: fitted to them; `centred` training subtracts what it expects of each visit.
        training: one of `plan.TRAININGS`.
    """
    adapted = inject(load_base(study.base_model), read_adapter(study.adapter), study.seed)
    train_in_rounds(adapted, _training_data(modality, people, drift, training), study)
    return adapted


def save(adapted: AdaptedModel[BaseModel], file: Path) -> None:
    """Keep the adapter's tensors."""
    write_tensors(file, adapted.state(), {})


def load(study: StudyConfig, file: Path) -> AdaptedModel[BaseModel]:
    """The base with a kept adapter in it."""
    adapted = inject(load_base(study.base_model), read_adapter(study.adapter), study.seed)
    adapted.load(read_tensors(file)[0])
    return adapted


def means(drift: LongitudinalDrift, modality: Modality, people: Sequence[Person], formulation: str) -> LatentDrift:
    """E[z | c] of every visit, less the base's mean `(N,C,h,w)`."""
    designs = [modality.design_vector(visit.attributes) for person in people for visit in person.visits]
    return replace(drift, formulation=formulation).at(designs)


def _training_data(
    modality: Modality, people: Sequence[Person], drift: LongitudinalDrift, training: str
) -> dict[str, TrainingData]:
    data = {}
    for name in dict.fromkeys(person.hospital for person in people):
        of_site = [person for person in people if person.hospital == name]
        of_site = with_mirror_images(of_site) if training == MIRRORED else of_site
        visits = [visit for person in of_site for visit in person.visits]
        latents: Tensor = torch.stack([visit.latent for visit in visits])
        prompts = [modality.prompt(visit.attributes) for visit in visits]
        centred = means(drift, modality, of_site, "centred") if training == CENTRED else None
        data[name] = TrainingData(latents, prompts, centred)
    return data
