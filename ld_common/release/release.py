"""A release: adapter, manifest and card in one folder, all that a counterfactual needs beside the base model."""

from __future__ import annotations

import contextlib
import json
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ld_common.adapters.base import inject
from ld_common.adapters.registry import read_adapter
from ld_common.adapters.state_dict import check_state, read_tensors, write_tensors
from ld_common.core.atomic_files import file_digest, write_bytes
from ld_common.core.config import from_mapping, to_mapping
from ld_common.core.errors import AdapterError, ConfigError, ModelError, ReleaseError
from ld_common.core.state import State
from ld_common.diffusion.base_model import BaseModel, base_digest, load_base
from ld_common.diffusion.drift import ConditionalDrift, LatentDrift, entering
from ld_common.editing.base import Editor
from ld_common.editing.registry import editor_options, read_editor
from ld_common.imaging.modality import Modality
from ld_common.protocol.dp_accounting import epsilon_rdp
from ld_common.protocol.site_name import check_site_name
from ld_common.protocol.study_config import StudyConfig
from ld_common.release.model_card import release_card

ADAPTER, MANIFEST, CARD = "adapter.safetensors", "manifest.json", "README.md"
SEALED = "adapter.sealed"
"""Stands in place of the adapter where a release is encrypted (`ld_common.release.encryption`)."""
FORMAT = 1
LIBRARIES = ("torch", "diffusers", "peft", "opacus", "flwr", "safetensors")


@dataclass(frozen=True)
class Release:
    """A release as it was read: checked against its own hashes."""

    study: StudyConfig
    modality: Modality
    base_name: str
    base_digest: str
    state: State
    drift: LatentDrift | ConditionalDrift | None
    """The sites' mean drift, or None."""
    site_drifts: dict[str, LatentDrift | ConditionalDrift]
    manifest: dict[str, Any]
    signed_by: str | None = None
    """Fingerprint of the trusted key that signed it, where `trusted_keys` checked that."""

    @property
    def adapter_sha256(self) -> str:
        """SHA-256 of the file of the adapter's weights."""
        return str(self.manifest["files"][ADAPTER])


def write_release(
    folder: Path,
    study: StudyConfig,
    modality: Modality,
    digest: str,
    state: State,
    drift: Tensor | None,
    site_drifts: dict[str, Tensor],
    rounds: list[dict[str, Any]],
) -> Path:
    """Write a release folder; the manifest comes last, so a folder with one is whole."""
    write_tensors(folder / ADAPTER, state, {"format": "pt"})
    manifest = {
        "format": FORMAT,
        "study": {key: value for key, value in to_mapping(study).items() if key != "output"}
        | {"edit": editor_options(read_editor(study.edit))},
        "study_digest": study.digest(),
        "modality": to_mapping(modality),
        "base_model": {"name": study.base_model, "sha256": digest},
        "privacy": privacy_statement(study),
        "drift": {"mean": _listed(drift), "sites": {name: _listed(site_drifts[name]) for name in sorted(site_drifts)}},
        "rounds": rounds,
        "tensors": {name: {"shape": list(value.shape), "dtype": "float32"} for name, value in state.items()},
        "software": software(),
    }
    write_manifest(folder, manifest)
    return folder


def read_release(folder: Path) -> Release:
    """Read and check a release folder against its own hashes; who signed it is `release_signature`'s to say.

    Raises:
        ReleaseError: absent, of an unknown format, or a file that is not the one the manifest names.
    """
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    try:
        state, _ = read_tensors(folder / ADAPTER)
        study, drift = from_mapping(StudyConfig, manifest["study"]), manifest["drift"]
        for name in drift["sites"]:
            check_site_name(name)
        return Release(
            study=study,
            modality=from_mapping(Modality, manifest["modality"]),
            base_name=str(manifest["base_model"]["name"]),
            base_digest=str(manifest["base_model"]["sha256"]),
            state=state,
            drift=None if drift["mean"] is None else entering(torch.tensor(drift["mean"]), study.drift.formulation),
            site_drifts={
                name: entering(torch.tensor(values), study.drift.formulation) for name, values in drift["sites"].items()
            },
            manifest=manifest,
        )
    except (OSError, KeyError, TypeError, ValueError, AttributeError, AdapterError, ConfigError) as error:
        raise ReleaseError(f"'{folder}' is not a whole release ({error}): copy it again") from error


