"""Local training under patient-level differential privacy: DP-SGD with Opacus; the unit is the patient.

Each step takes a Poisson sample of the patients, draws K (visit, timestep, noise) examples of each, clips each
patient's mean gradient, adds noise to the sum and divides by the expected, not the actual, number of patients. All
random numbers come from the operating system, so a round cannot be repeated and its noise cannot be subtracted.

Where several processes train together (`Ranks`), the first one's random numbers decide the patients and the examples
of all. Each clips the gradients of its share of a step's patients, the first adds the noise to its sum, and the sums of
all are added up.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from opacus.validators import ModuleValidator
from torch import Tensor, nn

from ld_client.privacy.secure_rng import secret_generator, secret_normal, secret_uniform
from ld_client.train import learning_rate, loss_sampler
from ld_common.adapters.base import AdaptedModel
from ld_common.core.errors import PrivacyError
from ld_common.diffusion.ranks import ALONE, Ranks
from ld_common.diffusion.training import LossSampler, TrainingData, WeightAverage
from ld_common.protocol.dp_accounting import DpConfig
from ld_common.protocol.study_config import StudyConfig

MAX_GRADIENT_NUMBERS = 2**26
"""Numbers of per-example gradients in memory at once: a quarter of a gigabyte."""


class SecretNoiseOptimizer(DPOptimizer):
    """Opacus's optimizer with noise from the operating system in place of a generator's."""

    noise_multiplier: float
    ranks: Ranks = ALONE
    """The processes whose patients make up a step."""

    def add_noise(self) -> None:
        """Set each parameter's `grad` to the noised sum of clipped gradients, of the patients of all processes."""
        multiplier, self.noise_multiplier = self.noise_multiplier, 0.0
        try:
            super().add_noise()  # checks that no gradient is used twice, and adds no noise
        finally:
            self.noise_multiplier = multiplier
        for parameter in self.params if self.ranks.rank == 0 else ():
            noise = multiplier * self.max_grad_norm * secret_normal(parameter.shape)
            parameter.grad = (parameter.grad.double() + noise.to(parameter.device)).to(parameter.dtype)
        sums = self.ranks.sums([parameter.grad for parameter in self.params])
        for parameter, gradient in zip(self.params, sums, strict=True):
            parameter.grad = gradient


def train_round_privately(
    adapted: AdaptedModel[Any],
    data: TrainingData,
    study: StudyConfig,
    round_number: int,
    noise_multiplier: float,
    on_step: Callable[[int], None] = lambda step: None,
    ranks: Ranks = ALONE,
) -> None:
    """Train an adapter's parameters for one round, in place. Charge the round before it runs.

    For one patient, the resulting parameters have the ε of `training.steps` times the Gaussian mechanism with
    `noise_multiplier` on a Poisson sample at `privacy.sampling_rate`. No loss is returned: only the parameters may
    leave.

    Args:
        adapted: the model with the adapter's parameters at the start of the round.
        data: the scans, with their patients.
        study: `privacy.expected_batch_size` is the number of patients in a step, `training.batch_size` the number of
            examples in one pass of the network.
        round_number: from 1.
        noise_multiplier: of the study's plan.
        on_step: called after each step with its number.
        ranks: processes that call this with equal arguments; all end with the same parameters.

    Raises:
        PrivacyError: the model or adapter has no per-example gradients.
    """
    check_trainable(adapted)
    privacy, training = study.privacy, study.training
    examples = loss_sampler(adapted, data, study, _common_generator(ranks))
    sampled = Patients(data.patients, lambda shape: ranks.first(secret_uniform(shape)))
    trainable = list(adapted.trainable.values())
    optimizer = SecretNoiseOptimizer(
        torch.optim.AdamW(trainable, lr=training.learning_rate, weight_decay=0.0),
        noise_multiplier=noise_multiplier,
        max_grad_norm=privacy.max_grad_norm,
        expected_batch_size=privacy.expected_batch_size,
    )
    optimizer.ranks = ranks
    average = WeightAverage(trainable, privacy.ema)
    hooks = GradSampleModule(adapted.model.unet, loss_reduction="sum")
    adapted.model.unet.train()
    try:
        for index, chosen in enumerate(sampled.steps(privacy.sampling_rate, training.steps)):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(study, round_number, index)
            rows = sampled.draw(chosen, privacy.augmentation_multiplicity)
            accumulate_gradient(optimizer, hooks, examples, rows, privacy, training.batch_size)
            _add_prior_gradient(hooks, examples, trainable, ranks)
            optimizer.original_optimizer.step()
            optimizer.zero_grad()
            average.add()
            on_step(index + 1)
    finally:
        hooks.to_standard_module()
        adapted.model.unet.eval()
        for parameter in trainable:
            parameter.grad = None
    average.write()


def _common_generator(ranks: Ranks) -> torch.Generator:
    """A secret generator, the same in all processes."""
    generator = secret_generator()
    return generator.set_state(ranks.first(generator.get_state().long()).byte())


