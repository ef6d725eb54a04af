"""Rectified flow (arXiv 2209.03003): z_σ = (1 - σ) z_0 + σ ε, and a network that predicts ε - z_0.

The rest of this project works at unit variance, u = a z_0 + s ε with a² = ᾱ and a² + s² = 1. These are the same latents
on another scale: z_σ = c u with c = 1 / (a + s), and σ = s / (a + s). DDIM's step in u is Euler's step of the flow,
since both keep the network's z_0 and ε. A flow begins at σ = 1, where nothing of z_0 is left.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

FLOW = "flow"
"""`prediction_type` of a network of rectified flow."""


def flow_signal(time: Any) -> Any:
    """ᾱ at a flow's time σ, a number or a tensor in [0, 1]."""
    return (1 - time) ** 2 / ((1 - time) ** 2 + time**2)


def flow_time(signal: Any) -> Any:
    """σ at ᾱ, the inverse of `flow_signal`."""
    return (1 - signal) ** 0.5 * flow_scale(signal)


def flow_scale(signal: Any) -> Any:
    """c of the module's text at ᾱ: from latents of unit variance to those of the flow."""
    return 1 / (signal**0.5 + (1 - signal) ** 0.5)


def flow_prediction(latents: Tensor, output: Tensor, signal: Any) -> tuple[Tensor, Tensor]:
    """z_0 and ε by a flow's output `(B,C,h,w)` on latents of unit variance `(B,C,h,w)` at ᾱ."""
    at_time, time = latents * flow_scale(signal), flow_time(signal)
    return at_time - time * output, at_time + (1 - time) * output
