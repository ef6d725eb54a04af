"""What chest data sets share: which view is taken, and which finding is which diagnosis."""

from __future__ import annotations

from ld_client.layouts.base import DIAGNOSIS, LayoutImport
from ld_client.layouts.entries import Cause
from ld_client.layouts.labels import FORM, diagnosis_of
from ld_client.layouts.tables import LayoutRow, LayoutTable
from ld_common.core.config import nearest, require


def require_labels(run: LayoutImport, table: LayoutTable) -> bool:
    """Check --label against the table and the modality; returns whether the findings give the diagnosis.

    Raises:
        ConfigError: a label is missing, or names a finding or a value that there is not.
    """
    labels, attribute = run.options.labels, run.modality.attributes.get(DIAGNOSIS)
    if attribute is None or DIAGNOSIS in run.options.columns or DIAGNOSIS in run.options.constants:
        require(not labels, "--label gives the diagnosis: leave it out where the modality or another option decides")
        return False
    values = list(attribute.categories)
    known = ", ".join(values)
    require(bool(labels), f"which findings make the diagnosis ({known})? {FORM}")
    for label in labels:
        hint = nearest(label.finding, list(table.header))
        require(table.has([label.finding]), f"'{table.path}' has no finding '{label.finding}' (--label): {hint}")
        require(label.value in values, f"--label gives '{label.value}', the modality has {known}")
    rules = ", ".join(f"{label.finding} {label.state} is {label.value}" for label in labels)
    run.state(f"diagnosis: {rules}; a finding of these that is uncertain (-1) is no label")
    return True


def view_problem(run: LayoutImport, view: str) -> tuple[Cause, str] | None:
    """Why a view is not taken, or None."""
    accepted = run.modality.image.view_positions
    if not view:
        return Cause.NO_VIEW, ""
    return None if not accepted or view in accepted else (Cause.OTHER_VIEW, view)


def computed_diagnosis(run: LayoutImport, file: str, row: LayoutRow) -> dict[str, str] | None:
    """The diagnosis by the labels, if they give it; None where a radiograph has none and is left out."""
    if not run.options.labels:
        return {}
    value, problem = diagnosis_of(row, run.options.labels)
    if value:
        return {DIAGNOSIS: value}
    if not problem:
        run.leave_out(file, Cause.NO_LABEL, "no finding of --label applies")
    else:
        run.leave_out(file, Cause.UNCERTAIN if "uncertain" in problem else Cause.CONFLICT, problem)
    return None
