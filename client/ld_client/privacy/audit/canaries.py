"""Canary patients: made-up patients of whom half are put into a training run, to be looked for in its result.

A canary's scan is white noise in latent space: every value drawn by itself from N(mean, std) of its channel. Such
scans have nothing in common with each other or with a patient, so nothing but its own presence makes one easier for
the trained model than another, and no two share what is learned of them: that is as near as an input gets to the worst
case (the paper's canaries of random gradients need access that a site's training does not give). The prompt says
attributes drawn evenly from the modality's, as any patient's might be. A canary may have several visits, all of the
one scan: it then weighs as much as the patient with most visits.

Training with canaries is a rehearsal: the same study, site and privacy settings, thrown away afterwards. What it
learned of noise must not reach a release.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ld_client.privacy.audit.membership import LOSS_THRESHOLD, AttackOptions, Progress, Scans, patient_scores
from ld_client.privacy.audit.one_run import EpsilonBound, audit_epsilon
from ld_client.privacy.audit.statistics import AuditError
from ld_common.modality import Attributes, Modality
from ld_common.models import Denoiser
from ld_common.seeding import numpy_generator, torch_generator

PSEUDONYM = "canary-{:06d}"


@dataclass(frozen=True, eq=False)
class Canaries:
    """Made-up patients, M in all, with V visits each."""

    scans: Scans
    """`M * V` scans, a patient's side by side, in the order of `included`."""
    attributes: list[Attributes]
    """What each scan's prompt says, `M * V`."""
    included: Tensor
    """`(M,)` bool: the coins, fair and independent; a secret from whoever scores the canaries."""

    def taking_part(self) -> tuple[Scans, list[Attributes]]:
        """The scans, with their attributes, that go into training.

        Raises:
            AuditError: every coin said no.
        """
        visits = len(self.scans) // len(self.included)
        rows = self.included.repeat_interleave(visits).nonzero().flatten().tolist()
        chosen = [self.scans.prompts[row] for row in rows], [self.scans.pseudonyms[row] for row in rows]
        return Scans(self.scans.latents[rows], *chosen), [self.attributes[row] for row in rows]


def make_canaries(
    modality: Modality, mean: Tensor, std: Tensor, side: int, count: int, seed: int, visits: int = 1
) -> Canaries:
    """Draw canary patients and their coins; the same seed draws the same.

    Args:
        modality: the study's, whose attributes their prompts say.
        mean: of scaled latents by channel `(C,)`; the site's own, so that canaries are no louder than its scans.
        std: of the same `(C,)`.
        side: height and width of a latent.
        count: of canaries, M. More can show more: `EpsilonBound.ceiling`.
        seed: of all draws.
        visits: scans of each.

    Raises:
        AuditError: not at least one canary with one visit.
    """
    if count < 1 or visits < 1:
        raise AuditError(f"{count} canaries of {visits} visits audit nothing: use 1 or more of each")
    noise = torch.randn((count, len(mean), side, side), generator=torch_generator(seed, "canaries", "scans"))
    latents = mean.cpu()[:, None, None] + std.cpu()[:, None, None] * noise
    numbers, coins = numpy_generator(seed, "canaries", "attributes"), numpy_generator(seed, "canaries", "coins")
    attributes = [drawn for _ in range(count) for drawn in [_draw_attributes(modality, numbers)] * visits]
    return Canaries(
        scans=Scans(
            latents.repeat_interleave(visits, 0),
            [modality.describe(each) for each in attributes],
            [PSEUDONYM.format(patient) for patient in range(count) for _ in range(visits)],
        ),
        attributes=attributes,
        included=torch.from_numpy(coins.random(count) < 0.5),
    )


def _draw_attributes(modality: Modality, generator: np.random.Generator) -> Attributes:
    """Every attribute of a modality, even over its words or between its bounds."""
    drawn: Attributes = {}
    for name, known in modality.attributes.items():
        words = list(known.words)
        drawn[name] = (
            words[generator.integers(len(words))] if words else generator.uniform(known.minimum, known.maximum)
        )
    return drawn


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
        scans: of all canaries, in or out, as `Canaries.scans`, with the run's drift.
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
