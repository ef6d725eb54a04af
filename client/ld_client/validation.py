"""Validation at a site: the study's adapter after a round, scored on the site's held-out patients.

    loss                     mean squared error of the network on every held-out visit, at fixed timesteps and noise
    visits                   of held-out patients, rounded as the policy's counts are
    pairs                    pairs of visits of these patients, where the study has a longitudinal drift
    followup_gain_db         of the drift's prediction of the later visit's latents over copying the earlier one's
    same_for_all_gain_db     of the rule without a picture: the mean change in a year of the site's other patients

The noise of a visit follows from the study's seed and the visit's place, so the losses of two rounds differ by the
adapter alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ld_client.data.store import Store, open_store, split_store
from ld_client.data.withdrawals import check_consent
from ld_client.policy import check_hours, check_store, rounded_count, within_memory
from ld_client.privacy.ledger import VALIDATION, Ledger, RoundLimit, Use
from ld_client.round import checked_adapter, checked_study, load_weights, own_part
from ld_client.site_config import SiteConfig, load_modality
from ld_client.site_drift import site_drift
from ld_client.train import computing
from ld_common.adapters.state_dict import state_digest
from ld_common.core.errors import LdError, PolicyError
from ld_common.core.seeding import torch_generator
from ld_common.diffusion.base_model import Denoiser, load_denoiser
from ld_common.diffusion.computing import Computing
from ld_common.diffusion.conditioning import Condition, image_condition
from ld_common.diffusion.drift import LatentDrift, centre, entering, shift_noise
from ld_common.diffusion.longitudinal import AttributeChange, LongitudinalDrift
from ld_common.diffusion.longitudinal_sums import DAYS_IN_YEAR
from ld_common.diffusion.loss import denoising_loss
from ld_common.diffusion.training import FLOAT32, TrainingData
from ld_common.imaging.modality import Modality
from ld_common.protocol.messages import LOSS, SCORED_VISITS, TrainResult, TrainTask

TIMES = 8
"""Timesteps at which each visit is scored, evenly spread over the schedule."""
MOST_VISITS = 128
"""Visits that are scored: of more, an even choice."""
ROWS_AT_ONCE = 16
PAIRS, DRIFT_GAIN, RULE_GAIN = "pairs", "followup_gain_db", "same_for_all_gain_db"


class HeldOutError(LdError):
    """The site holds out too few patients for a validation."""

    code = "held_out"


def handle_validate(site: SiteConfig, task: TrainTask) -> TrainResult:
    """Score the task's weights on the site's held-out patients; nothing is trained.

    The ledger records it. A round is scored for one set of weights only: with many, a server could search for weights
    whose loss tells whether a scan is there.

    Raises:
        HeldOutError: fewer patients than `policy.min_patients` are held out.
        PolicyError: the study is private or sums secretly, and then no score may leave.
        LdError: as for a training task.
    """
    check_hours(site.policy)
    with within_memory(site.policy):
        study = checked_study(site, task)
        if not study.validates:
            raise PolicyError("the study does not validate: no score of its rounds leaves")
        store = open_store(site.store_path, base_digest=task.base_digest, modality_digest=task.modality_digest)
        trained, held_out = split_store(store, site.held_out)
        check_store(site.policy, trained, study)
        if held_out.patients < site.policy.min_patients:
            raise HeldOutError(
                f"{held_out.patients} patients are held out, policy.min_patients is {site.policy.min_patients}: set "
                "held_out in the site's config"
            )
        model, modality = load_denoiser(site.base_model, site.device), load_modality(site)
        adapted = checked_adapter(site, model, task, study, task.round)
        drift = None
        if study.drift.shape not in ("none", "conditional", "longitudinal"):  # what the network was centred on
            drift = site_drift(site, modality, trained, model, study)
        entered = None if drift is None else entering(drift, study.drift.formulation)
        load_weights(adapted, task, own_part(site, study, task, task.round + 1))
        visits = TrainingData(
            held_out.latents,
            held_out.prompts,
            entered if isinstance(entered, LatentDrift) else None,
            patients=held_out.pseudonyms,
            condition_vectors=held_out.condition_vectors(modality),
        )
        whole = state_digest({**task.weights, **task.drift})
        use = Use(study.name, study.digest(), task.round, {VALIDATION: None}, task=whole, cohort=trained.digest())
        limit = RoundLimit(site.policy.max_rounds, "policy.max_rounds")
        Ledger(site.ledger_path).charge(use, site.policy.max_epsilon, site.policy.delta, limit)
        scores = {
            LOSS: validation_loss(adapted.model, visits, study.seed, computing(site)),
            SCORED_VISITS: float(rounded_count(site.policy, len(held_out.latents))),
        }
        if task.drift:
            scores |= followup_scores(LongitudinalDrift.from_state(task.drift), modality, trained, held_out)
            scores[PAIRS] = float(rounded_count(site.policy, int(scores[PAIRS])))
        check_consent(site.store_path, store.pseudonyms)
        return TrainResult(site.site, task.round, {}, None, None, scores=scores)


@torch.no_grad()
def validation_loss(model: Denoiser, data: TrainingData, seed: int, arithmetic: Computing = FLOAT32) -> float:
    """The network's mean squared error over visits, timesteps and pixels.

    Args:
        model: the adapted base.
        data: the visits, sorted by patient and day; an image-conditioned network gets the patient's first one.
        seed: of the noise; equal seeds give every adapter the same.
        arithmetic: how the network computes.
    """
    model.unet.eval()
    chosen = torch.linspace(0, len(data.latents) - 1, min(MOST_VISITS, len(data.latents))).round().long()
    levels, kind = model.scheduler.alphas_cumprod, model.scheduler.config["prediction_type"]
    times = ((torch.arange(TIMES) + 0.5) * len(levels) / TIMES).long()
    centred, total = centre(data.latents, data.drift), 0.0
    first = {name: row for row, name in reversed(list(enumerate(data.patients)))}
    for rows in chosen.split(ROWS_AT_ONCE):
        latents = centred[rows].to(model.device)
        baseline = None
        if model.image_conditioned:
            begun = torch.tensor([first[data.patients[row]] for row in rows.tolist()])
            changes = data.condition_vectors[rows] - data.condition_vectors[begun]
            baseline = image_condition(centred[begun].to(model.device), changes)
        condition = Condition(model.embed([data.prompts[row] for row in rows.tolist()]), baseline)
        for time in times.tolist():
            noise = torch.stack([_noise(seed, row, time, centred[0]) for row in rows.tolist()]).to(model.device)
            mixed = shift_noise(noise, data.drift, levels)
            timesteps = torch.full((len(rows),), time, device=model.device)
            with arithmetic.on(model.device):
                loss = denoising_loss(model.unet, levels, kind, latents, condition, timesteps, noise, mixed)
            total += float(loss) * len(rows)
    return total / (len(chosen) * TIMES)


def followup_scores(drift: LongitudinalDrift, modality: Modality, trained: Store, held_out: Store) -> dict[str, float]:
    """The drift's prediction of each held-out patient's last visit from the first, against two rules.

    Returns:
        `pairs`, and where there are any: `followup_gain_db` and `same_for_all_gain_db`, 10·log10 of copying's squared
        error over the prediction's.
    """
    yearly = _mean_change(trained)
    copied = predicted = ruled = 0.0
    pairs = _pairs(held_out)
    for before, after in pairs:
        start, change = held_out.latents[before], held_out.latents[after] - held_out.latents[before]
        years = _years(held_out, before, after)
        attributes = held_out.attributes
        source, target = (tuple(modality.design_vector(attributes[row])) for row in (before, after))
        switched = tuple(
            old if number else new for old, new, number in zip(source, target, modality.numeric_columns, strict=True)
        )
        told = drift.change(start, AttributeChange(source, switched, target, years))
        copied += float(change.double().square().sum())
        predicted += float((change - told).double().square().sum())
        ruled += float((change - years * yearly).double().square().sum())
    scores = {PAIRS: float(len(pairs))}
    if copied > 0 and predicted > 0 and ruled > 0:
        scores |= {DRIFT_GAIN: 10 * math.log10(copied / predicted), RULE_GAIN: 10 * math.log10(copied / ruled)}
    return scores


def _noise(seed: int, row: int, time: int, like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=torch_generator(seed, "validation", row, time))


def _pairs(store: Store) -> list[tuple[int, int]]:
    """Rows of each patient's first and last visit, where they are of different days; rows are sorted by day."""
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(store.pseudonyms):
        rows.setdefault(name, []).append(row)
    return [(own[0], own[-1]) for own in rows.values() if store.days[own[-1]] > store.days[own[0]]]


def _years(store: Store, before: int, after: int) -> float:
    return (store.days[after] - store.days[before]) / DAYS_IN_YEAR


def _mean_change(store: Store) -> Tensor:
    """Least-squares change of the latents in a year `(C,h,w)`, the same for all patients; zeros without pairs."""
    total, weight = torch.zeros_like(store.latents[0]), 0.0
    for before, after in _pairs(store):
        years = _years(store, before, after)
        total += years * (store.latents[after] - store.latents[before])
        weight += years**2
    return total / weight if weight else total
