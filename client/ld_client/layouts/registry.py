"""Importers by the name of their layout."""

from __future__ import annotations

from collections.abc import Callable

from ld_client.layouts.base import LayoutImport
from ld_common.core.registry import Registry

Importer = Callable[[LayoutImport], None]
"""Adds the visits of the layout's root, and what is left out, to the import that it is given."""
_HERE = "ld_client.layouts"
LAYOUTS: Registry[Importer] = Registry(
    "layout",
    "latent_drift.layouts",
    {
        "bids": f"{_HERE}.bids:import_bids",
        "oasis3": f"{_HERE}.oasis3:import_oasis3",
        "adni": f"{_HERE}.adni:import_adni",
        "chexpert": f"{_HERE}.chexpert:import_chexpert",
        "mimic_cxr": f"{_HERE}.mimic_cxr:import_mimic_cxr",
        "tree": f"{_HERE}.tree:import_tree",
    },
)
