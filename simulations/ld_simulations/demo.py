"""The demo from nothing to a report: hospitals, index, federation, counterfactuals, tables, pictures."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ld_client.data.indexing import build_store
from ld_client.data.pseudonyms import KEY_FILE, write_key
from ld_client.data.store import open_store
from ld_client.site_config import load_site
from ld_common.core.config import load_config, require
from ld_common.core.errors import StoreError
from ld_common.core.seeding import numpy_generator
from ld_common.diffusion.base_model import base_digest
from ld_common.imaging.modality import Modality
from ld_common.protocol.study_config import StudyConfig, load_study
from ld_simulations.hospitals import HospitalsConfig, TableConfig, write_hospitals

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, what is done and the total."""


@dataclass
class DemoConfig:
    """A federation of demo hospitals on one machine."""

    output: str = "runs/demo"
    hospitals: str = "hospitals.yaml"
    """YAML of the hospitals, relative to the demo's file."""
    study: str = "demo_study.yaml"
    """YAML of the study, relative to the demo's file."""
    overrides: list[str] = field(default_factory=list)
    """key=value for the study, for example training.steps=20."""
    hospital_overrides: list[str] = field(default_factory=list)
    """key=value for the hospitals, for example patients=8."""
    cpus_per_site: int = 2
    """Processors that one site's training takes."""
    reuse: bool = False
    """Keep the hospitals, stores and release that an earlier run left in `output`."""

    def __post_init__(self) -> None:
        require(self.cpus_per_site > 0, f"cpus_per_site is {self.cpus_per_site}: it must be above 0")


@dataclass(frozen=True)
class Demo:
    """A demo's config with every file that it names read."""

    config: DemoConfig
    study: StudyConfig
    study_file: Path
    modality_file: Path
    hospitals: HospitalsConfig

    @property
    def output(self) -> Path:
        """Where everything of the demo lies."""
        return Path(self.config.output).resolve()

    @property
    def sites(self) -> Path:
        """Folder of the site configs."""
        return self.output / "sites"


def load_demo(path: Path, overrides: list[str] | None = None) -> Demo:
    """Read a demo's config and the files that it names; raises `ConfigError`."""
    config = load_config(DemoConfig, path, overrides or [])
    study_file = path.parent / config.study
    study, _ = load_study(study_file, [*config.overrides, f"output={Path(config.output).resolve() / 'study'}"])
    hospitals = load_config(
        HospitalsConfig,
        path.parent / config.hospitals,
        [*config.hospital_overrides, f"output={Path(config.output).resolve() / 'hospitals'}"],
    )
    return Demo(config, study, study_file, study_file.parent / study.modality, hospitals)


def prepare_sites(demo: Demo, progress: Progress = lambda *_: None) -> Path:
    """Write the hospitals and index each, where that is not done yet; returns the folder of site configs.

    Raises:
        LdError: `output` is not writable, or a hospital cannot be indexed.
    """
    hospitals = Path(demo.hospitals.output)
    if not hospitals.exists():
        shutil.rmtree(demo.output / "stores", ignore_errors=True)
        write_hospitals(demo.hospitals)
    demo.sites.mkdir(parents=True, exist_ok=True)
    for hospital in demo.hospitals.hospitals:
        file = demo.sites / f"{hospital.name}.yaml"
        text = f"# ld-client index --config {file}\n"
        file.write_text(text + yaml.safe_dump(site_config(demo, hospital.name, hospital.table), sort_keys=False))
        site = load_site(file)
        try:
            open_store(
                site.store_path,
                base_digest=base_digest(site.base_model),
                modality_digest=load_config(Modality, demo.modality_file).digest(),
            )
        except StoreError:
            if not (site.store_path / KEY_FILE).exists():
                # training draws visits in the order of their pseudonyms: one seed, one key, the same draws
                write_key(site.store_path, numpy_generator(demo.hospitals.seed, "key", hospital.name).bytes(32))
            build_store(site, functools.partial(_named, progress, hospital.name))
    return demo.sites


def _named(progress: Progress, site: str, stage: str, done: int, total: int) -> None:
    progress(f"{site}: {stage}", done, total)


def site_config(demo: Demo, name: str, table: TableConfig) -> dict[str, Any]:
    """A hospital's site config, as its data manager would write it."""
    folder = Path(demo.hospitals.output) / name
    columns = {"patient": table.patient, "date": table.date}
    attributes = {"age": table.age, "sex": table.sex, "diagnosis": table.diagnosis}
    base = Path(demo.study.base_model)
    words = {"sex": table.sex_words, "diagnosis": table.diagnosis_words}
    return {
        "site": name,
        "modality": str(demo.modality_file.resolve()),
        "base_model": str(base.resolve()) if base.exists() else demo.study.base_model,
        "store": str(demo.output / "stores" / name),
        "data": {
            "root": str(folder / "dicom"),
            "table": str(folder / "visits.csv"),
            "columns": {**columns, "attributes": attributes},
            "values": {name: {word: value for value, word in known.items()} for name, known in words.items()},
        },
        "policy": {"min_patients": 1},  # rendered patients: small demos must run
    }
