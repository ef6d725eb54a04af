"""`ld-generate --drift`: from a word on the command line to the drift that pictures are drawn with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ld_common.drift import Drift, drift_from_shift
from ld_common.errors import RequestError
from ld_common.models import Denoiser
from ld_common.release import Release

RELEASE, AUTO = "release", "auto"


@dataclass(frozen=True)
class DriftChoice:
    """One value of `--drift`."""

    name: str
    """As files and labels show it."""
    delta: float | None
    """δ in the paper's units; None for `release` or a site's drift."""
    drift: Drift | None
    """What samples start from; edits take their start from the scan."""


def choose_drifts(release: Release, model: Denoiser, words: Sequence[str]) -> list[DriftChoice]:
    """The drifts that `--drift` names: `release`, a site of the release, or a number.

    Raises:
        RequestError: a word that is none of these.
        ConfigError: a number, where the base's schedule ends without signal.
    """
    return [_choice(release, model, word) for word in dict.fromkeys(words)]


def _choice(release: Release, model: Denoiser, word: str) -> DriftChoice:
    if word == RELEASE:
        return DriftChoice(word, None, release.drift)
    if word in release.site_drifts:
        return DriftChoice(word, None, release.site_drifts[word])
    try:
        delta = float(word)
    except ValueError:
        delta = math.nan
    if not math.isfinite(delta):
        known = ", ".join([RELEASE, AUTO, *sorted(release.site_drifts)])
        raise RequestError(f"--drift {word} is no number and none of {known}")
    formulation = release.study.drift.formulation
    shift = drift_from_shift(delta, model.scheduler.alphas_cumprod) if delta else None
    return DriftChoice(f"{delta:+g}" if delta else "0", delta, None if shift is None else Drift(shift, formulation))
