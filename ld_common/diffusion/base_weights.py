"""Which files of a base's part its weights are read from, and that they are all there.

A hash of the wrong file, or weights that are missing and drawn at random, would let two sites believe that they train
on one base.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ld_common.core.errors import ModelError

STEMS = ("diffusion_pytorch_model", "model")
"""Names of weights in safetensors of diffusers and of transformers."""
HALF = re.compile(r"\.fp16[.-]")
NOT_WEIGHTS = "position_ids"
"""A buffer of older CLIP checkpoints."""


def weights_variant(part: Path) -> str | None:
    """`fp16` if a part has its weights in half precision only, else None."""
    names = [path.name for path in part.glob("*.safetensors")]
    return "fp16" if names and all(HALF.search(name) for name in names) else None


def weights_are_safetensors(part: Path) -> bool:
    """Whether a part has weights in safetensors, which are then loaded and no others."""
    return any(part.glob("*.safetensors"))


def weights_of(part: Path) -> list[Path]:
    """The files from which a part's weights are loaded; of several copies one, empty for a part without weights.

    Raises:
        ModelError: safetensors of another name than those that load, or an index that names files elsewhere.
    """
    variant = weights_variant(part)
    middle = f".{variant}" if variant else ""
    for stem in STEMS:
        if (file := part / f"{stem}{middle}.safetensors").is_file():
            return [file]
        if (index := part / f"{stem}.safetensors.index{middle}.json").is_file():
            return [index, *_shards(index)]
    if other := sorted(part.glob("*.safetensors")):
        raise ModelError(f"'{other[0]}' has a name that neither diffusers nor transformers loads: remove or rename it")
    return sorted(part.glob("*.bin"))


def load_whole(kind: Any, part: Path, **options: Any) -> Any:
    """A network by its class in diffusers or transformers, with every weight from the part's files.

    Raises:
        ModelError: weights are missing, or of another shape; the libraries would draw them at random.
    """
    network, found = kind.from_pretrained(part, output_loading_info=True, **options)
    lacking = [name for name in found["missing_keys"] if NOT_WEIGHTS not in name]
    lacking += [str(entry[0]) for entry in found["mismatched_keys"]]
    if lacking:
        raise ModelError(
            f"the weights in '{part}' lack {len(lacking)} tensors, the first is '{sorted(lacking)[0]}': copy them again"
        )
    return network


def weights_options(part: Path) -> dict[str, Any]:
    """Options by which diffusers and transformers load the weights that `weights_of` names."""
    return {"variant": weights_variant(part), "use_safetensors": weights_are_safetensors(part)}


def load_part(kind: Any, part: Path, **options: Any) -> Any:
    """`load_whole` of the weights that `weights_of` names."""
    return load_whole(kind, part, **options, **weights_options(part))


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"'{index}' is no index of weights ({error}): copy the folder again") from error
    files = [index.parent / name for name in names]
    if any(Path(name).name != name for name in names) or not all(file.is_file() for file in files):
        raise ModelError(f"'{index}' names weights that are not beside it: copy the folder again")
    return files
