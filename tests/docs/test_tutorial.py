"""The Python of the README and of the tutorial runs as it is written, on tiny data and with few steps."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest

from tests.conftest import write_mr_slice

ROOT = Path(__file__).parents[2]
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
FEWER = {
    "steps=500": "steps=2",
    "rank=8": "rank=1",
    '"num_inference_steps": 20': '"num_inference_steps": 2',
    "num_inference_steps=25": "num_inference_steps=2",
    "[5, 10, 15, 20]": "[5, 10]",
    "/AH0001/": "/AH0000/",
    'target={"age": 84})': 'target={"age": 84}, num_inference_steps=2)',
}
"""What the test replaces to be quick."""


@pytest.fixture
def workspace(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the configs, a base, and a few patients where the demo writes its own."""
    (tmp_path / "simulations").mkdir()
    (tmp_path / "simulations/tiny_base").symlink_to(tiny_base)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    hospitals = tmp_path / "runs/demo/hospitals"
    for table, inputs in {
        hospitals / "scans.csv": ["aster/A0/first", "aster/A0/second", "aster/A1/first"],
        hospitals / "held_out/scans.csv": ["aster/AH0000/series", "aster/AH0000/follow_up", "aster/AH0001/series"],
    }.items():
        rows = []
        for number, name in enumerate(inputs):
            header = {"PatientAge": f"{70 + number:03d}Y", "PatientSex": "F", "StudyDate": f"{2020 + number}0101"}
            pixels = np.random.default_rng(number).integers(0, 1000, (24, 20)).astype(np.uint16)
            write_mr_slice(table.parent / name / "IM0000.dcm", pixels, **header)
            rows.append([Path(name).parent.name, name, f"{70 + number}.3", "F", "CN"])
        with table.open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([["patient", "input", "age", "sex", "diagnosis"], *rows])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mpl, "use", lambda backend: None)
    mpl.rcParams["backend"] = "agg"
    return tmp_path


def run_blocks(page: str) -> dict[str, Any]:
    """Run a page's Python, block after block in one namespace, and return the namespace."""
    namespace: dict[str, Any] = {}
    for block in PYTHON.findall((ROOT / page).read_text(encoding="utf-8")):
        for text, quick in FEWER.items():
            block = block.replace(text, quick)
        exec(compile(block, page, "exec"), namespace)
    return namespace


def write_release() -> str:
    """A release of an untrained LoRA where the demo writes its own."""
    from ld_common import adapters, import_lora, inject, load_base

    base, modality, release = "simulations/tiny_base", "configs/modalities/brain_mri.yaml", "runs/demo/study/release"
    inject(load_base(base), adapters.Lora(rank=1), seed=0).save_pretrained("lora")
    import_lora("lora", base, modality, release)
    return release


def test_the_tutorial_runs(workspace: Path) -> None:
    names = run_blocks("docs/tutorial.md")
    assert len(names["losses"]) == 2
    assert all(len(areas) == 2 for areas in names["changes"].values())
    for file in ("lora/pytorch_lora_weights.safetensors", "first/image.png", "figure.png", "sample.png"):
        assert (workspace / "tutorial" / file).is_file()
    assert names["noisy"].shape == names["batch"].shape


@pytest.mark.slow
def test_the_researcher_s_scripts_run(workspace: Path) -> None:
    from typer.testing import CliRunner

    from ld_generate.cli import cli

    release = write_release()
    rows, figure = PYTHON.findall((ROOT / "docs/howto/researcher.md").read_text(encoding="utf-8"))
    (workspace / "guide").mkdir()
    exec(compile(rows, "rows.py", "exec"), {})
    options = ["--allow-unsigned", "--out", "guide/batch", "num_inference_steps=2"]
    done = CliRunner().invoke(cli, ["batch", release, "guide/rows.csv", *options])
    assert done.exit_code == 0, done.output
    exec(compile(figure, "figure.py", "exec"), {})
    assert (workspace / "guide/figure.png").is_file()


def test_the_longitudinal_drift_of_one_s_own_visits_runs(workspace: Path) -> None:
    names = run_blocks("docs/extending.md")
    assert names["pipe"].editor.name == "drift"
    assert names["result"].record["history_years"] == [pytest.approx(1, abs=0.01)]
    assert (workspace / "own_drift/image.png").is_file()


@pytest.mark.slow
def test_the_readme_s_python_runs(workspace: Path) -> None:
    write_release()
    with pytest.warns(UserWarning):
        names = run_blocks("README.md")
    assert names["result"].image.shape == names["result"].scan.shape
    assert (workspace / "counterfactual/image.png").is_file()
    assert (workspace / "out/pytorch_lora_weights.safetensors").is_file()
