from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ld_client.train import loss_sampler, train_round
from ld_common.adapters.base import AdaptedModel, inject
from ld_common.adapters.registry import read_adapter
from ld_common.core.config import from_mapping
from ld_common.core.errors import ConfigError
from ld_common.diffusion.base_model import Denoiser, load_denoiser
from ld_common.diffusion.conditioning import DELTA_CHANNELS, Condition, image_condition
from ld_common.diffusion.loss import denoising_loss
from ld_common.diffusion.training import TrainingData
from ld_common.editing.counterfactuals import LatentEditor, edit_to
from ld_common.editing.registry import read_editor
from ld_common.imaging.modality import Attributes, Modality
from ld_common.protocol.study_config import StudyConfig
from tests.conftest import random_state

PROMPT = "axial T1 brain MRI, woman, 70 years, healthy"
PATIENTS = ["a", "a", "b", "b", "b", "c"]


@pytest.fixture
def adapted(smallest_base: Path) -> AdaptedModel[Denoiser]:
    return inject(load_denoiser(str(smallest_base)), read_adapter({"name": "instruct_pix2pix", "rank": 4}), 0)


def study_of(**training: object) -> StudyConfig:
    options = {"batch_size": 8, "conditioning_dropout_prob": 0.25, "learning_rate": 0.02, **training}
    return from_mapping(StudyConfig, {"adapter": {"name": "instruct_pix2pix", "rank": 4}, "training": options})


@torch.no_grad()
def test_a_visit_beside_the_latents_is_heard_once_something_was_learned(adapted: AdaptedModel[Denoiser]) -> None:
    model = adapted.model
    latents = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    context = model.embed([PROMPT] * 2)
    conditions = [Condition(context), Condition(context, image_condition(torch.ones_like(latents), torch.zeros(2, 3)))]
    plain, seeing = (
        model.unet(condition.network_input(latents), 10, condition.context).sample for condition in conditions
    )
    assert torch.equal(plain, seeing)
    adapted.parameters["unet.conv_in.baseline.weight"].add_(1.0)
    after, changed = (
        model.unet(condition.network_input(latents), 10, condition.context).sample for condition in conditions
    )
    assert torch.equal(plain, after)
    assert not torch.allclose(plain, changed, atol=1e-2)


def test_training_shows_visits_of_the_same_patient_and_at_times_none(adapted: AdaptedModel[Denoiser]) -> None:
    shape = adapted.model.latent_shape
    latents = torch.arange(1.0, 7.0).view(-1, 1, 1, 1).expand(6, *shape)
    seen = []

    def watching(latents: torch.Tensor, *_: object) -> SimpleNamespace:
        seen.append(latents[:, shape[0] :, 0, 0].clone())
        return SimpleNamespace(sample=latents[:, : shape[0]])

    years = torch.tensor([0.0, 2.0, 10.0, 13.0, 17.0, 40.0])
    data = TrainingData(latents, [PROMPT] * 6, patients=PATIENTS, condition_vectors=years[:, None])
    sampler = loss_sampler(adapted, data, study_of(), torch.Generator().manual_seed(0))
    object.__setattr__(sampler.model, "unet", watching)
    rows = torch.arange(6).repeat(200)
    sampler.scans_loss(rows)
    shown = [(int(row), int(visit)) for row, visit in zip(rows, seen[0][:, 0], strict=True)]
    for (row, visit), told in zip(shown, seen[0][:, shape[0] :], strict=True):
        assert visit == 0 or PATIENTS[visit - 1] == PATIENTS[row]
        assert told.tolist() == [
            0.0 if visit == 0 else float(years[row] - years[visit - 1]),
            *[0.0] * (DELTA_CHANNELS - 1),
        ]
    for row in range(5):  # each other visit of a patient is shown, and the visit itself
        assert {visit for own, visit in shown if own == row} == {
            0,
            *(other + 1 for other in range(6) if PATIENTS[other] == PATIENTS[row]),
        }


def test_training_moves_the_weights_of_the_other_visit_and_of_the_elapsed_years(
    adapted: AdaptedModel[Denoiser],
) -> None:
    latents = torch.randn(6, *adapted.model.latent_shape, generator=torch.Generator().manual_seed(0))
    years = torch.tensor([0.0, 2.0, 10.0, 13.0, 17.0, 40.0])
    data = TrainingData(latents, [PROMPT] * 6, patients=PATIENTS, condition_vectors=years[:, None])
    train_round(adapted, data, study_of(steps=2), 1, "aster")
    moved = adapted.state()["unet.conv_in.baseline.weight"].abs().sum((0, 2, 3)) > 0
    channels = latents.shape[1]
    assert bool(moved[: channels + 1].all())  # the other visit, and the one number that differs between visits
    assert not bool(moved[channels + 1 :].any())  # this modality has no further number


