"""Training under differential privacy: one clipped gradient a patient, noise alone for an empty sample, refusals."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from opacus import GradSampleModule
from scipy.stats import kstest
from torch import Tensor

from ld_client.privacy import dp_sgd as private
from ld_client.privacy.dp_sgd import (
    Patients,
    SecretNoiseOptimizer,
    accumulate_gradient,
    check_trainable,
    train_round_privately,
)
from ld_client.privacy.secure_rng import secret_generator, secret_normal, secret_uniform
from ld_client.train import loss_sampler
from ld_common.adapters.base import AdaptedModel, inject
from ld_common.adapters.registry import read_adapter
from ld_common.core.config import from_mapping
from ld_common.core.errors import PrivacyError
from ld_common.diffusion.base_model import load_denoiser
from ld_common.diffusion.training import LossSampler, TrainingData
from ld_common.protocol.study_config import StudyConfig

PATIENTS = ["a", "a", "b", "c", "c", "c"]


def study_of(adapter: dict[str, object], **privacy: object) -> StudyConfig:
    return from_mapping(
        StudyConfig,
        {
            "adapter": adapter,
            "training": {"steps": 3, "batch_size": 6, "conditioning_dropout_prob": 0.0},
            "federation": {"weighting": "equal"},
            "privacy": {
                "enabled": True,
                "patients": 3,
                "expected_batch_size": 2,
                "target_delta": 0.01,
                "augmentation_multiplicity": 2,
                **privacy,
            },
        },
    )


def attached_of(tiny_base: Path, study: StudyConfig) -> AdaptedModel:
    found = inject(load_denoiser(str(tiny_base)), read_adapter(study.adapter), study.seed)
    generator = torch.Generator().manual_seed(3)
    for parameter in found.trainable.values():  # B starts at zero, where A has no gradient
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return found


def lesson(shape: tuple[int, ...] = (4, 8, 8)) -> TrainingData:
    latents = torch.randn(6, *shape, generator=torch.Generator().manual_seed(1))
    return TrainingData(
        latents,
        ["woman", "woman", "man", "man", "woman", "man"],
        patients=PATIENTS,
        condition_vectors=torch.zeros(6, 1),
    )


def noised_gradient(
    adapted: AdaptedModel, study: StudyConfig, rows: Tensor, noise: float, seed: int = 5
) -> list[Tensor]:
    """What one step would apply for patients' rows `(P,K)`."""
    learned = list(adapted.trainable.values())
    examples = loss_sampler(adapted, lesson(adapted.model.latent_shape), study, torch.Generator().manual_seed(seed))
    optimizer = SecretNoiseOptimizer(
        torch.optim.SGD(learned, lr=1.0),
        noise_multiplier=noise,
        max_grad_norm=study.privacy.max_grad_norm,
        expected_batch_size=study.privacy.expected_batch_size,
    )
    hooks = GradSampleModule(adapted.model.unet.train(), loss_reduction="sum")
    accumulate_gradient(optimizer, hooks, examples, rows, study.privacy, study.training.batch_size)
    hooks.to_standard_module()
    return [parameter.grad.clone() for parameter in learned]


def reference_gradient(adapted: AdaptedModel, study: StudyConfig, rows: Tensor) -> list[Tensor]:
    """The same without noise, patient by patient, by autograd alone."""
    learned = list(adapted.trainable.values())
    total, draws = [torch.zeros_like(parameter) for parameter in learned], rows.shape[1]
    unet = adapted.model.unet
    for patient in range(len(rows)):
        # the same random numbers for all, then the gradient of one patient's outputs alone
        examples = loss_sampler(adapted, lesson(adapted.model.latent_shape), study, torch.Generator().manual_seed(5))

        def only(*arguments: Tensor, patient: int = patient) -> SimpleNamespace:
            output = unet(*arguments).sample
            own = torch.arange(len(output)).view(-1, 1, 1, 1) // draws == patient
            return SimpleNamespace(sample=torch.where(own, output, output.detach()))

        examples.model = replace(examples.model, unet=only)
        loss = examples.scans_loss(rows.flatten(), "sum") / draws
        gradients = torch.autograd.grad(loss, learned)
        norm = torch.sqrt(sum(gradient.square().sum() for gradient in gradients))
        factor = min(1.0, study.privacy.max_grad_norm / float(norm))
        total = [own + factor * gradient for own, gradient in zip(total, gradients, strict=True)]
    return [own / study.privacy.expected_batch_size for own in total]


