"""A LoRA layer's update in one matrix product added in place of three passes over the layer's output.

peft computes `result + B(A(x)) * scaling`: a product, a scaling and a sum, each a tensor of the output's size that the
backward pass reads again. `addmm` does all three at once. It is one of peft's own variants of a layer, as DoRA is.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor, nn


class FusedUpdate(LoraVariant):
    """Of a linear or 2D convolutional layer, whose B is 1 x 1; dropout is not supported."""

    @staticmethod
    def forward(module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """`result` plus the update.

        Args:
            module: the layer.
            active_adapter: the adapter's name.
            x: the layer's input, `(B,...,in)` or `(B,in,H,W)`.
            result: the base layer's output, `(B,...,out)` or `(B,out,h,w)`.
            kwargs: not used.
        """
        lower, upper = module.lora_A[active_adapter], module.lora_B[active_adapter]
        scaling = module.scaling[active_adapter]
        if upper._forward_hooks or lower._forward_hooks:  # such as those of opacus, which see the modules' calls alone
            return result + upper(lower(x)) * scaling
        inner, weight = lower(x), upper.weight.flatten(1)
        if isinstance(upper, nn.Conv2d):
            weights = weight.expand(len(x), -1, -1)
            return torch.baddbmm(result.flatten(2), weights, inner.flatten(2), alpha=scaling).view_as(result)
        return torch.addmm(result.flatten(0, -2), inner.flatten(0, -2), weight.T, alpha=scaling).view_as(result)
