"""The central end of the federation: a Flower ServerApp that runs one study and writes its release.

run config: study = path of the study's YAML, overrides = "key=value key=value"
"""

from __future__ import annotations

import contextlib
import json
import shlex
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp

from ld_common import offline
from ld_common.adapters import check_state
from ld_common.errors import AdapterError, FederationError, LdError, ReleaseError
from ld_common.modality import Modality
from ld_common.models import base_digest, load_denoiser
from ld_common.release import Release, read_release, write_release
from ld_common.schemes import Attached, attach, read_scheme
from ld_common.study import StudyConfig, load_study
from ld_server.strategy import DriftFederation, RoundRecord

RELEASE, ROUNDS, FAILURE = "release", "rounds.jsonl", "failure.txt"

offline.configure()
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the study that the run config names."""
    overrides = shlex.split(str(context.run_config.get("overrides", "")))
    study, modality = load_study(Path(str(context.run_config["study"])), overrides)
    try:
        run_study(grid, study, modality)
    except LdError as error:
        with contextlib.suppress(OSError):
            (Path(study.output) / FAILURE).write_text(str(error))
        raise


def run_study(grid: Grid, study: StudyConfig, modality: Modality) -> Path:
    """Run all rounds of a study and write its release; returns the release's folder.

    Raises:
        FederationError: too few sites came, or no round had enough good answers.
    """
    output = Path(study.output)
    output.mkdir(parents=True, exist_ok=True)
    progress = output / ROUNDS
    progress.write_text("")
    digest = base_digest(study.base_model)
    model = load_denoiser(study.base_model)
    attached = attach(model, read_scheme(study.scheme), study.seed)
    if study.start:
        start_from(attached, read_release(Path(study.start)), study, digest)

    def note(record: RoundRecord) -> None:
        with progress.open("a") as stream:
            stream.write(json.dumps(vars(record)) + "\n")

    strategy = DriftFederation(
        study, digest, modality.digest(), drift_shape(study, modality, model.latent_shape), output, note
    )
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(dict(attached.learned_state())),
        num_rounds=study.federation.rounds,
        timeout=study.federation.round_timeout_seconds,
    )
    if not any(record.counted for record in strategy.records):
        raise FederationError("no round had enough good answers: no release is written")
    attached.load(strategy.state)
    return write_release(
        output / RELEASE,
        study,
        modality,
        digest,
        attached.state(),
        strategy.drift,
        strategy.site_drifts,
        [vars(record) for record in strategy.records],
    )


def start_from(attached: Attached[Any], release: Release, study: StudyConfig, digest: str) -> None:
    """Load a release's adapter as a study's start.

    Raises:
        ReleaseError: it is of another base, or its adapter is not what the study's scheme and seed would make.
    """
    if release.base_digest != digest:
        raise ReleaseError(f"start: '{study.start}' is of another base model than the study's")
    own = attached.state()
    frozen = own.keys() - attached.learned.keys()
    try:
        check_state(release.state, own)
    except AdapterError as error:
        raise ReleaseError(f"start: the adapter of '{study.start}' does not fit the study's scheme: {error}") from error
    if any(not torch.equal(release.state[name], own[name]) for name in frozen):
        raise ReleaseError(
            f"start: what '{study.start}' kept frozen differs from what sites draw from seed {study.seed}: "
            f"use its seed, {release.study.seed}, and its scheme.freeze_a"
        )
    attached.load(release.state)


def drift_shape(study: StudyConfig, modality: Modality, latent_shape: tuple[int, int, int]) -> torch.Size | None:
    """The shape that every site's drift must have; None for no drift."""
    shapes = {
        "scalar": (1, 1, 1),
        "channel": (latent_shape[0], 1, 1),
        "map": latent_shape,
        "conditional": (1 + modality.design_width, *latent_shape),
    }
    shape = shapes.get(study.drift.mean)
    return None if shape is None else torch.Size(shape)
