"""Named tensors: what an adapter trains, what crosses the wire and what a release holds."""

from __future__ import annotations

from torch import Tensor

State = dict[str, Tensor]
"""Float32 tensors on the CPU, sorted by name."""