def check_trainable(adapted: AdaptedModel[Any]) -> None:
    """Refuse models and adapters without per-example gradients; raises `PrivacyError`."""
    outside = [name for name in adapted.trainable if not name.startswith("unet.")]
    if outside:
        raise PrivacyError(
            f"'{outside[0]}' is trained outside the UNet, without a gradient for each patient: with privacy.enabled "
            "use adapter lora, custom_diffusion, dreambooth or full"
        )
    unet = adapted.model.unet
    if getattr(unet, "is_gradient_checkpointing", False):
        raise PrivacyError("gradient checkpointing leaves no gradient for each patient: switch it off")
    mixing = [str(error) for error in ModuleValidator.validate(unet.train(), strict=False)]
    unet.eval()
    if mixing:
        raise PrivacyError(f"the base mixes the examples of a batch ({mixing[0]}): use one with group norm")


class Patients:
    """The rows of each patient, and random samples of them; `uniform` returns numbers in (0, 1) of a shape."""

    def __init__(self, patients: Sequence[str], uniform: Callable[[Sequence[int]], Tensor] = secret_uniform) -> None:
        names = sorted(set(patients))
        self.uniform = uniform
        self.rows = [torch.tensor([row for row, patient in enumerate(patients) if patient == name]) for name in names]

    def steps(self, rate: float, steps: int) -> Iterator[list[int]]:
        """The patients of each step, by number: each with probability `rate`, possibly none."""
        for _ in range(steps):
            yield (self.uniform((len(self.rows),)) < rate).nonzero()[:, 0].tolist()

    def draw(self, chosen: Sequence[int], draws: int) -> Tensor:
        """Rows `(P,K)`: K visits of each chosen patient, with replacement."""
        picked = [
            self.rows[patient][(shares * len(self.rows[patient])).long()]
            for patient, shares in zip(chosen, self.uniform((len(chosen), draws)), strict=True)
        ]
        return torch.stack(picked) if picked else torch.zeros((0, draws), dtype=torch.long)


def accumulate_gradient(
    optimizer: SecretNoiseOptimizer,
    hooks: GradSampleModule,
    examples: LossSampler,
    rows: Tensor,
    privacy: DpConfig,
    at_once: int,
) -> None:
    """Compute the noised mean gradient of these patients' rows `(P,K)` into the parameters' `grad`, in chunks.

    A chunk has whole patients, at least one, and about `at_once` examples. Of several processes, each computes the
    gradients of its share of the patients, dealt out over the whole step.
    """
    parameters = [parameter for parameter in hooks.parameters() if parameter.requires_grad]
    draws, ranks = privacy.augmentation_multiplicity, optimizer.ranks
    size = sum(parameter.numel() for parameter in parameters) * draws
    together = max(1, min(at_once // draws, MAX_GRADIENT_NUMBERS // size))
    chunks = rows.split(together)
    for number, chunk in enumerate(chunks, start=1):
        turn = replace(ranks, rank=(ranks.rank - (number - 1) * together) % ranks.count)
        patients = len(turn.share(len(chunk)))
        if len(chunk):
            examples.share = functools.partial(turn.share, group=draws)
            hooks.enable_hooks()
            with warnings.catch_warnings():  # a trainable first layer has no input with a gradient, nor needs one
                warnings.filterwarnings("ignore", "Full backward hook")
                loss = examples.scans_loss(chunk.flatten(), "sum") / draws
                if patients:
                    loss.backward()
            hooks.disable_hooks()
        for parameter in parameters:
            parameter.grad_sample = _by_patient(parameter, patients, draws)
        last = number == len(chunks)
        optimizer.signal_skip_step(do_skip=not last)
        optimizer.pre_step()
        if not last:
            optimizer.zero_grad()


def _by_patient(parameter: nn.Parameter, patients: int, draws: int) -> Tensor:
    """Gradients `(P, *shape)`, one a patient; without patients, a step consists of noise alone.

    A gradient that is not finite counts as zero.
    """
    samples: Tensor | None = getattr(parameter, "grad_sample", None) if patients else None
    if samples is None:
        return torch.zeros((patients, *parameter.shape), device=parameter.device)
    return torch.nan_to_num(samples.view(patients, draws, *parameter.shape).sum(1), nan=0.0, posinf=0.0, neginf=0.0)


def _add_prior_gradient(
    hooks: GradSampleModule, examples: LossSampler, trainable: Sequence[nn.Parameter], ranks: Ranks
) -> None:
    """Add the gradient of the prior's loss, which is public, so it is neither clipped nor noised."""
    hooks.disable_hooks()
    examples.share = ranks.share
    loss = examples.prior_loss()
    if loss is not None:
        shares = torch.autograd.grad(loss, trainable) if loss.requires_grad else map(torch.zeros_like, trainable)
        for parameter, gradient in zip(trainable, ranks.sums(list(shares)), strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
