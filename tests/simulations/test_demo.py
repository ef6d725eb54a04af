"""The demo: its hospitals, and once the whole way with an interruption."""

from __future__ import annotations

import json
import re
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image

from ld_client.data.store import open_store
from ld_common.core.command import run_cli
from ld_common.diffusion.longitudinal import LongitudinalDrift
from ld_common.release.release import load_release_base, read_release
from ld_server.deployment.watched_run import WatchedRun
from ld_simulations import simulate
from ld_simulations.benchmarks.seen.browser import (
    CHROMIUM,
    DESK,
    PHONE,
    chromium,
    cut_text,
    opened,
    violations,
    width,
)
from ld_simulations.cli import cli
from ld_simulations.demo import load_demo
from ld_simulations.preparation import prepare_sites
from ld_simulations.run_folder import MARKER
from ld_simulations.summary import AIMS

DEMO = Path(__file__).parents[2] / "configs/demo.yaml"
SMALL = ["patients=2", "test_patients=1"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        run_cli(cli, arguments)
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


@pytest.mark.slow
def test_one_seed_gives_one_store(tiny_base: Path, tmp_path: Path) -> None:
    stores = []
    for name in ("first", "second"):
        demo = load_demo(DEMO, [f"output={tmp_path / name}", f"base_model={tiny_base}", *SMALL])
        demo.hospitals.hospitals = demo.hospitals.hospitals[:1]
        prepare_sites(demo)
        stores.append(open_store(demo.output / "stores/aster"))
    assert stores[0].pseudonyms == stores[1].pseudonyms
    assert torch.equal(stores[0].latents, stores[1].latents)


def test_an_interrupted_run_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(simulate, "run_demo", interrupt)
    code, out, err = run(capsys, "--config", str(DEMO), f"output={tmp_path / 'demo'}", *SMALL)
    assert code == 130
    assert "resumes" in out + err
    assert (tmp_path / "demo" / MARKER).exists()
    code, _, err = run(capsys, "--config", str(DEMO), f"output={tmp_path / 'demo'}", "patients=3")
    assert code == 2
    assert "hospitals" in err and "clean" in err
    code, out, _ = run(capsys, "clean", "--output", str(tmp_path / "demo"))
    assert code == 0
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config", str(DEMO), "output=/dev/null/demo"], ["/dev/null/demo"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["clean", "--output", "/dev/null/demo"], ["/dev/null/demo"]),
    ],
)
def test_what_cannot_be_is_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]) -> None:
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert err.count("\n") == 1
    assert all(word in err for word in words)


@pytest.mark.slow
def test_a_small_demo_runs_resumes_and_leaves_nothing_running(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "demo"
    study = [f"base_model={tiny_base}", "training.steps=2", "training.batch_size=2", "federation.rounds=2"]
    arguments = ["--config", str(DEMO), "--json", f"output={output}", *SMALL, *study]
    arguments += ["network.name=ddpm", "network.num_inference_steps=4", "adapter.rank=2"]
    code, out, err = run(capsys, *arguments)
    assert code == 0, err
    assert re.search(r"round 2/2 .*aster .*birch .*cedar", err.replace("\n", " "))
    summary = json.loads(out)
    assert summary == json.loads((output / "summary.json").read_text())
    assert set(AIMS) <= set(summary)
    assert 0 < summary["first_picture_seconds"] < summary["seconds_total"]
    with Image.open(output / "first_look.png") as first:
        assert first.width > 800
    assert (summary["sites"], summary["rounds"], summary["patients"]) == (3, 2, 6)
    log = (output / "study/flower.log").read_text()
    assert "\x1b" not in log
    assert [log.count(line) for line in ("[ROUND 1/2]", "[ROUND 2/2]", "Starting Flower SuperLink")] == [1, 1, 1]
    assert (output / "study/rounds.csv").read_text().count("\n") == 1 + 2 * 3
    assert WatchedRun.find(output).status().ended
    release = read_release(output / "study" / "release")
    assert load_release_base(release).digest == release.base_digest
    assert isinstance(release.drift, LongitudinalDrift)
    assert summary["network"]["by_edit"].keys() == summary["by_edit"].keys()
    report = (output / "report.html").read_text()
    assert report.count('alt="truth: ') == summary["counterfactuals"]
    assert report.index("Contents") < report.index("Test patients, from worst to best")
    check_in_browser(output / "report.html")
    assert "http://" not in report
    assert "https://" not in report
    assert not [process for process in psutil.process_iter() if str(output) in _flower_home(process)]
    # again: nothing is trained twice, and the report is drawn anew
    (output / "report.html").unlink()
    monkeypatch.setattr(simulate, "run_federation", None)
    code, out, err = run(capsys, *arguments)
    assert code == 0, err
    keys = ("raw_gain_db", "with_history", "within_edit_r_over_ceiling", "error_over_best_rule", "identity_ratio")
    assert [json.loads(out)[key] for key in keys] == [summary[key] for key in keys]
    assert (output / "report.html").exists()


def check_in_browser(report: Path) -> None:
    """Where there is a browser: nothing beside a phone's screen, nothing cut off, no accessibility violation."""
    if CHROMIUM is None:
        return
    with chromium() as browser:
        for size in (DESK, PHONE):
            with opened(browser, report, size) as page:
                assert width(page) <= size["width"]
                assert cut_text(page) == []
                assert violations(page) == []


def _flower_home(process: psutil.Process) -> str:
    try:
        return process.environ().get("FLWR_HOME", "")
    except psutil.Error:
        return ""
