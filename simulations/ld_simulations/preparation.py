"""The demo's hospitals and sites: written and indexed where that is not done yet."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import yaml

from ld_client.data.indexing import build_store
from ld_client.data.store import open_store
from ld_client.data.store_key import KEY_FILE, write_key
from ld_client.site_config import SiteConfig, load_site
from ld_common.core.atomic_files import write_bytes
from ld_common.core.errors import StoreError
from ld_common.core.seeding import numpy_generator
from ld_common.diffusion.base_model import base_digest
from ld_common.diffusion.options import SHAPES
from ld_simulations.demo import Demo
from ld_simulations.hospitals import Progress, write_hospitals
from ld_simulations.hospitals_config import HospitalConfig
from ld_simulations.side_by_side import side_by_side

POLICY = {
    "min_patients": 1,
    "min_batch_size": 1,
    "min_visits": 1,
    "count_step": 1,
    "drift_step": 0.0,
    "drift": list(SHAPES),
}
"""Of simulated hospitals, whose patients need no protection: small demos must run."""


def prepare_sites(demo: Demo, progress: Progress = lambda *_: None) -> Path:
    """Write the hospitals and index each, where that is not done yet; returns the folder of site configs.

    Raises:
        LdError: `output` cannot be written, or a hospital cannot be indexed.
    """
    if not Path(demo.hospitals.output).exists():
        shutil.rmtree(demo.output / "stores", ignore_errors=True)
        write_hospitals(demo.hospitals, progress)
    digest = base_digest(demo.study.base_model)
    missing = []
    for hospital in demo.hospitals.hospitals:
        file = demo.sites / f"{hospital.name}.yaml"
        text = f"# ld-client index --config {file}\n"
        content = text + yaml.safe_dump(site_config(demo, hospital), sort_keys=False)
        write_bytes(file, content.encode())
        site = load_site(file)
        try:
            open_store(site.store_path, base_digest=digest, modality_digest=demo.modality.digest())
        except StoreError:
            if not (site.store_path / KEY_FILE).exists():
                # training draws visits in the order of their pseudonyms: one seed, one key, the same draws
                write_key(site.store_path, numpy_generator(demo.hospitals.seed, "key", hospital.name).bytes(32))
            missing.append(site)
    for number, _ in enumerate(side_by_side(_index, missing), start=1):
        progress("index of a hospital", number, len(missing))
    return demo.sites


def _index(site: SiteConfig) -> None:
    build_store(site)


def site_config(demo: Demo, hospital: HospitalConfig) -> dict[str, Any]:
    """A hospital's site config, as its data manager would write it."""
    folder, table = Path(demo.hospitals.output) / hospital.name, hospital.table
    columns = {"patient": table.patient, "date": table.date}
    attributes = {"age": table.age, "sex": table.sex, "diagnosis": table.diagnosis}
    labels = {"sex": table.sex_labels, "diagnosis": table.diagnosis_labels}
    base = Path(demo.study.base_model)
    config = {
        "site": hospital.name,
        "modality": str(demo.modality_file.resolve()),
        "base_model": str(base.resolve()) if base.exists() else demo.study.base_model,
        "store": str(demo.output / "stores" / hospital.name),
        "data": {
            "root": str(folder / "dicom"),
            "table": str(folder / "visits.csv"),
            "columns": {**columns, "attributes": attributes},
            "burned_in_text_checked": ["*"],  # rendered without text: a search would take most of the demo's time
            "values": {name: {label: value for value, label in known.items()} for name, known in labels.items()},
        },
        "policy": POLICY,
    }
    # the key only where it is set, so that a demo without it has the site config that it always had
    return config | ({"held_out": demo.config.held_out} if demo.config.held_out else {})
