"""Phantoms by the name under `phantom:` in the hospitals' YAML."""

from __future__ import annotations

from typing import Any

from ld_common.core.config import nearest, require
from ld_simulations.phantoms.base import Phantom
from ld_simulations.phantoms.brain import BRAIN
from ld_simulations.phantoms.chest import CHEST

PHANTOMS: dict[str, Phantom[Any, Any]] = {phantom.name: phantom for phantom in (BRAIN, CHEST)}


def find_phantom(name: str) -> Phantom[Any, Any]:
    """The phantom of that name; raises `ConfigError` where there is none."""
    require(name in PHANTOMS, f"unknown phantom '{name}': {nearest(name, list(PHANTOMS))}")
    return PHANTOMS[name]
