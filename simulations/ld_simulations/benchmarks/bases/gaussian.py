"""A denoiser that is exactly right for Gaussian data, so that what samplers and drifts do can be computed."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from ld_common.diffusion.base_model import Denoiser
from ld_common.diffusion.bases.flow import FlowSchedule
from ld_common.diffusion.flow import FLOW, flow_scale
from ld_simulations.tiny_base.networks import make_scheduler

SCHEDULER = make_scheduler()
DATA_MEAN, DATA_VARIANCE = 1.5, 0.4


class PerfectUNet(nn.Module):
    """Predicts as the exact posterior mean for data from N(mean, variance) under noise of mean `noise_mean` would."""

    device, dtype = torch.device("cpu"), torch.float64

    def __init__(
        self,
        scheduler: DDIMScheduler | FlowSchedule,
        mean: float = DATA_MEAN,
        variance: float = DATA_VARIANCE,
        noise_mean: float = 0,
    ) -> None:
        super().__init__()
        self.levels, self.kind = scheduler.alphas_cumprod.double(), scheduler.config["prediction_type"]
        self.scheduler = scheduler
        self.mean, self.variance, self.noise_mean = mean, variance, noise_mean
        self.config = {"in_channels": 1, "sample_size": 2}

    def forward(self, latents: Tensor, timestep: Tensor | int, context: Tensor | None = None) -> SimpleNamespace:
        signal = self._signal(timestep)
        if self.kind == FLOW:
            latents = latents / flow_scale(signal)
        spread = 1 - signal
        # the centred noise: what is left of z once the data's and the noise's means are taken away
        centred = latents - signal**0.5 * self.mean - spread**0.5 * self.noise_mean
        noise = spread**0.5 * centred / (signal * self.variance + spread)
        clean = self.mean + signal**0.5 * self.variance * centred / (signal * self.variance + spread)
        answers = {"epsilon": noise, "v_prediction": signal**0.5 * noise - spread**0.5 * clean, "sample": clean}
        answers[FLOW] = noise - clean
        return SimpleNamespace(sample=answers[self.kind])

    def _signal(self, timestep: Tensor | int) -> float:
        """ᾱ at a timestep that need not be whole: interpolated in sigma, as Euler's scheduler does."""
        if isinstance(self.scheduler, FlowSchedule):
            return float(self.scheduler.signal(torch.as_tensor(timestep, dtype=torch.float64)))
        sigmas = ((1 - self.levels) / self.levels.clamp_min(1e-12)) ** 0.5
        low = int(timestep)
        high, share = min(low + 1, len(sigmas) - 1), float(timestep) - low
        sigma = (1 - share) * float(sigmas[low]) + share * float(sigmas[high])
        return 1 / (sigma**2 + 1) if share else float(self.levels[low])


class GaussianDenoiser(Denoiser):
    """A denoiser that reads no words."""

    def embed(self, prompts: Sequence[str]) -> Tensor:
        return NO_CONTEXT.expand(len(prompts), -1, -1)


def gaussian_model(
    scheduler: DDIMScheduler | FlowSchedule = SCHEDULER, mean: float = DATA_MEAN, noise_mean: float = 0.0
) -> Denoiser:
    """A perfect denoiser of one channel, 2x2, in float64."""
    unet = PerfectUNet(scheduler, mean=mean, noise_mean=noise_mean)
    return GaussianDenoiser(unet=unet, text_encoder=None, tokenizer=None, scheduler=scheduler)  # type: ignore[arg-type]


def unit_noise(count: int, seed: int = 1) -> Tensor:
    """N(0, I) noise `(count,1,2,2)` in float64."""
    return torch.randn(count, 1, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


NO_CONTEXT = torch.zeros(1, 1, 1, dtype=torch.float64)
