"""The page's left side: the scan, its attributes, the target and the editor's options."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio
from gradio.components import Component

from ld_common.core.errors import RequestError
from ld_common.diffusion.longitudinal import LongitudinalDrift
from ld_common.editing.registry import EDITORS
from ld_common.imaging.modality import AGE, AttributeConfig, Attributes
from ld_common.imaging.scan_table import shown
from ld_common.release.release import Release, release_editor
from ld_generate.web.appearance import heading
from ld_generate.web.drawing import EditForm
from ld_generate.web.editor_controls import EditorControls
from ld_generate.web.scans import Example

SWEEP_VALUES = 8
NO_SWEEP = "no"


class Controls:
    """The controls for a release's modality; made inside `gradio.Blocks`, where they appear."""

    def __init__(self, release: Release, examples: Mapping[str, Example]) -> None:
        self._attributes = release.modality.attributes
        self._place_scan(examples)
        self._place_attributes()
        self._serves_history = isinstance(release.drift, LongitudinalDrift) and AGE in self._attributes
        self._place_history(self._serves_history and release_editor(release).takes_move)
        heading("How")
        self._how = EditorControls(release)
        self._place_sweep()
        self._how.editor.input(
            self._adapt, self._how.editor, [*self._how.all, self._history_place], queue=False, api_visibility="private"
        )
        self.draw = gradio.Button("Draw", variant="primary", elem_id="draw")

    def _place_scan(self, examples: Mapping[str, Example]) -> None:
        heading("Scan")
        self.files = gradio.File(
            label="DICOM file, its series or a .zip of it; NIfTI; grey PNG or JPEG",
            file_count="multiple",
            height=104,
            elem_id="files",
            elem_classes="files",
        )
        self.example = gradio.Dropdown(
            list(examples), value=None, label="… or an example", visible=bool(examples), elem_id="example"
        )
        with gradio.Accordion("About the file", open=False):
            self.slice_index = gradio.Textbox(  # a gradio.Number in an accordion turns from empty into 0
                label="Slice of a volume",
                info="Counted from 0, the lowest. Empty: as in training.",
                max_lines=1,
                elem_id="slice",
            )
            self.burned_in_text_checked = gradio.Checkbox(label="I have checked: no text is burned into the pixels")

    def _place_attributes(self) -> None:
        with gradio.Row():
            with gradio.Column(min_width=140):
                heading("The scan shows")
                self.source = {name: _source_control(name, entry) for name, entry in self._attributes.items()}
            with gradio.Column(min_width=140):
                heading("It should show")
                self.target = {name: _target_control(name, entry) for name, entry in self._attributes.items()}
        gradio.HTML('<div class="note">Values that the file itself holds are grey and fixed.</div>')
        for name, entry in self._attributes.items():
            self.source[name].input(
                None, [self.source[name], self.target[name]], self.target[name], js=_following(entry), queue=False
            )

    def _place_history(self, visible: bool) -> None:
        with gradio.Accordion("Earlier scans of the patient", open=False, visible=visible, elem_id="history") as place:
            self.history_files = gradio.File(
                label="A file a visit: DICOM, .zip of a series, NIfTI, PNG",
                file_count="multiple",
                height=104,
                elem_id="history-files",
                elem_classes="files",
            )
            self.history_ages = gradio.Textbox(
                label="Ages then, years",
                info="In the order of the files, separated by commas; empty where the files have dates.",
                placeholder="70.5, 72",
                max_lines=1,
                elem_id="history-ages",
            )
        self._history_place = place

    def _place_sweep(self) -> None:
        numbers = [name for name, attribute in self._attributes.items() if not attribute.categories]
        with gradio.Accordion("Sweep", open=False, visible=bool(numbers)):
            self.along = gradio.Radio([NO_SWEEP, *numbers], value=NO_SWEEP, label="Along")
            with gradio.Row():
                self.first, self.last, self.step = (
                    gradio.Textbox(label=label, min_width=70, max_lines=1, elem_id=f"sweep-{label.split()[-1]}")
                    for label in ("from", "to", "in steps of")
                )
        self.along.input(self._range, self.along, [self.first, self.last, self.step], api_visibility="private")

    @property
    def scan(self) -> set[Component]:
        """Controls that decide which scan is read, and how."""
        return {self.files, self.example, self.slice_index, self.burned_in_text_checked}

    @property
    def all(self) -> set[Component]:
        """All controls that `form` reads."""
        along = {self.along, self.first, self.last, self.step}
        history = {self.history_files, self.history_ages}
        return self.scan | self._how.all | along | history | {*self.source.values(), *self.target.values()}

    def form(self, values: Mapping[Component, Any]) -> EditForm:
        """The values of the controls."""
        along = values[self.along]
        sweep = f"{along}={values[self.first]}:{values[self.last]}:{values[self.step]}"
        return EditForm(
            source={name: values[control] for name, control in self.source.items()},
            target={name: values[control] for name, control in self.target.items()},
            **self._how.values(values),
            sweep="" if along == NO_SWEEP else sweep,
            slice_index=read_slice(values[self.slice_index]),
            burned_in_text_checked=values[self.burned_in_text_checked],
            history=tuple(Path(file) for file in values[self.history_files] or []),
            history_ages=values[self.history_ages] or "",
        )

    def prefill(self, in_file: Attributes, listed: Attributes | None = None) -> dict[Component, Any]:
        """Updates after a scan was read: attributes in its file are fixed, those of a table filled in, others empty.

        The target becomes the same, so that nothing changes yet.
        """
        updates: dict[Component, Any] = {}
        for name, control in self.source.items():
            value = in_file.get(name, (listed or {}).get(name))
            text = None if value is None else shown(value)
            updates[control] = gradio.update(value=text, interactive=name not in in_file)
            updates[self.target[name]] = gradio.update(value=value)
        return updates

    def _adapt(self, name: str) -> dict[Component, Any]:
        takes_history = self._serves_history and EDITORS.load(name).takes_move
        return self._how.adapt(name) | {self._history_place: gradio.update(visible=takes_history)}

    def _range(self, along: str) -> list[str]:
        if along == NO_SWEEP:
            return ["", "", ""]
        attribute = self._attributes[along]
        step = max(1, round((attribute.maximum - attribute.minimum) / SWEEP_VALUES))
        return [shown(value) for value in (attribute.minimum, attribute.maximum, step)]


