"""The counts of `ld-benchmark house`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ld_simulations.benchmarks.house import (
    HouseConfig,
    duplicate_class_names,
    long_signatures,
    top_level_modules,
    words_without_code,
)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    package = tmp_path / "ld_common"
    (package / "core").mkdir(parents=True)
    parameters = ", ".join(f"p{number}" for number in range(8))
    (package / "__init__.py").write_text("")
    (package / "core" / "__init__.py").write_text("class Twice: ...\n")
    (package / "pipeline.py").write_text(
        f"class Twice:\n    def fits(self, {parameters}): ...\n    def long(self, {parameters}, *rest): ...\n"
    )
    (tmp_path / "README.md").write_text("# One two\n\n```bash\nmake demo\n```\n\nthree\n")
    return tmp_path


def test_what_is_counted(project: Path) -> None:
    assert words_without_code((project / "README.md").read_text()) == 4
    assert top_level_modules(project / "ld_common") == ["core", "pipeline"]
    assert [name.split()[-1] for name in long_signatures(project)] == ["long"]
    assert duplicate_class_names(project) == ["Twice"]
    assert HouseConfig(project=str(project)).project


def test_no_class_name_means_two_things() -> None:
    assert duplicate_class_names(Path(__file__).parents[2]) == []


@pytest.mark.slow
def test_few_functions_have_many_parameters() -> None:
    assert len(long_signatures(Path(__file__).parents[2])) <= 5


def test_the_published_numbers_are_flat() -> None:
    file = Path(__file__).parents[2] / "docs/benchmarks/house.json"
    numbers = json.loads(file.read_text())
    assert all(value is None or isinstance(value, int | float) for value in numbers.values())
