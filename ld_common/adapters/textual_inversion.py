"""Textual inversion (arXiv 2208.01618): new words of the prompt learn; nothing else moves or travels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ld_common.adapters.base import Adapter, Named
from ld_common.core.config import require
from ld_common.diffusion.base_model import Denoiser

CONCEPT = "scan"


class ExtendedEmbedding(nn.Module):
    """A frozen token embedding with learned rows behind it."""

    def __init__(self, base: nn.Embedding, learned: dict[str, Tensor]) -> None:
        super().__init__()
        self.base = base
        self.learned = nn.ParameterList([nn.Parameter(rows) for rows in learned.values()])

    @property
    def weight(self) -> Tensor:
        """All rows `(V+K, D)`."""
        return torch.cat([self.base.weight, *(rows.to(self.base.weight) for rows in self.learned)])

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids `(B,T)` -> embeddings `(B,T,D)`."""
        return F.embedding(tokens, self.weight)


@dataclass
class TextualInversion(Adapter):
    """A learned concept before every prompt, and a learned twin for each phrase of `words` in place of it."""

    name: ClassVar[str] = "textual_inversion"

    vectors: int = 2
    """Learned tokens for the concept and for each phrase."""
    words: list[str] = field(default_factory=list)
    """Phrases of the prompts, the longest matching first, that get learned tokens."""

    def __post_init__(self) -> None:
        require(self.vectors > 0, f"adapter.vectors is {self.vectors}: it must be above 0")
        names = [CONCEPT, *map(_slug, self.words)]
        for number, phrase in enumerate(self.words, start=1):
            own = _slug(phrase)
            require(own.strip("-") != "" and own not in names[:number], f"adapter.words: '{phrase}' needs another name")

    def inject(self, model: Denoiser, seed: int) -> Iterator[Named]:
        """Add the tokens; each starts as the mean of its phrase's own, the concept's as the mean of all tokens."""
        from transformers import AddedToken

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
        """The concept's tokens, then the prompt with each known phrase replaced by its own tokens."""
        parts = [(prompt, False)]
        for phrase in sorted(self.words, key=len, reverse=True):
            tokens = " ".join(self._tokens(phrase))
            parts = [new for text, done in parts for new in ([(text, done)] if done else _split(text, phrase, tokens))]
        return " ".join([*self._tokens(CONCEPT), "".join(text for text, _ in parts)])

    def _tokens(self, phrase: str) -> list[str]:
        return [f"<{_slug(phrase)}-{number}>" for number in range(self.vectors)]


def _split(text: str, phrase: str, tokens: str) -> list[tuple[str, bool]]:
    """`text` around each whole-word occurrence of `phrase`, which becomes `tokens` and is marked as done."""
    parts: list[tuple[str, bool]] = []
    rest = text
    while (at := _find(rest, phrase)) >= 0:
        parts += [(rest[:at], False), (tokens, True)]
        rest = rest[at + len(phrase) :]
    return [*parts, (rest, False)]


def _find(text: str, phrase: str) -> int:
    """Where `phrase` stands as whole words (`man` is not found in `woman`), or -1."""
    at = text.find(phrase)
    while at >= 0:
        end = at + len(phrase)
        if not (text[at - 1 : at].isalnum() or text[end : end + 1].isalnum()):
            return at
        at = text.find(phrase, at + 1)
    return -1


def _slug(phrase: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in phrase.lower())
