"""Every body that hospitals can be made of, by the name under `body:` in the hospitals' YAML."""

from __future__ import annotations

from typing import Any

from ld_common.core.config import nearest, require
from ld_simulations.phantoms.base import Body
from ld_simulations.phantoms.brain import BRAIN
from ld_simulations.phantoms.chest import CHEST

BODIES: dict[str, Body[Any, Any]] = {body.name: body for body in (BRAIN, CHEST)}


def find_body(name: str) -> Body[Any, Any]:
    """The body of that name; raises `ConfigError` where there is none."""
    require(name in BODIES, f"body '{name}' is not known: {nearest(name, list(BODIES))}")
    return BODIES[name]
