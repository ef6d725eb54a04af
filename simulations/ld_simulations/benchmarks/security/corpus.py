"""Whole files of every kind, which are then damaged: all small, and the same bytes on every run."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.sequence import Sequence as ItemSequence
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    MRImageStorage,
    RLELossless,
)
from safetensors.torch import save

from ld_client.deployment.audit_log import LogEntry, entry_hash, make_entry
from ld_common.core.config import from_mapping, to_mapping
from ld_common.diffusion.drift import LatentDrift
from ld_common.protocol.enrollment_kit import AUTHORITY, BUNDLE, MODALITY, STUDY, KitManifest
from ld_common.protocol.keys import public_line
from ld_common.protocol.kit_archive import write_kit
from ld_common.protocol.study_config import StudyConfig
from ld_common.release.release import ReleaseContent, write_release
from ld_common.release.signature import sign_release
from ld_simulations.benchmarks.security.readers import KEY
from ld_simulations.benchmarks.security.readers import MODALITY as BRAIN

SYNTAXES = (ExplicitVRLittleEndian, ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian)
COMPRESSED = (RLELossless, JPEG2000Lossless, JPEGLSLossless)
DIGEST = "0" * 64


def corpus() -> dict[str, list[bytes]]:
    """Files by the name that `readers.READERS` has."""
    release = release_files()
    study = to_mapping(from_mapping(StudyConfig, {"name": "brain"}))
    kit, kit_manifest = _kit()
    yaml = "name: brain\nfederation: {rounds: 3}\ntraining:\n  steps: 10\nadapter: {name: lora, rank: 4}\n"
    site = (
        "site: aster\nmodality: modality.yaml\nbase_model: base\nstore: store\npolicy: {min_patients: 20}\n"
        "data:\n  root: scans\n  table: visits.csv\n  values: {sex: {f: F}}\n  columns: {patient: who, date: seen}\n"
    )
    rows = "patient,date,file,age,sex\nP1,2020-01-02,a.nii,71,F\nP2,2021-03-04,,80.5,M\nP3,2021-03-05,b.png,,F\n"
    volumes = _nifti()
    return {
        "scan.dcm": _dicom(),
        "scan.nii": volumes,
        "scan.nii.gz": [gzip.compress(volume, 1, mtime=0) for volume in volumes],
        "scan.png": _png(),
        "adapter.safetensors": _safetensors(),
        "site.ldkit": [kit],
        "bundle.fab": [_zip(_bundle_files())],
        "scans.zip": [_zip({f"{number}.dcm": content for number, content in enumerate(_dicom())})],
        "visits.csv": [rows.encode(), ("﻿" + rows.replace(",", ";")).encode()],
        "visits.tsv": [rows.replace(",", "\t").encode()],
        "batch.csv": [b'input,target,source,slice\na.nii,"age=84;sex=M","age=74,sex=F",3\nb.dcm,age=80,,\n'],
        "scans.csv": [b"patient,input,age,sex\nP1,a.nii,71,F\nP2,b.png,80,M\n"],
        "kit.json": [kit_manifest],
        "manifest.json": [release["manifest.json"]],
        "manifest.sig": [release["manifest.sig"]],
        "sealed.json": [json.dumps({"format": 2, "recipients": {"aster": "QUJD"}, "sha256": {"a": DIGEST}}).encode()],
        "trust.json": [kit_manifest, public_line(KEY.public_key()).encode()],
        "study.json": [json.dumps(study).encode()],
        "audit.log": [_audit_log()],
        "study.yaml": [yaml.encode()],
        "modality.yaml": [json.dumps(to_mapping(BRAIN), indent=1).encode(), b"name: x\nprompt_template: x ray\n"],
        "site.yaml": [site.encode()],
    }


def release_files() -> dict[str, bytes]:
    """A signed release of a LoRA with one layer and a drift."""
    study = from_mapping(StudyConfig, {"name": "brain"})
    values = torch.linspace(-1, 1, 32).reshape(4, 8)
    state = {
        "down.to_q.lora_A.weight": values,
        "down.to_q.lora_B.weight": values.T.clone(memory_format=torch.contiguous_format),
    }
    content = ReleaseContent(DIGEST, state, LatentDrift(torch.full((4, 1, 1), 0.5)))
    with tempfile.TemporaryDirectory() as place:
        folder = write_release(Path(place) / "release", study, BRAIN, content)
        sign_release(folder, KEY)
        return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def _dicom() -> list[bytes]:
    files = [written(mr_slice(syntax)) for syntax in SYNTAXES]
    for syntax in COMPRESSED:
        dataset = mr_slice(ExplicitVRLittleEndian)
        dataset.compress(syntax, generate_instance_uid=False)
        files.append(written(dataset))
    return files


def written(dataset: Dataset) -> bytes:
    """A data set as the bytes of a file."""
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def mr_slice(syntax: UID) -> Dataset:
    """An axial slice of 64 x 48 pixels, without compression."""
    pixels = (np.arange(64 * 48, dtype=np.uint16).reshape(64, 48) * 37) % 4096
    dataset, item = Dataset(), Dataset()
    item.CodeValue, item.CodeMeaning = "T-A0100", "Brain"
    elements = {
        "SOPClassUID": MRImageStorage,
        "SOPInstanceUID": "1.2.3.4",
        "SeriesInstanceUID": "1.2.3",
        "StudyInstanceUID": "1.2",
        "ImageType": ["ORIGINAL", "PRIMARY"],
        "Modality": "MR",
        "PatientID": "P1",
        "PatientAge": "066Y",
        "PatientSex": "F",
        "StudyDate": "20200101",
        "SeriesNumber": 1,
        "PixelSpacing": [2.0, 2.0],
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "ImagePositionPatient": [0, 0, 0],
        "AnatomicRegionSequence": ItemSequence([item]),
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Rows": 64,
        "Columns": 48,
        "BitsAllocated": 16,
        "BitsStored": 12,
        "HighBit": 11,
        "PixelRepresentation": 0,
        "RescaleSlope": "1.5",
        "RescaleIntercept": "-10",
        "PixelPaddingValue": 0,
        "PixelData": pixels.tobytes(),
    }
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    return dataset


def _nifti() -> list[bytes]:
    kinds: tuple[tuple[Any, Any], ...] = ((nibabel.Nifti1Image, np.int16), (nibabel.Nifti2Image, np.float32))
    volumes = []
    for kind, dtype in kinds:
        volume = kind(np.arange(480, dtype=dtype).reshape(10, 8, 6), np.diag([-2.0, 2.0, 2.0, 1.0]))
        volume.header.set_xyzt_units("mm", "sec")
        volume.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"a protocol"))
        volumes.append(volume.to_bytes())
    return volumes


def _png() -> list[bytes]:
    pictures = []
    text = PngInfo()
    text.add_text("Comment", "a radiograph " * 20, zip=True)
    for dtype in (np.uint8, np.uint16):
        pixels = (np.arange(24 * 20, dtype=np.uint32).reshape(24, 20) * 97 % np.iinfo(dtype).max).astype(dtype)
        buffer = io.BytesIO()
        profile = zlib.compress(b"profile")
        Image.fromarray(pixels).save(buffer, format="PNG", pnginfo=text, icc_profile=profile, dpi=(72, 72))
        pictures.append(buffer.getvalue())
    return pictures


def _safetensors() -> list[bytes]:
    values = torch.arange(24, dtype=torch.float32)
    states = [
        {"a.lora_A.weight": values.reshape(4, 6), "a.lora_B.weight": values.reshape(6, 4).clone()},
        {"mean": values[:4].reshape(4, 1, 1).half(), "site.aster": values[:4].reshape(4, 1, 1).long()},
    ]
    return [save(states[0], {"lora_adapter_metadata": json.dumps({"unet.r": 4})}), save(states[1])]


def _zip(files: Mapping[str, bytes]) -> bytes:
    """An archive without times."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def _bundle_files() -> dict[str, bytes]:
    components = b'[tool.flwr.app.components]\nclientapp = "ld_client.client_app:app"\n'
    return {"pyproject.toml": components, "ld_common/__init__.py": b"", "ld_client/client_app.py": b"app = 1\n"}


