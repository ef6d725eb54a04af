"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206): two CLIPs, T5 where the folder has it, and a transformer of a flow.

Everything else of this project knows a prompt as one tensor `(B,T,D)`. Here its last row is the pooled embedding of
both CLIPs, filled up with zeros; `Sd3Transformer` takes it apart again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from torch import Tensor, nn

from ld_common.diffusion.base_weights import load_part
from ld_common.diffusion.bases.flow import FlowSchedule, read_flow_schedule
from ld_common.diffusion.prompts import token_ids

if TYPE_CHECKING:
    from transformers import CLIPTextModelWithProjection, T5EncoderModel

CLIP_TOKENS, T5_TOKENS = 77, 256
"""What diffusers' pipeline lets each text encoder read."""
LORA_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
)


@dataclass(frozen=True)
class Sd3Text:
    """The text encoders, each with its tokenizer."""

    clips: tuple[tuple[CLIPTextModelWithProjection, Any], ...]
    t5: tuple[T5EncoderModel, Any] | None
    """Without it, its part of a prompt is zeros."""
    width: int
    """Of a prompt's embeddings as the transformer takes them."""

    @property
    def encoders(self) -> tuple[nn.Module, ...]:
        """Both CLIPs, then T5."""
        return tuple(encoder for encoder, _ in (*self.clips, *([self.t5] if self.t5 else [])))

    @property
    def prompt_tokens(self) -> int:
        """What CLIP reads beside its tokens of beginning and end; T5 reads more."""
        return CLIP_TOKENS - 2

    def check(self, prompts: Sequence[str]) -> None:
        """Raise `ModelError` for a prompt that is too long."""
        for _, tokenizer in self.clips:
            token_ids(tokenizer, prompts, CLIP_TOKENS)
        if self.t5 is not None:
            token_ids(self.t5[1], prompts, T5_TOKENS)

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """The embeddings `(B,T+1,D)` of both CLIPs side by side, then those of T5, then the pooled one."""
        device = self.clips[0][0].device
        hidden, pooled = [], []
        for encoder, tokenizer in self.clips:
            said = encoder(_ids(tokenizer, prompts, CLIP_TOKENS, device), output_hidden_states=True)
            hidden.append(said.hidden_states[-2])
            pooled.append(said.text_embeds)
        words = _widened(torch.cat(hidden, -1), self.width)
        if self.t5 is None:
            more = words.new_zeros(len(words), T5_TOKENS, self.width)
        else:
            encoder, tokenizer = self.t5
            more = encoder(_ids(tokenizer, prompts, T5_TOKENS, device))[0].to(words)
        return torch.cat([words, more, _widened(torch.cat(pooled, -1), self.width)[:, None]], 1)


class Sd3Transformer(SD3Transformer2DModel):
    """The transformer, whose prompt embeddings `(B,T+1,D)` are those of `Sd3Text`."""

    diffusers_class = "SD3Transformer2DModel"
    lora_targets = LORA_TARGETS

    def forward(self, sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, **options: Any) -> Any:
        """ε - z_0, `(B,C,h,w)`; timesteps are those of `FlowSchedule`."""
        times = torch.as_tensor(timestep, device=sample.device).expand(len(sample)).float() + 1
        pooled = encoder_hidden_states[:, -1, : int(self.config["pooled_projection_dim"])]
        words = encoder_hidden_states[:, :-1]
        return super().forward(sample, words, pooled_projections=pooled, timestep=times, **options)


def load_sd3(folder: Path, name: str, **options: Any) -> tuple[Sd3Transformer, Sd3Text, FlowSchedule]:
    """The parts of a folder; options as diffusers' `from_pretrained`."""
    from transformers import AutoTokenizer, CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel

    transformer: Sd3Transformer = load_part(Sd3Transformer, folder / "transformer", **options)
    clips = tuple(
        (
            load_part(CLIPTextModelWithProjection, folder / f"text_encoder{number}", **options),
            CLIPTokenizer.from_pretrained(folder / f"tokenizer{number}"),
        )
        for number in ("", "_2")
    )
    t5 = None
    if (folder / "text_encoder_3").is_dir():
        t5 = (
            load_part(T5EncoderModel, folder / "text_encoder_3", **options),
            AutoTokenizer.from_pretrained(folder / "tokenizer_3", trust_remote_code=False),
        )
    tokens = (int(transformer.config["sample_size"]) // int(transformer.config["patch_size"])) ** 2
    schedule = read_flow_schedule(folder, name, lambda scheduler, steps: _space(scheduler, steps, tokens))
    return transformer, Sd3Text(clips, t5, int(transformer.config["joint_attention_dim"])), schedule


def _space(scheduler: FlowMatchEulerDiscreteScheduler, steps: int, tokens: int) -> None:
    """The timesteps of diffusers' pipeline for a picture of so many tokens."""
    config, shift = scheduler.config, {}
    if config["use_dynamic_shifting"]:
        lengths = config["base_image_seq_len"], config["max_image_seq_len"]
        shift["mu"] = calculate_shift(tokens, *lengths, config["base_shift"], config["max_shift"])
    scheduler.set_timesteps(steps, **shift)


def _ids(tokenizer: Any, prompts: Sequence[str], longest: int, device: torch.device) -> Tensor:
    return torch.tensor(token_ids(tokenizer, prompts, longest), device=device)


def _widened(embeddings: Tensor, width: int) -> Tensor:
    return F.pad(embeddings, (0, width - embeddings.shape[-1]))
