"""The demo's output folder: which run it belongs to, and what of it may be removed.

A marker file holds the config of the run and the names of what it writes. Nothing that no marker lists is ever removed,
and a folder is used again only by a run of the same config.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ld_common.core.atomic_files import held, write_bytes
from ld_common.core.errors import ConfigError

MARKER, LOCK = ".ld-simulate.json", ".ld-simulate.lock"
SUMMARY, NUMBERS, REPORT = "summary.json", "numbers.md", "report.html"
ROWS, STRIP, FIRST_LOOK = "counterfactuals.json", "counterfactuals.png", "first_look.png"
PARTS = ("hospitals", "hospitals.part", "stores", "sites", "study", SUMMARY, NUMBERS, REPORT, ROWS, STRIP, FIRST_LOOK)
"""Whatever a run writes below its output folder."""


def claim(folder: Path, content: Mapping[str, Any]) -> bool:
    """Mark a folder as that of a run with this config; returns whether such a run was there already.

    Raises:
        ConfigError: the folder belongs to a run of another config, holds parts that no marker lists, or cannot be
            written.
    """
    wanted = json.loads(json.dumps(content))
    marker = _read_marker(folder)
    if marker is not None:
        differing = _differences(marker["config"], wanted)
        if differing:
            raise ConfigError(
                f"'{folder}' holds a run with another {', '.join(differing[:4])}: choose another folder with "
                f"output=FOLDER, or remove that run with: ld-simulate clean --output {folder}"
            )
        return True
    foreign = [part for part in PARTS if (folder / part).exists()]
    if foreign:
        raise ConfigError(
            f"'{folder}' holds '{foreign[0]}', which no ld-simulate made: choose another folder with output=FOLDER"
        )
    _make(folder)
    content_text = json.dumps({"parts": PARTS, "config": wanted}, indent=1) + "\n"
    write_bytes(folder / MARKER, content_text.encode())
    return False


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder against other runs; raises `ConfigError` where one has it or it cannot be written."""
    _make(folder)
    try:
        with held(folder / LOCK, ConfigError(f"another ld-simulate works in '{folder}': wait for it")):
            yield
    except PermissionError as error:
        raise ConfigError(f"cannot write '{folder}' ({error.strerror}): choose another folder") from error


def remove_run(folder: Path) -> list[Path]:
    """Remove a run's parts, and the folder if nothing else is in it; returns what was removed.

    Raises:
        ConfigError: there is no marker, a run works in the folder, or a part cannot be removed.
    """
    if _read_marker(folder) is None:
        raise ConfigError(f"'{folder}' holds no run of ld-simulate: nothing was removed")
    with locked(folder):
        removed = remove_parts(folder)
        (folder / LOCK).unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()
        removed.append(folder)
    return removed


def remove_parts(folder: Path) -> list[Path]:
    """Remove what the folder's marker lists, and the marker; returns what was removed.

    Raises:
        ConfigError: there is no marker, or a part cannot be removed.
    """
    marker = _read_marker(folder)
    if marker is None:
        raise ConfigError(f"'{folder}' holds no run of ld-simulate: nothing was removed")
    removed = []
    try:
        for part in PARTS:
            path = folder / part
            if part in marker["parts"] and (path.exists() or path.is_symlink()):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
                removed.append(path)
        (folder / MARKER).unlink()
    except OSError as error:
        raise ConfigError(f"cannot remove '{error.filename}' ({error.strerror})") from error
    return removed


def _read_marker(folder: Path) -> dict[str, Any] | None:
    """A folder's marker, or None; raises `ConfigError` for one that cannot be read."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot read '{folder / MARKER}' ({error}): choose another folder with output=FOLDER"
        ) from error
    if not isinstance(marker, dict) or not {"parts", "config"} <= set(marker):
        raise ConfigError(f"'{folder / MARKER}' is of another version: choose another folder with output=FOLDER")
    return marker


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot write '{folder}' ({error.strerror}): choose another folder with output=FOLDER"
        ) from error


def _differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Dotted keys in which two nested mappings differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [
            name
            for key in keys
            if old.get(key) != new.get(key)
            for name in _differences(old.get(key), new.get(key), f"{prefix}{key}.")
        ]
    return [] if old == new else [prefix.rstrip(".")]
