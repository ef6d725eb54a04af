"""Membership inference: two attacks on a tuned model, scored by patient and calibrated by the plain base.

The unit is the patient: a patient's score is the mean over the patient's visits. A visit's score is the base's error
minus the tuned model's, so that scans which are easy for any model do not count (reference calibration, arXiv
2111.08440). Both sides must be patients of one site, split at random before training: patients of another site would
differ by scanner.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ld_client.audit.statistics import Area, AuditError, OperatingPoint, area_under_curve, operating_point
from ld_common.core.seeding import torch_generator
from ld_common.diffusion.base_model import Denoiser
from ld_common.diffusion.conditioning import Condition
from ld_common.diffusion.drift import LatentDrift, centre, shift_noise
from ld_common.diffusion.loss import denoising_loss, training_noise
from ld_common.diffusion.schedule import predictor

FALSE_POSITIVE_RATES = (0.01, 0.001)
LOSS_THRESHOLD = "loss threshold"
PROXIMAL_INITIALISATION = "proximal initialisation"
PROXIMAL_TIME = 0.2
"""Timestep of the proximal attack as a share of the schedule: 200 of 1,000."""
PROXIMAL_POWER = 4
"""Power of the norm, as in the authors' code."""

Progress = Callable[[int, int], None]
"""Called with the number of scans done and of all."""


@dataclass(frozen=True, eq=False)
class Scans:
    """Scans of a site's patients, N in all."""

    latents: Tensor
    """`(N,C,h,w)`, scaled, as in the store."""
    prompts: list[str]
    pseudonyms: list[str]
    """Patient of each."""
    drift: LatentDrift | None = None
    """Drift of their training; its μ may be one a scan, `(N,C,h,w)`."""
    condition_vectors: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    """`Modality.condition_vector` of each, `(N,k)`, or empty; needed by image-conditioned adapters."""

    def __post_init__(self) -> None:
        counts = len(self.latents), len(self.prompts), len(self.pseudonyms)
        if len(set(counts)) > 1 or not counts[0]:
            raise AuditError(
                f"there are {counts[0]} latents, {counts[1]} prompts, {counts[2]} pseudonyms: give one each"
            )

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, rows: list[int]) -> Scans:
        """Some of the scans, in this order."""
        prompts, pseudonyms = ([words[row] for row in rows] for words in (self.prompts, self.pseudonyms))
        drift = None if self.drift is None else self.drift.rows(rows)
        places = self.condition_vectors[rows] if len(self.condition_vectors) else self.condition_vectors
        return Scans(self.latents[rows], prompts, pseudonyms, drift, places)


@dataclass(frozen=True)
class AttackOptions:
    """Options of the attacks, which determine the scores."""

    points: int = 32
    """Pairs of timestep and noise for each scan's loss, the same for every scan and for both models."""
    noise_offset: float = 0.0
    """The study's `training.noise_offset`, for noise like in training."""
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if self.points < 1 or self.batch_size < 1:
            raise AuditError(f"points is {self.points}, batch_size {self.batch_size}: use 1 or more")


@dataclass(frozen=True)
class MembershipReport:
    """Result of one attack; unit: patient."""

    attack: str
    members: int
    """Patients who were trained on."""
    held_out: int
    """Patients who were not."""
    confidence: float
    """Of every interval."""
    area: Area
    operating_points: tuple[OperatingPoint, ...]
    """At 1 % and 0.1 % false positives."""


def audit_membership(
    base: Denoiser,
    tuned: Denoiser,
    members: Scans,
    held_out: Scans,
    options: AttackOptions | None = None,
    confidence: float = 0.95,
    progress: Progress = lambda done, total: None,
) -> tuple[MembershipReport, ...]:
    """Run both attacks on both sides in float32; the models must not share trained weights.

    Raises:
        AuditError: a patient is on both sides, fewer than two patients on one, or a score is not finite.
    """
    options = options or AttackOptions()
    both = set(members.pseudonyms) & set(held_out.pseudonyms)
    if both:
        raise AuditError(f"{len(both)} patients are both members and held out: split by patient, not by visit")
    reports = []
    total = 2 * (len(members) + len(held_out))
    done = 0
    for attack in (LOSS_THRESHOLD, PROXIMAL_INITIALISATION):
        sides = []
        for scans in (members, held_out):
            start = done

            def advance(count: int, _: int, start: int = start) -> None:
                progress(start + count, total)

            sides.append(list(patient_scores(attack, base, tuned, scans, options, advance).values()))
            done += len(scans)
        reports.append(membership_report(attack, sides[0], sides[1], confidence))
    return tuple(reports)


