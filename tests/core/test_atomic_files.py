"""Files are whole whoever writes them at once, and nothing is left beside them."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ld_common.core.atomic_files import write_bytes
from ld_common.core.errors import CheckpointError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_several_writers_of_one_path_do_not_break_each_other(tmp_path: Path) -> None:
    path, contents = tmp_path / "folder" / "file", [bytes([number]) * 5_000 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for written in [pool.submit(write_bytes, path, content) for content in contents * 25]:
            written.result()
            assert path.read_bytes() in contents
    assert names(path.parent) == ["file"]


def test_a_file_has_the_mode_that_is_asked_for_whatever_it_had(tmp_path: Path) -> None:
    path, before = tmp_path / "file", os.umask(0o027)
    try:
        for mode, expected in ((None, 0o640), (0o600, 0o600), (0o644, 0o644), (None, 0o640)):
            write_bytes(path, b"content", mode)
            assert path.stat().st_mode & 0o777 == expected
    finally:
        os.umask(before)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(CheckpointError, match="No space left"):
        patched.setattr(os, "fsync", full)
        write_bytes(path, b"new")
    assert (path.read_bytes(), names(tmp_path)) == (b"old", ["file"])
    with pytest.raises(CheckpointError, match="cannot write"):
        write_bytes(path / "below", b"new")
    (tmp_path / "folder" / "below").mkdir(parents=True)
    with pytest.raises(CheckpointError):
        write_bytes(tmp_path / "folder", b"a file where a folder is")
    assert names(tmp_path) == ["file", "folder"]


def test_the_folder_is_flushed_after_the_new_name_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[tuple[bool, bool]] = []
    flush = os.fsync

    def watched(number: int) -> None:
        flushed.append((os.path.sameopenfile(number, folder), (tmp_path / "file").exists()))
        flush(number)

    folder = os.open(tmp_path, os.O_RDONLY)
    monkeypatch.setattr(os, "fsync", watched)
    write_bytes(tmp_path / "file", b"content")
    os.close(folder)
    assert flushed == [(False, False), (True, True)]
