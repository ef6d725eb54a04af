"""InstructPix2Pix (arXiv 2211.09800) on longitudinal scans: a LoRA of a UNet that also takes another visit's latents.

The network draws a visit from its prompt, from another visit of the same patient, and from the differences between the
two, above all the elapsed years. It thereby learns how a patient changes, as in arXiv 2412.20651. Without another
visit it draws as before. The elapsed years are an input of their own, because neither the prompt's age
nor the appearance of the other visit determines them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from safetensors.torch import save
from torch import Tensor, nn

from ld_common.adapters.base import METADATA, Named, UnetConfig
from ld_common.adapters.lora import Lora
from ld_common.adapters.state_dict import read_tensors
from ld_common.core.errors import AdapterError
from ld_common.core.state import State
from ld_common.diffusion.base_model import Denoiser
from ld_common.diffusion.conditioning import DELTA_CHANNELS

SCALE = 0.2
"""Scale of the other visit's convolution, so that it can share the LoRA's learning rate, which is too high for it."""
BASELINE, BASELINE_WEIGHTS = "unet.conv_in.baseline.weight", "conv_in_baseline.safetensors"


@dataclass
class InstructPix2Pix(Lora):
    """A LoRA, and a convolution `conv_in` for the other visit, which starts at zero."""

    name: ClassVar[str] = "instruct_pix2pix"

    @property
    def image_conditioned(self) -> bool:
        """True: the widened `conv_in` takes the latent of the baseline visit."""
        return True

    def inject(self, model: Denoiser, seed: int) -> Iterator[Named]:
        """Widen `conv_in`, and add A and B.

        Raises:
            AdapterError: a base without `conv_in`, or no layer of it matches the targets.
        """
        if not model.has_unet:
            raise AdapterError(
                "adapter instruct_pix2pix widens the first convolution of a UNet, this base has none: use lora"
            )
        yield from super().inject(model, seed)
        widened = _BaselineConv(model.unet.conv_in)
        model.unet.conv_in = widened
        yield BASELINE, widened.baseline.weight

    def export_files(self, state: State, unet_config: UnetConfig) -> Iterator[tuple[str, bytes]]:
        """The LoRA's files, which diffusers and peft load, and the convolution, which only this package loads."""
        yield from super().export_files({name: state[name] for name in state if name != BASELINE}, unet_config)
        yield BASELINE_WEIGHTS, save({BASELINE: state[BASELINE]}, METADATA)

    def read_files(self, folder: Path) -> State:
        """The LoRA and the convolution."""
        return dict(sorted({**super().read_files(folder), **read_tensors(folder / BASELINE_WEIGHTS)[0]}.items()))


class _BaselineConv(nn.Module):
    """A first convolution that also takes the channels of a baseline scan, behind those of the noisy latents."""

    def __init__(self, latent: nn.Conv2d) -> None:
        super().__init__()
        self.latent = latent
        like = {"device": latent.weight.device, "dtype": latent.weight.dtype}
        sizes = latent.kernel_size, latent.stride, latent.padding
        self.baseline = nn.Conv2d(latent.in_channels + DELTA_CHANNELS, latent.out_channels, *sizes, bias=False, **like)  # type: ignore[arg-type]
        nn.init.zeros_(self.baseline.weight)

    def forward(self, latents: Tensor) -> Tensor:
        """Features `(B,F,h,w)` of noisy latents `(B,C,h,w)`, or of latents and baseline `(B,2C+DELTA_CHANNELS,h,w)`."""
        noisy, baseline = latents.tensor_split([self.latent.in_channels], 1)
        features: Tensor = self.latent(noisy)
        return features + SCALE * self.baseline(baseline) if baseline.shape[1] else features
