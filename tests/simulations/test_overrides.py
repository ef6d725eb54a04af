"""`key=value` for a demo, its study and its hospitals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ld_common.core.errors import ConfigError
from ld_simulations.demo import REMOVED, SCHEMAS, load_demo
from ld_simulations.overrides import split_overrides

DEMO = Path(__file__).parents[2] / "configs/demo.yaml"


def test_each_override_goes_to_the_first_config_that_has_the_key() -> None:
    overrides = [
        "cpus_per_site=1",
        "federation.rounds=2",
        "adapter.rank=4",
        "seed=3",
        "patients=8",
        "hospitals.0.patients=4",
    ]
    assert split_overrides(overrides[:5], SCHEMAS) == {
        "demo": ["cpus_per_site=1"],
        "study": ["federation.rounds=2", "adapter.rank=4", "seed=3"],
        "hospitals": ["patients=8"],
    }
    # the demo has a key `hospitals` too, but nothing below it
    assert split_overrides(overrides[5:], SCHEMAS)["hospitals"] == ["hospitals.0.patients=4"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rounds=2", r"federation\.rounds \(study\)"),
        ("federation.ronds=2", r"federation\.rounds \(study\)"),
        ("patiens=2", r"patients \(hospitals\)"),
        ("cpu_per_site=2", r"cpus_per_site \(demo\)"),
        ("federation.min_sites=2", r"federation\.min_train_nodes"),
        ("federation.aggregate=median", r"federation\.aggregation\.name"),
        ("scheme=lora", "adapter"),
        ("reuse=true", "--fresh"),
        ("overrides=[seed=1]", r"federation\.rounds=2"),
        ("federation.rounds", "key=value"),
        ("qqqq=1", "known keys"),
    ],
)
def test_an_unknown_key_names_the_nearest_one_and_its_config(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        split_overrides([override], SCHEMAS, REMOVED)


def test_a_demo_is_loaded_with_values_of_all_three_configs(tmp_path: Path) -> None:
    overrides = [f"output={tmp_path}", "federation.rounds=2", "federation.sites=[aster,birch]", "test_patients=1"]
    demo = load_demo(DEMO, [*overrides, "patients=2", "held_out=0.2", "adapter.name=full"])
    assert (demo.study.federation.rounds, demo.study.federation.sites) == (2, ["aster", "birch"])
    assert demo.study.adapter["name"] == "full"
    assert {(hospital.patients, hospital.test_patients) for hospital in demo.hospitals.hospitals} == {(2, 1)}
    assert demo.config.held_out == 0.2
    with pytest.raises(ConfigError, match=r"held_out is 4.*test_patients"):
        load_demo(DEMO, ["held_out=4"])


@pytest.mark.slow
def test_a_typo_is_refused_before_any_model_library_is_imported() -> None:
    code = (
        "import sys\n"
        "from ld_simulations.cli import cli\n"
        "try:\n"
        f"    cli(['--config', {str(DEMO)!r}, 'ronds=2'], standalone_mode=False)\n"
        "except Exception as error:\n"
        "    print(error)\n"
        "print(*{'torch', 'diffusers', 'flwr', 'nilearn', 'monai'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    message, heavy = done.stdout.splitlines()
    assert "federation.rounds (study)" in message
    assert heavy == ""
