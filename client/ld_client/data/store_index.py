"""The index of a store: an SQLite file that names no patient. Reading it needs no model library."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ld_common.core.errors import StoreError

INDEX = "index.sqlite"
SCHEMA_VERSION = "5"
LATENTS, LATENT_MEAN, SIZES, MIRRORED = "latents", "base_latent_mean", "sizes", "mirrored"
"""Names of tensors in the cache: of each visit, but for the base's own mean."""


@contextmanager
def open_index(folder: Path) -> Iterator[sqlite3.Connection]:
    """The store's index, read-only; raises `StoreError` where it is absent or damaged."""
    path = folder / INDEX
    if not path.is_file():
        raise StoreError(f"there is no store in '{folder}': run ld-client index")
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as index:
            yield index
    except (OSError, sqlite3.Error, SafetensorError, LookupError, ValueError) as error:
        raise StoreError(f"the store '{folder}' is damaged: run ld-client index again") from error
