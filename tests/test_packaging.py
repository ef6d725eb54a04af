"""The two wheels: every package is in the one it belongs to, and both ask for the same libraries."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def project(file: str) -> dict[str, Any]:
    return tomllib.loads((ROOT / file).read_text())


@pytest.mark.parametrize("file", ["pyproject.toml", "client/pyproject.toml"])
def test_every_package_is_in_its_wheel(file: str) -> None:
    setup = project(file)["tool"]["setuptools"]
    for name, folder in setup["package-dir"].items():
        root = (ROOT / file).parent / folder
        found = {path.parent.relative_to(root).parts for path in root.rglob("__init__.py")}
        assert {".".join([name, *parts]) for parts in found} == {
            one for one in setup["packages"] if one.split(".")[0] == name
        }


def test_the_clients_wheel_asks_for_no_other_libraries_than_the_whole() -> None:
    client, whole = (
        set(project(file)["project"]["dependencies"]) for file in ("client/pyproject.toml", "pyproject.toml")
    )
    assert client <= {one.replace("flwr[simulation]", "flwr") for one in whole}
    assert not any(one.startswith(("nilearn", "scikit-image")) for one in client)  # demo hospitals are drawn with them
