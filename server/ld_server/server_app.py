"""The server's side of the federation: a Flower ServerApp that runs one study and writes its release.

Run config:
    study, overrides    the study's YAML file, and `key=value` pairs separated by spaces
    home                folder of a deployed study (`ld-server provision`), in place of both
    resume              true continues after the last checkpoint in the study's output folder
"""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp

from ld_common.adapters.base import AdaptedModel, inject
from ld_common.adapters.low_rank import rank_of
from ld_common.adapters.registry import read_adapter
from ld_common.adapters.state_dict import check_state
from ld_common.core import offline
from ld_common.core.errors import (
    AdapterError,
    CheckpointError,
    ConfigError,
    FederationError,
    LdError,
    ReleaseError,
)
from ld_common.diffusion.base_model import base_digest, load_denoiser
from ld_common.diffusion.drift import INERT, is_inert
from ld_common.imaging.modality import Modality
from ld_common.imaging.preparation.files import step_files
from ld_common.protocol.study_config import BEST, StudyConfig, load_study
from ld_common.release.release import Release, ReleaseContent, write_release
from ld_server.aggregation import Aggregate, check_aggregation
from ld_server.checkpoint import NAME, Checkpoint, drop_checkpoint, find_checkpoint, has_checkpoint, read_best
from ld_server.deployment.admission import deployed_admission
from ld_server.deployment.run_log import FLOWER_LOG, logged_to
from ld_server.deployment.study_home import StudyHome
from ld_server.drift_collection import drift_collection
from ld_server.lora_aggregation import mean_own_part
from ld_server.node_registry import Admission
from ld_server.resilient_grid import ResilientGrid
from ld_server.round_log import FAILURE, RELEASE, RoundRecord, append_round, locked, write_rounds
from ld_server.strategy import DriftFederation
from ld_server.study_start import keep_start, kept_start, public_drift, read_start, start_record
from ld_server.tracking.run_study import write_run_study
from ld_server.tracking.tracking import Tracking, tracked
from ld_server.validation import best_round

