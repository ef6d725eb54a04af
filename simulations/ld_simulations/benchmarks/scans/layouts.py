"""Imports a small tree of each layout as a data manager does, indexes it, and compares the store with what was planted.

Scans are pictures of one grey level each, so that a scan under another patient or day is seen.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ld_client.cli import app
from ld_client.data.pseudonyms import pseudonym
from ld_client.data.store import open_store
from ld_client.data.store_key import load_key
from ld_client.site_config import load_site
from ld_simulations.benchmarks.scans.cases import read_site, scan_of
from ld_simulations.benchmarks.scans.commands import run_command
from ld_simulations.benchmarks.scans.layout_trees import (
    FRONTAL,
    adni_tree,
    bids_scan,
    bids_tree,
    chexpert_image,
    chexpert_tree,
    lines,
    mimic_cxr_image,
    mimic_cxr_tree,
    oasis3_scan,
    oasis3_tree,
    put,
)
from ld_simulations.benchmarks.scans.pictures import disc, level_of, write_nifti, write_picture, write_series

FIRST_LEVEL, LEVEL_STEP, LEVEL_TOLERANCE = 100, 9, 4
LABELS = ("--label", "No Finding=CN", "--label", "Cardiomegaly=HF")
BRAIN, CHEST = "brain_mri", "chest_radiograph"


@dataclass(frozen=True)
class PlantedVisit:
    """A visit that must arrive."""

    patient: str
    day: int
    """Since the patient's first visit."""
    age: float
    sex: str
    diagnosis: str
    scan: str
    """Its file, or the folder of its series, relative to the layout's root."""

    @property
    def attributes(self) -> dict[str, object]:
        """As the store has them."""
        return {"age": self.age, "sex": self.sex, "diagnosis": self.diagnosis}


@dataclass(frozen=True)
class LayoutTrial:
    """A tree of one layout, how it is imported, and what must arrive."""

    layout: str
    form: str
    """What its scans are."""
    make: Callable[[Path], Path]
    """Writes the tree into a folder and returns its root."""
    planted: tuple[PlantedVisit, ...]
    options: tuple[str, ...] = ()
    modality: str = BRAIN
    table: str = ""
    """A table that no layout names, beside the root."""

    @property
    def name(self) -> str:
        """Name in the results."""
        return self.layout if self.layout != "tree" else f"tree ({self.form})"


@dataclass(frozen=True)
class LayoutOutcome:
    """What arrived of a trial."""

    command: str
    form: str
    planted: int
    visits: int
    left_out: int
    """Files and rows, each with its reason in `left_out.csv`."""
    problems: list[str] = field(default_factory=list)


def _bids(folder: Path) -> Path:
    return bids_tree(folder / "bids")


def _oasis3(folder: Path) -> Path:
    return oasis3_tree(folder, ("OAS30001", 129), ("OAS30001", 757), ("OAS30002", 371)) / "scans"


FIRST, LAST = "MP-RAGE/2005-08-26_12_00_00.0/I11", "MPRAGE/2009-09-01_08_00_00.0/I22"
VOLUME = f"{LAST}/ADNI_011_S_0002_MR_MPRAGE_br_raw_I22.nii"


def _adni(folder: Path) -> Path:
    root = adni_tree(folder, VOLUME, "FLAIR/2005-08-26_12_30_00.0/I12/a.nii") / "ADNI"
    header: dict[str, Any] = {
        "PatientID": "011_S_0002",
        "StudyDate": "20050826",
        "PatientSex": "M",
        "PatientAge": "074Y",
    }
    write_series(root / "011_S_0002" / FIRST, disc(FIRST_LEVEL), **header)
    return root


def _chexpert(folder: Path) -> Path:
    rows = [
        (1, 1, FRONTAL, "Female", 68, "Frontal", "AP", "1.0", ""),
        (2, 1, FRONTAL, "Male", 80, "Frontal", "PA", "", "1.0"),
        (2, 1, "view2_lateral", "Male", 80, "Lateral", "", "", "1.0"),
        (2, 2, FRONTAL, "Male", 81, "Frontal", "PA", "", "1.0"),
        (3, 1, FRONTAL, "Male", 70, "Frontal", "AP", "", "-1.0"),
    ]
    return chexpert_tree(folder / "data", *rows)