@pytest.mark.slow
def test_what_is_learned_of_a_patient_is_read_off_the_seen_visit(adapted: AdaptedModel[Denoiser]) -> None:
    signs = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    latents = signs.view(-1, 1, 1, 1).expand(6, *adapted.model.latent_shape)
    data = TrainingData(
        latents, [PROMPT] * 6, patients=["a", "a", "a", "b", "b", "b"], condition_vectors=torch.zeros(6, 1)
    )
    train_round(adapted, data, study_of(steps=100), 1, "aster")
    model, errors = adapted.model, []
    noise = torch.randn(6, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    timesteps, context = torch.full((6,), 400), model.embed([PROMPT] * 6).detach()
    with torch.no_grad():
        for seen in (latents, -latents):
            told = Condition(context, image_condition(seen, torch.zeros(6, 1)))
            loss = denoising_loss(
                model.unet, model.scheduler.alphas_cumprod, "epsilon", latents, told, timesteps, noise
            )
            errors.append(float(loss))
    assert errors[0] < 0.99 * errors[1]


@pytest.mark.slow
def test_how_many_years_lie_between_is_learned_though_no_prompt_says_it(adapted: AdaptedModel[Denoiser]) -> None:
    patients, years = torch.arange(8).repeat_interleave(2), torch.tensor([-1.0, 1.0]).repeat(8)
    own = torch.randn(8, 1, 1, 1, generator=torch.Generator().manual_seed(1))
    latents = (own[patients] + years.view(-1, 1, 1, 1)).expand(16, *adapted.model.latent_shape)
    names = [str(int(patient)) for patient in patients]
    data = TrainingData(latents, [PROMPT] * 16, patients=names, condition_vectors=years[:, None])
    train_round(adapted, data, study_of(steps=150), 1, "aster")
    model, errors = adapted.model, []
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    context, other = model.embed([PROMPT] * 16).detach(), latents.view(8, 2, *latents.shape[1:]).flip(1).flatten(0, 1)
    with torch.no_grad():
        for change in (2 * years, -2 * years):
            told = Condition(context, image_condition(other, change[:, None]))
            parts = latents, told, torch.full((16,), 400), noise
            errors.append(float(denoising_loss(model.unet, model.scheduler.alphas_cumprod, "epsilon", *parts)))
    assert errors[0] < 0.95 * errors[1]


def test_an_edit_tells_what_differs_and_the_answer_hears_it(
    brain_mri: Modality, adapted: AdaptedModel[Denoiser]
) -> None:
    before: Attributes = {"age": 60.0, "sex": "F", "diagnosis": "CN"}
    edit = edit_to(brain_mri, 0, before, {"age": 64.1, "diagnosis": "AD"})
    assert (edit.scan, edit.target) == (0, brain_mri.prompt({"age": 64.1, "sex": "F", "diagnosis": "AD"}))
    assert edit.change == pytest.approx((1.0, -1.0, 0.0))  # AD is the reference of CN
    adapted.load(random_state(adapted.state(), 0.1))
    latents, factual = torch.zeros(1, *adapted.model.latent_shape), brain_mri.prompt(before)
    editor = LatentEditor(
        adapted.model, [factual, edit.target], read_editor({"name": "belm", "num_inference_steps": 4}), None
    )
    inverted = editor.invert(latents, [factual])
    heard, unheard, still = (
        editor.edit(inverted, [one]) for one in (edit, replace(edit, change=()), replace(edit, target=factual))
    )
    assert not torch.allclose(heard, unheard, atol=1e-3)
    assert not torch.allclose(still, inverted.reconstructions, atol=1e-3)


def test_more_numbers_than_there_are_channels_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"8 .*9"):
        image_condition(torch.zeros(1, 4, 8, 8), torch.zeros(1, 9))


def test_the_editor_needs_a_network_that_sees_the_scan(smallest_base: Path) -> None:
    model = load_denoiser(str(smallest_base))
    editor = LatentEditor(model, [PROMPT], read_editor({"name": "instruct_pix2pix", "num_inference_steps": 4}), None)
    with pytest.raises(ConfigError, match="adapter instruct_pix2pix"):
        editor.invert(torch.zeros(1, *model.latent_shape), [PROMPT])
