"""`ld-evaluate`, in this process and with nothing but ld_common beside it."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ld_common.core.command import run_cli
from ld_evaluate.cli import cli

FOREIGN = ("flwr", "nilearn", "opacus", "ld_server", "ld_client", "ld_simulations", "ld_generate")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        run_cli(cli, arguments)
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


METHOD = """
def brighter(pixels, source, target):
    return pixels * 1.1

def cropped(pixels, source, target):
    return pixels[1:]
"""


@pytest.mark.slow
def test_a_release_is_judged_beside_other_methods(
    release_folder: Path,
    hospital: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    (tmp_path / "my_method.py").write_text(METHOD)
    monkeypatch.chdir(tmp_path)
    arguments = [str(release_folder), "--data", str(hospital / "held_out"), "--out", str(out)]
    arguments += ["--editor", "belm", "--editor", "sdedit", "--num-seeds", "2", "--json", "cycles=1", "cycled=1"]
    code, printed, err = run(capsys, *arguments, "--callable", "brighter=my_method:brighter")
    assert code == 0, err
    results = json.loads((out / "counterfactuals.json").read_text())
    assert json.loads(printed) == results
    runs = results["runs"]
    assert [(run["editor"], run["seed"]) for run in runs] == [
        ("belm", 0),
        ("sdedit", 0),
        ("sdedit", 1),
        ("brighter", 0),
    ]
    page = (out / "counterfactuals.md").read_text()
    assert "| belm |" in page and "| *copy* | 2 |" in page and "### Follow up" in page
    assert f"{runs[0]['counts']['questions']} edits of 2 patients" in page
    for result in runs:
        for key in ("raw_gain_db", "followup_raw_gain_db"):
            metrics = result["metrics"]
            assert metrics[f"{key}_low"] <= metrics[key] <= metrics[f"{key}_high"]
    with (out / "counterfactuals_patients.csv").open() as stream:
        rows = [row for row in csv.DictReader(stream) if (row["answer"], row["edit"]) == ("belm", "age_plus_10")]
    errors = [float(row["ventricles_error_mm2"]) for row in rows]
    assert len(errors) == 2 and errors == sorted(errors, reverse=True)
    code, _, err = run(capsys, *arguments, "--callable", "cropped=my_method:cropped")
    assert code == 2
    assert "--callable cropped" in err and "keep the scan's grid" in err
    shared = [str(hospital / "held_out" / "scans.csv")]
    code, _, err = run(capsys, *arguments, "--reference", *shared)
    assert code == 2
    assert "--reference has 2 patients of --data" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["release"], ["--data"]),
        (["release", "--data", "nowhere"], ["--data", "nowhere"]),
        (["release", "--data", "{scans}", "--editor", "belmm"], ["belmm", "belm"]),
        (["release", "--data", "{scans}", "--num-seeds", "0"], ["--num-seeds", "0"]),
        (["release", "--data", "{scans}", "--answers", "mine"], ["--answers mine", "NAME=VALUE"]),
        (["release", "--data", "{scans}", "--answers", "mine=nowhere"], ["--answers mine", "answers.csv"]),
        (["release", "--data", "{scans}", "--callable", "belm=a:b"], ["belm", "taken"]),
        (["release", "--data", "{scans}", "--callable", "copy=a:b"], ["copy", "taken"]),
        (["release", "--data", "{scans}", "cycle=3"], ["cycle", "cycles"]),
        (["release", "--data", "{scans}", "--out", "/dev/null/x"], ["/dev/null/x", "--out"]),
    ],
)
def test_mistakes_are_refused_before_anything_is_loaded(
    hospital: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    scans = str(hospital / "held_out")
    code, _, err = run(capsys, *(argument.format(scans=scans) for argument in arguments))
    assert code == 2
    assert all(word in err for word in words)


def blocked(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process in which no other package of ours can be imported."""
    prefix = f"import sys\nsys.modules.update(dict.fromkeys({FOREIGN}))\n"
    command = [sys.executable, "-c", prefix + code, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=230, env=environment)


@pytest.mark.slow
def test_it_loads_without_server_client_and_simulations() -> None:
    done = blocked("import ld_evaluate.cli, ld_evaluate.evaluation")  # the latter imports all of ld_evaluate
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_it_runs_without_server_client_and_simulations(release_folder: Path, hospital: Path, tmp_path: Path) -> None:
    arguments = [str(release_folder), "--data", str(hospital / "held_out"), "--out", str(tmp_path / "out")]
    reference = ["--reference", str(hospital / "scans.csv")]
    quick = ["--num-seeds", "1", "cycles=1", "cycled=1", "predictor_steps=1"]
    done = blocked("import ld_evaluate.cli; ld_evaluate.cli.main()", *arguments, *reference, *quick)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "counterfactuals.md").exists()


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--version")
    assert code == 0
    assert out.strip()[-1].isdigit()
