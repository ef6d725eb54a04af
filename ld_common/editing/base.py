"""The interface of an editor: it inverts a scan's latents into a state and edits the state under another prompt."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ld_common.core.config import require
from ld_common.diffusion.base_model import Denoiser
from ld_common.diffusion.conditioning import Condition
from ld_common.diffusion.drift import LatentDrift, step_shift
from ld_common.diffusion.longitudinal import LongitudinalDrift
from ld_common.diffusion.schedule import DdimSchedule, Prediction, Predictor, ddim_schedule, predictor

EditDrift = LatentDrift | LongitudinalDrift


@dataclass(frozen=True)
class Guidance:
    """Scale w of the difference guidance at each timestep."""

    scale: float
    outside: float
    """Share of the scale outside the interval."""
    first: float
    """Lowest timestep of the interval."""
    last: float
    """Highest timestep of the interval."""

    def at(self, timestep: float) -> float:
        """w at a timestep."""
        return self.scale * (1.0 if self.first <= timestep <= self.last else self.outside)


@dataclass(frozen=True, eq=False)
class EditContext:
    """The model and the schedule that one edit runs on."""

    model: Denoiser
    schedule: DdimSchedule
    start: int
    """Level of the schedule at which editing starts; 0 is the noisiest."""
    guidance: Guidance
    drift: LatentDrift | None
    shift: Tensor | None
    """Added after each step (arXiv 2412.20651, Eq. 4), or None."""

    def predictor(self, source: Condition, target: Condition | None = None) -> Predictor:
        """The network under `source`, guided from there towards `target` if given.

        ε = ε_source + w (ε_target - ε_source) needs no unconditional model, and one network call where w = 0.
        """
        unguided = predictor(self.model, source, self.drift)
        if target is None:
            return unguided
        both = predictor(self.model, source.beside(target), self.drift)

        def guided(latents: Tensor, timestep: float | Tensor) -> Prediction:
            if isinstance(timestep, Tensor):
                raise TypeError("guidance is of one timestep at a time")
            scale = self.guidance.at(timestep)
            if scale == 0:
                return unguided(latents, timestep)
            pair = both(torch.cat([latents, latents]), timestep)
            return Prediction(_extrapolate(pair.pred_original_sample, scale), _extrapolate(pair.pred_epsilon, scale))

        return guided


@dataclass
class Editor(ABC):
    """A way to edit a scan. Subclasses are dataclasses whose fields are the options of a study's `edit` section."""

    name: ClassVar[str]
    """Name in configs, on command lines and in `EDITORS`."""
    needs_longitudinal: ClassVar[bool] = False
    """Whether it works only with a longitudinal drift."""
    unused: ClassVar[tuple[str, ...]] = ()
    """Options of this class that the editor does not use; to set one is an error."""
    exact: ClassVar[bool] = False
    """Whether an edit that changes nothing returns the scan's latents by construction, so that nobody need draw it."""
    takes_move: ClassVar[bool] = False
    """Whether answers follow what a longitudinal drift predicts, and so the patient's history."""
    RENAMED: ClassVar[dict[str, str]] = {
        "steps": "num_inference_steps",
        "depth": "noise_fraction",
        "strength": "guidance_scale",
        "refinements": "fixed_point_iterations",
        "attention": "cross_attention_guidance_amount",
        "late_share": "guidance_outside",
        "late_below": "guidance_interval",
    }

    num_inference_steps: int = 50
    """Steps of the whole DDIM schedule."""
    noise_fraction: float = 0.7
    """Share of the schedule that is inverted, above 0 and up to 1 (down to noise); diffusers' img2img `strength`."""
    guidance_scale: float = 2.0
    """w of the difference guidance; 0 returns the reconstruction."""
    guidance_interval: list[float] = field(default_factory=lambda: [0.0, 1.0])
    """Timesteps with full guidance, as shares of the schedule from 0 (image) to 1 (noise); arXiv 2404.07724."""
    guidance_outside: float = 0.0
    """Share of the guidance scale outside the interval."""
    delta: float = 0.0
    """Shift δ of each answer's reverse steps, in the paper's units; `ld-client drift --estimator counterfactual` and
    `ld-generate edit --drift auto` search for one."""
    time_scale: float = 1.25
    """Factor of the change with the years that a longitudinal drift predicts: ridge regression shrinks it."""
    effect_scale: float = 1.5
    """Factor of the difference between groups that it predicts, for attributes that do not act like years."""
    edge_share: float = 1.0
    """Of a longitudinal drift: the change with the years is scaled until the structure grows by this share of what the
    scan's own edge tells (`ld_common.diffusion.edge_growth`), and the rest of what is drawn anyway."""
    own_slope_half: float = 2.0
    """Of a longitudinal drift with a history: spread of the visits, in years² (`ld_common.editing.moves`), at which the
    latents' own slope counts half."""
    own_growth_half: float = 0.1
    """The same for the growth of the modality's first biomarker."""
    batch_size: int = 16
    """Counterfactuals that are denoised together."""

    def __post_init__(self) -> None:
        positive = ("num_inference_steps", "batch_size")
        for name in positive:
            require(getattr(self, name) > 0, f"edit.{name} is {getattr(self, name)}: it must be above 0")
        require(
            0 < self.noise_fraction <= 1,
            f"edit.noise_fraction is {self.noise_fraction}: it must lie above 0 and up to 1",
        )
        require(
            0 <= self.guidance_scale < math.inf,
            f"edit.guidance_scale is {self.guidance_scale}: it must be a number, 0 or above",
        )
        interval = self.guidance_interval
        fits = len(interval) == 2 and 0 <= interval[0] <= interval[1] <= 1
        require(fits, f"edit.guidance_interval is {interval}: give two numbers, 0 <= low <= high <= 1")
        require(
            0 <= self.guidance_outside <= 1, f"edit.guidance_outside is {self.guidance_outside}: use a share, 0 to 1"
        )
        for name in ("delta", "time_scale", "effect_scale"):
            require(math.isfinite(getattr(self, name)), f"edit.{name} is {getattr(self, name)}: it must be a number")
        share = self.edge_share
        require(0 <= share <= 1, f"edit.edge_share is {share}: use a share, 0 to 1")
        for name in ("own_slope_half", "own_growth_half"):
            require(getattr(self, name) > 0, f"edit.{name} is {getattr(self, name)}: it must be above 0")

    def context(self, model: Denoiser, drift: LatentDrift | None) -> EditContext:
        """The schedule, guidance and shift of these options on a model.

        Raises:
            ConfigError: more steps than the model's noise schedule has timesteps.
        """
        schedule = ddim_schedule(model.scheduler, self.num_inference_steps)
        steps, timesteps = len(schedule.timesteps), len(model.scheduler.alphas_cumprod)
        first, last = (share * timesteps for share in self.guidance_interval)
        return EditContext(
            model=model,
            schedule=schedule,
            start=steps - max(1, round(self.noise_fraction * steps)),
            guidance=Guidance(self.guidance_scale, self.guidance_outside, first, last),
            drift=drift,
            shift=step_shift(drift, steps, model.scheduler.alphas_cumprod),
        )

    @classmethod
    def draws_noise(cls) -> bool:
        """Whether answers depend on the seed."""
        return cls.noise_count is not Editor.noise_count

    def noise_count(self, context: EditContext) -> int:
        """Number of latents of noise that the editor draws for a scan."""
        return 0

    @abstractmethod
    def invert(self, context: EditContext, latents: Tensor, source: Condition, noise: Tensor) -> Tensor:
        """The state that `edit` starts from.

        Args:
            context: model and schedule.
            latents: of the scans, centred where the drift is, `(B,C,h,w)`.
            source: what the scans show.
            noise: `(B,noise_count,C,h,w)` standard normal, by the seed.

        Returns:
            A state, `(B,...)`.
        """

    @abstractmethod
    def edit(
        self, context: EditContext, state: Tensor, source: Condition, target: Condition | None, shift: Tensor | None
    ) -> Tensor:
        """The latents `(B,C,h,w)` of a state under another prompt.

        Args:
            context: model and schedule.
            state: of `invert`.
            source: what the scans show.
            target: what the answers shall show; None for the reconstruction.
            shift: added after each step, in place of the context's.
        """


def _extrapolate(pair: Tensor, scale: float) -> Tensor:
    source, target = pair.chunk(2)
    return source + scale * (target - source)
