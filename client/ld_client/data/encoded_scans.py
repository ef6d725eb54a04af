"""Scans that earlier indexes encoded or refused, so that the next one does not read them again.

The encoded ones are the last store's, and those of an index that stopped before its end, which lie in the memory until
one is complete. No model library is needed to read them.
"""

from __future__ import annotations

import base64
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, load_file, save

from ld_client.data.exclusions import Reason
from ld_client.data.memory import FileMemory
from ld_client.data.store_index import LATENTS, MIRRORED, SIZES, open_index
from ld_common.core.errors import StoreError


@dataclass(frozen=True, eq=False)
class EncodedScan:
    """What a store holds of one scan's pixels."""

    latents: np.ndarray
    """`(C,h,w)` float32, scaled."""
    mirrored: np.ndarray
    """`(C,h,w)` of the mirror image; `(0,)` where the modality has none."""
    sizes: np.ndarray
    """`(2,)` float64, as `structure_sizes`; `(0,)` where nothing was measured."""


@dataclass(frozen=True, eq=False)
class EncodedScans:
    """What is known of scans, for one modality and one base. Its methods may be called from several threads."""

    memory: FileMemory
    modality_digest: str
    base_digest: str
    _tensors: dict[str, np.ndarray] = field(default_factory=dict)
    _rows: dict[bytes, int] = field(default_factory=dict)

    @classmethod
    def of(cls, store: Path, memory: FileMemory, modality_digest: str, base_digest: str) -> EncodedScans:
        """Those of a store, perhaps none."""
        try:
            with open_index(store) as index:
                (cache,) = index.execute("SELECT value FROM meta WHERE key = 'cache'").fetchone()
                rows = index.execute("SELECT source, row FROM visits WHERE source != ''").fetchall()
                tensors = load_file(store / cache)
        except (StoreError, OSError, SafetensorError, TypeError, sqlite3.Error):
            rows, tensors = [], {}  # none, damaged, or made before sources were noted
        by_key = {bytes.fromhex(source): row for source, row in rows}
        return cls(memory, modality_digest, base_digest, tensors, by_key)

    def key(self, files: Sequence[Path], checked: bool, frames: Sequence[int | None]) -> bytes | None:
        """Key of the scan of these files, whose text a person has `checked`; None where they may still change.

        Args:
            files: in their order.
            checked: whether a person has looked for text in them.
            frames: which images of them make the scan.
        """
        return self.memory.key("scan", files, checked, list(frames), self.modality_digest, self.base_digest)

    def refusal(self, key: bytes | None) -> tuple[Reason, str] | None:
        """Why a scan cannot be used; None where nothing is known."""
        value = self.memory.get(key, keep=False)  # it may be an encoded scan, which is kept until the index is complete
        if value is None or "rejection" not in value:
            return None
        self.memory.get(key)
        return Reason(value["rejection"]), value["detail"]

    def refuse(self, key: bytes | None, reason: Reason, detail: str) -> None:
        """Remember why a scan cannot be used; raises `StoreError`."""
        self.memory.put(key, {"rejection": reason.value, "detail": detail})

    def get(self, key: bytes | None) -> EncodedScan | None:
        """The encoded scan of a key; None where it is not known."""
        row = None if key is None else self._rows.get(key)
        if row is None:
            value = self.memory.get(key, keep=False)
            return None if value is None or "encoded" not in value else _unpacked(value["encoded"])
        if row >= len(self._tensors[LATENTS]):
            return None
        mirrored, sizes = self._tensors[MIRRORED], self._tensors[SIZES]
        return EncodedScan(
            self._tensors[LATENTS][row],
            mirrored[row] if len(mirrored) else np.empty(0, np.float32),
            sizes[:, row] if sizes.shape[1] else np.empty(0, np.float64),
        )

    def put(self, key: bytes | None, scan: EncodedScan) -> None:
        """Note a scan until the index is complete; raises `StoreError`."""
        self.memory.put(key, {"encoded": _packed(scan)}, keep=False)


def _packed(scan: EncodedScan) -> str:
    return base64.b64encode(save({name: np.ascontiguousarray(tensor) for name, tensor in vars(scan).items()})).decode()


def _unpacked(text: str) -> EncodedScan:
    return EncodedScan(**load(base64.b64decode(text)))
