"""A simulation on a Ray cluster that runs already."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from ld_common.core.errors import ConfigError, FederationError
from ld_common.core.processes import free_port
from ld_simulations.benchmarks.performance.ray_cluster import SMALL, run
from ld_simulations.demo import load_demo
from ld_simulations.federation import run_federation

DEMO = Path(__file__).parents[2] / "configs/demo.yaml"


@pytest.mark.parametrize("address", ["ray://head:10001", "head", "head:6379/x", "auto"])
def test_an_address_of_another_form_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT"):
        load_demo(DEMO, [f"ray_address={address}"])


def test_the_cluster_does_not_make_it_another_run(tmp_path: Path) -> None:
    place = f"output={tmp_path}"
    assert load_demo(DEMO, [place, "ray_address=head.example:6379"]).content() == load_demo(DEMO, [place]).content()


def test_a_cluster_that_does_not_run_is_named(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(FederationError, match=f"no Ray cluster answers at {address}"):
        run_federation(load_demo(DEMO, [f"output={tmp_path}", f"ray_address={address}"]))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_nodes_train_the_sites_of_one_study(tiny_base: Path, tmp_path: Path) -> None:
    study = [f"base_model={tiny_base}", "adapter.rank=2", "drift.shape=none", "training.steps=2"]
    measured = run(tmp_path / "demo", [*SMALL, *study, "federation.rounds=1"], config=str(DEMO))
    assert {name: measured[name] for name in ("nodes", "sites", "rounds")} == {"nodes": 2, "sites": 3, "rounds": 1}
    words = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    assert not [line for line in words if str(tmp_path) in line]
