"""The release that a study begins with (`start`): its hash is part of the study, its privacy stands on the card."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ld_common.adapters.state_dict import state_digest
from ld_common.core.atomic_files import write_bytes
from ld_common.core.errors import ReleaseError
from ld_common.diffusion.longitudinal import LongitudinalDrift
from ld_common.protocol.study_config import StudyConfig
from ld_common.release.release import Release
from ld_common.release.signature import manifest_digest
from ld_common.release.trusted_keys import read_trusted_release

START = "start.json"


@dataclass(frozen=True)
class StudyStart:
    """What a study began with."""

    digest: str
    """Of the weights: the study's `start_digest`."""
    record: dict[str, Any]
    """For the release's manifest: name, hashes, privacy, and sites of both studies."""
    drift_digest: str = ""
    """Of the drift: the study's `start_drift_digest`."""

    def fill(self, study: StudyConfig) -> StudyConfig:
        """The study with its digests of the start."""
        return replace(study, start_digest=self.digest, start_drift_digest=self.drift_digest)


def kept_start(output: Path) -> StudyStart | None:
    """What the study in this folder began with; None where it began without a release."""
    file = output / START
    return StudyStart(**json.loads(file.read_text())) if file.exists() else None


def keep_start(output: Path, start: StudyStart | None) -> None:
    """Keep it for a resumed study, which no longer needs the release itself."""
    if start is None:
        (output / START).unlink(missing_ok=True)
    else:
        write_bytes(output / START, (json.dumps(asdict(start), indent=2) + "\n").encode())


def read_start(study: StudyConfig) -> tuple[StudyConfig, Release | None]:
    """The study with the digests of its start filled in, and the release that it begins with, or None.

    Raises:
        ReleaseError: the release has other weights or another drift than the digests say, would void the study's ε, or
            lacks the longitudinal drift that a private one is learned from.
        LdError: the release cannot be read.
    """
    if not study.start:
        return study, None
    start, _ = read_trusted_release(Path(study.start), allow_unsigned=True)  # often a simulation's
    digest = state_digest(start.state)
    if study.start_digest not in ("", digest):
        raise ReleaseError(
            f"start: the weights of '{study.start}' are not those of the study's start_digest: restore them, or make "
            "new kits with ld-server update"
        )
    check_start_privacy(start, study)
    drift_digest = _drift_digest(start, study)
    if study.start_digest and study.start_drift_digest not in ("", drift_digest):
        raise ReleaseError(
            f"start: the drift of '{study.start}' is not that of the study's start_drift_digest: restore it, or make "
            "new kits with ld-server update"
        )
    return replace(study, start_digest=digest, start_drift_digest=drift_digest), start


def _drift_digest(start: Release, study: StudyConfig) -> str:
    """SHA-256 of the start's drift, where a private longitudinal drift is learned in its basis, else empty."""
    if not (study.privacy.enabled and study.drift.shape == "longitudinal"):
        return ""
    if not isinstance(start.drift, LongitudinalDrift):
        raise ReleaseError(
            f"start: '{study.start}' has no longitudinal drift, and a private one is learned in the directions of "
            "public patients: begin with the release of a study of public data with drift.shape longitudinal"
        )
    return state_digest(start.drift.state())


def public_drift(start: Release | None) -> LongitudinalDrift | None:
    """The longitudinal drift of a study's start."""
    return start.drift if start is not None and isinstance(start.drift, LongitudinalDrift) else None


def check_start_privacy(start: Release, study: StudyConfig) -> None:
    """Refuse a private study that begins with weights which saw scans of its own sites without privacy.

    Raises:
        ReleaseError: the study's ε would be void.
    """
    if not study.privacy.enabled:
        return
    shared = sorted(set(start.study.federation.sites) & set(study.federation.sites))
    private = bool(start.manifest["privacy"]["differential_privacy"])
    if shared and not private:
        raise ReleaseError(
            f"start: '{study.start}' was trained without differential privacy at {', '.join(shared)}, so this study's "
            "ε would be void there: begin with a release of public data, or of other sites"
        )


def start_record(start: Release, study: StudyConfig) -> StudyStart:
    """What is kept of the release that a study begins with."""
    sites = start.study.federation.sites
    record = {
        "study": start.study.name,
        "manifest_sha256": manifest_digest(start.manifest).hex(),
        "weights_sha256": start.adapter_sha256,
        "privacy": start.manifest["privacy"],
        "sites_of_both": sorted(set(sites) & set(study.federation.sites)),
        "start": start.manifest.get("start"),
    }
    return StudyStart(state_digest(start.state), record, study.start_drift_digest)
