"""Scores of a site's held-out patients, and FedProx at the site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ld_client.data.store import Store
from ld_client.validation import DRIFT_GAIN, PAIRS, RULE_GAIN, followup_scores, validation_loss
from ld_common.adapters.base import AdaptedModel, inject
from ld_common.adapters.lora import Lora
from ld_common.core.config import load_config
from ld_common.core.state import State
from ld_common.diffusion.base_model import Denoiser, load_denoiser
from ld_common.diffusion.longitudinal import AttributeChange
from ld_common.diffusion.longitudinal_sums import DAYS_IN_YEAR
from ld_common.diffusion.options import TrainingConfig
from ld_common.diffusion.training import TrainingData, optimize
from ld_common.imaging.modality import Modality
from tests.support.longitudinal import random_drift

MODALITY = load_config(Modality, Path(__file__).parents[2] / "configs/modalities/brain_mri.yaml")
SHAPE = (4, 4, 4)


def store_of(visits: Mapping[str, list[tuple[int, float, torch.Tensor]]]) -> Store:
    """Visits by patient: day, age and latents."""
    rows = [(name, *visit) for name, own in sorted(visits.items()) for visit in own]
    attributes = [{"age": age, "sex": "F", "diagnosis": "CN"} for _, _, age, _ in rows]
    return Store(
        "",
        "",
        torch.stack([latent for *_, latent in rows]),
        [MODALITY.prompt(each) for each in attributes],
        torch.zeros(4),
        [name for name, *_ in rows],
        attributes,
        [day for _, day, *_ in rows],
    )


def test_a_drift_that_tells_the_change_beats_the_rule_and_the_rule_beats_copying() -> None:
    """The last visits are the drift's own prediction, a little off; the trained patients change alike."""
    drift, generator = random_drift(MODALITY, SHAPE), torch.Generator().manual_seed(0)
    visits: dict[str, list[tuple[int, float, torch.Tensor]]] = {}
    for number in range(6):
        start, years = torch.randn(SHAPE, generator=generator), 1.0 + number
        source, target = ({"age": age, "sex": "F", "diagnosis": "CN"} for age in (65.0, 65.0 + years))
        designs = [tuple(MODALITY.design_vector(each)) for each in (source, target)]
        change = drift.change(start, AttributeChange(designs[0], designs[0], designs[1], years))
        off = 0.01 * change.norm() * torch.randn(SHAPE, generator=generator) / 8
        later = start + change + off
        visits[f"p{number}"] = [(0, 65.0, start), (round(years * DAYS_IN_YEAR), 65.0 + years, later)]
    held_out = store_of(visits)
    told = followup_scores(drift, MODALITY, held_out, held_out)
    assert told[PAIRS] == 6
    assert told[DRIFT_GAIN] == pytest.approx(40, abs=2)  # an error of a hundredth
    assert 0 < told[RULE_GAIN] < told[DRIFT_GAIN]
    unknown = followup_scores(drift, MODALITY, store_of({"x": [visits["p0"][0]]}), held_out)
    assert unknown[RULE_GAIN] == 0  # nobody was seen twice: the rule is to copy
    one_visit = store_of({name: own[:1] for name, own in visits.items()})
    assert followup_scores(drift, MODALITY, held_out, one_visit) == {PAIRS: 0.0}


@pytest.fixture
def adapted(smallest_base: Path) -> AdaptedModel[Denoiser]:
    return inject(load_denoiser(str(smallest_base)), Lora(rank=2, targets=["to_k"]), 0)


def visits_for(model: Denoiser) -> TrainingData:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(20, *model.latent_shape, generator=generator)
    return TrainingData(latents, ["a scan"] * 20, patients=[f"p{row}" for row in range(20)])


@pytest.mark.slow
def test_equal_weights_score_alike_and_a_trained_adapter_scores_lower(adapted: AdaptedModel[Denoiser]) -> None:
    data = visits_for(adapted.model)
    first = validation_loss(adapted.model, data, 5)
    assert validation_loss(adapted.model, data, 5) == first
    assert validation_loss(adapted.model, data, 6) != first
    options = TrainingConfig(steps=30, batch_size=16, learning_rate=0.02)
    optimize(adapted.model, adapted.trainable, data, options, _draws, lambda step: 0.02)
    assert validation_loss(adapted.model, data, 5) < first


def _draws(step: int) -> torch.Generator:
    return torch.Generator().manual_seed(step)


def moved(base: Path, mu: float) -> float:
    """L2 distance that training moves the weights, from weights other than 0."""
    adapted = inject(load_denoiser(str(base)), Lora(rank=2, targets=["to_k"]), 0)
    before: State = {name: value + 0.1 for name, value in adapted.trainable_state().items()}
    adapted.load(before)
    options = replace(TrainingConfig(steps=25, batch_size=4, learning_rate=0.02), proximal_mu=mu)
    optimize(adapted.model, adapted.trainable, visits_for(adapted.model), options, _draws, lambda step: 0.02)
    after = adapted.trainable_state()
    return float(sum((after[name] - value).square().sum() for name, value in before.items())) ** 0.5


@pytest.mark.slow
def test_fedprox_holds_a_site_near_the_rounds_first_weights(smallest_base: Path) -> None:
    free, held = moved(smallest_base, 0.0), moved(smallest_base, 0.1)
    assert free > 1.0
    assert 0 < held < 0.1 * free
