"""Untrained base models, small enough for tests of algebra, wiring and file formats."""

from __future__ import annotations

from pathlib import Path

import torch

import ld_common.core.offline  # noqa: F401  (before any model library)

WORDS = ["axial T1 brain MRI, woman, 70 years, healthy", "man, Alzheimer's disease"]


def make_base(folder: Path, resolution: int = 16) -> Path:
    """Write a base with images of `resolution` pixels, latents `(4, resolution/4, resolution/4)`, prompts `(32,32)`."""
    from ld_simulations.tiny_base.networks import (  # takes seconds, which not every test file needs
        BaseModelConfig,
        make_scheduler,
        make_text_encoder,
        make_tokenizer,
        make_unet,
        make_vae,
    )
    from ld_simulations.tiny_base.train import write_folder

    config = BaseModelConfig(
        output=str(folder),
        side=resolution,
        latent_channels=4,
        vae_channels=[8, 8, 16],
        unet_channels=[32],
        text_width=32,
        text_layers=1,
        text_tokens=32,
    )
    torch.manual_seed(0)
    tokenizer = make_tokenizer(WORDS, 32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae, unet, text_encoder = make_vae(config), make_unet(config), make_text_encoder(config, tokenizer)
        latents = torch.randn(8, 4, resolution // 4, resolution // 4)
    vae.register_to_config(scaling_factor=1.5)
    parts = {"vae": vae, "unet": unet, "text_encoder": text_encoder}
    return write_folder(config, parts | {"tokenizer": tokenizer, "scheduler": make_scheduler()}, latents)
