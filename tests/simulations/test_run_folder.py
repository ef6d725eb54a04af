"""The demo's output folder: what is there belongs to one run, and only that run's parts are ever removed."""

from __future__ import annotations

from pathlib import Path

import pytest

from ld_common.core.errors import ConfigError
from ld_simulations.run_folder import LOCK, MARKER, claim, locked, remove_parts, remove_run

CONFIG = {"study": {"seed": 0, "training": {"steps": 2}}, "hospitals": {"patients": 4}}


def test_the_same_config_claims_a_folder_again_and_another_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    assert not claim(folder, CONFIG)
    (folder / "study").mkdir()
    assert claim(folder, CONFIG)
    other = {**CONFIG, "study": {"seed": 0, "training": {"steps": 3}}}
    with pytest.raises(ConfigError, match=r"study\.training\.steps.*ld-simulate clean --output"):
        claim(folder, other)
    assert (folder / "study").exists()


def test_a_folder_with_somebody_elses_parts_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    with pytest.raises(ConfigError, match=r"study.*output=FOLDER"):
        claim(tmp_path, CONFIG)
    for remove in (remove_parts, remove_run):
        with pytest.raises(ConfigError, match="nothing was removed"):
            remove(tmp_path)
    assert (tmp_path / "study").exists()
    assert not (tmp_path / MARKER).exists()


def test_a_damaged_marker_protects_the_folder(tmp_path: Path) -> None:
    claim(tmp_path, CONFIG)
    (tmp_path / "study").mkdir()
    for content in ("{", "[]", '{"parts": []}'):
        (tmp_path / MARKER).write_text(content)
        for use in (lambda: claim(tmp_path, CONFIG), lambda: remove_run(tmp_path)):
            with pytest.raises(ConfigError):
                use()
    assert (tmp_path / "study").exists()


def test_a_run_is_removed_without_what_others_put_beside_it(tmp_path: Path) -> None:
    folder, outside = tmp_path / "demo", tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("kept")
    claim(folder, CONFIG)
    (folder / "hospitals" / "aster").mkdir(parents=True)
    (folder / "summary.json").write_text("{}")
    (folder / "notes.txt").write_text("mine")
    (folder / "stores").symlink_to(outside)
    removed = {path.name for path in remove_run(folder)}
    assert removed == {"hospitals", "summary.json", "stores"}
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    assert (outside / "file").read_text() == "kept"
    (folder / "notes.txt").unlink()
    claim(folder, CONFIG)
    assert remove_run(folder) == [folder]
    assert not folder.exists()


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    claim(tmp_path, CONFIG)
    with locked(tmp_path):
        with pytest.raises(ConfigError, match="another ld-simulate"), locked(tmp_path):
            pass
        with pytest.raises(ConfigError, match="another ld-simulate"):
            remove_run(tmp_path)
    assert (tmp_path / LOCK).exists()
    remove_run(tmp_path)


def test_a_folder_that_cannot_be_made_is_named() -> None:
    for use in (lambda: claim(Path("/dev/null/demo"), CONFIG), lambda: locked(Path("/dev/null/demo")).__enter__()):
        with pytest.raises(ConfigError, match="/dev/null/demo"):
            use()
