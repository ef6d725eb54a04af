"""The whole way once: hospitals, index, a real federation in Flower's engine, counterfactuals, report."""

from __future__ import annotations

import json
import re
from pathlib import Path

import psutil
import pytest
import torch

from ld_client.data.store import open_store
from ld_common.release.release import load_release_base, read_release
from ld_simulations.cli import cli
from ld_simulations.demo import load_demo, prepare_sites
from ld_simulations.summary import AIMS

CONFIGS = Path(__file__).parents[2] / "configs"


def test_one_seed_gives_one_store(tiny_base: Path, tmp_path: Path) -> None:
    stores = []
    for name in ("first", "second"):
        overrides = [f"output={tmp_path / name}", "hospital_overrides=[patients=2,held_out=1]"]
        demo = load_demo(CONFIGS / "demo.yaml", [*overrides, f"overrides=[base_model={tiny_base}]"])
        prepare_sites(demo)
        stores.append(open_store(demo.output / "stores/aster"))
    assert stores[0].pseudonyms == stores[1].pseudonyms
    assert torch.equal(stores[0].latents, stores[1].latents)


@pytest.mark.slow
def test_a_small_demo_runs_and_leaves_nothing_running(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "demo"
    study = [
        f"base_model={tiny_base}",
        "training.steps=2",
        "training.batch_size=2",
        "federation.rounds=2",
        "edit.steps=4",
    ]
    arguments = ["--config", str(CONFIGS / "demo.yaml"), f"output={output}"]
    arguments += ["hospital_overrides=[patients=2,held_out=1]", f"overrides=[{','.join([*study, 'adapter.rank=2'])}]"]
    cli(arguments, standalone_mode=False)
    said = capsys.readouterr().out
    assert re.search(r"round 2/2 .*aster .*birch .*cedar", said.replace("\n", " "))
    summary = json.loads((output / "summary.json").read_text())
    assert set(AIMS) <= set(summary)
    assert (summary["sites"], summary["rounds"], summary["patients"]) == (3, 2, 6)
    release = read_release(output / "study" / "release")
    assert load_release_base(release).digest == release.base_digest
    assert sorted(release.site_drifts) == ["aster", "birch", "cedar"]
    report = (output / "report.html").read_text()
    assert report.count('alt="true counterfactual"') == summary["counterfactuals"]
    assert "http://" not in report
    assert "https://" not in report
    assert not [process for process in psutil.process_iter() if str(output) in _flower_home(process)]


def _flower_home(process: psutil.Process) -> str:
    try:
        return process.environ().get("FLWR_HOME", "")
    except psutil.Error:
        return ""
