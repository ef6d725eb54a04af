from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ld_common.core.config import load_config, require, to_mapping
from ld_common.core.errors import ConfigError
from ld_common.protocol.study_config import StudyConfig


@dataclass
class Inner:
    learning_rate: float = 0.1

    def __post_init__(self) -> None:
        require(self.learning_rate > 0, "learning_rate must be above 0")


@dataclass
class Outer:
    steps: int = 3
    inner: Inner = field(default_factory=Inner)
    table: dict[str, Inner] = field(default_factory=dict)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


def test_overrides_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    loaded = load_config(Outer, write(tmp_path, "steps: 5\ninner: {learning_rate: 0.5}"), ["inner.learning_rate=0.25"])
    assert (loaded.steps, loaded.inner.learning_rate) == (5, 0.25)
    assert type(loaded.inner) is Inner


@pytest.mark.parametrize(
    ("text", "overrides", "parts"),
    [
        ("stesp: 4", [], ["'stesp'", "'steps'"]),
        ("inner: {lerning_rate: 1}", [], ["'inner.lerning_rate'", "'learning_rate'"]),
        ("table: {a: {learning_rat: 1}}", [], ["learning_rat", "'learning_rate'"]),
        ("", ["inner.learning=1"], ["'inner.learning'", "'learning_rate'"]),
        ("name: '${oc.env:HOME}'", [], ["'name'"]),
        ("zzz: 1", [], ["'zzz'", "known: steps, inner, table"]),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(
    tmp_path: Path, text: str, overrides: list[str], parts: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(Outer, write(tmp_path, text), overrides)
    assert all(part in str(caught.value) for part in parts)


def test_all_unknown_keys_are_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"stesp.*inne"):
        load_config(Outer, write(tmp_path, "stesp: 4\ninne: {}"))


@pytest.mark.parametrize("text", ["steps: many", "inner: {learning_rate: -1}", "[1, 2]", "a: [", "inner: 3"])
def test_bad_values_are_one_line_errors(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(Outer, write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        load_config(Outer, tmp_path / "absent.yaml")


def test_a_study_survives_the_wire_and_its_digest_ignores_where_results_lie() -> None:
    study = load_config(StudyConfig, None, ["name=s", "federation.sites=[x,y]", "output=one"])
    again = load_config(StudyConfig, None, ["name=s", "federation.sites=[x,y]", "output=two"])
    assert study.digest() == again.digest()
    assert to_mapping(study)["federation"]["sites"] == ["x", "y"]
    changed = load_config(StudyConfig, None, ["name=s", "federation.sites=[x,y]", "training.steps=7"])
    assert changed.digest() != study.digest()
