"""A release with a longitudinal drift of rendered patients, on the small base of the project: it draws them older."""

from __future__ import annotations

import csv
from pathlib import Path

import torch

from ld_common.adapters.base import inject
from ld_common.adapters.registry import read_adapter
from ld_common.core.config import from_mapping, load_config
from ld_common.diffusion.base_model import base_digest, load_base, load_denoiser
from ld_common.diffusion.longitudinal_fit import fit_tables
from ld_common.diffusion.longitudinal_sums import VisitTable
from ld_common.imaging.geometry import to_model
from ld_common.imaging.modality import AGE, Modality
from ld_common.imaging.readers import read_scan
from ld_common.protocol.study_config import StudyConfig
from ld_common.release.release import ReleaseContent, write_release
from ld_simulations.hospitals import write_hospitals
from ld_simulations.hospitals_config import HospitalConfig, HospitalsConfig

PROJECT = Path(__file__).parents[2]
BASE, BRAIN = PROJECT / "simulations/tiny_base", PROJECT / "configs/modalities/brain_mri.yaml"


def write_ageing_hospital(folder: Path, patients: int, test_patients: int) -> Path:
    """Rendered brains: `scans.csv` of the patients, and `held_out` with the test patients and their truths."""
    hospital = HospitalConfig("aster", patients=patients, test_patients=test_patients)
    written = write_hospitals(HospitalsConfig(output=str(folder), hospitals=[hospital]))
    mark_checked(written / "scans.csv")
    return written


def mark_checked(table: Path) -> None:
    """Say of all scans of a table that no text is burned in: the search takes most of the time that reading does."""
    head, *rows = table.read_text(encoding="utf-8").splitlines()
    lines = [f"{head},burned_in_text_checked", *(f"{row},yes" for row in rows)]
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_ageing_release(folder: Path, hospital: Path) -> Path:
    """A drift fitted to the scans of a hospital, with an untrained LoRA; the editor is the demo's."""
    options = {
        "base_model": str(BASE),
        "adapter": {"rank": 2},
        "drift": {"shape": "longitudinal"},
        "edit": {"name": "drift"},
    }
    study, modality = from_mapping(StudyConfig, options), load_config(Modality, BRAIN)
    base = load_base(str(BASE))
    with (hospital / "scans.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    visits = [modality.parse_all(",".join(f"{name}={row[name]}" for name in modality.attributes)) for row in rows]
    scans = [read_scan(hospital / row["input"], modality, released=True) for row in rows]
    images = torch.stack([to_model(scan, base.resolution, modality.image)[0] for scan in scans])
    latents = torch.cat([base.encode(batch) for batch in images.split(16)])
    patients = [row["patient"] for row in rows]
    first = {name: float(values[AGE]) for name, values in zip(patients[::-1], visits[::-1], strict=True)}
    days = [round(365.25 * (float(values[AGE]) - first[name])) for name, values in zip(patients, visits, strict=True)]
    designs = [modality.design_vector(values) for values in visits]
    table = VisitTable.of(latents, designs, modality.numeric_columns, patients, days)
    numeric, shape = modality.numeric_columns, base.latent_shape
    drift = fit_tables([table], numeric, torch.zeros(shape[0]), shape)[0]
    state = inject(load_denoiser(str(BASE)), read_adapter(study.adapter), study.seed).state()
    return write_release(folder, study, modality, ReleaseContent(base_digest(str(BASE)), state, drift))
