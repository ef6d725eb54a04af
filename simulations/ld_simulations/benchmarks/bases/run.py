"""`ld-benchmark bases`: every base that loads through one suite, and the page of what fits what."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import ld_common.core.offline  # noqa: F401  (before any model library)
from ld_common.adapters.base import inject
from ld_common.adapters.lora import Lora
from ld_common.core.atomic_files import write_bytes
from ld_common.diffusion.base_model import load_denoiser
from ld_common.diffusion.computing import Computing
from ld_common.diffusion.options import TrainingConfig
from ld_common.diffusion.training import TrainingData, optimize
from ld_simulations.benchmarks.bases.plan import BasesConfig
from ld_simulations.benchmarks.bases.report import page
from ld_simulations.benchmarks.bases.suite import KINDS, measure_base
from ld_simulations.benchmarks.bases.together import together_difference
from ld_simulations.benchmarks.harness import json_bytes, this_machine

NUMBERS = "bases.json"
NULL_EDIT, GRADIENT = 1e-3, 1e-5
"""Aims of a row."""
DRIFT, TOGETHER = 0.05, 1e-6


def run(config: BasesConfig, only_report: bool, console: Console) -> list[Path]:
    """Measure, unless `only_report` and there are numbers, and write the page; returns the files."""
    file = Path(config.results) / NUMBERS
    if only_report:
        found: dict[str, Any] = json.loads(file.read_text())
    else:
        found = _measure(config, console)
        write_bytes(file, json_bytes(found))
    written = file.with_suffix(".md")
    write_bytes(written, page(found).encode())
    return [file, written]


def _measure(config: BasesConfig, console: Console) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    ratios: list[float] = []
    with tempfile.TemporaryDirectory() as place:
        for number, kind in enumerate(KINDS):
            with console.status(kind.title):
                folder = kind.write(Path(place) / str(number))
                row = {"base": kind.title} | measure_base(folder, config.drift_steps, config.drift_samples)
                row["two_process_adapter_difference"] = together_difference(folder, config.processes)
                ratios.append(_bf16_over_fp32(folder, config.repeats))
                rows.append(row | {"cpu_bf16_over_fp32": ratios[-1]})
            console.print(f"{kind.title}: {'green' if is_green(row) else 'not green'}")
    return {
        "bases_supported": sum(is_green(row) for row in rows),
        "null_edit_max_error": max(row["null_edit_max_error"] for row in rows),
        "per_sample_gradient_error": max(row["per_sample_gradient_error"] for row in rows),
        "drift_target_error": max(_drift_error(row) for row in rows),
        "two_process_adapter_difference": max(row["two_process_adapter_difference"] for row in rows),
        "cpu_bf16_over_fp32": sorted(ratios)[len(ratios) // 2],
        "cpu_has_amx": _has_amx(),
        "rows": rows,
        **this_machine(),
        "threads": torch.get_num_threads(),
    }


def is_green(row: dict[str, Any]) -> bool:
    """Whether a base meets every aim."""
    return (
        "lora" in row["adapters"]
        and row["null_edit_max_error"] <= NULL_EDIT
        and row["per_sample_gradient_error"] <= GRADIENT
        and row["two_process_adapter_difference"] <= TOGETHER
        and _drift_error(row) <= DRIFT
    )


def _drift_error(row: dict[str, Any]) -> float:
    return max(float(values["error"]) for values in row["drift"]["by_steps"].values())


def _bf16_over_fp32(folder: Path, repeats: int) -> float:
    """How many times as many training steps a CPU does in bfloat16; interleaved, the fastest of each counts."""
    seconds: dict[str, list[float]] = {"float32": [], "bfloat16": []}
    adapted = inject(load_denoiser(str(folder)), Lora(rank=2), 0)
    latents = torch.randn(8, *adapted.model.latent_shape, generator=torch.Generator().manual_seed(0))
    data, options = TrainingData(latents, ["a scan"] * 8), TrainingConfig(steps=2, batch_size=8)
    for _ in range(repeats + 1):
        for precision, own in seconds.items():
            started = time.perf_counter()
            optimize(
                adapted.model,
                adapted.trainable,
                data,
                options,
                lambda step: torch.Generator().manual_seed(step),
                lambda step: 1e-4,
                Computing(precision),
            )
            own.append(time.perf_counter() - started)
    return min(seconds["float32"][1:]) / min(seconds["bfloat16"][1:])


def _has_amx() -> bool:
    """Whether the processor has instructions for products of bfloat16 matrices."""
    information = Path("/proc/cpuinfo")
    return information.is_file() and "amx_bf16" in information.read_text()
