"""Small trees of public layouts: tables as their data sets have them, and scans that may stay empty."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path

FRONTAL = "view1_frontal"
CHEXPERT_HEAD = ("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", "No Finding", "Cardiomegaly")


def put(root: Path, files: dict[str, str]) -> Path:
    """Write files by their path; a scan's content does not matter to most importers."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def lines(*rows: Sequence[object], separator: str = ",") -> str:
    """A table's text."""
    return "".join(separator.join(map(str, row)) + "\n" for row in rows)


def bids_scan(patient: str, session: str = "", run: str = "") -> str:
    """Path of a scan in BIDS."""
    folder = f"sub-{patient}/" + f"ses-{session}/" * bool(session)
    return f"{folder}anat/sub-{patient}" + f"_ses-{session}" * bool(session) + f"_run-{run}" * bool(run) + "_T1w.nii.gz"


def bids_tree(root: Path) -> Path:
    """Two participants of two sessions each, with dates of scans."""
    files = {bids_scan(patient, session): "" for patient in ("01", "02") for session in ("1", "2")}
    people = [("participant_id", "age", "sex", "group"), ("sub-01", "70.5", "F", "HC"), ("sub-02", "n/a", "M", "2")]
    files["participants.tsv"] = lines(*people, separator="\t")
    files["participants.json"] = '{"group": {"Levels": {"2": "Alzheimer\'s disease"}}}'
    files["sub-02/sub-02_sessions.tsv"] = lines(
        ("session_id", "age", "acq_time"), ("ses-1", "61", "n/a"), ("ses-2", "63", "1902-01-01"), separator="\t"
    )
    for patient, session, date in (("01", "1", "1900-01-01"), ("01", "2", "1902-07-01"), ("02", "1", "1900-01-01")):
        name = f"anat/{Path(bids_scan(patient, session)).name}"
        table = lines(("filename", "acq_time"), (name, f"{date}T09:30:00"), separator="\t")
        files[f"sub-{patient}/ses-{session}/sub-{patient}_ses-{session}_scans.tsv"] = table
    return put(root, files)


def oasis3_scan(patient: str, day: int, kind: str = "T1w") -> str:
    """Path of a scan of OASIS-3 below its folder of scans."""
    return f"{patient}_MR_d{day:04}/anat2/NIFTI/sub-{patient}_ses-d{day:04}_{kind}.nii.gz"


def oasis3_tree(root: Path, *scans: tuple[str, int], dx: str = "Cognitively normal") -> Path:
    """Scans (patient, day) of OASIS-3 in `scans/`, and tables with two visits of OAS30001 and of OAS30002."""
    names = {f"scans/{oasis3_scan(who, day, kind)}": "" for who, day in scans for kind in ("T1w", "T2w")}
    demographics = lines(("OASISID", "AgeatEntry", "GENDER"), ("OAS30001", 65.15, 2), ("OAS30002", 70, 1))
    head = ("OASISID", "OASIS_session_label", "days_to_visit", "age at visit", "CDRTOT", "dx1", "mmse")
    clinical = lines(
        head,
        ("OAS30001", "x", 0, 65.15, 0, dx, 28),
        ("OAS30001", "x", 722, 67.13, 0, dx, 27),
        ("OAS30002", "x", 400, 71.1, 0.5, "AD Dementia", 20),
        ("OAS30002", "x", 500, 71.4, 0.5, ".", 20),
    )
    return put(root, {**names, "OASIS3_demographics.csv": demographics, "OASIS3_UDSb4_cdr.csv": clinical})


def adni_tree(root: Path, *scans: str) -> Path:
    """Series of ADNI as paths below the subject, and ADNIMERGE of one subject beside the tree."""
    names = {f"ADNI/011_S_0002/{scan}": "" for scan in scans}
    head = ("RID", "PTID", "VISCODE", "EXAMDATE", "DX_bl", "AGE", "PTGENDER", "DX")
    table = lines(
        head,
        (2, "011_S_0002", "bl", "2005-09-08", "CN", 74.3, "Male", "CN"),
        (2, "011_S_0002", "m06", "2006-03-06", "CN", 74.3, "Male", ""),
        (2, "011_S_0002", "m48", "2009-09-10", "CN", 74.3, "Male", "MCI to Dementia"),
    )
    return put(root, {**names, "ADNIMERGE_01Jan2024.csv": table})


def chexpert_image(patient: int, study: int, view: str) -> str:
    """Path of an image of CheXpert."""
    return f"CheXpert-v1.0-small/train/patient{patient:05}/study{study}/{view}.jpg"


def chexpert_tree(root: Path, *rows: tuple[object, ...]) -> Path:
    """Images and train.csv, a row each of patient, study, view and the other columns."""
    paths = [chexpert_image(*row[:3]) for row in rows]  # type: ignore[arg-type]
    table = lines(CHEXPERT_HEAD, *[(path, *row[3:]) for path, row in zip(paths, rows, strict=True)])
    return put(root, {**dict.fromkeys(paths, ""), "CheXpert-v1.0-small/train.csv": table})


def mimic_cxr_image(patient: int, study: int, name: str) -> str:
    """Path of an image of MIMIC-CXR."""
    return f"files/p{str(patient)[:2]}/p{patient}/s{study}/{name}.jpg"


def mimic_cxr_tree(root: Path, *images: tuple[int, int, str, str, int, float]) -> Path:
    """Images by subject, study, name, view, date and time, with the three tables, one of them compressed."""
    files = {mimic_cxr_image(who, study, name): "" for who, study, name, *_ in images}
    rows = [(name, who, study, view, date, time) for who, study, name, view, date, time in images]
    metadata = lines(("dicom_id", "subject_id", "study_id", "ViewPosition", "StudyDate", "StudyTime"), *rows)
    studies = sorted({(who, study) for who, study, *_ in images})
    labels = [(who, study, "1.0", "") if study % 2 else (who, study, "", "1.0") for who, study in studies]
    patients = lines(
        ("subject_id", "gender", "anchor_age", "anchor_year", "anchor_year_group", "dod"),
        (10000032, "F", 52, 2180, "2014 - 2016", ""),
        (10000048, "M", 91, 2120, "2014 - 2016", ""),
        (10000999, "M", 60, 2120, "2014 - 2016", ""),
    )
    put(root, {**files, "mimic-cxr-2.0.0-metadata.csv": metadata, "patients.csv": patients})
    table = lines(("subject_id", "study_id", "No Finding", "Cardiomegaly"), *labels)
    (root / "mimic-cxr-2.0.0-chexpert.csv.gz").write_bytes(gzip.compress(table.encode()))
    return root
