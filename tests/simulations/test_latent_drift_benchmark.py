"""The benchmark of latent drift: its plan, its verdicts, and a quick run of all of it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ld_common.core.errors import ConfigError
from ld_simulations.benchmarks.cli import cli
from ld_simulations.benchmarks.latent_drift.plan import adopted_results, load_benchmark
from ld_simulations.benchmarks.latent_drift.strip import visible
from ld_simulations.benchmarks.latent_drift.table import find, metrics_of, reduction, rows_of, shown, verdicts

CONFIG = Path(__file__).parents[2] / "configs/benchmark_latent_drift.yaml"
ADAPTERS = ["full", "lora", "textual_inversion", "dreambooth", "custom_diffusion"]


def test_the_plan_is_the_papers_table_with_its_controls() -> None:
    benchmark = load_benchmark(CONFIG, [])
    assert list(benchmark.config.adapters) == ADAPTERS
    assert set(benchmark.config.modalities) == {"brain", "chest"}
    assert len(benchmark.config.seeds) >= 3
    drawings = benchmark.all_drawings
    plain = [drawing for drawing in drawings if drawing.training.variant == "plain"]
    for modality in ("brain", "chest"):
        for adapter in ADAPTERS:
            drawn = {
                (drawing.drift, drawing.control)
                for drawing in plain
                if (drawing.training.modality, drawing.training.adapter) == (modality, adapter)
            }
            assert drawn == {
                (False, None),
                (True, None),
                (False, "histogram_matching"),
            }
    assert {drawing.control for drawing in drawings} == {
        None,
        "histogram_matching",
        "offset_noise",
        "zero_terminal_snr",
    }
    names = [drawing.name for drawing in drawings]
    assert len(names) == len(set(names))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seeds=[]", "name seeds"),
        ("samples=0", "samples is 0"),
        ("variants.ofset_noise=[full]", "ofset_noise"),
        ("variants.centred=[basics]", "basics"),
        ("first_seed_only=[centered]", "centered"),
        ("forms.basics=[prior-map]", "basics"),
        ("forms.full=[prior-maps]", "prior-maps"),
        ("adapters.lora.adapter.ranc=2", "ranc"),
        ("device=tpu", "device is 'tpu'"),
        ("strip.modality=knee", "no 'knee'"),
        ("strip.adapter=basics", "no 'basics'"),
        ("strip.deltas=[0.1]", "at least two"),
        ("strip.rows=0", "rows is 0"),
    ],
)
def test_a_wrong_plan_is_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_benchmark(CONFIG, [override])


def test_a_strip_is_visible_by_its_smallest_step_and_monotone_or_not() -> None:
    columns = [{"delta": delta, "background_grey": grey} for delta, grey in ((-0.1, 60.0), (0.0, 40.0), (0.1, 33.0))]
    real = {"delta": None, "background_grey": 34.0}
    assert visible({"columns": [*columns, real]}) == {"strip_min_grey_difference": 7.0, "strip_monotone": True}
    turned = [columns[0], columns[2], columns[1]]
    assert visible({"columns": [*turned, real]}) == {"strip_min_grey_difference": 7.0, "strip_monotone": False}


def run_of(adapter: str, drift: bool, seed: int, control: str | None = None, **metrics: float) -> dict[str, Any]:
    return {
        "modality": "brain",
        "adapter": adapter,
        "drift": drift,
        "formulation": "prior" if drift else "none",
        "control": control,
        "seed": seed,
        "metrics": metrics,
    }


def table(cut: float, slope: float) -> list[dict[str, Any]]:
    runs = []
    for seed in range(2):
        runs.append(run_of("full", False, seed, frechet_x=10.0 + seed, size_slope=0.3))
        runs.append(run_of("full", False, seed, "histogram_matching", frechet_x=5.0, size_slope=0.5))
        runs.append(run_of("full", True, seed, frechet_x=(10.0 + seed) * (1 - cut), size_slope=slope))
    return runs


@pytest.mark.parametrize(("cut", "slope", "met"), [(0.7, 0.9, [True, True, True]), (0.3, 1.8, [False, True, False])])
def test_verdicts_follow_from_the_runs(cut: float, slope: float, met: list[bool]) -> None:
    assert [verdict.met for verdict in verdicts(table(cut, slope), "brain", ["full"])] == met


def test_drift_that_worsens_one_adapter_does_not_improve_every_adapter() -> None:
    runs = table(0.7, 0.9)
    runs += [run_of("lora", drift, 0, frechet_x=4.0 + drift, size_slope=0.3) for drift in (False, True)]
    assert not verdicts(runs, "brain", ["full", "lora"])[1].met


def test_rows_pair_the_seeds_and_show_their_spread() -> None:
    rows = rows_of(table(0.5, 0.9), "brain")
    plain, drifted = find(rows, "full", "none"), find(rows, "full", "prior")
    assert plain is not None
    assert drifted is not None
    assert reduction(plain, drifted, "frechet_x") == pytest.approx(0.5)
    assert shown(plain, "frechet_x") == "10.5 ± 0.7"
    assert list(metrics_of(table(0.5, 0.9))) == ["frechet_x", "size_slope"]


def test_the_published_table_is_adopted_whole() -> None:
    published = CONFIG.parents[1] / "docs/benchmarks/latent_drift.json"
    benchmark = load_benchmark(CONFIG, [f"adopt={published}"])
    adopted = adopted_results(benchmark)
    runs = json.loads(published.read_text())
    assert [adopted.get(drawing.name) for drawing in benchmark.all_drawings if drawing.name in adopted] == runs
    assert {f"reference-{modality}" for modality in benchmark.modalities} <= set(adopted)


@pytest.mark.slow
def test_a_quick_benchmark_fills_the_whole_table_and_goes_on_where_it_stopped(tiny_base: Path, tmp_path: Path) -> None:
    overrides = [
        f"output={tmp_path / 'work'}",
        f"results={tmp_path / 'results'}",
        f"base_model={tiny_base}",
        "zero_snr_base=''",
        "seeds=[0]",
        "patients=4",
        "test_patients=4",
        "samples=12",
        "sampler_steps=2",
        "classifier_steps=2",
        "workers=1",
        "features=[gabor]",
        "adapters.dreambooth.adapter.num_class_images=2",
        "adapters.dreambooth.adapter.class_inference_steps=2",
        *(f"adapters.{name}.training.{key}" for name in ADAPTERS for key in ("steps=2", "batch_size=2")),
    ]
    cli(["latent-drift", "--config", str(CONFIG), *overrides], standalone_mode=False)
    results = tmp_path / "results"
    runs = json.loads((results / "latent_drift.json").read_text())
    cells = {(run["modality"], run["adapter"], run["drift"], run["seed"]) for run in runs if run["control"] is None}
    assert cells == {(m, s, d, n) for m in ("brain", "chest") for s in ADAPTERS for d in (False, True) for n in (0,)}
    forms = {"none", "prior", "prior-map", "prior-conditional", "prior-scalar", "prior-local"}
    assert {run["formulation"] for run in runs} == forms | {"centred", "noise", "per-step", "per-step-literal"}
    assert {run["control"] for run in runs} == {None, "histogram_matching", "offset_noise"}
    wanted = {"frechet_gabor", "kernel_gabor", "background_error", "sharpness_ratio", "auc_synthetic"}
    wanted |= {"size_slope", "size_in_range"}
    assert all(wanted <= set(run["metrics"]) for run in runs)
    page = (results / "latent_drift.md").read_text()
    assert "## Brain" in page
    assert "## Chest" in page
    for modality in ("brain", "chest"):
        with (
            Image.open(results / f"latent_drift_{modality}.png") as sheet,
            Image.open(results / f"latent_drift_{modality}_full.png") as first,
        ):
            assert first.size[0] == sheet.size[0] > 300
            assert first.size[1] < sheet.size[1]  # the first adapter's rows alone
    strip = json.loads((results / "latent_drift_strip.json").read_text())
    assert [column["delta"] for column in strip["columns"]] == [-0.1, -0.05, 0.0, 0.05, 0.1, None]
    greys = [column["background_grey"] for column in strip["columns"][:-1]]
    differences = [abs(after - before) for before, after in itertools.pairwise(greys)]
    assert strip["strip_min_grey_difference"] == pytest.approx(min(differences), abs=0.051)
    with Image.open(results / "latent_drift_strip.png") as picture:
        assert picture.size[0] > picture.size[1] > 300
    assert f"{strip['columns'][0]['background_grey']:.0f} |" in page
    with pytest.raises(ConfigError, match="another samples"):
        cli(["latent-drift", "--config", str(CONFIG), *overrides, "samples=13"], standalone_mode=False)
    first = (tmp_path / "work/results").glob("*.json")
    times = {file: file.stat().st_mtime_ns for file in first}
    next(iter(times)).unlink()
    before = (results / "latent_drift.json").read_text()
    cli(["latent-drift", "--config", str(CONFIG), *overrides], standalone_mode=False)
    changed = [file for file, time in times.items() if file.stat().st_mtime_ns != time]
    assert changed == [next(iter(times))]
    assert (results / "latent_drift.json").read_text() == before
