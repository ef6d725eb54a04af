"""Which studies and releases a patient was part of, as far as the site can know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ld_client.data.participation import Participation, read_participations
from ld_client.privacy.ledger import TRAINING, Ledger, by_study
from ld_client.site_config import SiteConfig

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class StudyPart:
    """One study that trained on one of some patients."""

    study: str
    study_digest: str
    patients: int
    """Of those asked about."""
    rounds: list[int]
    """Rounds that trained on one of them."""
    in_last_data: bool
    """Whether one of them is in the data of the study's latest round."""
    last_round: int
    """Last round of the study that trained here, on whomever."""
    planned_rounds: int
    steps: int
    """Training steps of a site in a round."""
    sites: list[str]
    drift: str
    """Shape of the study's drift."""
    epsilon: float | None
    """The study's target; None, like `delta`, without differential privacy."""
    delta: float | None
    releases: list[str]
    """Releases at this site that these rounds are part of, and those that began with one of them."""


@dataclass(frozen=True)
class UnrecordedRounds:
    """Rounds that the ledger holds without a record of the patients: an earlier version of this software trained them,
    or they were charged and never trained."""

    study: str
    study_digest: str
    rounds: list[int]


def studies_of(site: SiteConfig, pseudonyms: frozenset[str], releases: Sequence[Path]) -> list[StudyPart]:
    """The studies that trained on one of these patients, by name.

    Args:
        site: the site.
        pseudonyms: patients under the key of the site's store.
        releases: folders of releases at this site; what is no release is passed over.

    Raises:
        LdError: the ledger or a record of participation cannot be read.
    """
    recorded: dict[str, list[Participation]] = {}
    for record in read_participations(site.ledger_path):
        recorded.setdefault(record.study_digest, []).append(record)
    concerned = {
        digest: [record for record in records if not pseudonyms.isdisjoint(record.pseudonyms)]
        for digest, records in recorded.items()
    }
    rounds = {
        digest: {number for record in records for number in record.rounds} for digest, records in concerned.items()
    }
    containing = _containing(site.site, rounds, releases)
    charged = by_study(Ledger(site.ledger_path).entries())
    parts = []
    for digest, records in concerned.items():
        if not records:
            continue
        latest = max(recorded[digest], key=lambda record: record.rounds[-1])
        trained = [entry.round for entry in charged.get(digest, ()) if entry.purpose == TRAINING]
        parts.append(
            StudyPart(
                study=latest.study,
                study_digest=digest,
                patients=len(pseudonyms & {name for record in records for name in record.pseudonyms}),
                rounds=sorted(rounds[digest]),
                in_last_data=not pseudonyms.isdisjoint(latest.pseudonyms),
                last_round=max(latest.rounds[-1], *trained, 0),
                planned_rounds=latest.planned_rounds,
                steps=latest.steps,
                sites=latest.sites,
                drift=latest.drift,
                epsilon=latest.epsilon,
                delta=latest.delta,
                releases=containing[digest],
            )
        )
    return parts


def unrecorded_rounds(site: SiteConfig) -> list[UnrecordedRounds]:
    """Charged rounds without a record of their patients; raises `LdError`."""
    recorded: dict[str, set[int]] = {}
    for record in read_participations(site.ledger_path):
        recorded.setdefault(record.study_digest, set()).update(record.rounds)
    missing = []
    for digest, entries in by_study(Ledger(site.ledger_path).entries()).items():
        rounds = {entry.round for entry in entries if entry.purpose == TRAINING} - recorded.get(digest, set())
        if rounds:
            missing.append(UnrecordedRounds(entries[0].study, digest, sorted(rounds)))
    return missing


def part_lines(parts: Sequence[StudyPart], unrecorded: Sequence[UnrecordedRounds], patients: int = 1) -> list[str]:
    """Which studies and releases, as text; `patients` is the number of those asked about."""
    nobody = "this patient" if patients == 1 else "these patients"
    lines = [] if parts else [f"no round of a study is recorded that trained on {nobody}"]
    for part in parts:
        who = "" if patients == 1 else f"{part.patients} of {patients} patients were "
        privacy = "without differential privacy" if part.epsilon is None else f"ε {part.epsilon:g} at δ {part.delta:g}"
        place = f"study '{part.study}' ({part.study_digest[:16]}): {rounds_text(part.rounds)}, {privacy}"
        lines.append(f"{who}part of {place}")
        lines.append(
            f"  releases at this site: {', '.join(part.releases) or 'none; the server knows what it released'}"
        )
    return [*lines, *unrecorded_lines(unrecorded)]


def unrecorded_lines(unrecorded: Sequence[UnrecordedRounds]) -> list[str]:
    """The rounds whose patients are not known, as text."""
    return [
        f"not recorded: the patients of {rounds_text(entry.rounds)} of study '{entry.study}' "
        f"({entry.study_digest[:16]}); assume that whoever was in the store then was among them"
        for entry in unrecorded
    ]


def rounds_text(rounds: Sequence[int]) -> str:
    """`round 2`, `rounds 1 to 3` or `rounds 1, 3`."""
    if len(rounds) == 1:
        return f"round {rounds[0]}"
    if rounds[-1] - rounds[0] == len(rounds) - 1:
        return f"rounds {rounds[0]} to {rounds[-1]}"
    return f"rounds {', '.join(map(str, rounds))}"


def read_manifests(releases: Sequence[Path]) -> dict[Path, dict[str, Any]]:
    """The manifests of the folders that hold a release, by folder; nothing is verified."""
    folders = [folder for folder in releases if (folder / MANIFEST).is_file() and folder.suffix != ".part"]
    if not folders:
        return {}
    from ld_common.core.errors import ReleaseError
    from ld_common.release.release import read_manifest

    manifests = {}
    for folder in folders:
        try:
            manifests[folder] = read_manifest(folder)
        except ReleaseError:
            continue
    return manifests


def _containing(site: str, rounds: dict[str, set[int]], releases: Sequence[Path]) -> dict[str, list[str]]:
    """Study's digest -> names of the releases that hold a result of these rounds, or began with one that does."""
    manifests, names = read_manifests(releases), {digest: list[str]() for digest in rounds}
    weights: dict[str, str] = {}
    """Hash of the weights of a release -> the study whose rounds it holds."""
    for folder, manifest in manifests.items():
        digest = str(manifest.get("study_digest"))
        if any(
            record.get("counted") and site in record.get("sites", {}) and record.get("round") in rounds.get(digest, ())
            for record in manifest.get("rounds", [])
        ):
            names[digest].append(folder.name)
            weights[str(manifest.get("files", {}).get(manifest.get("weights")))] = digest
    for folder, manifest in manifests.items():
        for origin in {weights[digest] for digest in _starts(manifest) if digest in weights}:
            if folder.name not in names[origin]:
                names[origin].append(f"{folder.name}, which began with one of these")
    return names


def _starts(manifest: dict[str, Any]) -> list[str]:
    """Hashes of the weights of the releases that a release goes back to."""
    hashes, start = [], manifest.get("start")
    while isinstance(start, dict):
        hashes.append(str(start.get("weights_sha256")))
        start = start.get("start")
    return hashes