offline.configure()
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the study of the run config; a study with a home never starts again over an existing checkpoint."""
    config = context.run_config
    home, overrides = str(config.get("home", "")), shlex.split(str(config.get("overrides", "")))
    resume = bool(config.get("resume", False))
    if not home:
        study, modality = load_study(Path(str(config["study"])), overrides)
        run_study(ResilientGrid(grid), study, modality, resume=resume)
        return
    if overrides:
        raise ConfigError(
            "overrides cannot change an approved study: edit study.yaml in its home, then run ld-server update"
        )
    deployed = StudyHome(Path(home)).check()
    with logged_to(deployed.run / FLOWER_LOG):
        study, modality = deployed.study()
        admission = deployed_admission(deployed, study)
        run_study(ResilientGrid(grid), study, modality, resume=resume, overwrite=False, admission=admission)


def run_study(
    grid: Grid,
    study: StudyConfig,
    modality: Modality,
    *,
    resume: bool = False,
    overwrite: bool = True,
    admission: Admission | None = None,
) -> Path:
    """Run all rounds of a study and write its release; returns the release's folder.

    Args:
        grid: Flower's.
        study: the study; its output is the run's folder, used by one run at a time.
        modality: the study's.
        resume: continue after the last checkpoint, with the same result as an uninterrupted run. The interrupted round
            runs again, and private sites are charged for it again.
        overwrite: start again over a checkpoint unless `resume`.
        admission: who takes part; None asks the nodes for their names.

    Raises:
        ConfigError: a tracker of the study is not installed.
        FederationError: too few sites connected, no round had enough accepted results, or there is a checkpoint that
            must not be overwritten or cannot be resumed.
        CheckpointError: the checkpoint cannot be read or written.
    """
    output = Path(study.output)
    output.mkdir(parents=True, exist_ok=True)
    with locked(output):
        (output / FAILURE).unlink(missing_ok=True)
        try:
            with tracked(study, output) as tracking:
                return _run(grid, study, modality, output, resume, overwrite, admission, tracking)
        except LdError as error:
            with contextlib.suppress(OSError):
                (output / FAILURE).write_text(str(error))
            raise


def _run(
    grid: Grid,
    study: StudyConfig,
    modality: Modality,
    output: Path,
    resume: bool,
    overwrite: bool,
    admission: Admission | None,
    tracking: Tracking,
) -> Path:
    if not (resume or overwrite) and has_checkpoint(output):
        raise FederationError(
            f"'{output}' holds rounds of a study already: continue with --resume (resume=true), "
            "or move the folder away to start again"
        )
    aggregator = check_aggregation(study)
    step_files(modality.preprocessing)  # the release carries them: one that is missing is said before the first round
    begun = kept_start(output) if resume else None
    study, start = read_start(study) if begun is None else (begun.fill(study), None)
    digest = base_digest(study.base_model)
    checkpoint = last_checkpoint(output, study, digest, modality.digest()) if resume else None
    model = load_denoiser(study.base_model)
    if study.drift.shape not in ("none", "longitudinal") and is_inert(study.drift.formulation, model):
        print(INERT, flush=True)
    adapted = inject(model, read_adapter(study.adapter), study.seed)

    def ended(record: RoundRecord) -> None:
        append_round(output, record)
        tracking.add(record)

    strategy = DriftFederation(
        study,
        digest,
        modality.digest(),
        drift_collection(study, modality, model, aggregator, public_drift(start)),
        output,
        ended,
        admission,
    )
    if checkpoint is None:
        drop_checkpoint(output)
        begun = None if start is None else start_record(start, study)
        keep_start(output, begun)
        if start is not None:
            start_from(adapted, start, study, digest)
            strategy.frozen = adapted.frozen_state()
    else:
        check_state(checkpoint.state, adapted.trainable_state())
        adapted.load({**checkpoint.frozen, **checkpoint.state})
        strategy.restore(checkpoint)
        strategy.score_restored(grid)
    strategy.state = dict(adapted.trainable_state())
    write_rounds(output, strategy.records)
    write_run_study(output, study)
    tracking.begin(strategy.records)
    remaining = study.federation.rounds - len(strategy.records)
    if remaining:
        strategy.start(
            grid=grid,
            initial_arrays=ArrayRecord({}),
            num_rounds=remaining,
            timeout=study.federation.round_timeout_seconds,
        )
    if not any(record.counted for record in strategy.records):
        raise FederationError("no round had enough accepted results: no release is written")
    if study.federation.keep == BEST:
        keep_best(strategy, output)
    adapted.load({**strategy.state, **mean_own_part(strategy.own_parts)})
    state = Aggregate(strategy.state, strategy.carried).released(adapted.state())
    adapter = {**study.adapter, "rank": rank_of(state)} if strategy.carried else None
    return write_release(
        output / RELEASE,
        study,
        modality,
        ReleaseContent(
            digest,
            state,
            strategy.drifts.released(),
            strategy.drifts.released_sites(),
            [vars(record) for record in strategy.records],
            None if begun is None else begun.record,
            adapter=adapter,
            own_parts=strategy.own_parts,
            round=strategy.released_round or strategy.records[-1].round,
        ),
    )


def keep_best(strategy: DriftFederation, output: Path) -> None:
    """Go back to the round of the lowest validation loss; where none is kept, say so and stay at the last."""
    best = best_round(strategy.records)
    try:
        if best is None:
            raise CheckpointError("no round was validated")
        checkpoint = read_best(output)
        if checkpoint.round != best.round:
            raise CheckpointError(f"the one kept is of round {checkpoint.round}, not {best.round}")
    except CheckpointError as error:
        print(f"the release is of the last round, as the best is not kept: {error}", flush=True)
        return
    print(f"the release is of round {best.round}, of the lowest validation loss", flush=True)
    strategy.state, strategy.carried = checkpoint.state, checkpoint.carried
    strategy.drifts.collected = checkpoint.drifts
    # not those of sites that no longer release theirs
    kept = {name: own for name, own in checkpoint.own_parts.items() if name in strategy.own_parts}
    strategy.own_parts, strategy.released_round = kept, best.round


def last_checkpoint(output: Path, study: StudyConfig, digest: str, modality_digest: str) -> Checkpoint | None:
    """The checkpoint to resume; prints a line and returns None when no round has ended yet.

    Raises:
        FederationError: it is of another study, base or modality.
        CheckpointError: neither it nor the one before it can be read.
    """
    newest = find_checkpoint(output)
    if newest is None:
        print(f"'{output}' holds no checkpoint: the study starts at round 1", flush=True)
        return None
    checkpoint = newest.checkpoint
    for kind, expected, actual in (
        ("study", study.digest(), checkpoint.study_digest),
        ("base model", digest, checkpoint.base_digest),
        ("modality", modality_digest, checkpoint.modality_digest),
    ):
        if expected != actual:
            raise FederationError(
                f"cannot resume: the checkpoint in '{output}' is of another {kind} (sha256 {actual[:12]}..., not "
                f"{expected[:12]}...): restore that {kind}, or move the folder away to start again"
            )
    if newest.damage:
        print(f"{newest.damage}; continues after round {checkpoint.round}, from the checkpoint before it", flush=True)
        drop_checkpoint(output, (NAME,))  # else the next round's would replace the intact one
    return checkpoint


def start_from(adapted: AdaptedModel[Any], release: Release, study: StudyConfig, digest: str) -> None:
    """Load all of a release's adapter, trained and frozen parts, as a study's start.

    Raises:
        ReleaseError: it is of another base, or its adapter has other tensors than the study's.
    """
    if release.base_digest != digest:
        raise ReleaseError(f"start: '{study.start}' is of another base model than the study's")
    try:
        check_state(release.state, adapted.state())
    except AdapterError as error:
        raise ReleaseError(
            f"start: the adapter of '{study.start}' does not fit the study's adapter: {error}"
        ) from error
    adapted.load(release.state)
