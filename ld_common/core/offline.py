"""Importing this makes the process offline and quiet; whoever imports a model library imports this before it.

Only defaults are set: a variable that the user has set himself stays as it is.
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
    """Set the defaults and silence what is known; importing this module has done it already."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    # diffusers imports image processors that nothing here uses, and each says at length that torchvision is absent
    logging.getLogger("transformers.utils.import_utils").addFilter(_not_about_torchvision)
    # pydicom's warnings may quote a header's values, and those are a patient's
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)


def _not_about_torchvision(record: logging.LogRecord) -> bool:
    return "requires torchvision" not in record.getMessage()


configure()
