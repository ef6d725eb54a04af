"""The counterfactuals benchmark: its plan, what it adopts, its summary, and a quick run of all of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from ld_common.core.command import run_cli
from ld_common.core.errors import ConfigError
from ld_evaluate.report import Run
from ld_simulations.benchmarks.cli import cli
from ld_simulations.benchmarks.counterfactuals import worker
from ld_simulations.benchmarks.counterfactuals.plan import load_counterfactuals
from ld_simulations.benchmarks.counterfactuals.table import page, summarize_table
from ld_simulations.benchmarks.counterfactuals.worker import adopted_results, speedup_name

CONFIGS = Path(__file__).parents[2] / "configs"
TABLE = CONFIGS / "benchmark_counterfactuals.yaml"
PUBLISHED = CONFIGS.parent / "docs/benchmarks/counterfactuals.json"
COUNTS = {"patients": 24, "follow_ups": 24, "questions": 96, "reference_scans": 9, "reference_patients": 4}


def test_an_editor_may_be_judged_on_one_modality_only() -> None:
    benchmark = load_counterfactuals(TABLE, ["seeds=[0]", "editors.pix2pix_zero.modalities=[chest]"])
    modalities: dict[str, set[str]] = {}
    for task in benchmark.tasks:
        modalities.setdefault(task.editor, set()).add(task.training.modality)
    assert modalities["pix2pix_zero"] == {"chest"}
    assert modalities["belm"] == {"brain", "chest"}
    assert set(benchmark.trainings) == {task.training for task in benchmark.tasks}
    with pytest.raises(ConfigError, match="no demo 'knee': known: brain, chest"):
        load_counterfactuals(TABLE, ["editors.belm.modalities=[knee]"])


@pytest.mark.slow
def test_an_earlier_table_is_adopted_except_for_editors_with_other_options(tmp_path: Path) -> None:
    options = [f"output={tmp_path / 'runs'}", f"adopt={PUBLISHED}"]
    published = json.loads(PUBLISHED.read_text())
    batch = published["batch"]
    runs = {f"{run['modality']}-{run['editor']}-{run['seed']}": run for run in published["runs"]}

    def adopted(*more: str) -> dict[str, Run]:
        benchmark = load_counterfactuals(TABLE, [*options, *more])
        results = adopted_results(benchmark)
        return {task.name: results[task.name] for task in benchmark.tasks if task.name in results}

    assert adopted() == runs
    other_seed = adopted_results(load_counterfactuals(TABLE, [*options, "seeds=[1]"]))
    assert other_seed[speedup_name(batch["modality"], batch["editor"])] == batch  # whichever seed's release was timed
    first = {name for name in runs if name.endswith("-0")}
    for change in ("edit.guidance_scale=9", "seeds=2", "release=longer"):
        missing = first - adopted("seeds=[0]", f"editors.ddim.{change}").keys()
        assert missing == {"brain-ddim-0", "chest-ddim-0"}


def run_of(editor: str, seed: int, gain: float) -> Run:
    metrics = {
        "null_edit_psnr_gap_db": 0.1,
        "followup_ventricles_error_cut": 0.1,
        "followup_ventricles_error_mm2": 90.0,
        "copy_ventricles_error_mm2": 100.0,
        "edit_direction_rate": 1.0,
        "copy_gain_db": gain,
        "growth_correlation": 0.9,
        **{f"{who}_{what}": 1.0 for who in ("copy", "followup") for what in ("psnr_db", "ssim", "ms_ssim")},
    }
    return {
        "modality": "brain",
        "editor": editor,
        "seed": seed,
        "metrics": metrics,
        "by_edit": {"age_plus_10": {"copy_gain_db": gain}},
        "real": {},
        "counts": COUNTS,
    }


def test_the_summary_is_of_the_editor_nearest_to_the_truth_and_names_missed_aims() -> None:
    runs = [run_of("far", 0, 1.0), run_of("near", 0, 4.0), run_of("near", 1, 5.0), run_of("far", 1, 6.0)]
    speedup = {"speedup": 2.0, "batch": 16, "turns": [{"1": 2.0, "16": 1.0}], "threads": 1}
    summary = summarize_table(runs, {"brain": 0.95}, speedup)
    assert (summary["editor"], summary["copy_gain_db"]) == ("near", 4.5)
    assert summary["growth_correlation_of_ceiling"] == pytest.approx(0.9 / 0.95)
    text = page(runs, 6, summary, {"brain": 0.95}, speedup)
    assert "4 of 6 planned results" in text
    assert "| `batch16_speedup` | 2 | at least 3 | **missed** |" in text
    assert "| `edit_direction_rate` | 1 | at least 0.98 | met |" in text
    assert "| near | 4.5 ± 0.71 |" in text


@pytest.mark.slow
def test_the_table_is_filled_once_and_read_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = ["adapter.rank=1", "training.steps=1", "training.batch_size=2", "federation.rounds=1"]
    quick += ["edit.num_inference_steps=3"]
    config = {
        "output": str(tmp_path / "runs"),
        "results": str(tmp_path / "docs"),
        "demos": {"brain": str(CONFIGS / "demo.yaml")},
        "releases": {
            "prompt": quick,
            "image": ["adapter.name=instruct_pix2pix", *quick[1:]],
        },
        "editors": {
            "belm": {"release": "prompt", "edit": {"name": "belm"}},
            "seen": {"release": "image", "edit": {"name": "instruct_pix2pix"}},
        },
        "judge": {"cycles": 1, "cycled": 1, "predictor_steps": 1},
        "hospitals": ["patients=1", "test_patients=1"],
    }
    file = tmp_path / "table.yaml"
    file.write_text(yaml.safe_dump(config))
    monkeypatch.setattr(worker, "BATCH", 2)
    monkeypatch.setattr(worker, "TURNS", 1)
    adopting = f"adopt={tmp_path / 'docs' / 'counterfactuals.json'}", f"output={tmp_path / 'elsewhere'}"
    for more in ((), (), adopting):
        with pytest.raises(SystemExit) as ended:
            run_cli(cli, ["counterfactuals", "--config", str(file), *more])
        assert (ended.value.code or 0) == 0, capsys.readouterr()
        monkeypatch.setattr(worker, "train_release", None)  # nothing is trained twice
    written = json.loads((tmp_path / "docs" / "counterfactuals.json").read_text())
    assert {run["editor"] for run in written["runs"]} == {"belm", "seen"}
    (exact,) = [run for run in written["runs"] if run["editor"] == "belm"]
    assert exact["metrics"]["null_edit_psnr_gap_db"] == pytest.approx(0, abs=0.01)
    assert [written["batch"][key] == written["summary"][key] for key in ("modality", "editor")] == [True, True]
    assert written["summary"]["batch16_speedup"] == written["batch"]["speedup"] > 0
    assert "| seen |" in (tmp_path / "docs" / "counterfactuals.md").read_text()