def _mimic_cxr(folder: Path) -> Path:
    return mimic_cxr_tree(
        folder / "data",
        (10000032, 1, "a", "PA", 21800506, 213014.5),
        (10000032, 1, "b", "LATERAL", 21800506, 213014.5),
        (10000032, 4, "c", "AP", 21820626, 80000.25),
        (10000999, 5, "d", "PA", 21210101, 80000.0),
    )


TREE_VISITS = (("A", "20200101", "F", "070Y"), ("A", "20220101", "F", "072Y"), ("B", "20200505", "M", "080Y"))


def _dicom_tree(folder: Path) -> Path:
    put(folder, {"people.csv": lines(("ptid", "diagnosis"), ("A", "CN"), ("B", "AD"))})
    for number, (patient, date, sex, age) in enumerate(TREE_VISITS):
        header: dict[str, Any] = {"PatientID": patient, "StudyDate": date, "PatientSex": sex, "PatientAge": age}
        level = FIRST_LEVEL + number * LEVEL_STEP
        write_series(folder / f"pacs/{number}/t1", disc(level), SeriesDescription="ax T1", **header)
        write_series(folder / f"pacs/{number}/t2", disc(20), SeriesDescription="ax T2", **header)
    return folder / "pacs"


def _nifti_tree(folder: Path) -> Path:
    people = lines(("patient", "age", "sex", "diagnosis"), ("A", "70.5", "w", "CN"), ("B", 80, "M", "AD"))
    put(folder, {"people.csv": people})
    names = [f"{patient}/{date[:4]}-{date[4:6]}-{date[6:]}/t1.nii.gz" for patient, date, *_ in TREE_VISITS]
    return put(folder / "scans", dict.fromkeys(names, ""))


TRIALS = (
    LayoutTrial(
        *("bids", "NIfTI", _bids),
        (
            PlantedVisit("sub-01", 0, 70.5, "F", "CN", bids_scan("01", "1")),
            PlantedVisit("sub-01", 911, 72.99, "F", "CN", bids_scan("01", "2")),
            PlantedVisit("sub-02", 0, 61.0, "M", "AD", bids_scan("02", "1")),
            PlantedVisit("sub-02", 730, 63.0, "M", "AD", bids_scan("02", "2")),
        ),
        ("--baseline-age",),
    ),
    LayoutTrial(
        *("oasis3", "NIfTI", _oasis3),
        (
            PlantedVisit("OAS30001", 0, 65.5, "F", "CN", oasis3_scan("OAS30001", 129)),
            PlantedVisit("OAS30001", 628, 67.22, "F", "CN", oasis3_scan("OAS30001", 757)),
            PlantedVisit("OAS30002", 0, 71.02, "M", "AD", oasis3_scan("OAS30002", 371)),
        ),
    ),
    LayoutTrial(
        *("adni", "DICOM and NIfTI", _adni),
        (
            PlantedVisit("011_S_0002", 0, 74.26, "M", "CN", f"011_S_0002/{FIRST}"),
            PlantedVisit("011_S_0002", 1467, 78.28, "M", "AD", f"011_S_0002/{VOLUME}"),
        ),
    ),
    LayoutTrial(
        *("chexpert", "JPEG", _chexpert),
        (
            PlantedVisit("patient00001", 0, 68.0, "F", "CN", chexpert_image(1, 1, FRONTAL)),
            PlantedVisit("patient00002", 0, 80.0, "M", "HF", chexpert_image(2, 1, FRONTAL)),
        ),
        ("--one-visit", "first", *LABELS),
        CHEST,
    ),
    LayoutTrial(
        *("mimic_cxr", "JPEG", _mimic_cxr),
        (
            PlantedVisit("10000032", 0, 52.0, "F", "CN", mimic_cxr_image(10000032, 1, "a")),
            PlantedVisit("10000032", 781, 54.0, "F", "HF", mimic_cxr_image(10000032, 4, "c")),
            PlantedVisit("10000999", 0, 61.0, "M", "CN", mimic_cxr_image(10000999, 5, "d")),
        ),
        LABELS,
        CHEST,
    ),
    LayoutTrial(
        *("tree", "DICOM", _dicom_tree),
        (
            PlantedVisit("A", 0, 70.0, "F", "CN", "0/t1"),
            PlantedVisit("A", 731, 72.0, "F", "CN", "1/t1"),
            PlantedVisit("B", 0, 80.0, "M", "AD", "2/t1"),
        ),
        ("--series", "*T1*"),
        table="people.csv",
    ),
    LayoutTrial(
        *("tree", "NIfTI", _nifti_tree),
        (
            PlantedVisit("A", 0, 70.5, "F", "CN", "A/2020-01-01/t1.nii.gz"),
            PlantedVisit("A", 731, 72.5, "F", "CN", "A/2022-01-01/t1.nii.gz"),
            PlantedVisit("B", 0, 80.0, "M", "AD", "B/2020-05-05/t1.nii.gz"),
        ),
        ("--pattern", "{patient}/{date}/*.nii.gz", "--map", "sex:w=F", "--baseline-age"),
        table="people.csv",
    ),
)


