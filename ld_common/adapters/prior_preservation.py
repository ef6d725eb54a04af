"""Images that the base draws of a class, for prior preservation (arXiv 2208.12242)."""

from __future__ import annotations

import torch

from ld_common.adapters.base import Prior
from ld_common.core.seeding import torch_generator
from ld_common.diffusion.base_model import Denoiser
from ld_common.diffusion.sampling import make_sampler, sample
from ld_common.diffusion.training import PriorImages


def draw_prior(model: Denoiser, prior: Prior, seed: int) -> PriorImages:
    """Draw the prior's images with a base that has no adapter yet; equal seeds give equal images."""
    noise = torch.randn((prior.samples, *model.latent_shape), generator=torch_generator(seed, "prior"))
    with torch.no_grad():
        context = model.embed([prior.prompt])
    sampler = make_sampler(model.scheduler, steps=prior.steps)
    latents = sample(model, context.expand(prior.samples, -1, -1), noise, sampler)
    return PriorImages(latents, context[0], prior.weight)
