"""The tiny base model's recipe and its untrained parts: diffusers and transformers classes, small ones."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass, field

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ld_common.core.config import require

VOCABULARY_SIZE = 1600
LARGEST_NUMBER = 120
"""Whole numbers up to this one are one token each."""
PROMPT_WORDS = (
    "a adult age aged alzheimer and axial bone brain ct chest clear control coronal dementia disease effusion exam "
    "female fluid frontal gender head healthy heart image impaired large lateral left lesion lung male man mild mri "
    "no normal of old older patient person pneumonia radiograph ray right sagittal scan sex showing small stage "
    "subject t the view weighted with without woman year years young younger x"
)
"""Words that have a token of their own as they do in CLIP's vocabulary, although no picture here shows them."""


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
    device: str = "cpu"
    """`cpu` or `cuda`; the two draw other random numbers."""
    start: str = ""
    """Folder of a base whose VAE, tokenizer and weights are taken over; empty trains all of them from nothing."""
    zero_terminal_snr: bool = False
    """A schedule that ends without signal, trailing timesteps and v-prediction (arXiv 2305.08891), in place of Stable
    Diffusion 1.4's own."""
    pictures: int = 120000
    side: int = 64
    """Height and width of the pictures, in pixels."""
    latent_channels: int = 8
    vae_channels: list[int] = field(default_factory=lambda: [24, 48, 96])
    unet_channels: list[int] = field(default_factory=lambda: [48, 96])
    text_width: int = 96
    text_layers: int = 3
    text_tokens: int = 32
    """Longest prompt, in tokens."""
    kl_weight: float = 3e-5
    """Weight of the VAE's KL term beside the mean squared error of pixels in [-1, 1]."""
    caption_dropout: float = 0.1
    vae: StageConfig = field(default_factory=lambda: StageConfig(9000, 64, 2e-3))
    unet: StageConfig = field(default_factory=lambda: StageConfig(10000, 256, 1e-3))

    def __post_init__(self) -> None:
        require(self.device in ("cpu", "cuda"), f"device is '{self.device}': use cpu or cuda")


def make_tokenizer(captions: list[str], max_tokens: int) -> CLIPTokenizer:
    """A byte-level BPE tokenizer in CLIP's form: known words and whole numbers are one token, any other text several.

    CLIP itself splits a number into its digits, which a text encoder of this size would hardly put together again.
    """
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
    # numbers have tokens of their own, so merges of their digits would be wasted
    words = (re.sub(r"\d+", "", caption) for caption in captions)
    bpe.train_from_iterator(itertools.chain(words, [PROMPT_WORDS] * len(captions)), trainer)
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
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_tokens)
    tokenizer.add_tokens([AddedToken(str(number), single_word=True) for number in range(LARGEST_NUMBER + 1)])
    return tokenizer


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
    """An untrained UNet with attention, to itself and to the prompt, at every level."""
    levels = len(config.unet_channels)
    return UNet2DConditionModel(
        sample_size=config.side // 2 ** (len(config.vae_channels) - 1),
        in_channels=config.latent_channels,
        out_channels=config.latent_channels,
        block_out_channels=tuple(config.unet_channels),
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        layers_per_block=1,
        cross_attention_dim=config.text_width,
        attention_head_dim=6,
        norm_num_groups=16,
    )


def make_text_encoder(config: BaseModelConfig, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained CLIP text encoder."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.text_width,
            intermediate_size=4 * config.text_width,
            num_hidden_layers=config.text_layers,
            num_attention_heads=4,
            max_position_embeddings=config.text_tokens,
            projection_dim=config.text_width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_scheduler(zero_terminal_snr: bool = False) -> DDIMScheduler:
    """Stable Diffusion 1.4's noise schedule, which ends at signal level 0.068; or the one that ends at 0."""
    mended = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        **(mended if zero_terminal_snr else {"prediction_type": "epsilon"}),
    )
