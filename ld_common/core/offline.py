"""Importing this module makes the process offline and quiet. Import it before any model library.

It sets defaults only: environment variables that are set already stay as they are.
"""

from __future__ import annotations

import logging
import os

DEFAULTS = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "GRPC_VERBOSITY": "NONE",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def configure() -> None:
    """Set the defaults and silence known warnings; importing this module calls it."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    # diffusers imports unused image processors, each of which warns that torchvision is absent
    logging.getLogger("transformers.utils.import_utils").addFilter(_not_about_torchvision)
    # pydicom's warnings may quote header values, which may name a patient
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    # Flower prints its own log; opacus gives the root a handler, which would print each line once more
    logging.getLogger("flwr").propagate = False


def _not_about_torchvision(record: logging.LogRecord) -> bool:
    return "requires torchvision" not in record.getMessage()


configure()
