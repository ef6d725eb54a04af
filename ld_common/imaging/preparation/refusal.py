"""What a step raises on a volume that it cannot prepare."""

from __future__ import annotations


class StepRefusedError(Exception):
    """A volume does not fit a step; the message says why, without path."""
