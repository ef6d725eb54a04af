"""The files of a site's data, and their names relative to the data's root."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from ld_client.data.exclusions import Exclusion, Reason
from ld_client.site_config import SiteConfig


def list_files(site: SiteConfig) -> tuple[list[Path], list[Exclusion]]:
    """Every file under the root except the tables, the store and hidden files, in a fixed order; and lost folders."""
    tables = [site.data.table, *(other.table for other in site.data.joined)]
    skipped = frozenset(os.path.realpath(path) for path in (*tables, site.store))
    files: list[Path] = []
    lost: dict[str, str] = {}
    # only links need be resolved: any other entry lies where its folder does
    waiting = [(site.data.root, os.path.realpath(site.data.root).rstrip(os.sep))]
    while waiting:
        folder, real = waiting.pop()
        entries = _entries(folder)
        if entries is None:
            lost[folder] = "no permission to list this folder: change its permissions"
            continue
        below = []
        for entry in entries:
            link = entry.is_symlink()
            place = os.path.realpath(entry.path) if link else f"{real}{os.sep}{entry.name}"
            if place in skipped:
                continue
            if not _is_folder(entry):
                files.append(Path(entry.path))
            elif link:
                lost[entry.path] = "a link to a folder, which is not followed: set data.root to its target"
            else:
                below.append((entry.path, place))
        waiting += reversed(below)
    exclusions = [
        Exclusion(relative_name(Path(path), site.data.root), 0, Reason.UNREADABLE, why) for path, why in lost.items()
    ]
    return sorted(files, key=lambda path: path.parts), exclusions


def relative_name(path: Path, root: Path | str) -> str:
    """A file's path relative to a folder above it, with slashes; raises `ValueError` where it is not above it."""
    whole, start = str(path), _start(root)
    return whole[len(start) :] if whole.startswith(start) else path.relative_to(root).as_posix()


@functools.lru_cache(maxsize=8)
def _start(root: Path | str) -> str:
    """What a path below a root begins with; pathlib takes many times as long, for each of many files."""
    return f"{Path(root)}/"


def _entries(folder: str) -> list[os.DirEntry[str]] | None:
    """What is in a folder, hidden files apart; None where it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError:
        return None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one."""
    try:
        return entry.is_dir()
    except OSError:
        return False
