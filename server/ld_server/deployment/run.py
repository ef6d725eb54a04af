"""`ld-server run`: starts the study of a home and follows it to its end."""

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
    """Run a study at its hospitals until its release is written.

    Raises:
        DeploymentError: no server runs, another run is active, or the software is not what the sites approved.
        FederationError: the study ended without a release.
    """
    check_bundle(home.check())
    with superlink.control(home) as client:
        shown = len(read_rounds(home.run)) if resume else 0
        with _only_starter(home):
            run = _active_run(client, home, resume)
            started = run is None
            if run is None:
                run = _start(client, home, resume)
        ended, shown = _follow(client, home, run, shown, on_round)
        if ended != COMPLETED and not started:  # its server died
            with _only_starter(home):
                run = _start(client, home, resume)
            ended, _ = _follow(client, home, run, shown, on_round)
    failure = home.run / FAILURE
    if ended != COMPLETED or not (home.run / RELEASE).exists():
        status = f"Flower reports '{ended}', see '{home.path / 'link.log'}'; continue with ld-server run --resume"
        reason = failure.read_text() if failure.exists() else status
        raise FederationError(f"the study ended without a release: {reason}")


def _only_starter(home: StudyHome) -> AbstractContextManager[None]:
    """Prevent two commands from starting a run each."""
    return held(
        home.path / "starting.lock",
        DeploymentError("another ld-server run is starting this study: follow it with --resume in a minute"),
    )


def _active_run(client: ControlHttpClient, home: StudyHome, resume: bool) -> int | None:
    """The active run, or None; a run that is active for Flower only is stopped."""
    run = superlink.active_run(client)
    if run is None or _is_alive(home):
        if run is not None and not resume:
            raise DeploymentError("a run of this study is active: follow it with ld-server run --resume")
        return run
    superlink.stop_run(client, run)
    if not resume and has_checkpoint(home.run):
        raise DeploymentError("the study's run was killed: continue with ld-server run --resume")
    return None


def _start(client: ControlHttpClient, home: StudyHome, resume: bool) -> int:
    _wait_for_the_last(home)
    (home.run / FAILURE).unlink(missing_ok=True)
    return superlink.start_run(client, home, resume)


def _follow(
    client: ControlHttpClient, home: StudyHome, run_id: int, shown: int, on_round: Callable[[RoundRecord], None]
) -> tuple[str, int]:
    """Show a run's rounds until it ends; returns its status in Flower and the number of rounds shown."""
    try:
        while (status := superlink.run_status(client, run_id))[0] != superlink.FINISHED:
            shown = _show(home, shown, on_round)
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        superlink.stop_run(client, run_id)
        raise
    return status[1], _show(home, shown, on_round)


def _is_alive(home: StudyHome) -> bool:
    """Whether a ServerApp locks the run's folder, or does so soon.

    For Flower, the run of a killed SuperLink stays active until a heartbeat is missed.
    """
    deadline = time.monotonic() + START_SECONDS
    while not is_locked(home.run):
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def _wait_for_the_last(home: StudyHome) -> None:
    """Wait for the ServerApp of a killed SuperLink, which ends some seconds after it."""
    deadline = time.monotonic() + LAST_RUN_SECONDS
    while is_locked(home.run):
        if time.monotonic() > deadline:
            raise DeploymentError(f"a run still uses '{home.run}': end its flwr-serverapp, then try again")
        time.sleep(POLL_SECONDS)


def _show(home: StudyHome, shown: int, on_round: Callable[[RoundRecord], None]) -> int:
    """Show the rounds after the first `shown`; returns the number of rounds."""
    rounds = read_rounds(home.run)
    for record in rounds[shown:]:
        on_round(record)
    return len(rounds)
