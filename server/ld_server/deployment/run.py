"""`ld-server run`: start the study of a home, follow it to its end."""

from __future__ import annotations

import time
from collections.abc import Callable

from flwr.supercore.control import ControlHttpClient

from ld_common.errors import DeploymentError, FederationError
from ld_server.deployment import link
from ld_server.deployment.provision import check_bundle
from ld_server.deployment.study_home import StudyHome
from ld_server.records import FAILURE, RELEASE, RoundRecord, is_locked, read_rounds

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
    with link.control(home) as client:
        going_on = link.active_run(client)
        if going_on is not None and not resume:
            raise DeploymentError("a run of this study is going on: follow it with ld-server run --resume")
        shown = len(read_rounds(home.run)) if resume else 0
        if going_on is not None:
            if _is_alive(home):
                ended, shown = _follow(client, home, going_on, shown, on_round)
                if ended == COMPLETED:
                    return
            else:
                link.stop_run(client, going_on)
        _wait_for_the_last(home)
        (home.run / FAILURE).unlink(missing_ok=True)
        ended, _ = _follow(client, home, link.start_run(client, home, resume), shown, on_round)
    failure = home.run / FAILURE
    if ended != COMPLETED or not (home.run / RELEASE).exists():
        reason = failure.read_text() if failure.exists() else f"Flower says '{ended}', see '{home.path / 'link.log'}'"
        raise FederationError(f"the study ended without a release: {reason}; go on with ld-server run --resume")


def _follow(
    client: ControlHttpClient, home: StudyHome, run_id: int, shown: int, on_round: Callable[[RoundRecord], None]
) -> tuple[str, int]:
    """Show a run's rounds until it ends; returns how Flower says it ended, and how many rounds were shown."""
    try:
        while (status := link.run_status(client, run_id))[0] != link.FINISHED:
            shown = _show(home, shown, on_round)
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        link.stop_run(client, run_id)
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
