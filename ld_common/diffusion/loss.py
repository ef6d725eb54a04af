"""The training loss: the network's targets, and the mean squared error from them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ld_common.core.errors import ModelError
from ld_common.diffusion.conditioning import Condition
from ld_common.diffusion.flow import FLOW, flow_time


def denoising_loss(
    unet: nn.Module,
    alphas_cumprod: Tensor,
    prediction_type: str,
    latents: Tensor,
    condition: Condition,
    timesteps: Tensor,
    noise: Tensor,
    mixed: Tensor | None = None,
) -> Tensor:
    """Mean squared error of `denoising_pair`, over the batch, channels and pixels."""
    return F.mse_loss(
        *denoising_pair(unet, alphas_cumprod, prediction_type, latents, condition, timesteps, noise, mixed)
    )


def denoising_pair(
    unet: nn.Module,
    alphas_cumprod: Tensor,
    prediction_type: str,
    latents: Tensor,
    condition: Condition,
    timesteps: Tensor,
    noise: Tensor,
    mixed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The network's prediction and its target (arXiv 2006.11239, Eq. 14; v: 2202.00512, Eq. 11).

    Args:
        unet: called as `unet(latents, timesteps, context).sample`.
        alphas_cumprod: ᾱ by timestep `(T,)`.
        prediction_type: the scheduler's: `epsilon`, `v_prediction`, `sample` or `flow`.
        latents: scaled latents `(B,C,h,w)`.
        condition: prompts, and a baseline scan for image-conditioned networks.
        timesteps: `(B,)`, int64.
        noise: `(B,C,h,w)`, the noise that the network predicts.
        mixed: `(B,C,h,w)`, the noise that is mixed into the latents if a drift shifts it; None for `noise`.

    Returns:
        Both `(B,C,h,w)`, float32.
    """
    levels = alphas_cumprod.to(latents.device)[timesteps].view(-1, 1, 1, 1)
    signal, spread = levels.sqrt().to(latents), (1 - levels).sqrt().to(latents)
    noisy = signal * latents + spread * (noise if mixed is None else mixed)
    targets = {
        "epsilon": noise,
        "v_prediction": signal * noise - spread * latents,
        "sample": latents,
        FLOW: noise - latents,
    }
    if prediction_type not in targets:
        raise ModelError(f"prediction type '{prediction_type}' is unknown: known: {', '.join(targets)}")
    if prediction_type == FLOW:
        noisy = noisy / (signal + spread)
    predicted = unet(condition.network_input(noisy), timesteps, condition.context).sample
    return predicted.float(), targets[prediction_type]


def weighted_loss(predicted: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Mean over the examples of their squared errors `(B,C,h,w)`, each times its weight `(B,)`."""
    return (F.mse_loss(predicted, target, reduction="none").flatten(1).mean(1) * weights).mean()


def min_snr_weights(signal: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Min-SNR weights (arXiv 2303.09556, Sec. 3.4) of examples at ᾱ `(B,)`: the error of the image weighs min(SNR, γ).

    A v-prediction's error is SNR + 1 times that of the image, a noise's SNR times, a flow's 1/σ² times.
    """
    ratio = signal / (1 - signal)
    capped = ratio.clamp(max=gamma)
    if prediction_type == "epsilon":
        return torch.where(ratio > 0, capped / ratio, torch.ones_like(ratio))  # without signal, 0/0 tends to 1
    if prediction_type == FLOW:
        return capped * flow_time(signal) ** 2
    return capped / (ratio + 1) if prediction_type == "v_prediction" else capped


def training_noise(shape: torch.Size, offset: float, generator: torch.Generator) -> Tensor:
    """Noise `(B,C,h,w)` ~ N(0, I), plus `offset` times a N(0, 1) draw that is constant over each channel.

    Offset 0 draws no further random number. Offset noise lets a network learn the mean of the images, which a
    schedule that leaks hides from it (Guttenberg 2023; Lin et al., arXiv 2305.08891).
    """
    noise = torch.randn(shape, generator=generator)
    if offset:
        noise = noise + offset * torch.randn((*shape[:2], 1, 1), generator=generator)
    return noise


def training_timesteps(count: int, timesteps: int, power: float, generator: torch.Generator) -> Tensor:
    """Timesteps `(count,)`, int64, in [0, timesteps): uniform at power 1, noisier at higher powers.

    t = T (1 - u^power) with u uniform; power 3 is the cubic sampling of T2I-Adapter (arXiv 2302.08453), which
    trains most where the prompt, not the noisy latent, decides what the image shows.
    """
    uniform = torch.rand(count, generator=generator)
    return (timesteps * (1 - uniform**power)).long().clamp(0, timesteps - 1)
