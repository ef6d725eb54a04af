"""Edits a second against diffusers' own pipeline with as many evaluations of the network, and 16 edits against one."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from torch import Tensor

from ld_common.adapters.base import AdaptedModel, inject
from ld_common.adapters.lora import Lora
from ld_common.diffusion.base_model import BaseModel, load_base
from ld_common.editing.base import Editor
from ld_common.editing.counterfactuals import Edit, draw_counterfactuals
from ld_common.editing.registry import read_editor
from ld_simulations.benchmarks.performance.interleaved import interleaved, ratio
from ld_simulations.benchmarks.performance.training import RANK, TARGETS

SCANS = 16
STEPS = 20
GUIDANCE = 2.2
SOURCE, TARGET = "brain MRI of a healthy woman of 70 years", "brain MRI of a healthy woman of 80 years"


def measure_generation(base_model: str, repeats: int) -> dict[str, Any]:
    """Seconds of one edit by our network editor and of one image by the pipeline, and of 16 edits at once."""
    adapted = _trained(base_model)
    pipe = _pipeline(base_model, adapted)
    adapted.adapter.merge(adapted.model)
    editor = read_editor(
        {"name": "ddpm", "num_inference_steps": STEPS, "noise_fraction": 1.0, "guidance_scale": GUIDANCE}
    )
    side = adapted.model.resolution
    images = torch.rand(SCANS, 1, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1
    calls = _evaluations(adapted.model, lambda: _edit(adapted.model, images[:1], editor))
    steps = calls // 2  # the pipeline asks twice a step: with the prompt and without
    pipeline_calls = _evaluations(pipe, lambda: _sample(pipe, steps))
    one = interleaved(
        {
            "one edit": lambda: _edit(adapted.model, images[:1], editor),
            "one image of the pipeline": lambda: _sample(pipe, steps),
            "16 edits": lambda: _edit(adapted.model, images, replace(editor, batch_size=SCANS)),
        },
        repeats,
    )
    return {
        "evaluations": calls,
        "evaluations_of_pipeline": pipeline_calls,
        "seconds": one,
        "edits_per_second": SCANS / min(one["16 edits"]),
        "edits_per_second_over_pipeline_same_calls": ratio(one, "one image of the pipeline", "one edit"),
        "edits_batch16_over_one": SCANS / ratio(one, "16 edits", "one edit"),
        "evaluation_of_batch_over_one": _batching(adapted.model, repeats),
    }


def _trained(base_model: str) -> AdaptedModel[BaseModel]:
    """A base with a LoRA that changes something."""
    adapted = inject(load_base(base_model), Lora(rank=RANK, targets=TARGETS), 0)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapted.parameters.values():
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=draw)).requires_grad_(False)
    return adapted


def _pipeline(base_model: str, adapted: AdaptedModel[BaseModel]) -> StableDiffusionPipeline:
    """diffusers' pipeline of the same base and LoRA, loaded as its documentation says."""
    diffusers_logging.set_verbosity_error()
    pipe = StableDiffusionPipeline.from_pretrained(Path(base_model).resolve(), safety_checker=None)
    with tempfile.TemporaryDirectory() as folder:
        adapted.save_pretrained(folder)
        pipe.load_lora_weights(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _edit(base: BaseModel, images: Tensor, editor: Editor) -> Tensor:
    edits = [Edit(row, TARGET) for row in range(len(images))]
    return draw_counterfactuals(base, images, [SOURCE] * len(images), edits, editor).images


def _sample(pipe: StableDiffusionPipeline, steps: int) -> object:
    return pipe(TARGET, num_inference_steps=steps, guidance_scale=GUIDANCE, output_type="np").images


def _evaluations(model: Any, run: Callable[[], object]) -> int:
    """Latents that the network is asked about during a run, whether alone or in batches."""
    asked = 0

    def count(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
        nonlocal asked
        asked += len(inputs[0])

    handle = model.unet.register_forward_hook(count)
    try:
        run()
    finally:
        handle.remove()
    return asked


def _batching(base: BaseModel, repeats: int) -> float:
    """What batching can bring at most here: the network's seconds for 32 latents one pair at a time, over all at once.

    An edit asks in pairs, for the prompts of the scan and of the answer.
    """
    latents, context = torch.randn(2 * SCANS, *base.latent_shape), base.embed([SOURCE]).detach()

    @torch.no_grad()
    def ask(count: int) -> None:
        base.unet(latents[:count], torch.tensor(500), context.expand(count, -1, -1))

    seconds = interleaved({"pair": lambda: ask(2), "all": lambda: ask(2 * SCANS)}, repeats)
    return SCANS / ratio(seconds, "all", "pair")
