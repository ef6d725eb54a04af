"""One site's local training under patient-level differential privacy: DP-SGD by Opacus, a patient a unit.

Each step takes a Poisson sample of the patients, draws K (visit, timestep, noise) examples inside each, clips the mean
gradient of each patient, adds noise to the sum and divides by the expected, not the true, number of patients. All
random numbers come from the operating system: a round cannot be repeated, and nobody can subtract its noise.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from opacus.validators import ModuleValidator
from torch import Tensor, nn

from ld_client.privacy.secure_rng import SecretNoiseOptimizer, secret_generator, secret_uniform
from ld_client.train import learning_rate, loss_sampler
from ld_common.adapters.base import AdaptedModel
from ld_common.core.errors import PrivacyError
from ld_common.diffusion.training import LossSampler, TrainingData
from ld_common.protocol.dp_accounting import DpConfig
from ld_common.protocol.study_config import StudyConfig

MOST_GRADIENTS = 2**26
"""Numbers in the per-example gradients that are held at once, whatever the batch: a quarter of a gigabyte."""


def train_round_privately(
    adapted: AdaptedModel[Any],
    lesson: TrainingData,
    study: StudyConfig,
    round_number: int,
    noise_multiplier: float,
    on_step: Callable[[int], None] = lambda step: None,
) -> None:
    """Train an adapter's parameters for one round, in place; charge the round before it runs, whatever becomes of it.

    What the parameters are afterwards has, for one patient, the ε of `training.steps` times the Gaussian mechanism
    with `noise_multiplier` on a Poisson sample at `privacy.sampling_rate`. Losses are not even computed into a return
    value: nothing but the parameters may leave.

    Args:
        adapted: the model with the adapter's parameters at the start of the round.
        lesson: what it learns from, and whose it is.
        study: how; `privacy` decides how many patients make a step, `training.batch_size` how many examples pass the
            network at once.
        round_number: counted from 1.
        noise_multiplier: of the study's plan.
        on_step: called after each step with its number.

    Raises:
        PrivacyError: the model or adapter has no per-example gradients.
    """
    check_trainable(adapted)
    privacy, training = study.privacy, study.training
    examples, sampled = loss_sampler(adapted, lesson, study, secret_generator()), Patients(lesson.patients)
    learned = list(adapted.trainable.values())
    optimizer = SecretNoiseOptimizer(
        torch.optim.AdamW(learned, lr=training.learning_rate, weight_decay=0.0),
        noise_multiplier=noise_multiplier,
        max_grad_norm=privacy.max_grad_norm,
        expected_batch_size=privacy.expected_batch_size,
    )
    average = _Average(learned, privacy.ema)
    hooks = GradSampleModule(adapted.model.unet, loss_reduction="sum")
    adapted.model.unet.train()
    try:
        for index, chosen in enumerate(sampled.steps(privacy.sampling_rate, training.steps)):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(study, round_number, index)
            rows = sampled.draw(chosen, privacy.augmentation_multiplicity)
            accumulate_gradient(optimizer, hooks, examples, rows, privacy, training.batch_size)
            _add_prior_gradient(hooks, examples, learned)
            optimizer.original_optimizer.step()
            optimizer.zero_grad()
            average.add()
            on_step(index + 1)
    finally:
        hooks.to_standard_module()
        adapted.model.unet.eval()
        for parameter in learned:
            parameter.grad = None
    average.write()


def check_trainable(adapted: AdaptedModel[Any]) -> None:
    """Refuse what has no gradient of its own for each example; raises `PrivacyError`."""
    outside = [name for name in adapted.trainable if not name.startswith("unet.")]
    if outside:
        raise PrivacyError(
            f"'{outside[0]}' learns outside the UNet, without a gradient for each patient: under privacy.enabled "
            "choose adapter lora, custom_diffusion, dreambooth or basic"
        )
    unet = adapted.model.unet
    if getattr(unet, "is_gradient_checkpointing", False):
        raise PrivacyError("gradient checkpointing leaves no gradient for each patient: switch it off")
    mixing = [str(error) for error in ModuleValidator.validate(unet.train(), strict=False)]
    unet.eval()
    if mixing:
        raise PrivacyError(f"the base mixes the examples of a batch ({mixing[0]}): use one with group norm")


class Patients:
    """The rows of each patient, and random choices among them; `uniform` gives numbers in (0, 1) of a shape."""

    def __init__(self, patients: Sequence[str], uniform: Callable[[Sequence[int]], Tensor] = secret_uniform) -> None:
        names = sorted(set(patients))
        self.uniform = uniform
        self.rows = [torch.tensor([row for row, own in enumerate(patients) if own == name]) for name in names]

    def steps(self, rate: float, steps: int) -> Iterator[list[int]]:
        """For each step the numbers of the patients in it, each there with chance `rate`; there may be none."""
        for _ in range(steps):
            yield (self.uniform((len(self.rows),)) < rate).nonzero()[:, 0].tolist()

    def draw(self, chosen: Sequence[int], draws: int) -> Tensor:
        """Rows `(P,K)`: K visits of each chosen patient, with replacement."""
        picked = [
            self.rows[patient][(own * len(self.rows[patient])).long()]
            for patient, own in zip(chosen, self.uniform((len(chosen), draws)), strict=True)
        ]
        return torch.stack(picked) if picked else torch.zeros((0, draws), dtype=torch.long)


def accumulate_gradient(
    optimizer: DPOptimizer,
    hooks: GradSampleModule,
    examples: LossSampler,
    rows: Tensor,
    privacy: DpConfig,
    at_once: int,
) -> None:
    """Put the noised mean gradient of these patients' rows `(P,K)` into the parameters' `grad`, in chunks.

    A chunk is of whole patients with `at_once` examples together, and of one patient at least.
    """
    parameters = [parameter for parameter in hooks.parameters() if parameter.requires_grad]
    size = sum(parameter.numel() for parameter in parameters) * privacy.augmentation_multiplicity
    chunks = rows.split(max(1, min(at_once // privacy.augmentation_multiplicity, MOST_GRADIENTS // size)))
    for number, chunk in enumerate(chunks, start=1):
        if len(chunk):
            hooks.enable_hooks()
            with warnings.catch_warnings():  # a first layer that learns has no input with a gradient, nor needs one
                warnings.filterwarnings("ignore", "Full backward hook")
                (examples.scans_loss(chunk.flatten(), "sum") / privacy.augmentation_multiplicity).backward()
            hooks.disable_hooks()
        for parameter in parameters:
            parameter.grad_sample = _by_patient(parameter, len(chunk), privacy.augmentation_multiplicity)
        last = number == len(chunks)
        optimizer.signal_skip_step(do_skip=not last)
        optimizer.pre_step()
        if not last:
            optimizer.zero_grad()


def _by_patient(parameter: nn.Parameter, patients: int, draws: int) -> Tensor:
    """Gradients `(P, *shape)`, one a patient; the noise alone makes a step when there is none.

    A gradient that is not finite counts as zero: its patient's clipped share would be nothing else.
    """
    found: Tensor | None = getattr(parameter, "grad_sample", None) if patients else None
    if found is None:
        return torch.zeros((patients, *parameter.shape), device=parameter.device)
    return torch.nan_to_num(found.view(patients, draws, *parameter.shape).sum(1), nan=0.0, posinf=0.0, neginf=0.0)


def _add_prior_gradient(hooks: GradSampleModule, examples: LossSampler, learned: Sequence[nn.Parameter]) -> None:
    """The preserved prior is the base's own and public: its gradient is neither clipped nor noised."""
    hooks.disable_hooks()
    loss = examples.prior_loss()
    if loss is not None:
        for parameter, gradient in zip(learned, torch.autograd.grad(loss, learned), strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


class _Average:
    """Exponential moving average of parameters, which costs no privacy; a short run counts its first steps less."""

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self.parameters, self.decay, self.steps = parameters, decay, 0
        self.values = [parameter.detach().clone() for parameter in parameters]

    def add(self) -> None:
        """Take the parameters of a step in."""
        self.steps += 1
        decay = min(self.decay, self.steps / (self.steps + 10))
        for value, parameter in zip(self.values, self.parameters, strict=True):
            value.lerp_(parameter.detach(), 1 - decay)

    def write(self) -> None:
        """Make the average the parameters."""
        with torch.no_grad():
            for value, parameter in zip(self.values, self.parameters, strict=True):
                parameter.copy_(value)
