"""The site's base model as an index needs it: loaded only where a scan or a prompt is new.

Loading takes seconds, and the digest of a Stable Diffusion reads gigabytes. So what an index needs to know of a base
is remembered, as long as none of its files changes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ld_client.data.encoded_scans import EncodedScan
from ld_client.data.memory import FileMemory
from ld_common.core.errors import ModelError
from ld_common.imaging.geometry import Scan, to_model
from ld_common.imaging.modality import Modality

if TYPE_CHECKING:
    from torch import Tensor

    from ld_common.diffusion.base_model import BaseModel


@dataclass(frozen=True)
class BaseFacts:
    """What an index needs to know of a base that it does not load."""

    digest: str
    latent_shape: tuple[int, int, int]
    """`(C,h,w)` of one latent."""
    latent_mean: tuple[float, ...]
    """Mean of the base's own training latents, by channel."""
    prompt_tokens: int
    """Tokens of the longest prompt that its text encoder reads, without those of beginning and end."""


@dataclass
class SiteBase:
    """A base that is loaded when it is first needed."""

    name: str
    """Path of its folder, or its hub id."""
    facts: BaseFacts
    memory: FileMemory
    _model: BaseModel | None = field(default=None, repr=False)

    @classmethod
    def of(cls, name: str, memory: FileMemory) -> SiteBase:
        """The base of a name; it is loaded at once unless it is remembered.

        Raises:
            ModelError: as `load_base`.
            StoreError: the memory cannot be written.
        """
        folder = _folder(name)
        key = memory.key("base", _files(folder), root=folder)
        known = memory.get(key)
        if known is not None:
            shape, mean = tuple(known.pop("latent_shape")), tuple(known.pop("latent_mean"))
            return cls(name, BaseFacts(latent_shape=shape, latent_mean=mean, **known), memory)
        model = _load(name)
        mean = tuple(model.latent_mean.float().tolist())
        facts = BaseFacts(model.digest, model.latent_shape, mean, model.prompt_tokens)
        memory.put(key, asdict(facts))
        return cls(name, facts, memory, model)

    @property
    def model(self) -> BaseModel:
        """The base itself; raises `ModelError`, also where it is no longer the one that was looked at first."""
        if self._model is None:
            self._model = _load(self.name)
            if self._model.digest != self.facts.digest:
                raise ModelError(f"base model '{self.name}' changed while the index ran: run ld-client index again")
        return self._model

    def check_prompts(self, prompts: Iterable[str]) -> None:
        """Let the tokenizer count the prompts that may be too long and were not counted before.

        Raises:
            ModelError: a prompt has more tokens than the text encoder reads.
        """
        # a token has one byte at least
        long = {prompt for prompt in prompts if len(prompt.encode()) > self.facts.prompt_tokens}
        keys = {prompt: self.memory.key("prompt", [], self.facts.digest, prompt) for prompt in sorted(long)}
        unknown = [prompt for prompt, key in keys.items() if self.memory.get(key) is None]
        if unknown:
            self.model.check_prompts(unknown)
        for prompt in unknown:
            self.memory.put(keys[prompt], {"fits": True})

    def picture(self, scan: Scan, modality: Modality) -> Tensor:
        """The model's picture `(1,S,S)` of a scan; raises `ScanError` for one without contrast."""
        return to_model(scan, self.model.resolution, modality.image)[0]

    def encode(self, pictures: list[Tensor], modality: Modality) -> list[EncodedScan]:
        """What the store holds of pictures, each `(1,S,S)`."""
        import torch

        from ld_common.metrics.structure import structure_sizes

        together = torch.stack(pictures)
        latents = _array(self.model.encode(together))
        mirrored = np.empty((len(pictures), 0), np.float32)
        if modality.image.symmetric:
            mirrored = _array(self.model.encode(together.flip(-1)))
        measured = structure_sizes(modality, together)
        sizes = np.empty((len(pictures), 0)) if measured is None else measured.T.cpu().numpy()
        return [EncodedScan(*scan) for scan in zip(latents, mirrored, sizes, strict=True)]


def _array(latents: Tensor) -> np.ndarray:
    return latents.float().cpu().numpy()


def _load(name: str) -> BaseModel:
    from ld_common.diffusion.base_model import load_base

    return load_base(name)


def _folder(name: str) -> Path:
    """The base's folder; raises `ModelError` where a hub id is not on this machine."""
    if Path(name).is_dir():
        return Path(name)
    from ld_common.diffusion.base_model import locate_base

    return locate_base(name)


def _files(folder: Path) -> list[Path]:
    """The files of a base and its parts: those that its digest reads, and those beside them."""
    return sorted(path for pattern in ("*", "*/*") for path in folder.glob(pattern) if path.is_file())
