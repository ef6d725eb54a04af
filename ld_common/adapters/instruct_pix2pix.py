"""InstructPix2Pix (arXiv 2211.09800) on longitudinal scans: a LoRA of a UNet that also sees another visit's latents.

A visit is drawn from its prompt, from a visit of the same patient, earlier or later, and from what differs between the
two, elapsed years above all, so what learns is how a patient changes; with no visit beside it the network draws as it
does without. The paper ages faces and brains so (arXiv 2412.20651). The prompt's age and the seen visit alone would not
say how many years lie between them: a brain may look older than it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ld_common.adapters.base import Named
from ld_common.adapters.lora import Lora
from ld_common.diffusion.base_model import Denoiser
from ld_common.diffusion.conditioning import DELTA_CHANNELS

SCALE = 0.2
"""Of the first convolution for the seen visit: one learning rate serves it and the LoRA, which bears a higher one."""


@dataclass
class InstructPix2Pix(Lora):
    """A LoRA, and a first convolution for the seen visit, which starts at zero."""

    name: ClassVar[str] = "instruct_pix2pix"

    @property
    def image_conditioned(self) -> bool:
        """Always."""
        return True

    def inject(self, model: Denoiser, seed: int) -> Iterator[Named]:
        """Widen `conv_in`, and add A and B.

        Raises:
            AdapterError: no layer of this UNet matches the targets.
        """
        yield from super().inject(model, seed)
        widened = _BaselineConv(model.unet.conv_in)
        model.unet.conv_in = widened
        yield "unet.conv_in.baseline.weight", widened.baseline.weight


class _BaselineConv(nn.Module):
    """A first convolution `(B,C,h,w)` that also takes a seen scan's channels behind the noisy latents'."""

    def __init__(self, own: nn.Conv2d) -> None:
        super().__init__()
        self.own = own
        like = {"device": own.weight.device, "dtype": own.weight.dtype}
        sizes = own.kernel_size, own.stride, own.padding
        self.baseline = nn.Conv2d(own.in_channels + DELTA_CHANNELS, own.out_channels, *sizes, bias=False, **like)  # type: ignore[arg-type]
        nn.init.zeros_(self.baseline.weight)

    def forward(self, latents: Tensor) -> Tensor:
        """The features `(B,F,h,w)` of latents, and of a seen scan where there are more channels."""
        noisy, seen = latents.tensor_split([self.own.in_channels], 1)
        found: Tensor = self.own(noisy)
        return found + SCALE * self.baseline(seen) if seen.shape[1] else found
