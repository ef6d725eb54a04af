"""Textual inversion (arXiv 2208.01618): only the embeddings of new tokens in the prompt train and travel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from ld_common.adapters.base import METADATA, Adapter, Named, UnetConfig
from ld_common.adapters.state_dict import read_tensors
from ld_common.core.config import require
from ld_common.core.errors import AdapterError
from ld_common.core.state import State
from ld_common.diffusion.base_model import Denoiser

CONCEPT = "scan"
LEARNED_EMBEDS, MORE_EMBEDS = "learned_embeds.safetensors", "learned_embeds_{}.safetensors"
"""The concept's embeddings, and those of each phrase, from 1: diffusers reads one token per file."""


class ExtendedEmbedding(nn.Module):
    """A frozen token embedding, extended by learned rows."""

    def __init__(self, base: nn.Embedding, learned: dict[str, Tensor]) -> None:
        super().__init__()
        self.base = base
        self.learned = nn.ParameterList([nn.Parameter(rows) for rows in learned.values()])

    @property
    def weight(self) -> Tensor:
        """All rows `(V+K, D)`."""
        return torch.cat([self.base.weight, *(rows.to(self.base.weight) for rows in self.learned)])

    def forward(self, tokens: Tensor) -> Tensor:
        """Embeddings `(B,T,D)` of token ids `(B,T)`."""
        return F.embedding(tokens, self.weight)


@dataclass
class TextualInversion(Adapter):
    """Puts a learned concept in front of every prompt, and replaces each phrase of `words` by learned tokens."""

    name: ClassVar[str] = "textual_inversion"

    vectors: int = 2
    """Tokens of the concept and of each phrase."""
    words: list[str] = field(default_factory=list)
    """Phrases that get learned tokens; of several that match, the longest wins."""

    def __post_init__(self) -> None:
        require(self.vectors > 0, f"adapter.vectors is {self.vectors}: it must be above 0")
        names = [CONCEPT, *map(_slug, self.words)]
        for number, phrase in enumerate(self.words, start=1):
            slug = _slug(phrase)
            fits = slug.strip("-") != "" and slug not in names[:number]
            require(fits, f"adapter.words: '{phrase}' gives the token <{slug}>, which is taken or empty: reword it")

    def inject(self, model: Denoiser, seed: int) -> Iterator[Named]:
        """Add the tokens, a phrase's at the mean embedding of its words, the concept's at the mean of all tokens."""
        from transformers import AddedToken

        if model.reader is not None:
            raise AdapterError(
                "adapter textual_inversion trains tokens of one CLIP, and this base reads prompts otherwise: use lora"
            )
        table = model.text_encoder.get_input_embeddings()
        starts: dict[str, Tensor] = {CONCEPT: table.weight.float().mean(0)}
        for phrase in self.words:
            ids = model.tokenizer(phrase, add_special_tokens=False).input_ids
            starts[phrase] = table.weight[ids].float().mean(0)
        rows = {phrase: start.repeat(self.vectors, 1) for phrase, start in starts.items()}
        for phrase in rows:
            tokens = [AddedToken(token, single_word=True) for token in self._tokens(phrase)]
            model.tokenizer.add_tokens(tokens)
        extended = ExtendedEmbedding(table, rows)
        model.text_encoder.set_input_embeddings(extended)
        for phrase, parameter in zip(rows, extended.learned, strict=True):
            yield f"text_encoder.<{_slug(phrase)}>", parameter

    def transform_prompt(self, prompt: str) -> str:
        """The concept's tokens, then the prompt with each phrase of `words` replaced by its tokens."""
        parts = [(prompt, False)]
        for phrase in sorted(self.words, key=len, reverse=True):
            tokens = " ".join(self._tokens(phrase))
            parts = [new for text, done in parts for new in ([(text, done)] if done else _split(text, phrase, tokens))]
        return " ".join([*self._tokens(CONCEPT), "".join(text for text, _ in parts)])

    def export_files(self, state: State, unet_config: UnetConfig) -> Iterator[tuple[str, bytes]]:
        """A file for the concept and one for each phrase, for `load_textual_inversion`."""
        for number, phrase in enumerate([CONCEPT, *self.words]):
            token = f"<{_slug(phrase)}>"
            name = MORE_EMBEDS.format(number) if number else LEARNED_EMBEDS
            yield name, save({token: state[f"text_encoder.{token}"]}, METADATA)

    def read_files(self, folder: Path) -> State:
        """The embeddings of all tokens."""
        names = [LEARNED_EMBEDS, *(MORE_EMBEDS.format(number) for number in range(1, len(self.words) + 1))]
        tokens = {token: rows for name in names for token, rows in read_tensors(folder / name)[0].items()}
        return {f"text_encoder.{token}": tokens[token] for token in sorted(tokens)}

    def _tokens(self, phrase: str) -> list[str]:
        # diffusers' names for the tokens of a multi-vector embedding, so that it reads the same prompts
        token = f"<{_slug(phrase)}>"
        return [token, *(f"{token}_{number}" for number in range(1, self.vectors))]


def _split(text: str, phrase: str, tokens: str) -> list[tuple[str, bool]]:
    """Split `text` at each whole-word occurrence of `phrase`, which becomes `tokens` and is marked as done."""
    parts: list[tuple[str, bool]] = []
    rest = text
    while (at := _find(rest, phrase)) >= 0:
        parts += [(rest[:at], False), (tokens, True)]
        rest = rest[at + len(phrase) :]
    return [*parts, (rest, False)]


def _find(text: str, phrase: str) -> int:
    """Position of `phrase` as whole words (`man` is not found in `woman`), or -1."""
    at = text.find(phrase)
    while at >= 0:
        end = at + len(phrase)
        if not (text[at - 1 : at].isalnum() or text[end : end + 1].isalnum()):
            return at
        at = text.find(phrase, at + 1)
    return -1


def _slug(phrase: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in phrase.lower())