def try_layout(trial: LayoutTrial, folder: Path, project: Path, base_model: Path) -> dict[str, Any]:
    """Write the tree, import and index it, and compare; returns a `LayoutOutcome` as JSON holds it.

    Args:
        trial: the layout.
        folder: an empty folder.
        project: the repository.
        base_model: folder of the base model.
    """
    root = trial.make(folder)
    levels = _fill(root, trial.planted)
    options = [*trial.options, *(("--table", str(folder / trial.table)) if trial.table else ())]
    out = folder / "imported"
    places = ["--out", str(out), "--base-model", str(base_model.resolve())]
    places += ["--modality", str(project.resolve() / f"configs/modalities/{trial.modality}.yaml")]
    imported = run_command(app, ["import", trial.layout, str(root), *places, *options, "--json"])
    shown = [f"--table {trial.table}"] if trial.table else []
    words = [f"'{word}'" if set(word) & set(" *{") else word for word in trial.options]
    command = " ".join(["ld-client import", trial.layout, "ROOT --out FOLDER", *words, *shown])
    if imported.code:
        problem = f"the import ended with {imported.code}: {imported.said}".replace(str(folder), "FOLDER")
        return asdict(LayoutOutcome(command, trial.form, len(trial.planted), 0, 0, [problem]))
    indexed = run_command(app, ["index", "--config", str(out / "site.yaml"), "--json"])
    problems = [f"the index ended with {indexed.code}: {indexed.said}"] if indexed.code else []
    visits = 0
    if not problems:
        visits, problems = _compare(out / "site.yaml", trial.planted, levels)
    with (out / "left_out.csv").open(encoding="utf-8") as stream:
        left_out = sum(1 for _ in stream) - 1
    planted = len(trial.planted)
    problems = [problem.replace(str(folder), "FOLDER") for problem in problems]
    outcome = LayoutOutcome(command, trial.form, planted, visits, left_out, problems)
    return asdict(outcome) | {"statements": json.loads(imported.out)["statements"]}


def _fill(root: Path, planted: tuple[PlantedVisit, ...]) -> dict[str, int]:
    """Write a picture into each empty scan; returns the level of each planted one's."""
    levels = {visit.scan: FIRST_LEVEL + number * LEVEL_STEP for number, visit in enumerate(planted)}
    for path in sorted(root.rglob("*")):
        if path.is_file() and not path.stat().st_size:
            picture = disc(levels.get(path.relative_to(root).as_posix(), 20))
            if path.name.endswith((".nii", ".nii.gz")):
                write_nifti(path, picture)
            elif path.suffix in (".jpg", ".png"):
                write_picture(path, picture)
    return levels


def _compare(site_yaml: Path, planted: tuple[PlantedVisit, ...], levels: Mapping[str, int]) -> tuple[int, list[str]]:
    """The number of visits in the store, and what of it differs from what was planted."""
    site, problems = load_site(site_yaml), []
    store, key = open_store(site.store_path), load_key(site.store_path, site.ledger_path)
    keys = [*zip(store.pseudonyms, store.days, strict=True)]
    stored = dict(zip(keys, store.attributes, strict=True))
    wanted = {(pseudonym(key, visit.patient), visit.day): visit for visit in planted}
    for place, visit in wanted.items():
        if stored.get(place) != visit.attributes:
            problems.append(f"{visit.patient}, day {visit.day}: {stored.get(place)}, not {visit.attributes}")
    problems += [f"a visit that nobody planted, day {day}" for who, day in keys if (who, day) not in wanted]
    for read in read_site(site_yaml).visits:  # by a key of zeros
        for visit in planted:
            if (pseudonym(bytes(32), visit.patient), visit.day) == (read.pseudonym, read.days_since_baseline):
                shown = level_of(scan_of(read).pixels)
                if abs(shown - levels[visit.scan]) > LEVEL_TOLERANCE:
                    problems.append(f"{visit.patient}, day {visit.day}: another scan than {visit.scan}")
    return len(keys), problems
