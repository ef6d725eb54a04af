"""How a release names its base model: by hash, and by hub id or a path relative to the release.

No absolute path of the machine that wrote the release gets into its files.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from ld_common.core.errors import ModelError, ReleaseError
from ld_common.diffusion.base_components import family_of
from ld_common.diffusion.base_model import base_digest, locate_base

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def base_reference(base: str, digest: str, folder: Path) -> dict[str, Any]:
    """The `base_model` section of a manifest.

    Args:
        base: path of the base's folder, or its hub id.
        digest: its `base_digest`.
        folder: of the release.
    """
    if base and Path(base).is_dir():
        path = os.path.relpath(Path(base).resolve(), folder.resolve())
        return {"name": Path(base).resolve().name, "hub_id": None, "path": path, "sha256": digest}
    if HUB_ID.fullmatch(base):
        return {"name": base, "hub_id": base, "path": None, "sha256": digest}
    return {"name": Path(base).name, "hub_id": None, "path": None, "sha256": digest}


def find_base(reference: dict[str, Any], folder: Path, base_name: str | None = None) -> str:
    """Path or hub id of a release's base on this machine.

    Looks at `base_name` only if it is given, else in the hub's local cache, then relative to the release.

    Args:
        reference: the manifest's `base_model` section.
        folder: of the release.
        base_name: path or hub id that the user named, with `--base` on command lines.

    Raises:
        ReleaseError: the base is not on this machine, or another one is in its place.
        ModelError: `base_name` is no base model.
    """
    wanted, name = str(reference["sha256"]), str(reference["name"])
    if base_name:
        if base_digest(base_name) != wanted:
            raise ReleaseError(
                f"base model '{base_name}' is not the one of this release, '{name}' (sha256 {wanted[:12]}...): "
                "name the right one with --base"
            )
        return base_name
    path = None if reference["path"] is None else str((folder / str(reference["path"])).resolve())
    others = []
    for candidate in filter(None, (reference["hub_id"], path)):
        try:
            digest = base_digest(candidate)
        except ModelError:
            continue
        if digest == wanted:
            return str(candidate)
        others.append(str(candidate))
    reason = f"'{others[0]}' is another one" if others else "it is not on this machine where the release looks for it"
    raise ReleaseError(f"base model '{name}' (sha256 {wanted[:12]}...): {reason}; name its folder with --base")


def read_unet_config(base: str) -> dict[str, Any]:
    """The config of the network that denoises; raises `ModelError`."""
    folder = locate_base(base)
    file = folder / family_of(folder).network / "config.json"
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read '{file}': {error}") from error
    return config
