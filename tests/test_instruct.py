from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ld_client.train import Examples, Lesson, train_round
from ld_common.config import from_mapping
from ld_common.counterfactual import EditConfig, LatentEditor
from ld_common.errors import ConfigError
from ld_common.models import Condition, Denoiser, load_denoiser
from ld_common.objective import denoising_loss
from ld_common.schemes import Attached, attach, read_scheme
from ld_common.study import StudyConfig

PROMPT = "axial T1 brain MRI, woman, 70 years, healthy"
PATIENTS = ["a", "a", "b", "b", "b", "c"]


@pytest.fixture
def attached(tiny_base: Path) -> Attached[Denoiser]:
    return attach(load_denoiser(str(tiny_base)), read_scheme({"name": "instruct", "rank": 4}), 0)


def study_of(**training: object) -> StudyConfig:
    options = {"batch_size": 8, "prompt_dropout": 0.25, "learning_rate": 0.02, **training}
    return from_mapping(StudyConfig, {"scheme": {"name": "instruct", "rank": 4}, "training": options})


@torch.no_grad()
def test_a_visit_beside_the_latents_is_heard_once_something_was_learned(attached: Attached[Denoiser]) -> None:
    model = attached.model
    latents = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    context = model.embed([PROMPT] * 2)
    conditions = [Condition(context), Condition(context, torch.ones_like(latents))]
    plain, seeing = (model.unet(one.seen(latents), 10, one.context).sample for one in conditions)
    assert torch.equal(plain, seeing)
    attached.parameters["unet.conv_in.baseline.weight"].add_(1.0)
    after, changed = (model.unet(one.seen(latents), 10, one.context).sample for one in conditions)
    assert torch.equal(plain, after)
    assert not torch.allclose(plain, changed, atol=1e-2)


def test_training_shows_visits_of_the_same_patient_and_at_times_none(attached: Attached[Denoiser]) -> None:
    shape = attached.model.latent_shape
    latents = torch.arange(1.0, 7.0).view(-1, 1, 1, 1).expand(6, *shape)
    seen = []

    def watching(latents: torch.Tensor, *_: object) -> SimpleNamespace:
        seen.append(latents[:, shape[0] :, 0, 0].clone())
        return SimpleNamespace(sample=latents[:, : shape[0]])

    lesson = Lesson(latents, [PROMPT] * 6, patients=PATIENTS)
    examples = Examples(attached, lesson, study_of(), torch.Generator().manual_seed(0))
    object.__setattr__(examples.model, "unet", watching)
    rows = torch.arange(6).repeat(200)
    examples.scans_loss(rows)
    shown = [(int(row), int(visit)) for row, visit in zip(rows, seen[0][:, 0], strict=True)]
    for row, visit in shown:
        assert visit == 0 or PATIENTS[visit - 1] == PATIENTS[row]
    for row in range(5):  # each other visit of a patient is shown, and the visit itself
        assert {visit for own, visit in shown if own == row} == {
            0,
            *(other + 1 for other in range(6) if PATIENTS[other] == PATIENTS[row]),
        }


def test_what_is_learned_of_a_patient_is_read_off_the_seen_visit(attached: Attached[Denoiser]) -> None:
    signs = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    latents = signs.view(-1, 1, 1, 1).expand(6, *attached.model.latent_shape)
    lesson = Lesson(latents, [PROMPT] * 6, patients=["a", "a", "a", "b", "b", "b"])
    train_round(attached, lesson, study_of(steps=100), 1, "aster")
    model, errors = attached.model, []
    noise = torch.randn(6, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    timesteps, context = torch.full((6,), 400), model.embed([PROMPT] * 6).detach()
    with torch.no_grad():
        for seen in (latents, -latents):
            told = Condition(context, seen)
            loss = denoising_loss(
                model.unet, model.scheduler.alphas_cumprod, "epsilon", latents, told, timesteps, noise
            )
            errors.append(float(loss))
    assert errors[0] < 0.99 * errors[1]


def test_the_method_needs_a_network_that_sees_the_scan(tiny_base: Path) -> None:
    model = load_denoiser(str(tiny_base))
    editor = LatentEditor(model, [PROMPT], EditConfig(method="instruct", steps=4), None)
    with pytest.raises(ConfigError, match="scheme instruct"):
        editor.abduct(torch.zeros(1, *model.latent_shape), [PROMPT])
