"""Canaries: patients of the site, about half of whom take part in a rehearsal by coin toss.

They are real patients with all their visits, as an attacker would look for them; synthetic canaries of noise were not
detected by an adapter that did reveal its patients. All other patients take part.

A rehearsal is a training with the same study, site and privacy settings, whose result is discarded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ld_client.audit.membership import LOSS_THRESHOLD, AttackOptions, Progress, Scans, patient_scores
from ld_client.audit.one_run import EpsilonBound, audit_epsilon
from ld_client.audit.statistics import AuditError
from ld_common.core.seeding import numpy_generator
from ld_common.diffusion.base_model import Denoiser


@dataclass(frozen=True, eq=False)
class Rehearsal:
    """The patients of a rehearsal."""

    training: Scans
    """Scans of all patients who are not canaries, and of the canaries whose coin includes them."""
    canaries: Scans
    """Scans of all canaries."""
    included: Tensor
    """`(M,)` bool, in the order of the canaries' pseudonyms: fair, independent coins, unknown to the scoring."""


def cast_rehearsal(scans: Scans, count: int, seed: int) -> Rehearsal:
    """Choose canaries among the patients and toss their coins; reproducible by the seed.

    Args:
        scans: of all patients who could take part.
        count: number of canaries, M, or all patients if there are fewer. More canaries can show a larger ε
            (`EpsilonBound.ceiling`).
        seed: of the choice and the coins.

    Raises:
        AuditError: there is no canary, or no patient takes part.
    """
    if count < 1:
        raise AuditError(f"the number of canaries is {count}: use 1 or more")
    names, generator = sorted(set(scans.pseudonyms)), numpy_generator(seed, "canaries")
    chosen = sorted(generator.choice(names, min(count, len(names)), replace=False).tolist())
    included = generator.random(len(chosen)) < 0.5
    coins = dict(zip(chosen, included.tolist(), strict=True))
    canaries = [row for row, name in enumerate(scans.pseudonyms) if name in coins]
    training = [row for row, name in enumerate(scans.pseudonyms) if coins.get(name, True)]
    if not training:
        raise AuditError(
            f"none of the {len(chosen)} canaries takes part, and there are no other patients: too few patients"
        )
    return Rehearsal(scans.take(training), scans.take(canaries), torch.from_numpy(included))


@dataclass(frozen=True)
class CanaryTest:
    """The test of `audit_epsilon`, except its scores and coins."""

    delta: float = 0.0
    """δ of the (ε, δ) that is tested: the study's, or 0."""
    confidence: float = 0.95
    guesses: Sequence[int] | None = None


def audit_canaries(
    base: Denoiser,
    tuned: Denoiser,
    scans: Scans,
    included: Tensor,
    test: CanaryTest | None = None,
    options: AttackOptions | None = None,
    progress: Progress = lambda done, total: None,
) -> EpsilonBound:
    """Score canaries by the loss attack and bound the ε of the run that trained `tuned`.

    Args:
        base: the model that the run started from.
        tuned: the model after the run.
        scans: of all canaries, in or out, with the run's drift.
        included: the coins `(M,)`, in the order of pseudonyms.
        test: what is tested, and how surely.
        options: of the loss attack.
        progress: called with the scans done.

    Raises:
        AuditError: as `audit_epsilon`.
    """
    scores = patient_scores(LOSS_THRESHOLD, base, tuned, scans, options or AttackOptions(), progress)
    test = test or CanaryTest()
    return audit_epsilon(
        list(scores.values()), included.tolist(), test.delta, confidence=test.confidence, guesses=test.guesses
    )
