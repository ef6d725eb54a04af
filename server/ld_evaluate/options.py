"""How much an evaluation tries of what costs most; importing this loads no model library."""

from __future__ import annotations

from dataclasses import dataclass

from ld_common.core.config import require


@dataclass
class JudgeConfig:
    """Options of an evaluation."""

    cycles: int = 10
    """Repetitions of the null edit, each applied to the result of the last."""
    cycled: int = 4
    """Baselines used for the repeated null edits and for edits there and back."""
    predictor_steps: int = 300
    """Training steps of each attribute predictor."""

    def __post_init__(self) -> None:
        for name in ("cycles", "cycled", "predictor_steps"):
            require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}: it must be above 0")
