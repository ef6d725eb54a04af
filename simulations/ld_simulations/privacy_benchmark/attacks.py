"""The audit turned on a run that learned by heart and on a private one: can it see, and does it stay below ε?"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from ld_client.privacy.audit.canaries import audit_canaries, make_canaries
from ld_client.privacy.audit.membership import AttackOptions, Scans, audit_membership
from ld_client.privacy.private import train_round_privately
from ld_client.train import Lesson, train_round
from ld_common.models import load_denoiser
from ld_common.schemes import attach, read_scheme
from ld_simulations.privacy_benchmark.plan import Attacked
from ld_simulations.privacy_benchmark.quality import QualityRuns, first_patients, lesson_of

POINTS = 16


def patients_of_attacks(runs: QualityRuns) -> Lesson:
    """Members and those who are left out, made once and kept."""
    return runs.lesson(runs.private, runs.config.attacked_patients + runs.config.left_out_patients)


def attack(runs: QualityRuns, attacked: Attacked) -> dict[str, Any]:
    """Train on patients and canaries, with or without privacy, and attack with those who were left out."""
    benchmark, seed = runs.benchmark, attacked.seed
    config, device = benchmark.config, benchmark.config.device
    members, everyone = config.attacked_patients, patients_of_attacks(runs)
    inside = first_patients(everyone, members)
    rows = [row for row, name in enumerate(everyone.patients) if name not in set(inside.patients)]
    outside, latents = lesson_of(everyone, rows), inside.latents
    moments = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    canaries = make_canaries(benchmark.modality, *moments, latents.shape[-1], config.canaries, seed, visits=3)
    joining, _ = canaries.taking_part()
    study = benchmark.study_of(config.attacked_setting(attacked.private), seed)
    model = load_denoiser(benchmark.study.base_model, device)
    attached = attach(model, read_scheme(study.scheme), seed)
    prompts, names = [*inside.prompts, *joining.prompts], [*inside.patients, *joining.pseudonyms]
    lesson = Lesson(torch.cat([latents, joining.latents]), prompts, patients=names)
    if attacked.private:
        train_round_privately(attached, lesson, study, 1, study.privacy_plan().step.noise_multiplier)
    else:
        train_round(attached, lesson, study, 1, "attack")
    base = load_denoiser(benchmark.study.base_model, device)
    options = AttackOptions(points=POINTS, offset_noise=study.training.offset_noise, seed=seed)
    delta = study.privacy.delta if attacked.private else 0.0
    membership = audit_membership(
        base,
        attached.model,
        Scans(latents, inside.prompts, inside.patients),
        Scans(outside.latents, outside.prompts, outside.patients),
        options,
    )
    bound = audit_canaries(
        base,
        attached.model,
        canaries.scans,
        canaries.included,
        delta,
        options=options,
    )
    return {
        "epsilon": study.privacy_plan().epsilon if attacked.private else None,
        "seed": seed,
        "membership": [asdict(report) for report in membership],
        "canaries": asdict(bound),
    }
