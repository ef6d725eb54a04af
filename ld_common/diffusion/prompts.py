"""How a base's text encoders read prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from ld_common.core.errors import ModelError


class TextReader(Protocol):
    """The text encoders of a base that has more than one CLIP."""

    @property
    def encoders(self) -> tuple[nn.Module, ...]:
        """All of them."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens that a prompt may have."""

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings of prompts, `(B,T,D)`, with all that the network takes of them.

        Raises:
            ModelError: a prompt is too long.
        """

    def check(self, prompts: Sequence[str]) -> None:
        """Raise `ModelError` for a prompt that is too long."""


def token_ids(tokenizer: Any, prompts: Sequence[str], longest: int) -> list[list[int]]:
    """Token ids of prompts `(B,T)`, filled up to T = `longest`.

    Raises:
        ModelError: a prompt has more tokens than that.
    """
    if not prompts:
        return []  # tokenizers take no empty batch
    tokens = tokenizer(list(prompts), padding="max_length", max_length=longest).input_ids
    for prompt, ids in zip(prompts, tokens, strict=True):
        if len(ids) > longest:
            raise ModelError(f"prompt '{prompt}' has {len(ids)} tokens, the base reads {longest}: shorten it")
    return [list(ids) for ids in tokens]
