"""`ld-server run`: start the study of a home, follow it to its end."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager

from flwr.supercore.control import ControlHttpClient

from ld_common.core.atomic_files import held
from ld_common.core.errors import DeploymentError, FederationError
from ld_server.checkpoint import has_checkpoint
from ld_server.deployment import superlink
from ld_server.deployment.provision import check_bundle
from ld_server.deployment.study_home import StudyHome
from ld_server.round_log import FAILURE, RELEASE, RoundRecord, is_locked, read_rounds

POLL_SECONDS = 1.0
START_SECONDS = 15.0
LAST_RUN_SECONDS = 60.0
COMPLETED = "completed"


def run_deployed(home: StudyHome, resume: bool, on_round: Callable[[RoundRecord], None]) -> None:
    """Run a study at its hospitals until its release is there.

    Raises:
        DeploymentError: no server runs, a run is going on, or the software is not what the sites approved.
        FederationError: the study ended without a release.
    """
    check_bundle(home.check())
    with superlink.control(home) as client:
        shown = len(read_rounds(home.run)) if resume else 0
        with _only_starter(home):
            run = _going_on(client, home, resume)
            started = run is None
            if run is None:
                run = _start(client, home, resume)
        ended, shown = _follow(client, home, run, shown, on_round)
        if ended != COMPLETED and not started:  # its server died under it
            with _only_starter(home):
                run = _start(client, home, resume)
            ended, _ = _follow(client, home, run, shown, on_round)
    failure = home.run / FAILURE
    if ended != COMPLETED or not (home.run / RELEASE).exists():
        said = f"Flower says '{ended}', see '{home.path / 'superlink.log'}'; go on with ld-server run --resume"
        raise FederationError(f"the study ended without a release: {failure.read_text() if failure.exists() else said}")


def _only_starter(home: StudyHome) -> AbstractContextManager[None]:
    """Keep two commands from starting a run each, where both see none."""
    return held(
        home.path / "starting.lock",
        DeploymentError("another ld-server run starts this study just now: follow it with --resume in a minute"),
    )


def _going_on(client: ControlHttpClient, home: StudyHome, resume: bool) -> int | None:
    """The run that goes on; one that only seems to is ended, and None is returned."""
    found = superlink.active_run(client)
    if found is None or _is_alive(home):
        if found is not None and not resume:
            raise DeploymentError("a run of this study is going on: follow it with ld-server run --resume")
        return found
    superlink.stop_run(client, found)
    if not resume and has_checkpoint(home.run):
        raise DeploymentError("the study's run was killed: go on with ld-server run --resume")
    return None


def _start(client: ControlHttpClient, home: StudyHome, resume: bool) -> int:
    _wait_for_the_last(home)
    (home.run / FAILURE).unlink(missing_ok=True)
    return superlink.start_run(client, home, resume)


def _follow(
    client: ControlHttpClient, home: StudyHome, run_id: int, shown: int, on_round: Callable[[RoundRecord], None]
) -> tuple[str, int]:
    """Show a run's rounds until it ends; returns how Flower says it ended, and how many rounds were shown."""
    try:
        while (status := superlink.run_status(client, run_id))[0] != superlink.FINISHED:
            shown = _show(home, shown, on_round)
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        superlink.stop_run(client, run_id)
        raise
    return status[1], _show(home, shown, on_round)


def _is_alive(home: StudyHome) -> bool:
    """Whether a ServerApp holds the run's folder, or takes it soon.

    To Flower the run of a SuperLink that was killed goes on until a heartbeat is missed.
    """
    deadline = time.monotonic() + START_SECONDS
    while not is_locked(home.run):
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def _wait_for_the_last(home: StudyHome) -> None:
    """The ServerApp of a SuperLink that was killed ends some seconds after it."""
    deadline = time.monotonic() + LAST_RUN_SECONDS
    while is_locked(home.run):
        if time.monotonic() > deadline:
            raise DeploymentError(f"a run still holds '{home.run}': end its flwr-serverapp, then try again")
        time.sleep(POLL_SECONDS)


def _show(home: StudyHome, shown: int, on_round: Callable[[RoundRecord], None]) -> int:
    """Show the rounds after the first `shown`; returns how many there are."""
    rounds = read_rounds(home.run)
    for record in rounds[shown:]:
        on_round(record)
    return len(rounds)
