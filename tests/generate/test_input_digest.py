"""Records and identifiers tie answers to their scans for the account that drew them, and for nobody else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ld_common.core.errors import ConfigError
from ld_generate import input_digest
from ld_generate.input_digest import answer_key_file, describe_input, keyed_digest

PIXELS = np.arange(12, dtype=np.float32).reshape(3, 4)


@pytest.fixture(autouse=True)
def account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    use_account(monkeypatch, tmp_path / "first")
    yield
    input_digest._key.cache_clear()


def use_account(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    input_digest._key.cache_clear()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder))


def test_equal_inputs_of_an_account_have_equal_hashes_in_every_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = describe_input(Path("a/b.dcm"), [PIXELS], PIXELS > 3)
    assert answer_key_file().stat().st_mode & 0o777 == 0o600
    use_account(monkeypatch, tmp_path / "first")  # another process
    assert describe_input(Path("c/b.dcm"), PIXELS, PIXELS > 3) == first
    assert describe_input(Path("a/b.dcm"), [PIXELS + 1], None)["hmac_of_pixels"] != first["hmac_of_pixels"]
    use_account(monkeypatch, tmp_path / "second")
    other = describe_input(Path("a/b.dcm"), [PIXELS], PIXELS > 3)
    assert not set(other.values()) & set(first.values())


@pytest.mark.attack
def test_a_scan_and_its_name_cannot_be_matched_without_the_key() -> None:
    described = describe_input(Path("WEBER_ANNA.dcm"), [PIXELS], None)
    guesses = {hashlib.sha256(text).hexdigest() for text in (PIXELS.tobytes(), b"WEBER_ANNA.dcm", b"WEBER_ANNA")}
    assert not guesses & set(described.values())
    assert "WEBER" not in str(described)


def test_a_home_that_cannot_be_written_gives_hashes_of_one_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    use_account(monkeypatch, tmp_path / "file")
    first = keyed_digest([b"a"])
    assert keyed_digest([b"a"]) == first
    use_account(monkeypatch, tmp_path / "file")
    assert keyed_digest([b"a"]) != first


def test_a_key_that_others_may_read_or_that_is_damaged_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keyed_digest([b"a"])
    answer_key_file().chmod(0o644)
    use_account(monkeypatch, tmp_path / "first")
    with pytest.raises(ConfigError, match="others may read"):
        keyed_digest([b"a"])
    answer_key_file().chmod(0o600)
    answer_key_file().write_bytes(b"short")
    with pytest.raises(ConfigError, match="5 bytes, not 32"):
        keyed_digest([b"a"])
