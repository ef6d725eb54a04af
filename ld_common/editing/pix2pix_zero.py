"""pix2pix-zero (arXiv 2302.03027): denoise under the target, with each step held near the scan's cross-attention.

The scan is inverted and reconstructed beside the edit. Before each step of the edit, its latents move down the gradient
of the squared distance between its cross-attention maps and the reconstruction's, so that structure stays in place. The
edit direction is that of our prompts with guidance, as in every editor, not a mean over sentences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ld_common.core.config import require
from ld_common.core.errors import ConfigError
from ld_common.diffusion.conditioning import Condition
from ld_common.diffusion.schedule import Prediction, add_noise
from ld_common.editing.base import EditContext
from ld_common.editing.ddim import DdimInversion

CROSS_ATTENTION = "attn2"
"""diffusers' name of the layers that attend to the prompt."""


@dataclass
class Pix2PixZero(DdimInversion):
    """The state is that of `ddim`; an answer costs four network passes and a gradient a step."""

    name: ClassVar[str] = "pix2pix_zero"

    cross_attention_guidance_amount: float = 0.1
    """Step size down the gradient of the distance between the attention maps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        amount = self.cross_attention_guidance_amount
        fits = 0 <= amount < math.inf
        require(fits, f"edit.cross_attention_guidance_amount is {amount}: it must be a number, 0 or above")

    def edit(
        self, context: EditContext, state: Tensor, source: Condition, target: Condition | None, shift: Tensor | None
    ) -> Tensor:
        """Denoise from level `start`, beside the reconstruction."""
        if target is None or context.guidance.scale == 0:
            return super().edit(context, state, source, None, shift)
        if not context.model.has_unet:
            raise ConfigError(
                "editor pix2pix_zero steers the layers that attend to the prompt alone, and this base attends to "
                "prompt and picture together: use flowedit, or another editor"
            )
        schedule, edited = context.schedule, state
        reconstruct = context.predictor(source)
        attend, guided = context.predictor(target), context.predictor(source, target)
        with cross_attention_maps(context.model.unet) as maps:
            for index in range(context.start, len(schedule.timesteps)):
                timestep = schedule.timesteps[index]
                with torch.no_grad():
                    reconstructed = reconstruct(state, timestep)
                    reference = maps()
                with torch.enable_grad():
                    leaf = edited.detach().requires_grad_()
                    attend(leaf, timestep)
                    (gradient,) = torch.autograd.grad(_distance(maps(), reference, len(leaf)), leaf)
                edited = edited - self.cross_attention_guidance_amount * gradient
                with torch.no_grad():
                    prediction = guided(edited, timestep)
                signal = schedule.alphas_cumprod[index + 1]
                state, edited = _step(reconstructed, signal, shift), _step(prediction, signal, shift)
        return edited


def _distance(maps: list[Tensor], references: list[Tensor], rows: int) -> Tensor:
    """Squared distance of attention maps: summed over samples, pixels and tokens, averaged over heads."""
    layers = [(layer - reference).unflatten(0, (rows, -1)) for layer, reference in zip(maps, references, strict=True)]
    return torch.stack([layer.square().sum((2, 3)).mean(1).sum() for layer in layers]).sum()


def _step(prediction: Prediction, signal: float, shift: Tensor | None) -> Tensor:
    latents = add_noise(prediction, signal)
    return latents if shift is None else latents + shift.to(latents)


@contextmanager
def cross_attention_maps(unet: nn.Module) -> Iterator[Callable[[], list[Tensor]]]:
    """Yield a function that returns the last pass's cross-attention maps, one `(B·heads, pixels, tokens)` a layer."""
    outputs: dict[str, dict[str, Tensor]] = {}
    layers = {name: layer for name, layer in unet.named_modules() if name.endswith(CROSS_ATTENTION)}
    hooks = []
    for name, layer in layers.items():
        for part in ("to_q", "to_k"):

            def record(_: nn.Module, __: object, output: Tensor, name: str = name, part: str = part) -> None:
                outputs.setdefault(name, {})[part] = output

            hooks.append(getattr(layer, part).register_forward_hook(record))

    def maps() -> list[Tensor]:
        return [
            layer.get_attention_scores(
                *(layer.head_to_batch_dim(outputs[name][part]) for part in ("to_q", "to_k")), None
            )
            for name, layer in layers.items()
        ]

    try:
        yield maps
    finally:
        for hook in hooks:
            hook.remove()
