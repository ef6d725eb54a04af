"""`ld-benchmark bases` and `ld-benchmark gpu`: the page says what was measured, the script for a GPU runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ld_common.core.errors import ConfigError
from ld_simulations.benchmarks.bases.plan import BasesConfig
from ld_simulations.benchmarks.bases.report import page
from ld_simulations.benchmarks.bases.run import is_green
from ld_simulations.benchmarks.bases.suite import KINDS, measure_base
from ld_simulations.benchmarks.gpu import run as gpu
from ld_simulations.benchmarks.gpu.plan import GpuConfig

DOCS = Path("docs/benchmarks")


def test_the_page_is_that_of_its_numbers() -> None:
    found = json.loads((DOCS / "bases.json").read_text(encoding="utf-8"))
    assert (DOCS / "bases.md").read_text(encoding="utf-8") == page(found)
    assert [row["base"] for row in found["rows"]] == [kind.title for kind in KINDS]
    assert found["bases_supported"] == sum(map(is_green, found["rows"]))


def test_a_row_that_misses_one_aim_is_not_green() -> None:
    row = json.loads((DOCS / "bases.json").read_text(encoding="utf-8"))["rows"][0]
    assert is_green(row)
    for key in ("null_edit_max_error", "per_sample_gradient_error", "two_process_adapter_difference"):
        assert not is_green(row | {key: 0.1})
    assert not is_green(row | {"adapters": []})
    assert not is_green(row | {"drift": {"by_steps": {"10": {"error": 0.06}}}})


@pytest.mark.slow
def test_a_base_is_measured(tmp_path: Path) -> None:
    found = measure_base(KINDS[-1].write(tmp_path / "base"), [4], 500)
    assert found["adapters"] == ["lora", "full", "dreambooth"]
    assert set(found["refused"]) == {"textual_inversion", "custom_diffusion", "instruct_pix2pix", "pix2pix_zero"}
    assert found["null_edit_max_error"] < 1e-3
    assert found["per_sample_gradient_error"] < 1e-5
    assert found["pipeline_max_difference"] < 1e-4
    assert found["drift"]["prior_is_inert"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_script_says_so(tmp_path: Path) -> None:
    from rich.console import Console

    with pytest.raises(ConfigError, match="this machine has no GPU"):
        gpu.run(GpuConfig(results=str(tmp_path)), False, Console())


@pytest.mark.slow
def test_the_script_for_a_gpu_runs_on_a_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but what takes minutes: other bases, and the compiled network, which needs a compiler."""
    from rich.console import Console

    monkeypatch.setattr(gpu, "KINDS", KINDS[:1])
    monkeypatch.delitem(gpu.ARITHMETICS, "bfloat16, compiled")
    config = GpuConfig(str(tmp_path), "cpu", full_size=False, steps=1, batch_size=2, repeats=1)
    (file,) = gpu.run(config, False, Console())
    found = json.loads(file.read_text())
    assert not [name for name, part in found.items() if "failed" in part]
    assert found["exactness"]["bases"][0]["sample_difference"] == 0
    assert found["several"]["adapter_difference"] < 1e-6
    rows = found["training"]["rows"]
    assert set(rows) == {"float32", "bfloat16", "float16", "bfloat16, checkpointing"}
    assert all(row["loss_difference"] < 0.05 for row in rows.values())
    assert found["diffusers"]["training_over_diffusers_loop"] > 0


def test_options_out_of_range_are_named() -> None:
    for options in ({"drift_steps": []}, {"drift_samples": 1}, {"processes": 1}, {"repeats": 0}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            BasesConfig(**options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="device is 'tpu'"):
        GpuConfig(device="tpu")
