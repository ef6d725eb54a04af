"""Counterfactuals of scans: editors that invert a scan's latents and edit them under another prompt.

from ld_common import editing
editing.DdimInversion(num_inference_steps=50, guidance_scale=2.0)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ld_common.core.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from ld_common.editing.base import EditContext, Editor
    from ld_common.editing.belm import Belm
    from ld_common.editing.counterfactuals import (
        Counterfactuals,
        Edit,
        LatentEditor,
        draw_counterfactuals,
        draw_several,
        edit_to,
    )
    from ld_common.editing.ddim import DdimInversion
    from ld_common.editing.ddpm import EditFriendlyDdpm
    from ld_common.editing.drift import DriftEditor
    from ld_common.editing.flowedit import FlowEdit
    from ld_common.editing.instruct_pix2pix import InstructPix2PixEditor
    from ld_common.editing.pix2pix_zero import Pix2PixZero
    from ld_common.editing.registry import EDITORS, change_editor, editor_options, read_editor
    from ld_common.editing.sdedit import SdEdit

__all__ = [
    "EDITORS",
    "Belm",
    "Counterfactuals",
    "DdimInversion",
    "DriftEditor",
    "Edit",
    "EditContext",
    "EditFriendlyDdpm",
    "Editor",
    "FlowEdit",
    "InstructPix2PixEditor",
    "LatentEditor",
    "Pix2PixZero",
    "SdEdit",
    "change_editor",
    "draw_counterfactuals",
    "draw_several",
    "edit_to",
    "editor_options",
    "read_editor",
]

if not TYPE_CHECKING:  # a type checker would take any name from `__getattr__`
    _COUNTERFACTUALS = ("Counterfactuals", "Edit", "LatentEditor", "draw_counterfactuals", "draw_several", "edit_to")
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            **dict.fromkeys(("EditContext", "Editor"), "ld_common.editing.base"),
            **dict.fromkeys(_COUNTERFACTUALS, "ld_common.editing.counterfactuals"),
            **dict.fromkeys(
                ("EDITORS", "change_editor", "editor_options", "read_editor"), "ld_common.editing.registry"
            ),
            "Belm": "ld_common.editing.belm",
            "DdimInversion": "ld_common.editing.ddim",
            "DriftEditor": "ld_common.editing.drift",
            "EditFriendlyDdpm": "ld_common.editing.ddpm",
            "FlowEdit": "ld_common.editing.flowedit",
            "InstructPix2PixEditor": "ld_common.editing.instruct_pix2pix",
            "Pix2PixZero": "ld_common.editing.pix2pix_zero",
            "SdEdit": "ld_common.editing.sdedit",
        },
    )
