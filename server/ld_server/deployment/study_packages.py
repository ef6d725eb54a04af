"""Packages of others that a deployed study uses: what provisioning lists in the kits, and what a run compares."""

from __future__ import annotations

import json
from importlib.metadata import distribution
from pathlib import Path

from ld_common.adapters.registry import ADAPTERS
from ld_common.core.atomic_files import write_bytes
from ld_common.core.errors import DeploymentError
from ld_common.core.registry import Registry, normalized
from ld_common.protocol.foreign_packages import SERVER, SITES, PackageRecord, installed_package, read_records
from ld_common.protocol.study_config import StudyConfig
from ld_server.aggregation import AGGREGATORS, check_aggregation

LIST = "packages.json"
GROUPS = "latent_drift."


def study_packages(study: StudyConfig) -> list[PackageRecord]:
    """A record of each package that a study lists, as it is installed here.

    Raises:
        DeploymentError: a package is not installed or has no digest, or the study uses an adapter or an aggregator of a
            package that it does not list.
        ConfigError: the study's aggregator or its options are wrong, or do not fit the rest of the study.
    """
    check_aggregation(study)
    uses: list[tuple[Registry, str]] = [  # type: ignore[type-arg]
        (ADAPTERS, str(study.adapter["name"])),
        (AGGREGATORS, str(study.federation.aggregation["name"])),
    ]
    listed = set(map(normalized, study.packages))
    for registry, name in uses:
        package = registry.package_of(name)
        if package is not None and normalized(package) not in listed:
            raise DeploymentError(
                f"{registry.kind} '{name}' comes from package '{package}': add it to the study, packages: [{package}]"
            )
    return [installed_package(name, _runs_at(name)) for name in sorted(study.packages)]


def write_package_list(folder: Path, records: list[PackageRecord]) -> None:
    """Write the records that the study's kits list; raises `CheckpointError`."""
    write_bytes(folder / LIST, (json.dumps([vars(record) for record in records], indent=2) + "\n").encode())


def check_packages(folder: Path, study: StudyConfig) -> None:
    """Raise `DeploymentError` when the installed packages are not those that the kits list."""
    try:
        listed = read_records(json.loads((folder / LIST).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise DeploymentError(f"cannot read '{folder / LIST}': run ld-server update") from error
    changed = set(listed) ^ set(study_packages(study))
    if changed:
        names = ", ".join(sorted({record.name for record in changed}))
        raise DeploymentError(
            f"package {names} is not the one that the sites approved: run ld-server update and send the new kits, or "
            "install the former version"
        )


def _runs_at(name: str) -> str:
    """A package whose only entry points are aggregators runs at the server; any other one runs at the sites."""
    try:
        points = distribution(name).entry_points
    except ModuleNotFoundError as error:
        raise DeploymentError(f"package '{name}' is not installed: install it with pip install {name}") from error
    groups = {point.group for point in points if point.group.startswith(GROUPS)}
    return SERVER if groups == {AGGREGATORS.group} else SITES
