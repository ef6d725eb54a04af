"""What a file of one format is: how it is written, and which pixels a right reading has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ld_simulations.benchmarks.scans.pictures import disc

BRAIN, CHEST = "brain_mri", "chest_radiograph"
LEVEL = 180
PICTURE = disc(LEVEL)
"""What most samples show."""


@dataclass(frozen=True, eq=False)
class Written:
    """A sample on disk."""

    file: str
    """Path in the sample's folder that the table names; empty for the folder itself."""
    truth: np.ndarray | None = None
    """Real values `(H,W)` of the slice that a study uses; None where they are not known."""


Writer = Callable[[Path], Written | None]
"""Writes a sample into an empty folder; None where no sample can be had on this machine."""


@dataclass(frozen=True)
class FormatSample:
    """One row of the page of formats."""

    group: str
    name: str
    detail: str
    """UID of a transfer syntax, ending of a file, or nothing."""
    write: Writer
    modality: str = BRAIN