def _kit() -> tuple[bytes, bytes]:
    """A kit, and its manifest alone."""
    manifest = KitManifest(
        study="brain",
        site="aster",
        server="localhost:9092",
        release_service="localhost:9093",
        study_digest=DIGEST,
        base_digest=DIGEST,
        modality_digest=DIGEST,
        public_key="",
        files={},
        software="0.1.0",
        packages=[],
        site_keys={},
    )
    files = {STUDY: b"name: brain\n", MODALITY: b"name: x\n", AUTHORITY: b"certificate", BUNDLE: b"PK"}
    with tempfile.TemporaryDirectory() as place:
        write_kit(Path(place) / "kit", manifest, files, KEY)
        with zipfile.ZipFile(Path(place) / "kit") as archive:
            content = {name: archive.read(name) for name in archive.namelist()}
    return _zip(content), content["kit.json"]


def _audit_log() -> bytes:
    entries: list[bytes] = []
    last: LogEntry | None = None
    for number in range(4):
        made = make_entry(last, "opened" if not number else "round", {"round": number, "salt": "00" * 16})
        content = dataclasses.asdict(made) | {"time": f"2026-01-01T00:00:0{number}+00:00"}
        del content["hash"]
        last = LogEntry(**content, hash=entry_hash(content))
        entries.append(last.line())
    return b"\n".join([*entries, b""])
