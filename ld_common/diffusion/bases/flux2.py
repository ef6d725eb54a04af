"""FLUX.2 klein: hidden states of Qwen3, a transformer of a flow on packed latents, and a VAE of normalised patches.

A latent here is what the transformer takes: patches of 2 x 2 of the VAE's latents as channels, each channel normalised
by the VAE's own running mean and variance.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor, nn

from ld_common.core.errors import ModelError
from ld_common.diffusion.base_components import FLUX_SIDE
from ld_common.diffusion.base_weights import load_part
from ld_common.diffusion.bases.flow import FlowSchedule, read_flow_schedule

if TYPE_CHECKING:
    from transformers import Qwen3ForCausalLM

TOKENS = 512
"""What diffusers' pipeline lets the text encoder read, the frame of a chat included."""
LAYERS = (9, 18, 27)
"""Whose hidden states are a prompt's embedding."""
PATCH = 2
LORA_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out"),
    *("to_qkv_mlp_proj", "attn.to_out"),
)


@dataclass(frozen=True)
class Flux2Text:
    """The text encoder and its tokenizer."""

    encoder: Qwen3ForCausalLM
    tokenizer: Any

    @property
    def encoders(self) -> tuple[nn.Module, ...]:
        """Qwen3 alone."""
        return (self.encoder,)

    @property
    def prompt_tokens(self) -> int:
        """What the frame of a chat leaves."""
        return TOKENS - len(self._framed(""))

    def check(self, prompts: Sequence[str]) -> None:
        """Raise `ModelError` for a prompt that is too long."""
        for prompt in prompts:
            count = len(self._framed(prompt))
            if count > TOKENS:
                raise ModelError(f"prompt '{prompt}' has {count} tokens, the base reads {TOKENS}: shorten it")

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """The hidden states of three layers side by side, `(B,512,3·D)`, as diffusers' pipeline has them."""
        self.check(prompts)
        embeddings: Tensor = Flux2KleinPipeline._get_qwen3_prompt_embeds(
            self.encoder, self.tokenizer, list(prompts), max_sequence_length=TOKENS, hidden_states_layers=LAYERS
        )
        return embeddings

    def _framed(self, prompt: str) -> list[int]:
        message = [{"role": "user", "content": prompt}]
        text = self.tokenizer.apply_chat_template(
            message, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        return list(self.tokenizer(text).input_ids)


class Flux2Transformer(Flux2Transformer2DModel):
    """The transformer, on latents `(B,C,h,w)` in place of rows of tokens."""

    diffusers_class = "Flux2Transformer2DModel"
    latent_side = FLUX_SIDE // PATCH

    @property
    def lora_targets(self) -> list[str]:
        """The linear layers of all blocks, by their whole names: `attn.to_out` is a list of layers in some blocks."""
        endings = tuple(f".{target}" for target in LORA_TARGETS)
        return [name for name, layer in self.named_modules() if isinstance(layer, nn.Linear) and name.endswith(endings)]

    def forward(self, sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, **options: Any) -> Any:
        """ε - z_0, `(B,C,h,w)`; timesteps are those of `FlowSchedule`."""
        times = torch.as_tensor(timestep, device=sample.device).expand(len(sample)).float() + 1
        places = Flux2KleinPipeline._prepare_latent_ids(sample[:1]).to(sample.device)
        words = Flux2KleinPipeline._prepare_text_ids(encoder_hidden_states[:1]).to(sample.device)
        (output,) = super().forward(
            sample.flatten(2).transpose(1, 2),
            encoder_hidden_states,
            times / 1000,
            places,
            words,
            return_dict=False,
            **options,
        )
        return SimpleNamespace(sample=output.transpose(1, 2).view_as(sample))


@dataclass(frozen=True)
class PatchScaling:
    """Between the VAE's latents `(B,C,2h,2w)` and those of the transformer `(B,4C,h,w)`."""

    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, vae: AutoencoderKLFlux2) -> PatchScaling:
        """As a VAE's running mean and variance say."""
        norm, epsilon = vae.bn, float(vae.config["batch_norm_eps"])
        variance = norm.running_var.view(1, -1, 1, 1)
        return cls(norm.running_mean.view(1, -1, 1, 1), (variance + epsilon).sqrt())

    factor = PATCH
    """Latents of the VAE along one of the transformer's."""

    def scaled(self, latents: Tensor) -> Tensor:
        """From the VAE's latents."""
        patched = nn.functional.pixel_unshuffle(latents, PATCH)
        return (patched - self.mean.to(patched)) / self.deviation.to(patched)

    def unscaled(self, latents: Tensor) -> Tensor:
        """To the VAE's latents."""
        return nn.functional.pixel_shuffle(latents * self.deviation.to(latents) + self.mean.to(latents), PATCH)


def load_flux2(folder: Path, name: str, side: int, **options: Any) -> tuple[Flux2Transformer, Flux2Text, FlowSchedule]:
    """The parts of a folder.

    Args:
        folder: the base's.
        name: as the user gave it, for messages.
        side: of the VAE's latents.
        options: as diffusers' `from_pretrained`.

    Raises:
        ModelError: a text encoder of too few layers, or a scheduler that is not of plain rectified flow.
    """
    from transformers import AutoTokenizer, Qwen3ForCausalLM

    logging.getLogger("diffusers.configuration_utils").addFilter(_not_of_sample_size)
    transformer: Flux2Transformer = load_part(Flux2Transformer, folder / "transformer", **options)
    transformer.latent_side = side // PATCH
    encoder: Qwen3ForCausalLM = load_part(Qwen3ForCausalLM, folder / "text_encoder", **options)
    if encoder.config.num_hidden_layers < max(LAYERS):
        raise ModelError(
            f"the text encoder of base model '{name}' has {encoder.config.num_hidden_layers} layers, a prompt is read "
            f"from layer {max(LAYERS)}"
        )
    tokens = transformer.latent_side**2
    schedule = read_flow_schedule(folder, name, lambda scheduler, steps: _space(scheduler, steps, tokens))
    return (
        transformer,
        Flux2Text(encoder, AutoTokenizer.from_pretrained(folder / "tokenizer", trust_remote_code=False)),
        schedule,
    )


def _not_of_sample_size(record: logging.LogRecord) -> bool:
    """Whether diffusers' message is another than the one that it ignores `sample_size`, which we read."""
    return "sample_size" not in record.getMessage()


def _space(scheduler: FlowMatchEulerDiscreteScheduler, steps: int, tokens: int) -> None:
    """The timesteps of diffusers' pipeline for a picture of so many tokens."""
    sigmas = np.linspace(1.0, 1 / steps, steps)
    scheduler.set_timesteps(sigmas=sigmas, mu=compute_empirical_mu(tokens, steps))  # type: ignore[arg-type]
