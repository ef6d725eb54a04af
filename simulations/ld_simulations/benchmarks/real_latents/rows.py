"""The rows of the table of drawn pictures, and how each is drawn."""

from __future__ import annotations

from dataclasses import dataclass

FLOOR, EVERYDAY = "training patients' pictures", "everyday crops"
EVERYDAY_MATCHED, GAUSSIAN = "everyday crops, grey levels matched", "Gaussian of the training latents"
BASE, NO_DRIFT, MATCHED = "the base, before fine-tuning", "no drift", "no drift, grey levels matched"
CHANNEL, SITE, MAP = "drift by channel", "drift by channel, each site's own", "drift by map"
CENTRED_ROW = "centred by channel"
PLAIN, CENTRED = "plain", "centred"
TRAININGS = (PLAIN, CENTRED)


@dataclass(frozen=True)
class DrawnRow:
    """Samples of one training under one drift."""

    name: str
    training: str = PLAIN
    shape: str = "none"
    """Of μ: `none`, `channel`, `site` (by channel, one a site) or `map`."""
    spacing: str = ""
    """Of the sampler's timesteps; empty for Stable Diffusion's `leading`."""


DRAWN = (
    DrawnRow(NO_DRIFT),
    DrawnRow("no drift, trailing timesteps", spacing="trailing"),
    DrawnRow(CHANNEL, shape="channel"),
    DrawnRow(SITE, shape="site"),
    DrawnRow(MAP, shape="map"),
    DrawnRow(CENTRED_ROW, CENTRED, "channel"),
)
WITHOUT_TRAINING = (FLOOR, EVERYDAY, EVERYDAY_MATCHED, GAUSSIAN)
"""Rows that no network draws; italic in the table."""
ROWS = (*WITHOUT_TRAINING, BASE, NO_DRIFT, MATCHED, *(row.name for row in DRAWN[1:]))
METRICS = ("frechet", "kernel", "frechet_matched", "frechet_gabor")
