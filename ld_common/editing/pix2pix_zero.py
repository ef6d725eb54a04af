"""pix2pix-zero (arXiv 2302.03027): denoised under the target, each step held near where the prompt looked in the scan.

The scan is inverted and reconstructed beside the edit; before each step of the edit, its latents move down the gradient
of the squared distance between its cross-attention maps and the reconstruction's, so that structure stays where it was.
The direction of the edit is that of our prompts, guided as in every method, not a mean over sentences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ld_common.diffusion.base_model import Condition
from ld_common.diffusion.schedule import Prediction, mixture
from ld_common.editing.base import Setting
from ld_common.editing.ddim import Invert

CROSS_ATTENTION = "attn2"
"""How diffusers calls the layers that listen to the prompt."""


class Pix2PixZero(Invert):
    """The state is that of `invert`; answers cost four passes and a gradient a step."""

    def answer(
        self, setting: Setting, state: Tensor, factual: Condition, target: Condition | None, shift: Tensor | None
    ) -> Tensor:
        """Denoised from there, beside the reconstruction."""
        if target is None or setting.guidance.strength == 0:
            return super().answer(setting, state, factual, None, shift)
        seen, edited, path = setting.predictor(factual), state, setting.path
        wanted, guided = setting.predictor(target), setting.predictor(factual, target)
        with watched(setting.model.unet) as maps:
            for index in range(setting.start, len(path.timesteps)):
                timestep = path.timesteps[index]
                with torch.no_grad():
                    reconstructed = seen(state, timestep)
                    before = maps()
                with torch.enable_grad():
                    own = edited.detach().requires_grad_()
                    wanted(own, timestep)
                    (gradient,) = torch.autograd.grad(_apart(maps(), before, len(own)), own)
                edited = edited - setting.attention * gradient
                with torch.no_grad():
                    found = guided(edited, timestep)
                state, edited = (_step(one, path.levels[index + 1], shift) for one in (reconstructed, found))
        return edited


def _apart(maps: list[Tensor], others: list[Tensor], rows: int) -> Tensor:
    """Squared distance of attention maps, each sample's summed over pixels and tokens, with the mean over its heads."""
    layers = [(one - other).unflatten(0, (rows, -1)) for one, other in zip(maps, others, strict=True)]
    return torch.stack([layer.square().sum((2, 3)).mean(1).sum() for layer in layers]).sum()


def _step(prediction: Prediction, level: float, shift: Tensor | None) -> Tensor:
    latents = mixture(prediction, level)
    return latents if shift is None else latents + shift.to(latents)


@contextmanager
def watched(unet: nn.Module) -> Iterator[Callable[[], list[Tensor]]]:
    """Yields what gives the cross-attention maps of the last pass, a layer each, `(B·heads, pixels, tokens)`."""
    heard: dict[str, dict[str, Tensor]] = {}
    layers = {name: layer for name, layer in unet.named_modules() if name.endswith(CROSS_ATTENTION)}
    hooks = []
    for name, layer in layers.items():
        for part in ("to_q", "to_k"):

            def hear(_: nn.Module, __: object, found: Tensor, name: str = name, part: str = part) -> None:
                heard.setdefault(name, {})[part] = found

            hooks.append(getattr(layer, part).register_forward_hook(hear))

    def maps() -> list[Tensor]:
        return [
            layer.get_attention_scores(*(layer.head_to_batch_dim(heard[name][part]) for part in ("to_q", "to_k")), None)
            for name, layer in layers.items()
        ]

    try:
        yield maps
    finally:
        for hook in hooks:
            hook.remove()
