"""Canary patients: patients of the site of whom coins put half into a training run, to be looked for in its result.

They are the site's own, with all their visits: what is looked for is what an attacker would look for. Made-up canaries
of noise were tried: an adapter that told its patients from others did not tell such canaries apart. Whoever is no
canary takes part in any case.

Training with canaries is a rehearsal: the same study, site and privacy settings, thrown away afterwards.
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
    """Who takes part in a rehearsal, and about whom is guessed."""

    training: Scans
    """Of everybody who is no canary and of the canaries whose coin let them in."""
    canaries: Scans
    """Of all canaries."""
    included: Tensor
    """`(M,)` bool, in the order of canaries' pseudonyms: fair, independent coins, secret from whoever scores."""


def cast_rehearsal(scans: Scans, count: int, seed: int) -> Rehearsal:
    """Make canaries of some patients and toss their coins; the same seed does the same.

    Args:
        scans: of all patients who could take part.
        count: of canaries, M, or all patients where there are fewer. More can show more: `EpsilonBound.ceiling`.
        seed: of the choice and the coins.

    Raises:
        AuditError: not at least one canary, or the coins let nobody take part.
    """
    if count < 1:
        raise AuditError(f"{count} canaries audit nothing: use 1 or more")
    names, generator = sorted(set(scans.pseudonyms)), numpy_generator(seed, "canaries")
    chosen = sorted(generator.choice(names, min(count, len(names)), replace=False).tolist())
    included = generator.random(len(chosen)) < 0.5
    coins = dict(zip(chosen, included.tolist(), strict=True))
    canaries = [row for row, name in enumerate(scans.pseudonyms) if name in coins]
    training = [row for row, name in enumerate(scans.pseudonyms) if coins.get(name, True)]
    if not training:
        raise AuditError(f"the coins of {len(chosen)} canaries let nobody take part: there are too few patients")
    return Rehearsal(scans.take(training), scans.take(canaries), torch.from_numpy(included))


def audit_canaries(
    base: Denoiser,
    tuned: Denoiser,
    scans: Scans,
    included: Tensor,
    delta: float = 0.0,
    confidence: float = 0.95,
    guesses: Sequence[int] | None = None,
    options: AttackOptions | None = None,
    progress: Progress = lambda done, total: None,
) -> EpsilonBound:
    """Score canaries by the loss attack and bound the ε of the run that trained `tuned`.

    Args:
        base: the model that the run started from.
        tuned: what the run made of it and of the canaries that took part.
        scans: of all canaries, in or out, with the run's drift.
        included: the coins `(M,)`, in the order of pseudonyms.
        delta: of the (ε, δ) that is tested: the study's δ, or 0.
        confidence: that the bound is true.
        guesses: as in `audit_epsilon`.
        options: how hard to look.
        progress: called with the scans done.

    Raises:
        AuditError: as `audit_epsilon`.
    """
    scores = patient_scores(LOSS_THRESHOLD, base, tuned, scans, options or AttackOptions(), progress)
    return audit_epsilon(list(scores.values()), included.tolist(), delta, confidence, guesses)
