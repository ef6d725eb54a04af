"""The two wheels: every package is in the one it belongs to, and both ask for the same libraries."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def project(file: str) -> dict[str, Any]:
    return tomllib.loads((ROOT / file).read_text())


def test_the_clients_wheel_asks_for_no_other_libraries_than_the_whole() -> None:
    client, whole = (
        set(project(file)["project"]["dependencies"]) for file in ("client/pyproject.toml", "pyproject.toml")
    )
    assert client <= {one.replace("flwr[simulation]", "flwr") for one in whole}
    assert not any(one.startswith("nilearn") for one in client)  # demo hospitals are drawn with it
