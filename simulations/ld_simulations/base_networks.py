"""The tiny base model's recipe and its untrained parts: diffusers and transformers classes, small ones."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ld_common.config import require

VOCABULARY_SIZE = 1200


@dataclass
class StageConfig:
    """How long and how fast one network learns."""

    steps: int = 1000
    batch_size: int = 16
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        require(self.steps > 0 and self.batch_size > 0, "a stage needs steps and batch_size above 0")


@dataclass
class BaseModelConfig:
    """The tiny base model's recipe; the defaults are those of the committed model."""

    seed: int = 0
    work: str = "runs/base_model"
    """Folder for pictures, checkpoints and logs; a stopped run goes on from here."""
    output: str = "simulations/tiny_base"
    pictures: int = 16000
    side: int = 64
    """Height and width of the pictures, in pixels."""
    latent_channels: int = 8
    vae_channels: list[int] = field(default_factory=lambda: [16, 32, 64])
    unet_channels: list[int] = field(default_factory=lambda: [48, 96])
    text_width: int = 96
    text_tokens: int = 64
    """Longest prompt, in tokens."""
    kl_weight: float = 1e-4
    """Weight of the VAE's KL term beside the mean squared error of pixels in [-1, 1]."""
    caption_dropout: float = 0.1
    vae: StageConfig = field(default_factory=lambda: StageConfig(6500, 8, 2e-3))
    unet: StageConfig = field(default_factory=lambda: StageConfig(6000, 16, 8e-4))


def make_tokenizer(captions: list[str], max_tokens: int) -> CLIPTokenizer:
    """A byte-level BPE tokenizer in CLIP's form; any text can be written in it, generic captions shortest."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - 2,
        initial_alphabet=sorted(alphabet),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(captions, trainer)
    state = json.loads(bpe.to_str())["model"]
    # every byte must also exist as the last one of a word, or an unseen word would end in an unknown token
    pieces = sorted({*alphabet, *(f"{byte}</w>" for byte in alphabet)})
    merges = [tuple(pair) for pair in state["merges"]]
    for left, right in merges:
        if left + right not in pieces:
            pieces.append(left + right)
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    vocabulary["<|startoftext|>"] = len(vocabulary)
    vocabulary["<|endoftext|>"] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_tokens)


def make_vae(config: BaseModelConfig) -> AutoencoderKL:
    """An untrained AutoencoderKL for one grey channel; its residual branches start at zero and learn faster so."""
    levels = len(config.vae_channels)
    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        block_out_channels=tuple(config.vae_channels),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=config.latent_channels,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=config.side,
    )
    for block in vae.modules():
        if isinstance(block, ResnetBlock2D):
            nn.init.zeros_(block.conv2.weight)
            nn.init.zeros_(block.conv2.bias)
    return vae


def make_unet(config: BaseModelConfig) -> UNet2DConditionModel:
    """An untrained UNet; attention, to itself and to the prompt, from the second level down."""
    levels = len(config.unet_channels)
    return UNet2DConditionModel(
        sample_size=config.side // 2 ** (len(config.vae_channels) - 1),
        in_channels=config.latent_channels,
        out_channels=config.latent_channels,
        block_out_channels=tuple(config.unet_channels),
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * (levels - 1),
        up_block_types=("CrossAttnUpBlock2D",) * (levels - 1) + ("UpBlock2D",),
        layers_per_block=1,
        cross_attention_dim=config.text_width,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def make_text_encoder(config: BaseModelConfig, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained CLIP text encoder of two layers."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.text_width,
            intermediate_size=4 * config.text_width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=config.text_tokens,
            projection_dim=config.text_width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_scheduler() -> DDIMScheduler:
    """Stable Diffusion 1.4's noise schedule; it ends at signal level 0.068, not 0."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )
