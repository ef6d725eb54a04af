"""A malicious server without differential privacy: the study and the weights that it sends, and what it sees.

It chooses the adapter, targets, rank, steps, batch, learning rate and law of the timesteps, and knows base, modality
and code. It does not know the key of the site, so rows, timesteps and noise of a round are unknown to it.

With `honest` weights it can do no more than choose these options. `timestep_power` near 0 makes every timestep 0, so
that the network sees nearly clean latents. With `crafted` weights, each ResNet block gets a projection of the time
embedding that is 0 below `GATE_BELOW` and huge above: the group norm behind it then divides the derivative of whatever
came before by that number. The gradient of `conv1` therefore holds only visits whose timestep is below, and the law of
the timesteps makes it one visit a round on average, however many are drawn: the trap weights of Boenisch et al. (arXiv
2112.02918), by timestep in place of content. A large output in place of the noise as the residual makes that gradient a
function of the scan alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ld_client.site_config import PolicyConfig
from ld_client.train import learning_rate, train_round
from ld_common.adapters.base import AdaptedModel, inject
from ld_common.adapters.registry import read_adapter
from ld_common.adapters.state_dict import update_norm
from ld_common.core.state import State
from ld_common.diffusion.base_model import BaseModel, load_base
from ld_common.diffusion.training import Losses, TrainingData
from ld_simulations.benchmarks.privacy.reconstruction_plan import (
    CRAFTED,
    GATE,
    GATE_BELOW,
    HONEST,
    LORA,
    STRONGEST_ALLOWED,
    Request,
)

GATE_ABOVE = 60
"""First timestep that does not pass."""
TINY = 1e-7
"""Size of LoRA's factors in `conv1`: their gradient stays below Adam's epsilon, where its step is linear in it."""
OUTPUT = 30.0
"""Factor of the output, so that the residual hardly depends on the noise."""
ADAM_EPSILON = 1e-8


@dataclass(frozen=True, eq=False)
class Round:
    """One round of a site."""

    rows: list[int]
    """Rows of the site's scans that were drawn."""
    update: State
    """Tensors sent less tensors received."""


