"""Membership attacks on an overfitted and on a private training."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ld_client.audit.canaries import cast_rehearsal
from ld_client.audit.membership import (
    LOSS_THRESHOLD,
    PROXIMAL_INITIALISATION,
    AttackOptions,
    Scans,
    membership_report,
    patient_scores,
)
from ld_client.audit.one_run import audit_epsilon
from ld_client.privacy.dp_sgd import train_round_privately
from ld_client.train import train_round
from ld_common.adapters.base import inject
from ld_common.adapters.registry import read_adapter
from ld_common.diffusion.base_model import load_denoiser
from ld_common.diffusion.training import TrainingData
from ld_simulations.benchmarks.privacy.plan import PrivacyTraining
from ld_simulations.benchmarks.privacy.quality import QualityRuns

POINTS = 16


def patients_of_attacks(runs: QualityRuns) -> Scans:
    """Patients of the private hospital, of whom a coin lets each into a training; made once and kept."""
    data = runs.training_data(runs.private, runs.config.attacked_patients)
    return Scans(data.latents, data.prompts, data.patients)


def attack(runs: QualityRuns, training: PrivacyTraining) -> dict[str, Any]:
    """Train on the patients whom a coin chose, with or without privacy, and attack the result."""
    benchmark, seed, private = runs.benchmark, training.seed, training.setting.epsilon > 0
    config, device = benchmark.config, benchmark.config.device
    study = benchmark.study_of(training.setting, seed)
    rehearsal = cast_rehearsal(patients_of_attacks(runs), config.attacked_patients, seed)
    inside = rehearsal.training
    adapted = inject(load_denoiser(benchmark.study.base_model, device), read_adapter(study.adapter), seed)
    data = TrainingData(inside.latents, inside.prompts, patients=inside.pseudonyms)
    if private:
        train_round_privately(adapted, data, study, 1, study.privacy_plan().step.noise_multiplier)
    else:
        train_round(adapted, data, study, 1, "attack")
    base = load_denoiser(benchmark.study.base_model, device)
    options = AttackOptions(points=POINTS, noise_offset=study.training.noise_offset, seed=seed)
    coins, membership, scores = rehearsal.included.tolist(), [], {}
    for kind in (LOSS_THRESHOLD, PROXIMAL_INITIALISATION):
        scores[kind] = list(patient_scores(kind, base, adapted.model, rehearsal.canaries, options).values())
        sides: tuple[list[float], list[float]] = [], []
        for score, included in zip(scores[kind], coins, strict=True):
            sides[0 if included else 1].append(score)
        membership.append(asdict(membership_report(kind, *sides)))
    delta = study.privacy.target_delta if private else 0.0
    return {
        "epsilon": study.privacy_plan().epsilon if private else None,
        "seed": seed,
        "membership": membership,
        "canaries": asdict(audit_epsilon(scores[LOSS_THRESHOLD], coins, delta)),
    }
