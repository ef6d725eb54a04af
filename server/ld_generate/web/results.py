"""The page's right side: the scan as it will be seen, then the answer about it."""

from __future__ import annotations

from typing import Any

import gradio
from gradio.components import Component

from ld_generate.web import appearance
from ld_generate.web.drawing import EditResult, Preview

EMPTY = "Drop a scan, or pick an example.<br>Say what should be different.<br>Press Draw."


class ResultView:
    """Where answers appear; it is placed where this is called, inside `gradio.Blocks`."""

    def __init__(self) -> None:
        self.message = gradio.HTML(elem_id="message")
        self.hint = gradio.HTML(f'<div class="hint">{EMPTY}</div>', elem_id="hint")
        with gradio.Column(visible=False) as self.before:
            self.preview = _picture("Scan, as the model sees it", "preview")
        with gradio.Column(visible=False, elem_id="answer") as self.after:
            self.caption = gradio.HTML()
            with gradio.Row():
                self.scan = _picture("Scan")
                self.reconstruction = _picture("Reconstruction")
                self.counterfactual = _picture("Counterfactual")
                self.difference = _picture("Difference")
            with gradio.Row():
                with gradio.Column(scale=1, min_width=300):
                    appearance.heading("Swipe to the counterfactual from")
                    with gradio.Tabs():
                        with gradio.Tab("the scan"):
                            self.from_scan = _swipe()
                        with gradio.Tab("the reconstruction"):
                            self.from_reconstruction = _swipe()
                with gradio.Column(scale=1, min_width=260):
                    gradio.HTML(appearance.DIFFERENCE_SCALE)
                    self.areas = gradio.HTML(elem_id="areas")
                    appearance.heading("Download")
                    with gradio.Row():
                        self.dicom = gradio.DownloadButton("DICOM", size="md", min_width=80, elem_id="dicom")
                        self.nifti = gradio.DownloadButton("NIfTI", size="md", min_width=80, elem_id="nifti")
                        self.record = gradio.DownloadButton("record.json", size="md", min_width=80)
                        self.archive = gradio.DownloadButton("All, .zip", size="md", min_width=80, elem_id="archive")
            with gradio.Row(visible=False) as self.trajectory:
                with gradio.Column(scale=1, min_width=300):
                    self.animation = _picture("Trajectory")
                with gradio.Column(scale=1, min_width=260):
                    self.along = gradio.HTML()

    def show_scan(self, seen: Preview) -> dict[Component, Any]:
        """A scan, and no answer about another one."""
        return {
            self.message: "",
            self.hint: gradio.update(visible=False),
            self.before: gradio.update(visible=True),
            self.preview: seen.picture,
            self.after: gradio.update(visible=False),
        }

    def show_answer(self, name: str, drawn: EditResult) -> dict[Component, Any]:
        """An answer about the scan `name`, with its warnings first."""
        pictures = {what: str(file) for what, file in drawn.pictures.items()}
        counterfactual = pictures["counterfactual"]
        return {
            self.message: "".join(appearance.message("warning", line) for line in drawn.warnings),
            self.before: gradio.update(visible=False),
            self.after: gradio.update(visible=True),
            self.caption: appearance.caption(name, drawn),
            self.scan: pictures["scan"],
            self.reconstruction: pictures["reconstruction"],
            self.counterfactual: counterfactual,
            self.difference: pictures["difference"],
            self.from_scan: (pictures["scan"], counterfactual),
            self.from_reconstruction: (pictures["reconstruction"], counterfactual),
            self.areas: appearance.areas(drawn.areas),
            self.dicom: str(drawn.dicom),
            self.nifti: gradio.update(
                value=None if drawn.nifti is None else str(drawn.nifti), visible=drawn.nifti is not None
            ),
            self.record: str(drawn.record),
            self.archive: str(drawn.archive),
            self.trajectory: gradio.update(visible=drawn.animation is not None),
            self.animation: None if drawn.animation is None else str(drawn.animation),
            self.along: appearance.trajectory(drawn.trajectory),
        }

    def show_error(self, line: str) -> dict[Component, Any]:
        """One line, above what was drawn before."""
        return {self.message: appearance.message("error", line)}

    def show_no_scan(self, line: str) -> dict[Component, Any]:
        """One line, and nothing of the scan before."""
        hidden = {part: gradio.update(visible=False) for part in (self.before, self.after)}
        return self.show_error(line) | hidden | {self.hint: gradio.update(visible=True)}

    @property
    def all(self) -> list[Component]:
        """What an answer changes."""
        return list(vars(self).values())


def _picture(label: str, kind: str = "") -> gradio.Image:
    return gradio.Image(
        label=label,
        interactive=False,
        format="png",
        min_width=130,
        buttons=["fullscreen"],
        elem_classes=["picture", kind],
    )


def _swipe() -> gradio.ImageSlider:
    return gradio.ImageSlider(interactive=False, format="png", max_height=520, show_label=False, buttons=["fullscreen"])
