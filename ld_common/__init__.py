"""Latent Drift Federation: counterfactual medical images from a shared adapter of a frozen latent diffusion model.

    from ld_common import CounterfactualPipeline

    pipe = CounterfactualPipeline.from_release("release/", base="simulations/tiny_base")
    result = pipe("series/", source={"diagnosis": "CN"}, target={"age": 84})
    result.save("out")

Names are imported on first use, so importing this package loads neither torch nor diffusers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ld_common.core.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from ld_common import adapters, editing
    from ld_common.adapters.base import AdaptedModel, Adapter, inject
    from ld_common.adapters.registry import ADAPTERS, read_adapter
    from ld_common.adapters.train import train
    from ld_common.core.errors import LdError
    from ld_common.diffusion.base_model import BaseModel, load_base
    from ld_common.diffusion.drift import ConditionalDrift, LatentDrift
    from ld_common.diffusion.longitudinal import LongitudinalDrift
    from ld_common.diffusion.training import TrainingData
    from ld_common.editing.base import Editor
    from ld_common.editing.counterfactuals import Counterfactuals, Edit, draw_counterfactuals, edit_to
    from ld_common.editing.drift_fitting import fit_longitudinal_drift
    from ld_common.editing.registry import EDITORS, read_editor
    from ld_common.imaging.geometry import Scan
    from ld_common.imaging.modality import Modality
    from ld_common.imaging.readers import read_scan
    from ld_common.imaging.scan_table import load_modality
    from ld_common.metrics.registry import BIOMARKERS
    from ld_common.pipeline import CounterfactualPipeline, CounterfactualResult
    from ld_common.release.import_lora import import_lora
    from ld_common.release.release import Release, load_release_base, read_release

__version__ = "0.1.0"

__all__ = [
    "ADAPTERS",
    "BIOMARKERS",
    "EDITORS",
    "AdaptedModel",
    "Adapter",
    "BaseModel",
    "ConditionalDrift",
    "CounterfactualPipeline",
    "CounterfactualResult",
    "Counterfactuals",
    "Edit",
    "Editor",
    "LatentDrift",
    "LdError",
    "LongitudinalDrift",
    "Modality",
    "Release",
    "Scan",
    "TrainingData",
    "adapters",
    "draw_counterfactuals",
    "edit_to",
    "editing",
    "fit_longitudinal_drift",
    "import_lora",
    "inject",
    "load_base",
    "load_modality",
    "load_release_base",
    "read_adapter",
    "read_editor",
    "read_release",
    "read_scan",
    "train",
]

if not TYPE_CHECKING:  # a type checker would take any name from `__getattr__`
    _COUNTERFACTUALS = ("Counterfactuals", "Edit", "draw_counterfactuals", "edit_to")
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            **dict.fromkeys(("AdaptedModel", "Adapter", "inject"), "ld_common.adapters.base"),
            **dict.fromkeys(("ADAPTERS", "read_adapter"), "ld_common.adapters.registry"),
            **dict.fromkeys(("BaseModel", "load_base"), "ld_common.diffusion.base_model"),
            **dict.fromkeys(("ConditionalDrift", "LatentDrift"), "ld_common.diffusion.drift"),
            **dict.fromkeys(_COUNTERFACTUALS, "ld_common.editing.counterfactuals"),
            **dict.fromkeys(("EDITORS", "read_editor"), "ld_common.editing.registry"),
            **dict.fromkeys(("CounterfactualPipeline", "CounterfactualResult"), "ld_common.pipeline"),
            **dict.fromkeys(("Release", "load_release_base", "read_release"), "ld_common.release.release"),
            "BIOMARKERS": "ld_common.metrics.registry",
            "Editor": "ld_common.editing.base",
            "LdError": "ld_common.core.errors",
            "LongitudinalDrift": "ld_common.diffusion.longitudinal",
            "fit_longitudinal_drift": "ld_common.editing.drift_fitting",
            "Modality": "ld_common.imaging.modality",
            "Scan": "ld_common.imaging.geometry",
            "TrainingData": "ld_common.diffusion.training",
            "adapters": "ld_common.adapters",
            "editing": "ld_common.editing",
            "import_lora": "ld_common.release.import_lora",
            "load_modality": "ld_common.imaging.scan_table",
            "read_scan": "ld_common.imaging.readers",
            "train": "ld_common.adapters.train",
        },
    )
