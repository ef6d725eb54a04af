"""The page itself, and what happens when something on it is touched."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gradio
from gradio.components import Component

from ld_common.core.errors import LdError
from ld_common.diffusion.base_model import BaseModel
from ld_common.release.release import Release
from ld_generate.web import appearance
from ld_generate.web.controls import Controls
from ld_generate.web.drawing import draw, preview
from ld_generate.web.results import ResultView
from ld_generate.web.scans import one_scan

KEPT_SECONDS, SWEEP_SECONDS = 1800, 60
"""How long a file lies in the server's folder after its last use, and how often that is looked at."""
MOST_WAITING = 64
"""Requests that wait for the model."""


class Page:
    """The page of one release: `blocks` is what Gradio serves."""

    def __init__(self, model: BaseModel, release: Release, examples: Mapping[str, Path]) -> None:
        self._model, self._release, self._examples = model, release, examples
        with gradio.Blocks(
            analytics_enabled=False,
            title=f"{release.study.name}: counterfactuals",
            delete_cache=(SWEEP_SECONDS, KEPT_SECONDS),
            fill_width=True,
        ) as self.blocks:
            gradio.HTML(appearance.NOTICE, elem_id="notice")
            gradio.HTML(appearance.title(release), elem_id="title")
            with gradio.Row(elem_id="both"):
                with gradio.Column(scale=4, min_width=360, elem_id="ask"):
                    self._controls = Controls(release, examples)
                with gradio.Column(scale=9, min_width=500):
                    self._results = ResultView()
            self._connect()
        self.blocks.queue(max_size=MOST_WAITING)

    def _connect(self) -> None:
        controls, results = self._controls, self._results
        drawing = controls.draw.click(
            self.draw, controls.all, results.all, concurrency_limit=1, show_progress_on=results.message
        )
        seen = [*results.all, *controls.shows.values(), *controls.wanted.values()]
        files = controls.files
        # of files and example the one touched last counts, so each empties the other
        for touched, other in ((files.upload, controls.example), (controls.example.input, files)):
            touched(lambda: None, None, other, api_visibility="private", cancels=drawing).then(
                self.look, controls.scan, seen, api_visibility="private"
            )
        for changed in (files.clear, files.delete, controls.slice_index.submit, controls.released.input):
            changed(self.look, controls.scan, seen, api_visibility="private", cancels=drawing)

    def look(self, values: dict[Component, Any]) -> dict[Component, Any]:
        """Show the scan that was dropped or picked, and what its file says."""
        controls, modality = self._controls, self._release.modality
        with tempfile.TemporaryDirectory() as folder:
            try:
                _, scan = self._scan(values, Path(folder))
                index, released = values[controls.slice_index], values[controls.released]
                seen = preview(modality, self._model.resolution, scan, index, released)
            except Exception as error:
                return self._results.show_no_scan(_told(error)) | controls.prefill({})
        return self._results.show_scan(seen) | controls.prefill(seen.says)

    def draw(
        self, values: dict[Component, Any], progress: gradio.Progress = gradio.Progress()
    ) -> Iterator[dict[Component, Any]]:
        """Answer the question; what was written for it is gone once Gradio has copied what it serves."""
        with tempfile.TemporaryDirectory() as folder:
            try:
                progress(0.0, desc="drawing")
                name, scan = self._scan(values, Path(folder))
                form = self._controls.form(values)
                drawn = draw(self._model, self._release, scan, form, Path(folder) / "out", progress)
            except Exception as error:
                yield self._results.show_error(_told(error))
            else:
                yield self._results.show_answer(name, drawn)

    def _scan(self, values: dict[Component, Any], folder: Path) -> tuple[str, Path]:
        """The scan's name and path."""
        example = values[self._controls.example]
        if example is not None:
            return example, self._examples[example]
        files = [Path(file) for file in values[self._controls.files] or []]
        for file in filter(Path.exists, files):
            os.utime(file)  # in use: the sweep counts from now
        scan = one_scan(files, folder)
        return scan.name, scan


def _told(error: Exception) -> str:
    """An error in one line, without what only a command line knows: folders, and the dashes of options.

    Anything but an `LdError` is a defect; its text and its traceback may quote a patient's file, so that only its kind
    and place are told, and logged.
    """
    if not isinstance(error, LdError):
        place = traceback.extract_tb(error.__traceback__)[-1]
        line = f"this failed inside the program: {type(error).__name__} at {Path(place.filename).name}:{place.lineno}"
        print(line, file=sys.stderr)
        return line
    line = re.sub(r"'[^']*/([^'/]+)'", r"'\1'", " ".join(str(error).split()))
    return re.sub(r"--(?=\w)", "", line)
