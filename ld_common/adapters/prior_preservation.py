"""The pictures that a base draws of a class by itself, learned beside a site's so that the class does not drift."""

from __future__ import annotations

import torch

from ld_common.adapters.base import Prior
from ld_common.core.seeding import torch_generator
from ld_common.diffusion.base_model import Denoiser
from ld_common.diffusion.sampling import make_sampler, sample
from ld_common.diffusion.training import PriorImages


def draw_prior(model: Denoiser, prior: Prior, seed: int) -> PriorImages:
    """Draw the examples with the plain base, before an adapter changes it; the same seed draws the same everywhere."""
    noise = torch.randn((prior.samples, *model.latent_shape), generator=torch_generator(seed, "prior"))
    with torch.no_grad():
        context = model.embed([prior.prompt])
    sampler = make_sampler(model.scheduler, steps=prior.steps)
    latents = sample(model, context.expand(prior.samples, -1, -1), noise, sampler)
    return PriorImages(latents, context[0], prior.weight)
