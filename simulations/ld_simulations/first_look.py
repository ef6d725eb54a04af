"""The demo's first picture: one test patient's answers, minutes before the federation has trained.

The study's editor needs no trained network, only the longitudinal drift, whose sums the sites send in rounds 1 and 2.
Here they are added up from the stores on this machine, which gives the same drift up to rounding.
"""

from __future__ import annotations

from pathlib import Path

from ld_client.data.store import open_store
from ld_client.site_drift import visit_table
from ld_common.diffusion.base_model import load_base
from ld_common.diffusion.longitudinal_fit import fit_tables
from ld_common.editing.registry import read_editor
from ld_evaluate.truth import read_truths
from ld_simulations.demo import Demo
from ld_simulations.evaluation import EditedScans
from ld_simulations.hospitals import HELD_OUT
from ld_simulations.phantoms.registry import find_phantom
from ld_simulations.report.patients import shown_patients, write_strip
from ld_simulations.run_folder import FIRST_LOOK


def write_first_look(demo: Demo) -> Path | None:
    """Draw one test patient's answers beside the truths; None where the study's editor needs a trained network.

    Raises:
        ConfigError: no patient of any site has two visits on different days.
    """
    editor, modality = read_editor(demo.study.edit), demo.modality
    if demo.study.drift.shape != "longitudinal" or not editor.needs_longitudinal:
        return None
    base = load_base(demo.study.base_model)
    tables = [visit_table(modality, open_store(demo.output / "stores" / name)) for name in demo.study.federation.sites]
    drift, _ = fit_tables(tables, modality.numeric_columns, base.latent_mean, base.latent_shape, demo.study.seed)
    folder = Path(demo.hospitals.output) / HELD_OUT
    first = EditedScans(base, modality, *read_truths(folder, modality, base.resolution, most=1))
    patients = shown_patients(modality, first.judged(editor, drift), find_phantom(demo.hospitals.phantom).edit_titles())
    return write_strip(demo.output / FIRST_LOOK, patients, find_phantom(demo.hospitals.phantom).terms.structure)
