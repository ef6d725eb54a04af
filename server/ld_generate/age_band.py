"""Which band and which cohort's curve of a release's evaluation belong to a request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ld_common.editing.base import Editor
from ld_common.editing.registry import EDITORS, change_editor, editor_options
from ld_common.imaging.modality import AGE, Attributes, Modality
from ld_common.metrics.bands import Band
from ld_common.release.age_calibration import AgeCalibration, read_age_calibration
from ld_common.release.release import Release, release_editor
from ld_generate.age_curve import EXTRAPOLATED, JUDGED, AgeContext
from ld_generate.request import EditRequest
from ld_generate.sweep_writer import measure_biomarkers

NO_EFFECT = ("batch_size",)
"""Options of an editor that change no answer."""


def age_context(release: Release, editor: Editor, request: EditRequest) -> AgeContext:
    """Band, cohort's curve and earlier scans of a request's plot."""
    calibration = _calibration(release)
    return AgeContext(_band(release, editor, request), calibration.curve_of(request.source), _visits(release, request))


def band_entry(
    release: Release, editor: Editor, request: EditRequest, target: Attributes, areas_mm2: Mapping[str, float]
) -> dict[str, Any] | None:
    """The band around one answer, for the record; None where the edit changes more than the age, or none is known.

    Args:
        release: the release.
        editor: what drew the answer.
        request: what was asked.
        target: the attributes that it changes.
        areas_mm2: the biomarkers of the answer.
    """
    band = _band(release, editor, request)
    if band is None or not _ages_only(release, request.source, target):
        return None
    years, name = float(target[AGE]) - float(request.source[AGE]), release.modality.biomarkers[0]
    width = float(band.half_width(years))
    return {
        "biomarker": name,
        "low_mm2": max(areas_mm2[name] - width, 0.0),
        "high_mm2": areas_mm2[name] + width,
        "level": band.level,
        "kind": JUDGED if band.judged(years) else EXTRAPOLATED,
    }


def missing_band(release: Release, editor: Editor, requests: Sequence[EditRequest]) -> list[str]:
    """A sentence where answers at other ages get no band, or earlier scans do not narrow it."""
    calibration = _calibration(release)
    if calibration.one_scan is None and calibration.history is None:
        return ["the release has no evaluation with bands: the drawn change has none (ld-evaluate makes one)"]
    for request in requests:
        if request.frame.spacing_mm is None:
            return ["a scan does not say its pixel spacing: its areas are not known, and it gets no band"]
        if reason := _unlike(release, calibration, editor, request):
            return [f"the drawn change has no band: {reason}"]
        if request.history is not None and calibration.band_of(request.history) is calibration.one_scan:
            why = "no history was judged" if calibration.history is None else "its visits lie nearer together"
            return [f"a scan with a history gets the band of one scan: {why}"]
    return []


def _calibration(release: Release) -> AgeCalibration:
    """Of the modality's first biomarker; empty where the evaluation is of another."""
    calibration = read_age_calibration(release.manifest.get("evaluation", {}))
    biomarkers = release.modality.biomarkers
    return calibration if biomarkers and biomarkers[0] == calibration.biomarker else AgeCalibration()


def _band(release: Release, editor: Editor, request: EditRequest) -> Band | None:
    calibration = _calibration(release)
    if request.frame.spacing_mm is None or _unlike(release, calibration, editor, request):
        return None
    return calibration.band_of(request.history)


def _unlike(release: Release, calibration: AgeCalibration, editor: Editor, request: EditRequest) -> str:
    """What makes a request another one than those judged; empty for none."""
    if calibration.editor != editor.name:
        return f"the evaluation judged editor {calibration.editor}, not {editor.name}"
    recommended = release_editor(release)
    if editor.name in EDITORS and _options(change_editor(recommended, editor.name)) != _options(editor):
        return f"the evaluation judged editor {editor.name} with other options"
    if request.rendering != release.modality.image.rendering:
        return f"the evaluation judged --rendering {release.modality.image.rendering}, not {request.rendering}"
    return (
        "" if request.preserve_mask is None else "the evaluation judged whole answers, and --preserve-mask keeps some"
    )


def _options(editor: Editor) -> dict[str, Any]:
    return {name: value for name, value in editor_options(editor).items() if name not in NO_EFFECT}


def _ages_only(release: Release, source: Attributes, target: Attributes) -> bool:
    changed = {name for name, value in target.items() if value != source[name]}
    return changed == {AGE} and not release.modality.attributes[AGE].categories


def visit_areas(modality: Modality, request: EditRequest) -> list[dict[str, float]]:
    """Biomarkers in mm2 of each earlier scan; empty where not all pictures show as many mm as the scan's."""
    if request.history is None:
        return []
    if not modality.image.field_of_view_mm:
        return [{} for _ in request.history.years]
    return measure_biomarkers(modality, request.frame, request.history.pictures)


def _visits(release: Release, request: EditRequest) -> list[tuple[float, float]]:
    """Age and first biomarker of the earlier scans."""
    modality, history = release.modality, request.history
    if history is None or not modality.biomarkers:
        return []
    age, measured = float(request.source[AGE]), visit_areas(modality, request)
    return [
        (age - years, areas[modality.biomarkers[0]])
        for years, areas in zip(history.years, measured, strict=True)
        if areas
    ]
