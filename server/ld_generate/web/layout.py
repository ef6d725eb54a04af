"""The page: its layout and what its controls do."""

from __future__ import annotations

import io
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import gradio
from gradio.components import Component

from ld_common.core.errors import LdError
from ld_common.diffusion.base_model import BaseModel
from ld_common.release.release import Release
from ld_generate.card import write_card
from ld_generate.web import appearance
from ld_generate.web.controls import Controls, read_slice
from ld_generate.web.drawing import EditForm, draw, preview
from ld_generate.web.results import ResultView
from ld_generate.web.scans import Example, one_scan

FILE_LIFETIME_SECONDS, SWEEP_SECONDS = 1800, 60
"""How long the server's folder keeps a file after its last use, and how often that is checked."""
SCROLL = """() => {
    if (innerWidth >= 900) return;
    const error = document.querySelector("#message .error");
    (error || document.getElementById("answer"))?.scrollIntoView({behavior: "smooth"});
}"""
"""Where the answer lies below the controls, as on a phone, it is brought into view, or the reason why there is none."""
MODEL = "model"
"""Answers and their cards are drawn one at a time."""
MAX_QUEUE_SIZE = 64
"""Requests that wait for the model."""


class Page:
    """The page of one release; Gradio serves its `blocks`."""

    def __init__(
        self, model: BaseModel, release: Release, examples: Mapping[str, Example], strict: bool = False
    ) -> None:
        self._model, self._release, self._examples, self._strict = model, release, examples, strict
        with gradio.Blocks(
            analytics_enabled=False,
            title=f"{release.study.name}: counterfactuals",
            delete_cache=(SWEEP_SECONDS, FILE_LIFETIME_SECONDS),
            fill_width=True,
        ) as self.blocks:
            gradio.HTML(appearance.NOTICE, elem_id="notice")
            gradio.HTML(appearance.title(release, strict), elem_id="title")
            with gradio.Row(elem_id="both"):
                with gradio.Column(scale=4, min_width=360, elem_id="ask"):
                    self._controls = Controls(release, examples)
                with gradio.Column(scale=9, min_width=500):
                    self._results = ResultView()
            self._connect()
        self.blocks.queue(max_size=MAX_QUEUE_SIZE)

    def _connect(self) -> None:
        controls, results = self._controls, self._results
        drawing = controls.draw.click(
            self.draw,
            controls.all,
            results.all,
            concurrency_limit=1,
            concurrency_id=MODEL,
            show_progress_on=results.message,
        )
        drawing.then(None, js=SCROLL, queue=False, api_visibility="private")
        # an event of its own: Draw can be pressed again meanwhile, and its place in the queue is before that one's
        card = drawing.then(
            self.draw_card,
            results.without_card,
            [results.message, results.without_card, results.card_png, results.card_pdf],
            concurrency_id=MODEL,
            show_progress="hidden",
            api_visibility="private",
        )
        shown = [*results.all, *controls.source.values(), *controls.target.values()]
        files = controls.files
        # files and example exclude each other: using one empties the other; earlier scans may be of another patient
        for used, other in ((files.upload, controls.example), (controls.example.input, files)):
            emptied = [other, controls.history_files, controls.history_ages]
            used(lambda: (None, None, ""), None, emptied, api_visibility="private", cancels=[drawing, card]).then(
                self.look, controls.scan, shown, api_visibility="private"
            )
        for changed in (files.clear, files.delete, controls.slice_index.submit, controls.burned_in_text_checked.input):
            changed(self.look, controls.scan, shown, api_visibility="private", cancels=[drawing, card])

    def look(self, values: dict[Component, Any]) -> dict[Component, Any]:
        """Show the scan that was dropped or picked, and fill in the attributes of its file."""
        controls, modality = self._controls, self._release.modality
        with tempfile.TemporaryDirectory() as folder:
            try:
                _, scan = self._scan(values, Path(folder))
                index, checked = read_slice(values[controls.slice_index]), values[controls.burned_in_text_checked]
                scan_preview = preview(modality, self._model.resolution, scan, index, checked)
            except Exception as error:
                return self._results.show_no_scan(_error_line(error)) | controls.prefill({})
        in_file, example = scan_preview.attributes_in_file, self._examples.get(values[controls.example])
        listed, doubts = ({}, []) if example is None else (example.attributes, example.contradictions(in_file))
        return self._results.show_scan(scan_preview, doubts) | controls.prefill(in_file, listed)

    def draw(
        self, values: dict[Component, Any], progress: gradio.Progress = gradio.Progress()
    ) -> Iterator[dict[Component, Any]]:
        """Draw the counterfactual; its files are deleted once Gradio has copied those that it serves."""
        with tempfile.TemporaryDirectory() as folder:
            try:
                progress(0.0, desc="drawing")
                name, scan = self._scan(values, Path(folder))
                form = self._with_history(self._controls.form(values), Path(folder))
                result = draw(self._model, self._release, scan, form, Path(folder) / "out", progress, self._strict)
            except Exception as error:
                yield self._results.show_error(_error_line(error))
            else:
                yield self._results.show_result(name, result)

    def draw_card(self, archive: bytes | None) -> Iterator[dict[Component, Any]]:
        """Draw the patient card of the answer in an archive; `None` where the last press of Draw gave no answer."""
        if archive is None:
            yield {self._results.without_card: None}
            return
        with tempfile.TemporaryDirectory() as folder:
            try:
                ZipFile(io.BytesIO(archive)).extractall(folder)
                files = write_card(Path(folder), self._release)
            except Exception as error:
                yield self._results.show_error(_error_line(error)) | {self._results.without_card: None}
            else:
                yield self._results.show_card(files)

    def _scan(self, values: dict[Component, Any], folder: Path) -> tuple[str, Path]:
        """The scan's name and path."""
        example = values[self._controls.example]
        if example is not None:
            return example, self._examples[example].path
        files = [Path(file) for file in values[self._controls.files] or []]
        _keep(files)
        scan = one_scan(files, folder)
        return scan.name, scan

    def _with_history(self, form: EditForm, folder: Path) -> EditForm:
        """The form with its earlier scans unpacked."""
        _keep(form.history)
        scans = []
        for number, file in enumerate(form.history):
            place = folder / f"earlier-{number}"
            place.mkdir()
            scans.append(one_scan([file], place))
        return replace(form, history=tuple(scans))


def _keep(files: Iterable[Path]) -> None:
    """Start the lifetime of files again."""
    for file in filter(Path.exists, files):
        os.utime(file)


def _error_line(error: Exception) -> str:
    """An error in one line, without folders and without the dashes of options.

    Any other exception than `LdError` is a defect. Its text and traceback may quote a patient's file, so only its type
    and place are shown and logged.
    """
    if not isinstance(error, LdError):
        place = traceback.extract_tb(error.__traceback__)[-1]
        line = f"this failed inside the program: {type(error).__name__} at {Path(place.filename).name}:{place.lineno}"
        print(line, file=sys.stderr)
        return line
    line = re.sub(r"'[^']*/([^'/]+)'", r"'\1'", " ".join(str(error).split()))
    return re.sub(r"--(?=\w)", "", line)