def read_manifest(folder: Path) -> dict[str, Any]:
    """A release's manifest; raises `ReleaseError` when there is none of this format."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except OSError as error:
        raise ReleaseError(f"'{folder}' holds no release: give the folder with {MANIFEST} in it") from error
    except (ValueError, RecursionError) as error:
        raise ReleaseError(f"'{folder / MANIFEST}' is not JSON: copy the release again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ReleaseError(f"'{folder}' is no release of format {FORMAT}: use the software that wrote it")
    return manifest


def check_files(folder: Path, manifest: dict[str, Any]) -> None:
    """Refuse a folder whose files are not those of its manifest; raises `ReleaseError`."""
    if (folder / SEALED).exists() and not (folder / ADAPTER).exists():
        raise ReleaseError(f"'{folder}' is encrypted to named sites: each opens it with ld-client pull")
    try:
        for name, expected in {ADAPTER: "", **manifest["files"]}.items():
            if file_digest(folder / Path(name).name) != expected:
                raise ReleaseError(f"'{folder / name}' is not the file that was released: copy the release again")
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ReleaseError(f"'{folder}' is not a whole release ({error}): copy it again") from error


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write card and manifest of a folder that has its adapter; the manifest comes last, with their hashes.

    Raises:
        ReleaseError: the manifest lacks what a card says, because other software wrote it.
    """
    try:
        card = release_card(manifest, file_digest(folder / ADAPTER))
    except KeyError as error:
        raise ReleaseError(f"the manifest says nothing of {error}: it was written by another version") from error
    write_bytes(folder / CARD, card.encode())
    manifest["files"] = {name: file_digest(folder / name) for name in (ADAPTER, CARD)}
    write_bytes(folder / MANIFEST, (json.dumps(manifest, indent=2, sort_keys=True) + "\n").encode())


def load_release_base(
    release: Release, base_name: str | None = None, device: str = "cpu", precision: str = "float32"
) -> BaseModel:
    """The base of a release with the release's adapter in it; device and precision as for `load_base`.

    Raises:
        ReleaseError: the base is not the one that the release was trained on.
        ModelError: the base cannot be loaded, or not on this device.
    """
    name = base_name or release.base_name
    try:
        digest = base_digest(name)
    except ModelError as error:
        raise ReleaseError(f"{error}; name the base of this release with --base") from error
    if digest != release.base_digest:
        raise ReleaseError(
            f"base model '{name}' is not the one of this release (sha256 {release.base_digest[:12]}...): "
            "name the right one with --base"
        )
    adapted = inject(load_base(name, device, precision), read_adapter(release.study.adapter), release.study.seed)
    try:
        check_state(release.state, adapted.state())
    except AdapterError as error:
        raise ReleaseError(f"the release's adapter does not fit its base: {error}") from error
    adapted.load(release.state)
    for parameter in adapted.parameters.values():
        parameter.requires_grad_(False)
    return adapted.model


def edit_drift(release: Release) -> LatentDrift | None:
    """The drift that edits are drawn under; a conditional one only says where sampling from noise starts."""
    return release.drift if isinstance(release.drift, LatentDrift) else None


def release_editor(release: Release) -> Editor:
    """The editor that the release recommends; raises `ConfigError` where it is not installed here."""
    return read_editor(release.study.edit)


def release_record(release: Release) -> dict[str, Any]:
    """Which release drew a picture, for the picture's record."""
    return {
        "study": release.study.name,
        "files": release.manifest["files"],
        "base": release.base_digest,
        "signed_by": release.signed_by,
    }


def privacy_statement(study: StudyConfig) -> dict[str, Any]:
    """What a study promises of patients' privacy; there is no ε where none was kept."""
    if not study.privacy.enabled:
        return {"differential_privacy": False}
    planned, privacy = study.privacy_plan(), study.privacy
    return {
        "differential_privacy": True,
        "unit": "one patient of one site, with all visits; neighbouring data sets differ by that patient",
        "horizon": "all rounds of this study",
        "epsilon": planned.epsilon,
        "epsilon_by_renyi": epsilon_rdp(planned.charges, privacy.target_delta),
        "delta": privacy.target_delta,
        "accountant": "PRV (Opacus)",
        "noise_multiplier": planned.step.noise_multiplier,
        "sampling_rate": planned.step.sampling_rate,
        "sampling": "Poisson",
        "max_grad_norm": privacy.max_grad_norm,
        "steps": planned.step.steps,
        "drift_noise_multiplier": None if planned.drift is None else planned.drift.noise_multiplier,
    }


def software() -> dict[str, str]:
    """Versions of Python and of the libraries here that compute a release or a counterfactual."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):  # ld-generate alone needs neither flwr nor opacus
            versions[name] = version(name)
    return versions


def _listed(tensor: Tensor | None) -> list[Any] | None:
    return None if tensor is None else tensor.tolist()
