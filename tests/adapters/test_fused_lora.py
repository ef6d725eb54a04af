"""A LoRA layer's fused update is the plain one, and leaves the modules to whoever watches them."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from ld_common.adapters.fused_lora import FusedUpdate

LAYERS = {
    "linear": (lambda: nn.Linear(5, 7), (3, 4, 5)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 8, 8)),
    "strided conv": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 9, 9)),
}


def lora(kind: str) -> tuple[LoraLayer, Tensor]:
    """A LoRA layer whose update is not zero, with scaling 2, and an input."""
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    model = nn.Sequential(make())
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=4, target_modules=["0"], init_lora_weights=False), model)
    (layer,) = (module for module in model.modules() if isinstance(module, LoraLayer))
    return layer, torch.randn(shape)


def run(layer: LoraLayer, values: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output, and the gradient of the input and of A and B."""
    entered = values.clone().requires_grad_()
    output = layer(entered)
    learned = [module["default"].weight for module in (layer.lora_A, layer.lora_B)]
    weights = torch.linspace(-1, 1, output.numel()).view_as(output)
    return output.detach(), list(torch.autograd.grad((output * weights).sum(), [entered, *learned]))


@pytest.mark.parametrize("kind", LAYERS)
def test_the_fused_update_is_the_plain_one(kind: str) -> None:
    layer, values = lora(kind)
    plain, plain_gradients = run(layer, values)
    layer.lora_variant["default"] = FusedUpdate
    fused, fused_gradients = run(layer, values)
    assert torch.allclose(fused, plain, atol=1e-5)
    assert not torch.allclose(plain, layer.base_layer(values), atol=1e-2)
    for ours, theirs in zip(fused_gradients, plain_gradients, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", LAYERS)
def test_hooks_see_the_modules_that_they_watch(kind: str) -> None:
    layer, values = lora(kind)
    layer.lora_variant["default"] = FusedUpdate
    expected, seen = layer(values), []
    for module in (layer.lora_A["default"], layer.lora_B["default"]):
        module.register_forward_hook(lambda module, *_: seen.append(module))
    assert torch.allclose(layer(values), expected, atol=1e-5)
    assert seen == [layer.lora_A["default"], layer.lora_B["default"]]
