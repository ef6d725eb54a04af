"""The page's choice of an editor, and the options that the chosen one uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gradio
from gradio.components import Component

from ld_common.diffusion.longitudinal import LongitudinalDrift
from ld_common.editing.base import Editor
from ld_common.editing.instruct_pix2pix import InstructPix2PixEditor
from ld_common.editing.registry import EDITORS, change_editor
from ld_common.release.release import Release, release_editor

DRIFT_STEP, GUIDANCE_STEP, NOISE_STEP = 0.01, 0.05, 0.05
MAX_GUIDANCE = 5.0


def offered_editors(release: Release) -> list[str]:
    """The editors that work with this release."""
    return [name for name in EDITORS if _works(release, EDITORS.load(name))]


def _works(release: Release, editor: type[Editor]) -> bool:
    if issubclass(editor, InstructPix2PixEditor):
        return release.study.adapter.get("name") == editor.name
    return not editor.needs_longitudinal or isinstance(release.drift, LongitudinalDrift)


class EditorControls:
    """Editor, δ, guidance, noise and seed; made inside `gradio.Blocks`, where they appear."""

    def __init__(self, release: Release) -> None:
        self._recommended = editor = release_editor(release)
        search = release.study.drift.search
        reach = max(abs(search.lowest), abs(search.highest), abs(editor.delta))
        shown = _uses(editor)
        self.delta = gradio.Slider(
            -reach,
            reach,
            editor.delta,
            step=DRIFT_STEP,
            label="Drift δ",
            info="Shift of z_T, in the paper's units.",
            visible=shown["delta"],
            elem_id="delta",
        )
        with gradio.Accordion("Editor and its options", open=False):
            self.editor = gradio.Dropdown(offered_editors(release), value=editor.name, label="Editor", elem_id="editor")
            self.guidance_scale = gradio.Slider(
                0,
                max(MAX_GUIDANCE, editor.guidance_scale),
                editor.guidance_scale,
                step=GUIDANCE_STEP,
                label="Guidance scale",
                info="Factor of the change; 0 changes nothing.",
                visible=shown["guidance_scale"],
                elem_id="guidance-scale",
            )
            self.noise_fraction = gradio.Slider(
                NOISE_STEP,
                1,
                editor.noise_fraction,
                step=NOISE_STEP,
                label="Noise fraction",
                info="Share of the noise schedule that is inverted.",
                visible=shown["noise_fraction"],
                elem_id="noise-fraction",
            )
            self.seed = gradio.Number(
                release.study.seed, label="Seed", precision=0, minimum=0, visible=shown["seed"], elem_id="seed"
            )

    @property
    def all(self) -> set[Component]:
        """Controls that `values` reads; hidden ones keep the recommended value."""
        return {self.editor, *self._by_option.values()}

    def values(self, values: Mapping[Component, Any]) -> dict[str, Any]:
        """The values of the controls by name."""
        return {"editor": values[self.editor], **{name: values[control] for name, control in self._by_option.items()}}

    def adapt(self, name: str) -> dict[Component, Any]:
        """Updates after another editor was chosen: only options that it uses are shown, at what it recommends."""
        editor = change_editor(self._recommended, name)
        return {
            self._by_option[option]: gradio.update(
                visible=used, **({"value": getattr(editor, option)} if option != "seed" else {})
            )
            for option, used in _uses(editor).items()
        }

    @property
    def _by_option(self) -> dict[str, Component]:
        return {
            "delta": self.delta,
            "guidance_scale": self.guidance_scale,
            "noise_fraction": self.noise_fraction,
            "seed": self.seed,
        }


def _uses(editor: Editor) -> dict[str, bool]:
    used = {option: option not in editor.unused for option in ("delta", "guidance_scale", "noise_fraction")}
    return used | {"seed": editor.draws_noise()}