@pytest.mark.slow
@pytest.mark.parametrize(
    "adapter",
    [
        {"name": "lora", "rank": 2},
        {"name": "custom_diffusion"},
        {"name": "full"},
        {"name": "instruct_pix2pix", "rank": 2},
    ],
)
@pytest.mark.parametrize("clip", [1e-3, 1e3])
def test_one_gradient_a_patient_is_clipped(tiny_base: Path, adapter: dict[str, object], clip: float) -> None:
    study = study_of(adapter, max_grad_norm=clip)
    adapted, rows = attached_of(tiny_base, study), torch.tensor([[0, 1], [2, 2], [5, 3]])
    for found, expected in zip(
        noised_gradient(adapted, study, rows, 0.0), reference_gradient(adapted, study, rows), strict=True
    ):
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-6 * clip)


@pytest.mark.slow
@pytest.mark.parametrize("bound", ["memory", "batch"])
def test_a_patients_gradient_does_not_depend_on_how_many_are_held_at_once(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    study, rows = study_of({"name": "lora", "rank": 2}), torch.tensor([[0, 1], [2, 2], [5, 3]])
    adapted = attached_of(tiny_base, study)
    # a patient at a time draws its timesteps in the same order, but with other shapes: compare with fixed draws
    monkeypatch.setattr("ld_common.diffusion.training.training_timesteps", lambda count, *_: torch.full((count,), 300))
    monkeypatch.setattr("ld_common.diffusion.training.training_noise", lambda shape, *_: torch.ones(shape))
    sizes: list[int] = []
    monkeypatch.setattr(LossSampler, "scans_loss", _counting(LossSampler.scans_loss, sizes))
    together = noised_gradient(adapted, study, rows, 0.0)
    if bound == "memory":
        monkeypatch.setattr(private, "MAX_GRADIENT_NUMBERS", 1)
    else:
        study.training.batch_size = 3  # one patient of two draws
    apart = noised_gradient(adapted, study, rows, 0.0)
    assert sizes == [6, 2, 2, 2]
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(together, apart, strict=True))
    assert any(value.abs().max() > 1e-4 for value in together)


def _counting(loss: Callable[..., Tensor], sizes: list[int]) -> Callable[..., Tensor]:
    def counted(self: LossSampler, rows: Tensor, reduction: str = "mean") -> Tensor:
        sizes.append(len(rows))
        return loss(self, rows, reduction)

    return counted


@pytest.mark.parametrize("patients", [0, 3])
def test_noise_has_the_size_that_the_plan_says_even_without_a_patient(tiny_base: Path, patients: int) -> None:
    study = study_of({"name": "full"}, max_grad_norm=0.5)
    adapted, rows = attached_of(tiny_base, study), torch.tensor([[0, 1], [2, 2], [5, 3]])[:patients]
    clean, noised = (noised_gradient(adapted, study, rows, noise) for noise in (0.0, 7.0))
    noise = torch.cat([(b - a).flatten() for a, b in zip(clean, noised, strict=True)])
    assert len(noise) > 10_000
    assert float(noise.std()) == pytest.approx(7.0 * 0.5 / 2, rel=0.03)
    if not patients:
        assert all(not gradient.any() for gradient in clean)


def test_a_patient_whose_gradient_is_not_finite_changes_nothing_else(tiny_base: Path) -> None:
    study = study_of({"name": "lora", "rank": 2})
    adapted = attached_of(tiny_base, study)
    broken = lesson()
    broken.latents[0] = torch.inf
    learned = list(adapted.trainable.values())
    optimizer = SecretNoiseOptimizer(
        torch.optim.SGD(learned, lr=1.0), noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=1
    )
    hooks = GradSampleModule(adapted.model.unet.train(), loss_reduction="sum")
    examples = loss_sampler(adapted, broken, study, torch.Generator().manual_seed(5))
    accumulate_gradient(optimizer, hooks, examples, torch.tensor([[0, 0], [2, 2]]), study.privacy, 4)
    hooks.to_standard_module()
    norm = torch.sqrt(sum(parameter.grad.square().sum() for parameter in learned))
    assert 0 < float(norm) <= 1.0001