def patient_scores(
    attack: str,
    base: Denoiser,
    tuned: Denoiser,
    scans: Scans,
    options: AttackOptions,
    progress: Progress = lambda done, total: None,
) -> dict[str, float]:
    """Base error minus tuned error by pseudonym, sorted by pseudonym; higher for likelier members.

    Args:
        attack: `LOSS_THRESHOLD` or `PROXIMAL_INITIALISATION`.
        base: the model that training started from.
        tuned: the model after training.
        scans: of the patients to score.
        options: of the attack.
        progress: called with the scans done.
    """
    size = options.batch_size
    scores = torch.empty(len(scans))
    for start in range(0, len(scans), size):
        rows = slice(start, min(start + size, len(scans)))
        latents, prompts = scans.latents[rows], scans.prompts[rows]
        drift = None if scans.drift is None else scans.drift.rows(rows)
        errors = [_errors(attack, model, latents, prompts, drift, options) for model in (base, tuned)]
        scores[rows] = errors[0] - errors[1]
        progress(rows.stop, len(scans))
    return mean_by_patient(scores.tolist(), scans.pseudonyms)


def mean_by_patient(scores: Sequence[float], pseudonyms: Sequence[str]) -> dict[str, float]:
    """Mean score of each patient's visits, sorted by pseudonym."""
    visits: dict[str, list[float]] = {}
    for score, pseudonym in zip(scores, pseudonyms, strict=True):
        visits.setdefault(pseudonym, []).append(score)
    return {pseudonym: sum(visits[pseudonym]) / len(visits[pseudonym]) for pseudonym in sorted(visits)}


@torch.no_grad()
def grid_losses(
    model: Denoiser, latents: Tensor, prompts: Sequence[str], drift: LatentDrift | None, options: AttackOptions
) -> Tensor:
    """The training loss of each scan, `(B,)`, over a grid of (timestep, noise) that depends on the options only.

    Timesteps lie in the middle of `points` equal parts of the schedule (loss attack: arXiv 2301.09956, 2302.03262).
    """
    levels, kind = model.scheduler.alphas_cumprod, model.scheduler.config["prediction_type"]
    generator = torch_generator(options.seed, "audit", "grid")
    timesteps = ((torch.arange(options.points) + 0.5) / options.points * len(levels)).long()
    noise = training_noise(torch.Size((options.points, *latents.shape[1:])), options.noise_offset, generator)
    losses = []
    for row, prompt in enumerate(prompts):
        row_drift = None if drift is None else drift.rows([row])
        latent, context, loss = centre(latents[row : row + 1], row_drift).to(model.device), model.embed([prompt]), 0.0
        for points in torch.arange(options.points).split(options.batch_size):
            count, chosen = len(points), noise[points]
            mixed = shift_noise(chosen, row_drift, levels).to(model.device)
            repeated = latent.expand(count, -1, -1, -1), Condition(context.expand(count, -1, -1))
            drawn = timesteps[points].to(model.device), chosen.to(model.device), mixed
            loss += count * float(denoising_loss(model.unet, levels, kind, *repeated, *drawn))
        losses.append(loss / options.points)
    return torch.tensor(losses)


@torch.no_grad()
def proximal_errors(model: Denoiser, latents: Tensor, prompts: Sequence[str], drift: LatentDrift | None) -> Tensor:
    """Proximal initialisation attack (PIA, arXiv 2305.18355): one error a scan, `(B,)`, without random numbers.

    ε0 = ε(x_0, 0) replaces the noise; the error is the mean of |ε(a x_0 + s ε0, t) - ε0|^4. Where training adds ε + δ
    to the latents, ε stands for that sum.
    """
    levels = model.scheduler.alphas_cumprod
    forward = None if drift is None or drift.formulation in ("prior", "centred") else LatentDrift(drift.mean, "noise")
    predict = predictor(model, Condition(model.embed(prompts)), forward)
    clean, timestep = centre(latents, drift).to(model.device), round(PROXIMAL_TIME * len(levels))
    proximal, signal = predict(clean, 0).pred_epsilon, float(levels[timestep])
    noisy = signal**0.5 * clean + (1 - signal) ** 0.5 * proximal
    distance = predict(noisy, timestep).pred_epsilon - proximal
    return distance.abs().pow(PROXIMAL_POWER).flatten(1).mean(1).float().cpu()


def _errors(
    attack: str, model: Denoiser, latents: Tensor, prompts: list[str], drift: LatentDrift | None, options: AttackOptions
) -> Tensor:
    if attack == LOSS_THRESHOLD:
        return grid_losses(model, latents, prompts, drift, options)
    if attack == PROXIMAL_INITIALISATION:
        return proximal_errors(model, latents, prompts, drift)
    raise AuditError(f"attack '{attack}' is unknown: known: {LOSS_THRESHOLD}, {PROXIMAL_INITIALISATION}")


def membership_report(
    attack: str, members: list[float], held_out: list[float], confidence: float = 0.95
) -> MembershipReport:
    """The report of the scores of patients on both sides."""
    return MembershipReport(
        attack=attack,
        members=len(members),
        held_out=len(held_out),
        confidence=confidence,
        area=area_under_curve(members, held_out, confidence),
        operating_points=tuple(operating_point(members, held_out, rate, confidence) for rate in FALSE_POSITIVE_RATES),
    )
