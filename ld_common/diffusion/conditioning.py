"""What the denoising network takes beside noisy latents and their timestep."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ld_common.core.errors import ConfigError

DELTA_CHANNELS = 8
"""Channels for the difference between the scan that the network takes and the one it is asked for."""


@dataclass(frozen=True, eq=False)
class Condition:
    """The network's inputs beside noisy latents and their timestep."""

    context: Tensor
    """Prompt embeddings `(B,T,D)`."""
    baseline: Tensor | None = None
    """Another scan and the difference from it, by `image_condition`, for adapters whose network takes one."""
    move: Tensor | None = None
    """What a longitudinal drift predicts to change in the latents `(B,C,h,w)`; the network does not take it."""

    def beside(self, other: Condition) -> Condition:
        """Both as one batch; both have a baseline, or neither."""
        pairs = zip((self.context, self.baseline), (other.context, other.baseline), strict=True)
        return Condition(*(None if a is None or b is None else torch.cat([a, b]) for a, b in pairs))  # type: ignore[arg-type]

    def rows(self, rows: Tensor) -> Condition:
        """The condition of some rows of the batch, which may repeat."""
        parts = (self.context, self.baseline, self.move)
        return Condition(*(None if part is None else part[rows.to(part.device)] for part in parts))  # type: ignore[arg-type]

    def network_input(self, latents: Tensor) -> Tensor:
        """The network's input `(B,C or 2C+DELTA_CHANNELS,h,w)`: noisy latents, then the baseline's channels."""
        return latents if self.baseline is None else torch.cat([latents, self.baseline.to(latents)], 1)


def image_condition(latents: Tensor, changes: Tensor) -> Tensor:
    """Input channels for a network that takes a scan, `(B,C+DELTA_CHANNELS,h,w)`.

    Args:
        latents: of the scans, `(B,C,h,w)`.
        changes: target minus scan `Modality.condition_vector`, `(B,k)`.

    Raises:
        ConfigError: the modality has more numbers than there are channels.
    """
    if changes.shape[1] > DELTA_CHANNELS:
        needed = changes.shape[1]
        raise ConfigError(f"adapter instruct_pix2pix has {DELTA_CHANNELS} channels, this modality needs {needed}")
    maps = F.pad(changes, (0, DELTA_CHANNELS - changes.shape[1])).to(latents)
    return torch.cat([latents, maps[:, :, None, None].expand(-1, -1, *latents.shape[2:])], 1)
