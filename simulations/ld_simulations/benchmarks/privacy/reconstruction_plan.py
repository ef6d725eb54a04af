"""What a malicious server may ask of a round: the requests whose updates are attacked."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from ld_client.policy import check_study
from ld_client.site_config import PolicyConfig
from ld_common.core.config import from_mapping
from ld_common.core.errors import PolicyError
from ld_common.protocol.study_config import StudyConfig

HONEST, CRAFTED = "honest", "crafted"
LORA, FULL = "lora", "full"
LEAST_ROUNDS = 3
"""Rounds that a request needs for an interval."""
GATE_BELOW = 5
"""Visits with a lower timestep pass the gate."""
GATE = 1e4
"""Time embedding of visits that do not pass."""
STRONGEST_ALLOWED = 0.0
TARGETS = {HONEST: ["conv_in", "conv1", "conv2"], CRAFTED: ["conv1", "time_emb_proj", "conv_out"]}
RATES = {
    (HONEST, LORA): 1e-6,
    (CRAFTED, LORA): 1e-8,
    (HONEST, FULL): 1e-4,
    (CRAFTED, FULL): 1e-4,
}
"""Learning rates that hardly move the weights within a round, so that all its gradients are at the ones sent."""


@dataclass(frozen=True)
class Request:
    """What the server asks of one round."""

    weights: str
    """`honest` or `crafted`."""
    adapter: str
    """`lora` or `full`."""
    steps: int
    batch_size: int
    rank: int = 6
    gate: float = GATE
    """Strength of crafted weights' gate; `STRONGEST_ALLOWED` takes what the default `policy.max_distance` lets pass."""
    blocks: int = 0
    """ResNet blocks with a gate, in the network's order; 0 for all."""

    @property
    def visits(self) -> int:
        """Visits drawn in a round: steps times the visits of a step, with repetition."""
        return self.steps * self.batch_size

    @property
    def name(self) -> str:
        """Name of its results."""
        gate = "" if self.gate == GATE else f"-gate-{self.gate:g}"
        gate = "-allowed" if self.gate == STRONGEST_ALLOWED else gate
        blocks = f"-{self.blocks}-blocks" if self.blocks else ""
        return f"{self.weights}-{self.adapter}{self.rank}-{self.steps}x{self.batch_size}{gate}{blocks}"

    def study(self) -> StudyConfig:
        """The study; a second round and a large `max_update_norm` let the start check take crafted weights."""
        adapter: dict[str, Any] = {"name": self.adapter}
        if self.adapter == LORA:
            adapter |= {"rank": self.rank, "targets": TARGETS[self.weights]}
        training = {
            "steps": self.steps,
            "batch_size": self.batch_size,
            "learning_rate": RATES[self.weights, self.adapter],
            "noise_offset": 0.0,
            "conditioning_dropout_prob": 0.0,
            "timestep_power": timestep_power(self.visits) if self.weights == CRAFTED else timestep_power(1),
        }
        federation = {"rounds": 2, "max_update_norm": 1e6}
        return from_mapping(
            StudyConfig,
            {"adapter": adapter, "drift": {"shape": "none"}, "training": training, "federation": federation},
        )


def timestep_power(visits: int, timesteps: int = 1000) -> float:
    """The `training.timestep_power` with which one of `visits` timesteps lies below `GATE_BELOW` on average.

    t = T (1 - u^power) is below k with probability 1 - (1 - k/T)^(1/power). For one visit, all timesteps are 0.
    """
    if visits == 1:
        return 1e-6
    return math.log(1 - GATE_BELOW / timesteps) / math.log(1 - 1 / visits)


@dataclass
class ReconstructionConfig:
    """The attacks on one round: which requests, on whom, and how hard."""

    grid: list[list[int]] = field(
        default_factory=lambda: [[steps, batch] for steps in (1, 4, 16, 110) for batch in (1, 8, 32)] + [[1, 64]]
    )
    """Steps and batch of each request; 1 × 64 is the fewest steps that the default policy lets pass."""
    rank: int = 6
    """Rank of LoRA; the demo's."""
    gates: list[float] = field(default_factory=list)
    """Weaker gates of crafted LoRA weights, for the distance that they need, at 1 step of 64."""
    allowed_blocks: list[int] = field(default_factory=list)
    """Numbers of gated blocks of crafted LoRA weights within the default policy's distance."""
    rounds: int = 6
    """Rounds of a request, at most."""
    full_rounds: int = 3
    """The same where all weights train."""
    confirmed_rounds: int = 10
    """Fresh rounds of the request whose gap was the largest within the default policy: the largest of several is high
    by chance too."""
    visits: int = 1100
    """Visits drawn in all rounds of a request, at most, but a quarter of the rounds is run."""
    tuning_patients: int = 128
    """First patients of the hospital, on whom the attacks were tuned."""
    patients: int = 160
    """Patients after them; half are in the store of a round."""
    public_patients: int = 300
    """Patients of each other hospital, whose scans the server has."""
    draws: int = 1
    """Timesteps and noises of each public scan or candidate."""
    evaluations: int = 60
    """Of gradient matching."""
    matched_rounds: int = 4
    """Rounds of a request that gradient matching is run on."""
    matched_visits: int = 128
    """Most visits of a round with crafted weights that it is run on."""


def requests(config: ReconstructionConfig) -> list[Request]:
    """All requests, in an order in which neighbours share what the server computes before."""
    gates = [Request(CRAFTED, LORA, 1, 64, config.rank, gate) for gate in config.gates]
    grid = [
        Request(weights, adapter, steps, batch, config.rank)
        for adapter in (LORA, FULL)
        for weights in (CRAFTED, HONEST)
        for steps, batch in config.grid
    ]
    allowed = [
        Request(CRAFTED, LORA, steps, batch, config.rank, STRONGEST_ALLOWED, blocks)
        for blocks in config.allowed_blocks
        for steps, batch in config.grid
    ]
    most = config.visits // LEAST_ROUNDS
    return gates + [request for request in allowed if request.visits <= most and passes_default_policy(request)] + grid


def confirmed_name(request: Request) -> str:
    """Name of the result of a request's fresh rounds."""
    return f"{request.name}-confirmed"


def passes_default_policy(request: Request, moved: float = 0.0) -> bool:
    """Whether a site with the default policy takes the study and, in its second round, weights this far away."""
    policy = PolicyConfig()
    try:
        check_study(policy, request.study())
    except PolicyError:
        return False
    return moved <= policy.max_distance