def test_each_patient_is_drawn_with_the_public_rate() -> None:
    uniform = functools.partial(torch.rand, generator=torch.Generator().manual_seed(0))
    patients = Patients(PATIENTS, uniform)
    steps = list(patients.steps(0.25, 4000))
    counts = [sum(number in step for step in steps) / 4000 for number in range(3)]
    assert counts == pytest.approx([0.25] * 3, abs=0.03)
    assert any(step == [] for step in steps)
    rows = patients.draw([2, 0], 50)
    assert rows.shape == (2, 50)
    assert set(rows[0].tolist()) == {3, 4, 5}
    assert set(rows[1].tolist()) == {0, 1}


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["lora", "full", "custom_diffusion", "dreambooth", "instruct_pix2pix"])
def test_a_private_round_moves_the_adapter_and_nothing_else(tiny_base: Path, adapter: str) -> None:
    study = study_of({"name": adapter}, ema=0.5)
    adapted = attached_of(tiny_base, study)
    learned = set(adapted.trainable)
    before = {name: value.clone() for name, value in adapted.model.unet.state_dict().items()}
    start = adapted.trainable_state()
    train_round_privately(adapted, lesson(), study, 1, 1.0)
    after = adapted.model.unet.state_dict()
    moved = {
        "unet." + name.replace(".default.", ".")
        for name, value in after.items()
        if not torch.equal(before[name], value)
    }
    assert moved == learned
    again = inject(load_denoiser(str(tiny_base)), read_adapter(study.adapter), study.seed)
    again.load(start)
    train_round_privately(again, lesson(), study, 1, 1.0)
    first, second = adapted.trainable_state(), again.trainable_state()
    assert any(not torch.equal(first[name], second[name]) for name in first)  # its noise cannot be repeated
    assert not any(getattr(module, "activations", []) for module in adapted.model.unet.modules())


def test_secret_numbers_have_the_distribution_and_the_tails_they_should() -> None:
    uniform, normal = secret_uniform((200, 1000)), secret_normal((200, 1000))
    assert kstest(uniform.flatten().numpy(), "uniform").pvalue > 1e-6
    assert kstest(normal.flatten().numpy(), "norm").pvalue > 1e-6
    assert 0 < float(uniform.min()) < float(uniform.max()) < 1
    assert float(normal.abs().max()) > 3.5
    assert not torch.equal(uniform, secret_uniform((200, 1000)))
    assert uniform.dtype == normal.dtype == torch.float64


def test_a_secret_generator_has_all_of_its_state_from_the_operating_system(monkeypatch: pytest.MonkeyPatch) -> None:
    words = np.random.default_rng(0).integers(0, 2**32, 624, dtype=np.uint32)
    monkeypatch.setattr("os.urandom", lambda count: words.tobytes()[:count])
    drawn = torch.randint(0, 2**20, (700,), generator=secret_generator())
    reference = np.random.RandomState()
    reference.set_state(("MT19937", words, 624))  # another implementation of the same generator
    assert drawn.tolist() == [int(word) % 2**20 for word in reference.randint(0, 2**32, 700, dtype=np.uint32)]


def test_a_private_round_draws_nothing_that_a_seed_decides(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch reads 32 bits of a CPU generator's seed, so that all seeds can be tried."""

    def refuse(*_: object) -> None:
        raise AssertionError("noise or a sample was drawn by a seeded generator")

    monkeypatch.setattr("opacus.optimizers.optimizer.torch.normal", refuse)
    counted = []
    monkeypatch.setattr("os.urandom", lambda count, own=os.urandom: counted.append(count) or own(count))
    study = study_of({"name": "lora"})
    adapted = attached_of(tiny_base, study)
    train_round_privately(adapted, lesson(), study, 1, 1.0)
    learned = sum(value.numel() for value in adapted.trainable.values())
    assert sum(counted) >= 8 * learned * study.training.steps + 4 * 624


def test_lora_freezes_a_under_privacy_unless_told_otherwise() -> None:
    assert study_of({"name": "lora"}).adapter["freeze_a"]
    assert not study_of({"name": "lora", "freeze_a": False}).adapter["freeze_a"]
    assert not from_mapping(StudyConfig, {"adapter": {"name": "lora"}}).adapter["freeze_a"]


def test_what_has_no_gradient_for_each_patient_is_refused(tiny_base: Path) -> None:
    study = study_of({"name": "textual_inversion"})
    with pytest.raises(PrivacyError, match="outside the UNet"):
        check_trainable(inject(load_denoiser(str(tiny_base)), read_adapter(study.adapter), 0))
    adapted = attached_of(tiny_base, study_of({"name": "lora"}))
    adapted.model.unet.enable_gradient_checkpointing()
    with pytest.raises(PrivacyError, match="checkpointing"):
        check_trainable(adapted)
    mixing = attached_of(tiny_base, study_of({"name": "lora"}))
    mixing.model.unet.conv_norm_out = torch.nn.BatchNorm2d(16)
    with pytest.raises(PrivacyError, match="mixes the examples"):
        check_trainable(mixing)
