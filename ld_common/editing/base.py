"""What every way of editing is: a scan's latents become a state, and the state an answer under another prompt."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ld_common.diffusion.base_model import Condition, Denoiser
from ld_common.diffusion.drift import Drift
from ld_common.diffusion.schedule import Prediction, Predictor, Trajectory, predictor


@dataclass(frozen=True)
class Guidance:
    """w of the difference guidance at each timestep."""

    strength: float
    late_share: float
    """Of the strength, at late timesteps."""
    late_below: float
    """Timestep below which one is late."""

    def at(self, timestep: int) -> float:
        """w at a timestep."""
        return self.strength * (self.late_share if timestep < self.late_below else 1.0)


@dataclass(frozen=True, eq=False)
class Setting:
    """How one edit is drawn, whatever the method."""

    model: Denoiser
    path: Trajectory
    start: int
    """Level of the trajectory from which an answer is denoised; 0 is the noisiest."""
    guidance: Guidance
    refinements: int
    """Fixed-point iterations where a method inverts a step that has no inverse."""
    drift: Drift | None
    shift: Tensor | None
    """Added after each step, or None."""
    attention: float
    """How far a step of pix2pix-zero moves towards the scan's cross-attention."""
    feedback: float
    """Share of the edit so far that the network sees in flowedit."""

    def predictor(self, factual: Condition, target: Condition | None = None) -> Predictor:
        """The network under the first condition, guided from there towards the second where there is one.

        ε = ε_factual + w (ε_target - ε_factual) needs no unconditional model and asks for nothing at w = 0.
        """
        if target is None:
            return predictor(self.model, factual, self.drift)
        both = predictor(self.model, factual.beside(target), self.drift)
        alone = predictor(self.model, factual, self.drift)

        def guided(latents: Tensor, timestep: int) -> Prediction:
            strength = self.guidance.at(timestep)
            if strength == 0:
                return alone(latents, timestep)
            found = both(torch.cat([latents, latents]), timestep)
            return Prediction(_between(found.clean, strength), _between(found.noise, strength))

        return guided


class Method(ABC):
    """One way to edit; it holds nothing of a scan."""

    @property
    def uses_noise(self) -> bool:
        """Whether answers depend on the seed."""
        return type(self).draws is not Method.draws

    def draws(self, setting: Setting) -> int:
        """How many latents of noise it draws for a scan."""
        return 0

    @abstractmethod
    def abduct(self, setting: Setting, latents: Tensor, factual: Condition, noise: Tensor) -> Tensor:
        """What `answer` starts from.

        Args:
            setting: how.
            latents: of the scans, centred where the drift is, `(B,C,h,w)`.
            factual: what they show.
            noise: `(B,draws,C,h,w)`, by the seed.

        Returns:
            A state, `(B,...)`.
        """

    @abstractmethod
    def answer(
        self, setting: Setting, state: Tensor, factual: Condition, target: Condition | None, shift: Tensor | None
    ) -> Tensor:
        """The latents `(B,C,h,w)` of a state under another prompt.

        Args:
            setting: how.
            state: of `abduct`.
            factual: what the scans show.
            target: what the answers shall show; None for the reconstruction.
            shift: added after each step, in place of the setting's.
        """


def _between(pair: Tensor, strength: float) -> Tensor:
    factual, target = pair.chunk(2)
    return factual + strength * (target - factual)
