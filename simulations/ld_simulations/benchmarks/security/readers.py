"""The product's own readers of files that others make, by kind of file and ending."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ld_client.data.table_reading import read_table
from ld_client.data_config import ColumnsConfig, DataConfig
from ld_client.deployment.audit_log import read_log
from ld_client.deployment.audit_verify import LogOwner, verify_log
from ld_client.deployment.bundle import read_bundle
from ld_client.site_config import load_site
from ld_common.adapters.state_dict import read_tensors
from ld_common.core.config import load_config
from ld_common.core.errors import DeploymentError, LdError, ReleaseError
from ld_common.core.strict_json import read_limited
from ld_common.imaging.dicom import read_headers
from ld_common.imaging.modality import AttributeConfig, Modality
from ld_common.imaging.scan_reader import decode_scan
from ld_common.imaging.scan_table import read_scan_table
from ld_common.imaging.volume import decode_volume
from ld_common.protocol.enrollment_kit import FILES as KIT_FILES
from ld_common.protocol.enrollment_kit import check_manifest
from ld_common.protocol.kit_archive import MAX_BYTES, read_kit
from ld_common.protocol.study_config import StudyConfig, study_from_json
from ld_common.release.encryption import read_envelope
from ld_common.release.release import read_release
from ld_common.release.signature import read_signature
from ld_common.release.trusted_keys import read_trust
from ld_generate.batch_table import read_rows
from ld_generate.web.scans import one_scan

MODALITY = Modality(
    prompt_template="axial brain MRI, {sex}, {age} years",
    attributes={
        "age": AttributeConfig(minimum=18, maximum=100),
        "sex": AttributeConfig(categories={"F": "female", "M": "male"}),
    },
)
KEY = Ed25519PrivateKey.from_private_bytes(bytes(31) + b"\1")
Reader = Callable[[Path], Any]


def _images(path: Path) -> None:
    decode_scan(path, MODALITY)


def _dicom(path: Path) -> None:
    with contextlib.suppress(LdError):
        read_headers(path, MODALITY.dicom_modalities)
    decode_scan(path, MODALITY)


def _nifti(path: Path) -> None:
    with contextlib.suppress(LdError):
        decode_scan(path, MODALITY)
    decode_volume(path, MODALITY)


def _as_in_a_kit(path: Path) -> bytes:
    """A file's bytes; it comes in a kit, which holds no larger ones."""
    if path.stat().st_size > MAX_BYTES:
        raise DeploymentError("larger than a kit")
    return path.read_bytes()


def _bundle(path: Path) -> None:
    read_bundle(_as_in_a_kit(path))


def _scans(path: Path) -> None:
    one_scan([path], path.parent)


def _site_table(path: Path) -> None:
    columns = ColumnsConfig("patient", "date", "file", {"age": "age", "sex": "sex"})
    read_table(DataConfig(root=str(path.parent), table=str(path), columns=columns))


def _batch(path: Path) -> None:
    read_rows(path)


def _scan_table(path: Path) -> None:
    read_scan_table(path, MODALITY, 32)


def _kit_manifest(path: Path) -> None:
    check_manifest(_as_in_a_kit(path), "", dict.fromkeys(KIT_FILES, b""))


def _release(path: Path) -> None:
    read_release(path.parent)


def _signature(path: Path) -> None:
    read_signature(path.parent)


def _envelope(path: Path) -> None:
    try:
        read_envelope(read_limited(path))
    except ValueError as error:
        raise ReleaseError(str(error)) from error


def _trust(path: Path) -> None:
    read_trust(str(path))


def _study_message(path: Path) -> None:
    with path.open(encoding="utf-8", errors="replace") as stream:
        study_from_json(stream.read(2**24))  # as large as a message may be


def _audit_log(path: Path) -> None:
    verify_log(*read_log(path), LogOwner(KEY.public_key(), "aster", "brain"))


def _study(path: Path) -> None:
    load_config(StudyConfig, path)


def _modality(path: Path) -> None:
    load_config(Modality, path)


def _site(path: Path) -> None:
    load_site(path)


READERS: dict[str, Reader] = {
    "scan.dcm": _dicom,
    "scan.nii": _nifti,
    "scan.nii.gz": _nifti,
    "scan.png": _images,
    "adapter.safetensors": read_tensors,
    "site.ldkit": read_kit,
    "bundle.fab": _bundle,
    "scans.zip": _scans,
    "visits.csv": _site_table,
    "visits.tsv": _site_table,
    "batch.csv": _batch,
    "scans.csv": _scan_table,
    "kit.json": _kit_manifest,
    "manifest.json": _release,
    "manifest.sig": _signature,
    "sealed.json": _envelope,
    "trust.json": _trust,
    "study.json": _study_message,
    "audit.log": _audit_log,
    "study.yaml": _study,
    "modality.yaml": _modality,
    "site.yaml": _site,
}
"""By the name under which a file of the corpus is written."""
KINDS: dict[str, tuple[str, ...]] = {
    "dicom": ("scan.dcm",),
    "nifti": ("scan.nii", "scan.nii.gz"),
    "png": ("scan.png",),
    "safetensors": ("adapter.safetensors",),
    "archive": ("site.ldkit", "bundle.fab", "scans.zip"),
    "table": ("visits.csv", "visits.tsv", "batch.csv", "scans.csv"),
    "manifest": ("kit.json", "manifest.json", "manifest.sig", "sealed.json", "trust.json", "study.json", "audit.log"),
    "config": ("study.yaml", "modality.yaml", "site.yaml"),
}
