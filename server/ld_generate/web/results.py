"""The page's right side: the scan, then its counterfactual."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio
from gradio.components import Component

from ld_generate.web import appearance
from ld_generate.web.drawing import EditResult, Preview

CARD_SECONDS = 600
"""After which an answer without a card is forgotten."""
EMPTY = "Drop a scan, or pick an example.<br>Set what should change.<br>Press Draw."


class ResultView:
    """The results; made inside `gradio.Blocks`, where they appear."""

    def __init__(self) -> None:
        self.message = gradio.HTML(elem_id="message")
        self.without_card = gradio.State(time_to_live=CARD_SECONDS)
        """Archive of an answer whose card is still to be drawn, in the memory of the session."""
        self.hint = gradio.HTML(f'<div class="hint">{EMPTY}</div>', elem_id="hint")
        with gradio.Column(visible=False) as self.before:
            self.preview = _picture("Scan, as the model sees it", "preview")
        with gradio.Column(visible=False, elem_id="answer") as self.after:
            self.caption = gradio.HTML()
            self.familiarity = gradio.HTML(elem_id="familiarity")
            self.evaluation = gradio.HTML(elem_id="evaluation")
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
                    self.biomarkers = gradio.HTML(elem_id="biomarkers")
                    appearance.heading("Download")
                    with gradio.Row():
                        self.dicom = gradio.DownloadButton("DICOM", size="md", min_width=80, elem_id="dicom")
                        self.nifti = gradio.DownloadButton("NIfTI", size="md", min_width=80, elem_id="nifti")
                        self.record = gradio.DownloadButton("record.json", size="md", min_width=80)
                        self.archive = gradio.DownloadButton("All, .zip", size="md", min_width=80, elem_id="archive")
                    with gradio.Row():
                        self.card_png = gradio.DownloadButton(
                            "Patient card, PNG", size="md", min_width=120, interactive=False, elem_id="card-png"
                        )
                        self.card_pdf = gradio.DownloadButton(
                            "Patient card, PDF", size="md", min_width=120, interactive=False, elem_id="card-pdf"
                        )
            with gradio.Row(visible=False) as self.sweep:
                with gradio.Column(scale=1, min_width=300):
                    self.animation = _picture("Sweep")
                    self.curve = _picture("Along the age")
                with gradio.Column(scale=1, min_width=260):
                    self.sweep_table = gradio.HTML()

    def show_scan(self, scan: Preview, doubts: Sequence[str] = ()) -> dict[Component, Any]:
        """Updates that show a scan, with doubts about it, and hide the result for an earlier one."""
        return {
            self.message: "".join(appearance.message("warning", line) for line in doubts),
            self.hint: gradio.update(visible=False),
            self.before: gradio.update(visible=True),
            self.preview: scan.picture,
            self.after: gradio.update(visible=False),
        }

    def show_result(self, name: str, result: EditResult) -> dict[Component, Any]:
        """Updates that show the result for the scan `name`, its warnings first."""
        pictures = {kind: str(file) for kind, file in result.pictures.items()}
        counterfactual = pictures["counterfactual"]
        return {
            self.message: "".join(appearance.message("warning", line) for line in result.warnings),
            self.before: gradio.update(visible=False),
            self.after: gradio.update(visible=True),
            self.caption: appearance.caption(name, result),
            self.familiarity: appearance.familiarity_gauge(result.familiarity),
            self.evaluation: appearance.evaluation(result.evaluation),
            self.scan: pictures["scan"],
            self.reconstruction: pictures["reconstruction"],
            self.counterfactual: counterfactual,
            self.difference: pictures["difference"],
            self.from_scan: (pictures["scan"], counterfactual),
            self.from_reconstruction: (pictures["reconstruction"], counterfactual),
            self.biomarkers: appearance.biomarker_table(result.biomarkers, result.reference, result.band),
            self.without_card: result.archive.read_bytes(),
            self.card_png: gradio.update(value=None, interactive=False),
            self.card_pdf: gradio.update(value=None, interactive=False),
            self.dicom: str(result.dicom),
            self.nifti: gradio.update(
                value=None if result.nifti is None else str(result.nifti), visible=result.nifti is not None
            ),
            self.record: str(result.record),
            self.archive: str(result.archive),
            self.sweep: gradio.update(visible=result.animation is not None),
            self.animation: None if result.animation is None else str(result.animation),
            self.curve: gradio.update(
                value=None if result.curve is None else str(result.curve), visible=result.curve is not None
            ),
            self.sweep_table: appearance.sweep_table(result.sweep_table),
        }

    def show_card(self, files: Sequence[Path]) -> dict[Component, Any]:
        """Updates that offer the patient card, PNG and PDF."""
        png, pdf = (gradio.update(value=str(file), interactive=True) for file in files)
        return {self.without_card: None, self.card_png: png, self.card_pdf: pdf}

    def show_error(self, line: str) -> dict[Component, Any]:
        """Updates that show one line above an earlier result."""
        return {self.message: appearance.message("error", line)}

    def show_no_scan(self, line: str) -> dict[Component, Any]:
        """Updates that show one line and hide the earlier scan."""
        hidden = {part: gradio.update(visible=False) for part in (self.before, self.after)}
        return self.show_error(line) | hidden | {self.hint: gradio.update(visible=True)}

    @property
    def all(self) -> list[Component]:
        """All components that a result changes."""
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
