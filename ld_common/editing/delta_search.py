"""Search of the shift δ of edits by the paper's counterfactual objective (arXiv 2412.20651, Eq. 5).

It minimises λ l_o(f(x'), y') + l_in(x, x'): l_o says whether the edit reached the target, with the denoising network as
the classifier (arXiv 2303.16203); l_in is the L1 distance to the reconstruction, in latents. The δ shifts the reverse
steps of edits (`edit.delta`), not the prior.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ld_common.core.seeding import torch_generator
from ld_common.diffusion.base_model import Denoiser
from ld_common.diffusion.conditioning import Condition
from ld_common.diffusion.drift import LatentDrift, centre
from ld_common.diffusion.drift_search import Progress, Trial
from ld_common.diffusion.options import SearchConfig
from ld_common.diffusion.schedule import predictor
from ld_common.editing.base import EditDrift, Editor
from ld_common.editing.counterfactuals import Edit, LatentEditor

CLASSIFIER_TIMESTEPS = (0.2, 0.35, 0.5, 0.65, 0.8)
"""Shares of the noise schedule at which the denoising classifier looks, with the same noise for every prompt."""
CLASSIFIER_TEMPERATURE = 0.02
"""Difference of the mean squared error, relative to its mean, that counts as one logit."""


def search_counterfactual(
    model: Denoiser,
    latents: Tensor,
    source: Sequence[str],
    edits: Sequence[Edit],
    config: SearchConfig,
    editor: Editor,
    seed: int,
    drift: EditDrift | None = None,
    progress: Progress = lambda done, total: None,
) -> list[Trial]:
    """Try each δ in edits: λ times whether the target was reached, plus how far the scan moved (Eq. 5).

    Args:
        model: the base with the adapter that edits.
        latents: scaled latents `(N,C,h,w)` of real scans.
        source: prompt of each.
        edits: what is asked of which scan; at most `config.images` are drawn, by `seed`.
        config: which δ, and λ.
        editor: how edits are drawn.
        seed: decides which edits are drawn and the classifier's noise.
        drift: the drift that the adapter was trained with.
        progress: called with the number of δ tried and their total.
    """
    generator = torch_generator(seed, "drift-counterfactual")
    kept = torch.randperm(len(edits), generator=generator)[: config.images].tolist()
    scans = sorted({edits[index].scan for index in kept})
    chosen = [replace(edits[index], scan=scans.index(edits[index].scan), delta=0.0) for index in kept]
    images, prompts = latents[scans].to(model.device, model.dtype), [source[scan] for scan in scans]
    latent_editor = LatentEditor(model, sorted({*prompts, *(edit.target for edit in chosen)}), editor, drift)
    inverted = latent_editor.invert(images, prompts)
    before = inverted.reconstructions[[edit.scan for edit in chosen]]
    noise = torch.randn((len(CLASSIFIER_TIMESTEPS), *model.latent_shape), generator=generator)
    pairs = [(prompts[edit.scan], edit.target) for edit in chosen]
    trials = []
    for done, delta in enumerate(config.deltas):
        answers = latent_editor.edit(inverted, [replace(edit, delta=delta) for edit in chosen])
        inner = float((answers - before).float().abs().mean())
        outer = _cross_entropy(model, answers, pairs, noise, editor.batch_size, latent_editor.drift)
        trials.append(Trial(delta, config.weight * outer + inner, {"outer": outer, "inner": inner}))
        progress(done + 1, len(config.deltas))
    return trials


@torch.no_grad()
def _cross_entropy(
    model: Denoiser,
    latents: Tensor,
    prompts: Sequence[tuple[str, str]],
    noise: Tensor,
    batch_size: int,
    drift: LatentDrift | None,
) -> float:
    """Cross-entropy of the denoising classifier that tells each pair's target prompt from its source prompt."""
    errors = []
    levels = model.scheduler.alphas_cumprod
    for which in (0, 1):
        total = torch.zeros(len(latents), device=latents.device)
        context = model.embed([pair[which] for pair in prompts])
        for share, epsilon in zip(CLASSIFIER_TIMESTEPS, noise.to(latents), strict=True):
            timestep = int(share * len(levels))
            signal = float(levels[timestep])
            for rows in torch.arange(len(latents)).split(batch_size):
                noisy = signal**0.5 * centre(latents[rows], drift) + (1 - signal) ** 0.5 * epsilon
                predicted = predictor(model, Condition(context[rows]), drift)(noisy, timestep).pred_epsilon
                total[rows] += (predicted - epsilon).float().square().mean((1, 2, 3))
        errors.append(total)
    both = torch.stack(errors, 1)
    logits = -both / (CLASSIFIER_TEMPERATURE * both.mean())
    return float(F.cross_entropy(logits, torch.ones(len(logits), dtype=torch.long, device=logits.device)))
