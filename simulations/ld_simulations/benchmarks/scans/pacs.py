"""Scans fetched from a real PACS, and synthetic images sent to it, over DICOMweb on loopback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from pydicom import dcmread

from ld_client.cli import app
from ld_client.data.store import open_store
from ld_common.imaging.dicomweb import PacsService
from ld_common.imaging.dicomweb_options import PacsOptions
from ld_common.imaging.secondary_capture import Provenance, write_synthetic_dicom
from ld_generate.cli import cli
from ld_simulations.benchmarks.scans.commands import run_command
from ld_simulations.benchmarks.scans.orthanc import PASSWORD, USER, orthanc_program, start_orthanc
from ld_simulations.benchmarks.scans.pictures import disc
from ld_simulations.benchmarks.scans.plan import ScansConfig
from ld_simulations.benchmarks.scans.trees import TreeSize, write_tree

SIZE = TreeSize(patients=2, visits=2, slices=5)
SENT = 2
"""Synthetic images."""


def try_pacs(config: ScansConfig, folder: Path) -> dict[str, Any] | None:
    """Fetch, index, send and retrieve; None where there is no Orthanc.

    Returns:
        counts and `problems`, which are empty for a whole round trip.
    """
    if orthanc_program() is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    problems: list[str] = []
    site = write_tree(folder / "site", SIZE, Path(config.project), Path(config.base_model), config.seed)
    password = folder / "password"
    password.write_text(PASSWORD)
    password.chmod(0o600)
    login = ["--user", USER, "--password-file", str(password)]
    with start_orthanc(folder / "orthanc") as orthanc:
        version = str(orthanc.ask("/system")["Version"])
        problems += _fetched(site, orthanc.url, orthanc.add, login)
        problems += _sent(folder / "synthetic", orthanc.url, login, PacsOptions(user=USER, password_file=password))
    return {
        "server": f"Orthanc {version}",
        "fetched": SIZE.files,
        "visits": SIZE.patients * SIZE.visits,
        "sent": SENT,
        "problems": problems,
    }


def _fetched(site: Path, url: str, add: Any, login: list[str]) -> list[str]:
    """What is wrong with the files that `ld-client fetch` brings and with the index of them."""
    originals = sorted((site.parent / "scans").rglob("*.dcm"))
    add(originals)
    command = ["fetch", "--config", str(site), "--pacs", url, *login, "--query", "ModalitiesInStudy=MR"]
    done = run_command(app, command)
    if done.code:
        return [f"ld-client fetch ended with {done.code}: {done.said}"]
    quarantine = site.parent / "store/quarantine"
    problems = []
    if _objects(originals) != _objects(sorted(quarantine.glob("*/*.dcm"))):
        problems.append("the fetched objects are not those of the PACS")
    done = run_command(app, ["index", "--config", str(site), f"data.root={quarantine}", "--json"])
    if done.code:
        return [*problems, f"ld-client index ended with {done.code}: {done.said}"]
    store = open_store(site.parent / "store")
    if (store.patients, len(store.days)) != (SIZE.patients, SIZE.patients * SIZE.visits):
        problems.append(f"{store.patients} patients and {len(store.days)} visits in the store")
    return problems


def _objects(files: list[Path]) -> dict[str, tuple[str, str, bytes]]:
    """SOP Instance UID -> patient, date and pixels."""
    read = (dcmread(file) for file in files)
    return {str(one.SOPInstanceUID): (str(one.PatientID), str(one.StudyDate), bytes(one.PixelData)) for one in read}


def _sent(folder: Path, url: str, login: list[str], options: PacsOptions) -> list[str]:
    """What is wrong with synthetic images that `ld-generate send` stored and that are retrieved again."""
    problems, written = [], []
    for number in range(SENT):
        path = folder / f"answer-{number}/age-80.dcm"
        path.parent.mkdir(parents=True)
        pixels = disc(100 + number).astype(np.float32)
        write_synthetic_dicom(path, pixels, (1.0, 1.0), "age 80", Provenance("m", "0" * 64, number, "benchmark"))
        written.append(dcmread(path))
    done = run_command(cli, ["send", str(folder), url, *login])
    if done.code:
        return [f"ld-generate send ended with {done.code}: {done.said}"]
    with PacsService(options.access(url)) as pacs:
        for image in written:
            copy = folder / "copy"
            uids = str(image.StudyInstanceUID), str(image.SeriesInstanceUID)
            copies = [dcmread(copy) for _ in pacs.retrieve(*uids, str(image.SOPInstanceUID), copy)]
            if copies != [image] or copies[0].get("SyntheticData") != "YES":
                problems.append("a synthetic image came back changed, or not at all")
    return problems
