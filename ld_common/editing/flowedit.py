"""FlowEdit (arXiv 2412.08629): from the scan to its answer directly, by what the network says of both at equal noise.

At each level noise of its own is added to the scan, and to the scan as far as it is edited: the edit e moves to where
the network's two images differ, e' = e + (1 - s'/s) (x₀(u + e | target) - x₀(u | factual) - e), with u the noisy scan
and s = √((1-ᾱ)/ᾱ). No inversion, and a question that changes nothing returns the scan by construction.

The network draws an edited scan back towards what its prompt's scans are like on average, so that a patient who differs
from that average gets another edit than one who does not. With `feedback` f it sees f·e of the edit in place of e: less
of that pull, and less repair of what an edit leaves beside the anatomy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ld_common.diffusion.base_model import Condition
from ld_common.diffusion.schedule import Prediction, mixture, noise_ratio
from ld_common.editing.base import Method, Setting


class FlowEdit(Method):
    """The state is the scan, and for each step a noise and the image that the network sees in the scan under it.

    Its shape is `(B,1+2*steps,C,h,w)`.
    """

    def draws(self, setting: Setting) -> int:
        """One a step."""
        return len(setting.path.timesteps) - setting.start

    @torch.no_grad()
    def abduct(self, setting: Setting, latents: Tensor, factual: Condition, noise: Tensor) -> Tensor:
        """Ask the network of the scan at each level."""
        path, predict, seen = setting.path, setting.predictor(factual), []
        for row, index in enumerate(range(setting.start, len(path.timesteps))):
            noisy = mixture(Prediction(latents, noise[:, row]), path.levels[index])
            seen.append(predict(noisy, path.timesteps[index]).clean)
        return torch.cat([latents[:, None], noise, torch.stack(seen, 1)], 1)

    @torch.no_grad()
    def answer(
        self, setting: Setting, state: Tensor, factual: Condition, target: Condition | None, shift: Tensor | None
    ) -> Tensor:
        """The scan and its edit."""
        path, scan, edit = setting.path, state[:, 0], torch.zeros_like(state[:, 0])
        noise, seen = state[:, 1:].chunk(2, 1)
        predict = setting.predictor(factual, target)
        further = None if shift is None else shift - (0.0 if setting.shift is None else setting.shift)
        for row, index in enumerate(range(setting.start, len(path.timesteps))):
            level, following = path.levels[index], path.levels[index + 1]
            if target is not None:
                shown = setting.feedback * edit
                noisy = mixture(Prediction(scan + shown, noise[:, row]), level)
                moved = predict(noisy, path.timesteps[index]).clean - seen[:, row]
                edit = edit + (1 - noise_ratio(following) / noise_ratio(level)) * (moved - shown)
            if further is not None:
                edit = edit + further.to(edit) / following**0.5
        return scan + edit
