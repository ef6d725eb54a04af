"""Gives a file of each format to the index, and notes what it reads and the sentence for what it does not.

All samples of a modality are one site: a table names each file, and the reading is that of `ld-client index`, without
encoding.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ld_client.data.pseudonyms import pseudonym
from ld_common.core.config import load_config
from ld_common.imaging.modality import Modality
from ld_simulations.benchmarks.scans.cases import read_site, scan_of
from ld_simulations.benchmarks.scans.dicom_samples import dicom_samples
from ld_simulations.benchmarks.scans.image_samples import image_samples
from ld_simulations.benchmarks.scans.samples import BRAIN, CHEST, FormatSample, Written
from ld_simulations.benchmarks.scans.syntax_samples import syntax_samples
from ld_simulations.benchmarks.scans.table_samples import table_samples, try_table

HEALTHY = "CN"
WRONG = "WRONG"
"""Begins what is said of a file that is read with other pixels than it has."""


def try_formats(project: Path) -> dict[str, Any]:
    """One entry for each transfer syntax, format and form of table.

    Returns:
        `decoders`: versions of the installed packages that decode pixels; `entries`: of each one `group`, `name`,
        `detail` (UID or ending), `read`, `said` (the sentence for what is not read, or a setting that
        reading needs) and, for images that are read, `difference`: the largest one from the true pixels, None where
        those are not known.
    """
    samples = [*syntax_samples(), *dicom_samples(), *image_samples()]
    results = []
    for modality in (BRAIN, CHEST):
        results += _try_all([sample for sample in samples if sample.modality == modality], modality, project)
    order = {id(sample): number for number, sample in enumerate(samples)}
    ordered = [result for _, result in sorted(results, key=lambda entry: order[id(entry[0])])]
    brain = load_config(Modality, project / f"configs/modalities/{BRAIN}.yaml")
    for table in table_samples():
        with tempfile.TemporaryDirectory() as folder:
            ordered.append(try_table(table, Path(folder), brain))
    return {"decoders": _installed_decoders(), "entries": ordered}


def _try_all(
    samples: Sequence[FormatSample], modality: str, project: Path
) -> list[tuple[FormatSample, dict[str, Any]]]:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        written: dict[str, Written | None] = {}
        for number, sample in enumerate(samples):
            patient = f"S{number:03}"
            (folder / "scans" / patient).mkdir(parents=True)
            written[patient] = sample.write(folder / "scans" / patient)
        read = read_site(_site(folder, written, modality, project))
        visits = {visit.pseudonym: visit for visit in read.visits}
        results = []
        for (patient, sample_on_disk), sample in zip(written.items(), samples, strict=True):
            entry: dict[str, Any] = {"group": sample.group, "name": sample.name, "detail": sample.detail}
            visit = visits.get(pseudonym(bytes(32), patient))
            reasons = [one for one in read.exclusions if one.name.split("/")[0] == patient]
            if sample_on_disk is not None:
                of_file = [one for one in reasons if one.name == f"{patient}/{sample_on_disk.file}"]
                reasons = of_file or reasons
            said = "; ".join(dict.fromkeys(f"{one.reason.value}: {one.detail}" for one in reasons))
            if sample_on_disk is None:
                entry |= {"read": None, "said": "not tried: no file in this syntax can be had here"}
            elif visit is None:
                entry |= {"read": False, "said": said or f"{WRONG}: neither read nor refused"}
            else:
                entry |= {"read": True, **_judged(scan_of(visit).pixels, sample_on_disk.truth)}
            results.append((sample, entry))
        return results


def _judged(pixels: np.ndarray, truth: np.ndarray | None) -> dict[str, Any]:
    if truth is None:
        return {"said": "", "difference": None}
    if pixels.shape != truth.shape:
        return {"said": f"{WRONG}: {pixels.shape} pixels, not {truth.shape}", "difference": None}
    difference = float(np.abs(pixels - truth).max())
    lossy = 0.05 * float(np.ptp(truth))
    said = f"{WRONG}: pixels differ by up to {difference:g}" if difference > lossy else ""
    return {"said": said, "difference": difference}


def _site(folder: Path, written: dict[str, Written | None], modality: str, project: Path) -> Path:
    rows = [
        (patient, "2020-01-01", f"{patient}/{one.file}".rstrip("/"), 70, "F", HEALTHY)
        for patient, one in written.items()
        if one is not None
    ]
    lines = [("patient", "date", "file", "age", "sex", "diagnosis"), *rows]
    text = "".join(",".join(map(str, line)) + "\n" for line in lines)
    (folder / "visits.csv").write_text(text, encoding="utf-8")
    attributes = {name: name for name in ("age", "sex", "diagnosis")}
    data = {"root": "scans", "table": "visits.csv", "columns": {"file": "file", "attributes": attributes}}
    site = {
        "site": "formats",
        "modality": str(project.resolve() / f"configs/modalities/{modality}.yaml"),
        "base_model": "none",
        "store": "store",
        "data": data,
    }
    (folder / "site.yaml").write_text(yaml.safe_dump(site), encoding="utf-8")
    return folder / "site.yaml"


def _installed_decoders() -> dict[str, str]:
    """Version of each package that decodes pixels, of those that are installed."""
    found = {}
    for name in ("pydicom", "pylibjpeg-openjpeg", "pylibjpeg-libjpeg", "pyjpegls", "python-gdcm"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
