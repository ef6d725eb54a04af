"""The counterfactuals benchmark: its plan, what it adopts, its summary, and a quick run of all of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from ld_common.core.command import run_cli
from ld_common.core.errors import ConfigError
from ld_common.editing.registry import editor_options
from ld_evaluate.patient_tables import Run
from ld_simulations.benchmarks.cli import cli
from ld_simulations.benchmarks.counterfactuals import worker
from ld_simulations.benchmarks.counterfactuals.plan import load_counterfactuals
from ld_simulations.benchmarks.counterfactuals.table import page, summarize_table
from ld_simulations.benchmarks.counterfactuals.worker import adopted_results, planned_editor, speedup_name

CONFIGS = Path(__file__).parents[2] / "configs"
TABLE = CONFIGS / "benchmark_counterfactuals.yaml"
COUNTS = {
    "patients": 24,
    "follow_ups": 24,
    "raw_follow_ups": 24,
    "questions": 96,
    "reference_scans": 9,
    "reference_patients": 4,
}


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


def table_of(folder: Path) -> Path:
    """A complete table of the first seed, as this code writes it."""
    benchmark = load_counterfactuals(TABLE, ["seeds=[0]"])
    runs = []
    for task in benchmark.tasks:
        training, plan = task.training, benchmark.config.editors[task.editor]
        section = benchmark.demo(training.modality, training.release).study.edit
        labels = {"modality": training.modality, "seed": training.seed, "release": training.release}
        edit = editor_options(planned_editor(section, plan))
        runs.append({**labels, "editor": task.editor, "draws": plan.seeds, "edit": edit, "rules": {}})
    batch = {"modality": "brain", "editor": "belm", "speedup": 3.0}
    path = folder / "counterfactuals.json"
    path.write_text(json.dumps({"runs": runs, "batch": batch}))
    return path


@pytest.mark.slow
def test_an_earlier_table_is_adopted_except_for_editors_with_other_options(tmp_path: Path) -> None:
    table = table_of(tmp_path)
    options = [f"output={tmp_path / 'runs'}", f"adopt={table}", "seeds=[0]"]
    written = json.loads(table.read_text())
    names = {f"{run['modality']}-{run['editor']}-{run['seed']}" for run in written["runs"]}

    def adopted(*more: str) -> dict[str, Run]:
        benchmark = load_counterfactuals(TABLE, [*options, *more])
        results = adopted_results(benchmark)
        return {task.name: results[task.name] for task in benchmark.tasks if task.name in results}

    assert set(adopted()) == names
    results = adopted_results(load_counterfactuals(TABLE, options))
    assert results[speedup_name("brain", "belm")] == written["batch"]
    for change in ("edit.guidance_scale=9", "seeds=2", "release=instruct_pix2pix"):
        missing = names - adopted(f"editors.ddim.{change}").keys()
        assert missing == {"brain-ddim-0", "chest-ddim-0"}
    for run in written["runs"]:
        del run["rules"]  # as before answers were compared with rules
    table.write_text(json.dumps(written))
    assert not adopted()


def run_of(editor: str, seed: int, gain: float) -> Run:
    numbers = {"cases": 24, "gain_db": gain, "raw_pixels": 1.0, "ventricles_r": 0.6, "ventricles_error_mm2": 90.0}
    metrics = {
        "null_edit_psnr_gap_db": 0.1,
        "raw_gain_db": gain,
        "error_over_best_rule": 0.9,
        "followup_error_over_best_rule": 0.7,
    }
    return {
        "modality": "brain",
        "biomarkers": ["ventricles"],
        "editor": editor,
        "seed": seed,
        "metrics": metrics,
        "by_edit": {"age_plus_10": numbers},
        "patients": [],
        "rules": {"copy": {"age_plus_10": numbers | {"gain_db": 0.0}}},
        "rule_patients": [],
        "real": {},
        "of_truth": {},
        "counts": COUNTS,
    }


def test_the_summary_is_of_the_editor_nearest_to_the_truth_and_names_missed_aims() -> None:
    runs = [run_of("far", 0, 1.0), run_of("near", 0, 4.0), run_of("near", 1, 5.0), run_of("far", 1, 6.0)]
    speedup = {"speedup": 2.0, "batch": 16, "turns": [{"1": 2.0, "16": 1.0}], "threads": 1}
    ceilings = {"brain": {"age_plus_10": 0.75}}
    summary = summarize_table(runs, ceilings, speedup)
    assert (summary["editor"], summary["raw_gain_db"]) == ("near", 4.5)
    assert summary["within_edit_r_over_ceiling"] == pytest.approx(0.6 / 0.75)
    text = page(runs, 6, summary, ceilings, speedup)
    assert "4 of 6 planned results" in text
    assert "| `batch16_speedup` | 2 | at least 3 | **missed** |" in text
    assert "| `error_over_best_rule` | 0.9 | at most 0.8 | **missed** |" in text
    assert "| `followup_error_over_best_rule` | 0.7 | at most 0.8 | met |" in text
    assert "| near | 24 | +4.50 | 0.60 |" in text
    assert "an r of 0.75 at most" in text


@pytest.mark.slow
def test_the_table_is_filled_once_and_read_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = ["adapter.rank=1", "training.steps=1", "training.batch_size=2", "federation.rounds=1"]
    quick += ["edit.num_inference_steps=3"]
    config = {
        "output": str(tmp_path / "runs"),
        "results": str(tmp_path / "docs"),
        "demos": {"brain": str(CONFIGS / "network_demo.yaml")},
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
    assert set(written["ceilings"]["brain"]) == {"age_plus_10", "age_plus_20", "disease_added", "disease_removed"}
    assert "age_plus_20" in (tmp_path / "docs" / "counterfactuals_patients.csv").read_text()
