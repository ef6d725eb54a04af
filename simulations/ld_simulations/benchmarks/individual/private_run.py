"""Runs what is measured of private longitudinal drifts, in a folder of its own below the benchmark's output."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from ld_common.core.config import to_mapping
from ld_simulations.benchmarks.harness import Harness, ResultStore, claim_plan
from ld_simulations.benchmarks.individual.answers import Choice
from ld_simulations.benchmarks.individual.plan import IndividualConfig
from ld_simulations.benchmarks.individual.private_drift import PrivateAnswers
from ld_simulations.benchmarks.individual.private_plan import settings
from ld_simulations.benchmarks.individual.private_report import PrivateResults
from ld_simulations.benchmarks.individual.private_tables import latents_file

PRIVATE = "private"
DECIDES = ("training_seed", "drawn_patients", "test_seed", "test_patients", "starts")
"""Of `private`; each result has its patients, ε and draw in its name, so these may be extended."""


def private_output(config: IndividualConfig) -> Path:
    """Folder of the results."""
    return Path(config.output).resolve() / PRIVATE


def run_private(config: IndividualConfig, choice: Choice, console: Console) -> None:
    """Encode the patients and judge the drifts that have no result yet."""
    if not config.private.patients:
        return
    output, private = private_output(config), to_mapping(config.private)
    anatomy = next(iter(config.anatomies.values()))
    plan: dict[str, Any] = {key: private[key] for key in DECIDES} | {
        "base_model": config.base_model,
        "hospitals": [anatomy.hospitals, anatomy.modality],
        "editor": [choice.drift_rendering, asdict(choice)["drift"]],
    }
    claim_plan(output, plan)
    store = ResultStore(output)
    results = PrivateResults(config.private, store)
    asked = [setting for setting in settings(config.private) if not results.adopts(setting)]
    if not asked:
        return
    harness = Harness(store, console, config.workers)
    make = partial(PrivateAnswers, config, choice, output)
    harness.run(
        "latents",
        make().encoding_tasks(),
        make,
        PrivateAnswers.encode,
        done=lambda task: latents_file(output, task).exists(),
    )
    harness.run("drifts", asked, make, PrivateAnswers.judge)
