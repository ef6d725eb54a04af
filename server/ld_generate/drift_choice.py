"""The values of `--drift` of `ld-generate sample`, and the latent drift that each stands for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ld_common.core.config import nearest
from ld_common.core.errors import RequestError
from ld_common.diffusion.base_model import Denoiser
from ld_common.diffusion.drift import LatentDrift, at_designs, drift_from_shift
from ld_common.imaging.modality import Attributes
from ld_common.protocol.site_name import RELEASE
from ld_common.release.release import AnyDrift, Release


@dataclass(frozen=True)
class DriftChoice:
    """One value of `--drift`."""

    name: str
    """As files and labels show it."""
    delta: float | None
    """δ in the paper's units; None for `release` or a site's drift."""
    trained: AnyDrift | None = None
    """The drift of the release or of the site."""

    def latent_drift(self, release: Release, model: Denoiser, attributes: Attributes) -> LatentDrift | None:
        """The drift of samples that have these attributes.

        Raises:
            ConfigError: a δ, with a base whose noise schedule ends at a signal level of 0.
        """
        if not self.delta:
            drift = at_designs(self.trained, [release.modality.design_vector(attributes)])
            # all samples share the attributes, and so one μ
            return LatentDrift(drift.mean[0], drift.formulation) if drift and drift.mean.dim() == 4 else drift
        return LatentDrift(
            drift_from_shift(self.delta, model.scheduler.alphas_cumprod), release.study.drift.formulation
        )


def choose_drifts(release: Release, words: Sequence[str]) -> list[DriftChoice]:
    """The drifts that `--drift` names, without duplicates: `release`, a site of the release, or a number.

    Raises:
        RequestError: another word.
    """
    return list({choice.name: choice for choice in (_choice(release, word) for word in words)}.values())


def _choice(release: Release, word: str) -> DriftChoice:
    if word == RELEASE:
        return DriftChoice(word, None, release.drift)
    if word in release.site_drifts:
        return DriftChoice(word, None, release.site_drifts[word])
    try:
        delta = float(word)
    except ValueError:
        delta = math.nan
    if not math.isfinite(delta):
        names = [RELEASE, *sorted(release.site_drifts)]
        raise RequestError(f"--drift '{word}' is neither a number nor a known name: {nearest(word, names)}")
    return DriftChoice(f"{delta:+g}" if delta else "0", delta)