def read_slice(text: str | None) -> int | None:
    """The number of a slice, None where the field is empty; raises `RequestError`."""
    if not (text or "").strip():
        return None
    if not str(text).strip().isdecimal():
        raise RequestError(f"slice is '{text}': give the number of a slice, from 0, or leave it empty")
    return int(str(text))


def _source_control(name: str, attribute: AttributeConfig) -> Component:
    """Empty until the file or the user gives a value."""
    if attribute.categories:
        return gradio.Radio(_choices(attribute), value=None, label=name, elem_id=f"source-{name}")
    return gradio.Textbox(label=_label(name, attribute), placeholder="not known", max_lines=1, elem_id=f"source-{name}")


def _target_control(name: str, attribute: AttributeConfig) -> Component:
    if attribute.categories:
        return gradio.Radio(_choices(attribute), value=None, label=name, elem_id=f"target-{name}")
    return gradio.Slider(attribute.minimum, attribute.maximum, step=1, label=name, elem_id=f"target-{name}")


def _following(attribute: AttributeConfig) -> str:
    """JavaScript that copies a source value to the target, so that nothing changes until the user moves the target."""
    if attribute.categories:
        return "(source, target) => source"
    within = f"{attribute.minimum} <= Number(source) && Number(source) <= {attribute.maximum}"
    return f"(source, target) => source.trim() && {within} ? Number(source) : target"


def _choices(attribute: AttributeConfig) -> list[tuple[str, str]]:
    return [(words, value) for value, words in attribute.categories.items()]


def _label(name: str, attribute: AttributeConfig) -> str:
    return f"{name}, {attribute.unit}" if attribute.unit else name
