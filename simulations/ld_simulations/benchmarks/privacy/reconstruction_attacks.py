"""Attacks on the update of one round: a learned inverse, its refinement by gradient matching, and a gallery."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ld_common.diffusion.loss import training_timesteps
from ld_common.diffusion.training import TrainingData
from ld_simulations.benchmarks.privacy.reconstruction_plan import CRAFTED, GATE_BELOW
from ld_simulations.benchmarks.privacy.reconstruction_server import GATE_ABOVE, MaliciousServer

FEATURES = 30_000
"""Coordinates of the gradient that inverse and gallery use, at most."""
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
FOLDS = 5
SHARPNESS, PRIOR = 1e3, 1e-2
"""Weights of the angle between gradients and of the prior in gradient matching."""
LEAST_SHARE = 0.1
"""Of the visits that pass the gate; below, no visit passed it, and the attack returns the mean."""


class Gradients:
    """Gradients that single scans have at the server's weights."""

    def __init__(self, server: MaliciousServer, prompts: Sequence[str], seed: int) -> None:
        """Choose coordinates; `prompts` are all that may occur."""
        model = server.model.model
        self.server, self.generator = server, torch.Generator().manual_seed(seed)
        self.levels = model.scheduler.alphas_cumprod
        distinct = sorted(set(prompts))
        with torch.no_grad():
            contexts = model.embed(distinct)
        self.contexts = dict(zip(distinct, contexts.split(1), strict=True))
        self.common = contexts.mean(0, keepdim=True)
        """Used where the prompt is unknown."""
        size = sum(value.numel() for value in server.watched.values())
        self.chosen = torch.randperm(size, generator=self.generator)[:FEATURES].sort().values

    @property
    def timesteps(self) -> int:
        """The timesteps of the visits that the gradient shows lie below this."""
        request = self.server.request
        return GATE_BELOW if request.weights == CRAFTED and request.visits > 1 else 1

    def draw(self, latent: Tensor, context: Tensor, timestep: Tensor) -> Tensor:
        """The gradient `(N,)` of one latent `(1,C,h,w)` with a random noise."""
        noise = torch.randn(latent.shape, generator=self.generator)
        signal = self.levels[timestep]
        noisy = signal.sqrt() * latent + (1 - signal).sqrt() * noise
        return self.server.model_gradient(noisy, noise, timestep, context)

    def features(self, data: TrainingData, draws: int) -> Tensor:
        """Chosen coordinates of each scan's gradient of unit norm, `(draws, N, F)`."""
        rows = [
            self._feature(latent, prompt, torch.randint(self.timesteps, (1,), generator=self.generator))
            for _ in range(draws)
            for latent, prompt in zip(data.latents, data.prompts, strict=True)
        ]
        return torch.stack(rows).view(draws, len(data.latents), -1)

    def blocked_gradient(self, data: TrainingData, scans: int = 40) -> Tensor:
        """Mean direction of the gradients that the gate lets through of visits that it blocks, `(F,)`."""
        power, rows = self.server.study.training.timestep_power, []
        for latent, prompt in zip(data.latents[:scans], data.prompts[:scans], strict=True):
            timestep = torch.zeros(1, dtype=torch.int64)
            while int(timestep) < GATE_ABOVE:
                timestep = training_timesteps(1, len(self.levels), power, self.generator)
            rows.append(self._feature(latent, prompt, timestep))
        return F.normalize(torch.stack(rows).mean(0), dim=0)

    def _feature(self, latent: Tensor, prompt: str, timestep: Tensor) -> Tensor:
        return F.normalize(self.draw(latent[None], self.contexts[prompt], timestep), dim=0)[self.chosen]


@dataclass(frozen=True, eq=False)
class LearnedInverse:
    """Kernel ridge regression from gradients to latents, learned on public scans (after arXiv 2210.10880)."""

    features: Tensor
    """`(M,F)`, centred."""
    centre: Tensor
    mean: Tensor
    """Mean latent, `(D,)`."""
    dual: Tensor
    """`(M,D)`."""
    scale: Tensor
    """Standard deviation of each feature, `(F,)`."""

    @classmethod
    def fit(cls, features: Tensor, latents: Tensor) -> LearnedInverse:
        """Learn from features `(draws,N,F)` of latents `(N,C,h,w)`; the ridge is chosen by folds of patients."""
        draws, count = features.shape[:2]
        goals, flat = latents.flatten(1).repeat(draws, 1), features.flatten(0, 1)
        folds = torch.arange(count).repeat(draws) % FOLDS
        centre, scale, mean = flat.mean(0), flat.std(0) + 1e-12, goals.mean(0)
        rows = (flat - centre) / scale / flat.shape[1] ** 0.5
        kernel, goals = rows @ rows.T, goals - mean
        losses = []
        for ridge in RIDGES:
            loss = 0.0
            for fold in range(FOLDS):
                inside, outside = folds != fold, folds == fold
                dual = _solve(kernel[inside][:, inside], goals[inside], ridge)
                loss += float((kernel[outside][:, inside] @ dual - goals[outside]).square().mean())
            losses.append(loss)
        best = RIDGES[losses.index(min(losses))]
        return cls(rows, centre, mean, _solve(kernel, goals, best), scale)

    def __call__(self, observed: Tensor) -> Tensor:
        """The latent `(D,)` of an observed gradient of unit norm, its chosen coordinates `(F,)`."""
        row = (observed - self.centre) / self.scale / len(observed) ** 0.5
        return self.mean + (self.features @ row) @ self.dual


