"""A soak test: a deployed study whose processes are killed at random moments, again and again."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ld_client.privacy.ledger import TRAINING, Ledger
from ld_common.core.errors import CheckpointError
from ld_server.checkpoint import Checkpoint, find_checkpoint
from ld_simulations.benchmarks.deployment.stage import RUN, SERVER, Deployment

POLL_SECONDS = 0.25
QUIET_SECONDS = (10.0, 40.0)
"""Shortest and longest time between two kills, seconds."""
SETTLE_SECONDS = 300.0
"""Time limit of the round after the last kill."""
LINK, SERVER_APP, NODE, TASK = "flower-superlink", "flwr-serverapp", "flower-supernode", "ld_client.deployment.launcher"


@dataclass
class Soaked:
    """What a soak observed."""

    kills: Counter[str] = field(default_factory=Counter)
    """Number of kills by process."""
    rounds: int = 0
    """Rounds in the checkpoint at the end."""
    rounds_lost: int = 0
    """Rounds that were in a checkpoint and are no longer, or that a checkpoint holds twice or skips."""
    resumed: int = 0
    """Number of times that the study was resumed."""
    used_updates: int = 0
    """Updates that counted in rounds of the last checkpoint."""
    ledger_under_counts: int = 0
    """Counted updates that the site's ledger does not hold."""
    charges: int = 0
    """Rounds in the ledgers, those of killed rounds included."""
    recovered: bool = False
    """Whether a further round completed after the last kill."""
    seconds: float = 0.0


class Soak:
    """Kills a deployment's processes and starts them again, as systemd and an operator would."""

    def __init__(self, deployment: Deployment, seed: int, report: Callable[[str], None]) -> None:
        self.deployment, self.report = deployment, report
        self.random = random.Random(seed)
        self.seen = Soaked()

    def run(self, seconds: float, least_kills: int = 0) -> Soaked:
        """Soak for some seconds and until there were `least_kills`, then wait for one more round."""
        started = time.monotonic()
        for name in (*self.deployment.sites, RUN):
            self.deployment.start(name)
        while (elapsed := time.monotonic() - started) < seconds or sum(self.seen.kills.values()) < least_kills:
            self._watch(self.random.uniform(*QUIET_SECONDS))
            self._kill(elapsed)
        rounds, deadline = self.seen.rounds, time.monotonic() + SETTLE_SECONDS
        while not self.seen.recovered and time.monotonic() < deadline:
            self._watch(1.0)
            self.seen.recovered = self.seen.rounds > rounds
        self.deployment.stop([RUN])
        self._account()
        self.seen.seconds = time.monotonic() - started
        return self.seen

    def _watch(self, seconds: float) -> None:
        """For some seconds, start again what has ended and check the checkpoint."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for name in (SERVER, *self.deployment.sites):
                if self.deployment.ended(name) is not None:
                    self.deployment.start(name)
                    if name == SERVER:
                        self.deployment.wait_for_gate()
            if self.deployment.ended(RUN) is not None:
                self.seen.resumed += 1
                self.deployment.start(RUN, "--resume")
            checkpoint = self._checkpoint()
            if checkpoint is not None:
                self._compare(checkpoint)
            time.sleep(POLL_SECONDS)

    def _compare(self, checkpoint: Checkpoint) -> None:
        numbers = [record["round"] for record in checkpoint.records]
        wrong = len(set(range(1, checkpoint.round + 1)) ^ set(numbers)) + len(numbers) - len(set(numbers))
        gone = max(0, self.seen.rounds - checkpoint.round)
        if wrong or gone:
            self.report(f"LOST: round {checkpoint.round} after {self.seen.rounds}, records {numbers}")
        self.seen.rounds_lost += wrong + gone
        if checkpoint.round > self.seen.rounds:
            counted = ", ".join(checkpoint.records[-1]["sites"]) or "nobody"
            self.report(f"round {checkpoint.round}: {counted}")
        self.seen.rounds = checkpoint.round

    def _checkpoint(self) -> Checkpoint | None:
        try:
            newest = find_checkpoint(self.deployment.home.run)
        except CheckpointError as error:
            self.report(f"DAMAGED: {error}")
            self.seen.rounds_lost += 1
            return None
        return None if newest is None else newest.checkpoint

    def _kill(self, elapsed: float) -> None:
        deployment = self.deployment
        sites = sorted(deployment.sites)
        site = self.random.choice(sites)
        what = self.random.choice([SERVER, LINK, RUN, SERVER_APP, "site", "sites", NODE, TASK])
        if what in (SERVER, RUN):
            done = int(deployment.kill(what))
        elif what in (LINK, SERVER_APP):
            done = int(deployment.kill_below(SERVER, what))
        elif what in ("site", "sites"):
            hit = [site] if what == "site" else self.random.sample(sites, 2)
            done = sum(deployment.kill(name) for name in hit)
        else:
            done = int(deployment.kill_below(site, what))
        if done:
            self.seen.kills[what] += done
            self.report(f"{elapsed:4.0f} s: killed {what}" + (f" of {site}" if what in (NODE, TASK) else ""))

    def _account(self) -> None:
        """Compare the counted updates with the sites' ledgers."""
        checkpoint = self._checkpoint()
        records: list[dict[str, Any]] = [] if checkpoint is None else checkpoint.records
        digest = self.deployment.home.study()[0].digest()
        for name, site in self.deployment.sites.items():
            entries = Ledger(site.site().ledger_path).entries()
            held = Counter(
                entry.round for entry in entries if (entry.study_digest, entry.purpose) == (digest, TRAINING)
            )
            used = Counter(record["round"] for record in records if record["counted"] and name in record["sites"])
            self.seen.charges += held.total()
            self.seen.used_updates += used.total()
            self.seen.ledger_under_counts += (used - held).total()
