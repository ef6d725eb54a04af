"""Named random streams from one seed. Every random number of a run comes from a generator made here."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def derive_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the stream `names` of a run; streams of different names are independent."""
    text = "/".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def torch_generator(seed: int, *names: str | int, device: str = "cpu") -> torch.Generator:
    """A generator for the stream `names`; keep it on the CPU for the same draws on every device."""
    import torch  # seconds, which those who need only numpy save

    return torch.Generator(device).manual_seed(derive_seed(seed, *names))


def numpy_generator(seed: int, *names: str | int) -> np.random.Generator:
    """A numpy generator for the stream `names`."""
    return np.random.default_rng(derive_seed(seed, *names))
