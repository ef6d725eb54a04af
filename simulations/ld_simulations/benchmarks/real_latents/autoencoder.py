"""TAEF2, the distilled autoencoder of FLUX.2's latent space (madebyollin/taesd, MIT licence), from its weight files.

The layers were read off the tensors' names and shapes. 64 channels throughout; three strided convolutions halve the
picture, three nearest-neighbour upsamplings double it, so a latent pixel stands for 8x8 pixels. Blocks at the lowest
resolution have a second branch with group normalisation. Its number of groups is in no shape: of 1, 2, 4, 8, 16 and 32,
4 reconstructs best, by 2 dB or more.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ld_common.core.errors import ModelError
from ld_simulations.benchmarks.real_latents.plan import DECODER, ENCODER

WIDTH, LATENT_CHANNELS, GROUPS, FACTOR = 64, 32, 4, 8
ENCODED_TOGETHER = 8


class TinyBlock(nn.Module):
    """Three convolutions beside an identity; with `pool`, after a normalised 1x1 branch."""

    def __init__(self, pool: bool, groups: int) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1], nn.ReLU(), convolutions[2])
        inner = 4 * WIDTH
        self.pool = nn.Sequential() if not pool else nn.Sequential(
            nn.Conv2d(WIDTH, inner, 1, bias=False), nn.GroupNorm(groups, inner), nn.ReLU(),
            nn.Conv2d(inner, WIDTH, 1, bias=False),
        )  # fmt: skip

    def forward(self, features: Tensor) -> Tensor:
        """`(B,64,h,w)` to the same."""
        if len(self.pool):
            features = features + self.pool(features)
        return F.relu(features + self.conv(features))


class SoftClamp(nn.Module):
    """Latents softly limited to (-3, 3), the decoder's first layer."""

    def forward(self, latents: Tensor) -> Tensor:
        """`(B,C,h,w)` to the same."""
        return 3 * torch.tanh(latents / 3)


class TinyAutoencoder:
    """Encoder and decoder between pictures in [-1, 1] and 32-channel latents an eighth of their size."""

    def __init__(self, folder: Path, groups: int = GROUPS) -> None:
        """Load both files strictly.

        Args:
            folder: has `taef2_encoder.pth` and `taef2_decoder.pth`.
            groups: of the group normalisation.

        Raises:
            ModelError: a file cannot be read, or has other tensors than these layers.
        """
        self._encoder = _loaded(_encoder(groups), folder / ENCODER)
        self._decoder = _loaded(_decoder(groups), folder / DECODER)

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures `(N,1 or 3,S,S)` in [-1, 1] to latents `(N,32,S/8,S/8)`, in batches; S a multiple of 8."""
        batches = pictures.split(ENCODED_TOGETHER)
        return torch.cat([self._encoder(batch.expand(-1, 3, -1, -1) / 2 + 0.5) for batch in batches])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents `(N,32,h,w)` to pictures `(N,3,8h,8w)`, clipped to [-1, 1], in batches."""
        pictures = torch.cat([self._decoder(batch) for batch in latents.split(ENCODED_TOGETHER)])
        return (2 * pictures - 1).clamp(-1, 1)

    def decode_grey(self, latents: Tensor) -> Tensor:
        """Latents `(N,32,h,w)` to grey pictures `(N,1,8h,8w)`, the mean of the colours."""
        return self.decode(latents).mean(1, keepdim=True)


def _wide(stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(WIDTH, WIDTH, 3, stride, 1, bias=bias)


def _blocks(count: int, groups: int, pool: bool = False) -> list[nn.Module]:
    return [TinyBlock(pool, groups) for _ in range(count)]


def _encoder(groups: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(3, WIDTH, 3, padding=1), *_blocks(1, groups)]
    for pool in (False, False, True):
        layers += [_wide(2, bias=False), *_blocks(3, groups, pool)]
    return nn.Sequential(*layers, nn.Conv2d(WIDTH, LATENT_CHANNELS, 3, padding=1))


def _decoder(groups: int) -> nn.Sequential:
    layers: list[nn.Module] = [SoftClamp(), nn.Conv2d(LATENT_CHANNELS, WIDTH, 3, padding=1), nn.ReLU()]
    for pool in (True, False, False):
        layers += [*_blocks(3, groups, pool), nn.Upsample(scale_factor=2), _wide(bias=False)]
    return nn.Sequential(*layers, *_blocks(1, groups), nn.Conv2d(WIDTH, 3, 3, padding=1))


def _loaded(network: nn.Sequential, file: Path) -> nn.Sequential:
    try:
        network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    except (OSError, RuntimeError, ValueError, TypeError, AttributeError, EOFError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ModelError(
            f"'{file}' is not TAEF2's ({first}): take the file that madebyollin/taesd publishes"
        ) from error
    return network.float().eval().requires_grad_(False)