class MaliciousServer:
    """One request: the model with the weights that the server sends."""

    def __init__(self, request: Request, base_model: str) -> None:
        self.request, self.study = request, request.study()
        self.model: AdaptedModel[BaseModel] = inject(load_base(base_model), read_adapter(self.study.adapter), 0)
        first = self.model.trainable_state()
        self.gated = self._gated_blocks()
        if request.weights == CRAFTED:
            with torch.no_grad():
                self._craft(self._strongest_allowed(first) if request.gate == STRONGEST_ALLOWED else request.gate)
        self.state = self.model.trainable_state()
        self.moved = update_norm(self.state, first)
        """Distance of the weights from the study's first ones."""
        self.watched = {
            name: value
            for name, value in self.model.trainable.items()
            if request.weights == HONEST or (not name.endswith("bias") and name.split(".conv1.")[0] in self.gated)
        }
        """Parameters whose update the attacks use."""

    def round(self, data: TrainingData, secret: bytes) -> Round:
        """The honest site's round."""
        number = 2 if self.request.weights == CRAFTED else 1
        losses: Losses = train_round(self.model, data, self.study, number, "site", secret=secret)
        sent = self.model.trainable_state()
        self.model.load(self.state)
        return Round(sorted(losses.rows), {name: sent[name] - value for name, value in self.state.items()})

    def gradient(self, update: State) -> Tensor:
        """What an update says of the gradient, `(N,)`, up to a factor.

        Adam's first step is lr·g / (|g| + ε), whose float32 value gives |g|; the clip by norm is a factor.
        Later steps are taken as they are: with gradients below ε they are a weighted sum of them.
        """
        rate = learning_rate(self.study, 2 if self.request.weights == CRAFTED else 1, 0)
        parts = []
        for name in self.watched:
            step = -update[name].double().flatten()
            if self.request.steps == 1:
                share = (step / rate).clamp(-1 + 1e-7, 1 - 1e-7)
                step = ADAM_EPSILON * share / (1 - share.abs())
            parts.append(step)
        return torch.cat(parts).float()

    def model_gradient(self, noisy: Tensor, noise: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        """Gradient `(N,)` of the watched parameters, differentiable in the noisy latents `(B,C,h,w)` and the noise."""
        loss = F.mse_loss(self.model.model.unet(noisy, timesteps, context).sample, noise)
        found = torch.autograd.grad(loss, list(self.watched.values()), create_graph=noisy.requires_grad)
        return torch.cat([part.flatten() for part in found])

    def _gated_blocks(self) -> set[str]:
        """Names of the ResNet blocks whose `conv1` copies a scan, as parameters begin with them."""
        names = [name.split(".conv1.")[0] for name in self.model.trainable if ".conv1." in name]
        return set(list(dict.fromkeys(names))[: self.request.blocks or None])

    def _strongest_allowed(self, first: State) -> float:
        """The strongest gate within the distance that a site's default policy allows."""
        low, high = 0.0, GATE
        for _ in range(40):
            middle = (low + high) / 2
            self.model.load(first)
            self._craft(middle)
            allowed = update_norm(self.model.trainable_state(), first) < PolicyConfig().max_distance
            low, high = (middle, high) if allowed else (low, middle)
        self.model.load(first)
        return low

    def _craft(self, gate: float) -> None:
        unet, lora = self.model.model.unet, self.request.adapter == LORA
        direction = self._gate()
        for name, module in unet.named_modules():
            if not any(block.endswith(name.rpartition(".")[0]) for block in self.gated):
                continue
            if name.endswith("time_emb_proj"):
                weight = module.base_layer.weight if lora else module.weight
                signs = 1.0 - 2.0 * ((torch.arange(len(weight)) % (len(weight) // 16)) % 2)
                change = gate * signs[:, None] * direction[None]
                if lora:
                    _factor(module, change)
                else:
                    weight += change
            elif name.endswith("conv1") and lora:
                generator = torch.Generator().manual_seed(len(name))
                for factor in (module.lora_A["default"].weight, module.lora_B["default"].weight):
                    factor.copy_(TINY * torch.randn(factor.shape, generator=generator))
        if lora:
            _factor(unet.conv_out, (OUTPUT - 1) * unet.conv_out.base_layer.weight)
        else:
            unet.conv_out.weight *= 1e-2
            unet.conv_out.bias.copy_(1e4 * (1.0 - 2.0 * (torch.arange(len(unet.conv_out.bias)) % 2)))

    def _gate(self) -> Tensor:
        """Weights `(D,)` of the time embedding whose sum is 0 at timesteps that pass and about 1 at the others."""
        unet = self.model.model.unet
        timesteps = torch.arange(len(self.model.model.scheduler.alphas_cumprod))
        features = F.silu(unet.time_embedding(unet.time_proj(timesteps))).double()
        goal = (timesteps >= GATE_ABOVE).double()
        weights = torch.where(timesteps < GATE_BELOW, 1e6, goal)[:, None]
        normal = features.T @ (weights * features) + 1e-8 * torch.eye(features.shape[1]).double()
        solution: Tensor = torch.linalg.solve(normal, features.T @ (weights[:, 0] * goal))
        return solution.float()


def _factor(module: nn.Module, change: Tensor) -> None:
    """Set LoRA's factors to the best approximation of a change of the weight that their rank allows."""
    a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
    u, s, v = torch.linalg.svd(change.flatten(1), full_matrices=False)
    rank = min(len(a), len(s))
    a.zero_()
    b.zero_()
    a[:rank].copy_((s[:rank].sqrt()[:, None] * v[:rank]).view(rank, *a.shape[1:]))
    b[:, :rank].copy_((u[:, :rank] * s[:rank].sqrt()).view(len(b), rank, *b.shape[2:]))
