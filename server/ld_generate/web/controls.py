"""The page's left side: which scan, what it shows, what it should show, and how that is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio
from gradio.components import Component

from ld_common.editing.registry import EDITORS
from ld_common.imaging.modality import AttributeConfig, Attributes
from ld_common.imaging.scan_table import shown
from ld_common.release.release import Release, release_editor
from ld_generate.web.appearance import heading
from ld_generate.web.drawing import EditForm

DRIFT_STEP, GUIDANCE_STEP, NOISE_STEP = 0.01, 0.05, 0.05
MAX_GUIDANCE = 5.0
TRAJECTORY_VALUES = 8
NOWHERE = "no"


class Controls:
    """The controls of one release, made from its modality; they appear where this is called, inside `gradio.Blocks`."""

    def __init__(self, release: Release, examples: Mapping[str, Path]) -> None:
        attributes = release.modality.attributes
        heading("Scan")
        self.files = gradio.File(
            label="DICOM file, its series or a .zip of it; NIfTI; grey PNG",
            file_count="multiple",
            height=104,
            elem_id="files",
        )
        self.example = gradio.Dropdown(
            list(examples), value=None, label="… or an example", visible=bool(examples), elem_id="example"
        )
        with gradio.Accordion("About the file", open=False):
            self.slice_index = gradio.Number(
                None, label="Slice of a volume", info="Counted from 0, the lowest. Empty: as in training.", precision=0
            )
            self.released = gradio.Checkbox(label="I have looked: no text is burned into the pixels")
        with gradio.Row():
            with gradio.Column(min_width=140):
                heading("The scan shows")
                self.shows = {name: _known(name, known) for name, known in attributes.items()}
            with gradio.Column(min_width=140):
                heading("It should show")
                self.wanted = {name: _wanted(name, known) for name, known in attributes.items()}
        gradio.HTML('<div class="note">What the file itself says is grey and settled.</div>')
        edit, search = release_editor(release), release.study.drift.search
        reach = max(abs(search.lowest), abs(search.highest), abs(edit.delta))
        heading("How")
        self.drift = gradio.Slider(
            -reach, reach, edit.delta, step=DRIFT_STEP, label="Drift δ", info="Shift of z_T, in the paper's units."
        )
        with gradio.Accordion("Editor, guidance, seed", open=False):
            self.editor = gradio.Dropdown(list(EDITORS), value=edit.name, label="Editor")
            self.guidance_scale = gradio.Slider(
                0,
                max(MAX_GUIDANCE, edit.guidance_scale),
                edit.guidance_scale,
                step=GUIDANCE_STEP,
                label="Guidance scale",
            )
            self.noise_fraction = gradio.Slider(
                NOISE_STEP,
                1,
                edit.noise_fraction,
                step=NOISE_STEP,
                label="Noise fraction",
                info="Share of the diffusion that is inverted.",
            )
            self.seed = gradio.Number(release.study.seed, label="Seed", precision=0, minimum=0)
        numbers = {name: known for name, known in attributes.items() if not known.categories}
        with gradio.Accordion("Trajectory", open=False, visible=bool(numbers)):
            self.along = gradio.Radio([NOWHERE, *numbers], value=NOWHERE, label="Draw one along")
            with gradio.Row():
                self.first = gradio.Number(label="from", min_width=70)
                self.last = gradio.Number(label="to", min_width=70)
                self.step = gradio.Number(label="in steps of", min_width=70)
        self.draw = gradio.Button("Draw", variant="primary", elem_id="draw")
        self._numbers = numbers
        self.along.input(self._range, self.along, [self.first, self.last, self.step], api_visibility="private")
        for name, known in attributes.items():
            self.shows[name].input(
                None, [self.shows[name], self.wanted[name]], self.wanted[name], js=_following(known), queue=False
            )

    @property
    def scan(self) -> set[Component]:
        """What says which scan it is and how it is read."""
        return {self.files, self.example, self.slice_index, self.released}

    @property
    def all(self) -> set[Component]:
        """What a form is read from."""
        how = {self.drift, self.editor, self.guidance_scale, self.noise_fraction, self.seed}
        along = {self.along, self.first, self.last, self.step}
        return self.scan | how | along | {*self.shows.values(), *self.wanted.values()}

    def form(self, values: Mapping[Component, Any]) -> EditForm:
        """What the controls say."""
        along = values[self.along]
        spoken = f"{along}={values[self.first]}:{values[self.last]}:{values[self.step]}"
        return EditForm(
            shows={name: values[control] for name, control in self.shows.items()},
            wanted={name: values[control] for name, control in self.wanted.items()},
            drift=values[self.drift],
            editor=values[self.editor],
            guidance_scale=values[self.guidance_scale],
            noise_fraction=values[self.noise_fraction],
            seed=values[self.seed],
            trajectory="" if along == NOWHERE else spoken,
            slice_index=values[self.slice_index],
            released=values[self.released],
        )

    def prefill(self, says: Attributes) -> dict[Component, Any]:
        """Updates after a scan was read: what its file says is settled, the rest is open; nothing is different yet."""
        updates: dict[Component, Any] = {}
        for name, control in self.shows.items():
            value = says.get(name)
            text = None if value is None else shown(value)
            updates[control] = gradio.update(value=text, interactive=value is None)
            updates[self.wanted[name]] = gradio.update(value=value)
        return updates

    def _range(self, along: str) -> list[float | None]:
        if along == NOWHERE:
            return [None, None, None]
        known = self._numbers[along]
        step = max(1, round((known.maximum - known.minimum) / TRAJECTORY_VALUES))
        return [known.minimum, known.maximum, step]


def _known(name: str, known: AttributeConfig) -> Component:
    """What the scan shows: empty until the file or a person says it."""
    if known.categories:
        return gradio.Radio(_words(known), value=None, label=name, elem_id=f"shows-{name}")
    return gradio.Textbox(label=_label(name, known), placeholder="not known", max_lines=1, elem_id=f"shows-{name}")


def _wanted(name: str, known: AttributeConfig) -> Component:
    if known.categories:
        return gradio.Radio(_words(known), value=None, label=name, elem_id=f"wanted-{name}")
    return gradio.Slider(known.minimum, known.maximum, step=1, label=name, elem_id=f"wanted-{name}")


def _following(known: AttributeConfig) -> str:
    """What a person says of the scan is also what should be seen, in the browser, at once: nothing is different yet."""
    if known.categories:
        return "(said, wanted) => said"
    within = f"{known.minimum} <= Number(said) && Number(said) <= {known.maximum}"
    return f"(said, wanted) => said.trim() && {within} ? Number(said) : wanted"


def _words(known: AttributeConfig) -> list[tuple[str, str]]:
    return [(words, value) for value, words in known.categories.items()]


def _label(name: str, known: AttributeConfig) -> str:
    return f"{name}, {known.unit}" if known.unit else name