def _solve(kernel: Tensor, goals: Tensor, ridge: float) -> Tensor:
    size = ridge * kernel.diagonal().mean() * torch.eye(len(kernel))
    return torch.linalg.solve(kernel + size, goals)


class LatentPrior:
    """A normal law of latents, from public scans: half their covariance, half its diagonal."""

    def __init__(self, latents: Tensor) -> None:
        flat = latents.flatten(1)
        self.mean, centred = flat.mean(0), flat - flat.mean(0)
        covariance = centred.T @ centred / len(flat)
        mixed = 0.9 * covariance + 0.1 * torch.diag(covariance.diagonal())
        self.root = torch.linalg.cholesky(mixed + 1e-4 * torch.eye(len(mixed)))

    def whiten(self, latent: Tensor) -> Tensor:
        """Coordinates `(D,)` of a latent `(D,)`."""
        return torch.linalg.solve_triangular(self.root, (latent - self.mean)[:, None], upper=False)[:, 0]

    def latent(self, coordinates: Tensor) -> Tensor:
        """The latent of coordinates."""
        return self.mean + self.root @ coordinates


def share_of_gradient(observed: Tensor, centre: Tensor, blocked: Tensor | None) -> Tensor:
    """An observed gradient `(F,)` of many visits in units of single ones, whose mean is `centre`.

    Least squares finds how much of it is the mean of the visits that pass the gate, and how much is of blocked ones.
    """
    parts = torch.stack([centre] if blocked is None else [centre, blocked], 1)
    shares = torch.linalg.lstsq(parts, observed[:, None]).solution[:, 0]
    rest = observed if blocked is None else observed - shares[1] * blocked
    return rest / shares[0] if float(shares[0]) >= LEAST_SHARE else centre


def match_gradient(
    gradients: Gradients, prior: LatentPrior, observed: Tensor, start: Tensor, evaluations: int
) -> Tensor:
    """The latent `(D,)` whose gradient points as the observed one does (Geiping et al., arXiv 2003.14053), by L-BFGS.

    With honest weights the noise is searched beside the latent, as the residual depends on it; with crafted ones the
    output hides it. The prior stands for their total variation.

    Args:
        gradients: of single scans.
        prior: law of the latents.
        observed: gradient, its chosen coordinates `(F,)`.
        start: latent `(D,)`.
        evaluations: of the gradient's derivative.
    """
    server = gradients.server
    shape = (1, *server.model.model.latent_shape)
    coordinates = prior.whiten(start).clone().requires_grad_(True)
    noise = torch.randn(shape, generator=gradients.generator)
    searched = [coordinates]
    if server.request.weights != CRAFTED:
        searched.append(noise.requires_grad_(True))
    timestep = torch.tensor([gradients.timesteps // 2])
    signal = gradients.levels[timestep]

    def evaluate() -> float:
        noisy = signal.sqrt() * prior.latent(coordinates).view(shape) + (1 - signal).sqrt() * noise
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
            found = server.model_gradient(noisy, noise, timestep, gradients.common)[gradients.chosen]
            loss = SHARPNESS * (1 - F.cosine_similarity(found, observed, dim=0))
            loss = loss + sum(PRIOR * value.square().mean() for value in searched)
            slopes = torch.autograd.grad(loss, searched)
        for value, slope in zip(searched, slopes, strict=True):
            value.grad = slope
        return float(loss.detach())

    exact = {"tolerance_grad": 0.0, "tolerance_change": 0.0, "line_search_fn": "strong_wolfe"}
    torch.optim.LBFGS(searched, max_iter=evaluations, max_eval=evaluations, history_size=20, **exact).step(evaluate)
    return prior.latent(coordinates.detach())


def gallery_scores(observed: Tensor, features: Tensor) -> Tensor:
    """How well each candidate's mean gradient fits an observed one `(F,)`, from features `(draws,N,F)`: `(N,)`."""
    candidates = features.mean(0)
    centre = candidates.mean(0)
    return F.cosine_similarity(candidates - centre, (observed - centre)[None], dim=1)
