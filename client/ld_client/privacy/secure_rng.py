"""Random numbers from the operating system's entropy, for differential privacy.

PyTorch's CPU generator uses 32 bits of its seed, which can be found by trying all of them. So noise and samples come
from the operating system, number by number, and a generator that draws examples gets its whole state from there.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

MANTISSA_BITS = 53
"""Precision of a float64."""
STATE_WORDS, STATE_START = 624, 24
"""Words of MT19937, and their offset in PyTorch's serialized CPU generator, eight bytes each."""


def secret_uniform(shape: Sequence[int]) -> Tensor:
    """Independent numbers in (0, 1), float64 on the CPU, each of 53 bits of the operating system's entropy."""
    words = np.frombuffer(os.urandom(8 * math.prod(shape)), np.uint64) >> np.uint64(64 - MANTISSA_BITS)
    return torch.from_numpy((words + 0.5) * 2.0**-MANTISSA_BITS).view(tuple(shape))


def secret_normal(shape: Sequence[int]) -> Tensor:
    """Independent N(0, 1) numbers, float64 on the CPU, by the inverse of the normal distribution."""
    return torch.special.ndtri(secret_uniform(shape))


def secret_generator() -> torch.Generator:
    """A CPU generator whose whole state, 19,968 bits, is the operating system's entropy; do not store it."""
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    words = np.frombuffer(os.urandom(4 * STATE_WORDS), np.uint32).astype(np.uint64)
    state[STATE_START : STATE_START + 8 * STATE_WORDS] = torch.from_numpy(words.view(np.uint8))
    return generator.set_state(state)
