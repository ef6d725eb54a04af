"""The code bundle of a study, a Flower app bundle (FAB): all code of ours that runs at a site, in one file.

It holds the import closure of the ClientApp as it is installed at the server, and the starter of the server's side,
whose code stays at the server.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version

from flwr.cli.build import build_fab_from_files

from ld_common.core.errors import DeploymentError
from ld_common.protocol.code_bundle import PACKAGES, installed_sources

DISTRIBUTION = "latent-drift-federation"
PROJECT = """\
[project]
name = "latent-drift-study"
version = "{version}"
license = {{ file = "LICENSE" }}
description = "The code that a site of a latent drift federation runs"
dependencies = ["flwr>={flwr}"]

[tool.flwr.app]
publisher = "latent-drift"
fab-format-version = 1
flwr-version-target = "{flwr}"
fab-include = ["ld_common/**/*.py", "ld_client/**/*.py", "study_server.py", "LICENSE"]

[tool.flwr.app.components]
serverapp = "study_server:app"
clientapp = "ld_client.client_app:app"

[tool.flwr.app.config]
home = ""
study = ""
overrides = ""
resume = false
"""
LICENSE = """\
SPDX-License-Identifier: Apache-2.0

Licensed under the Apache License, Version 2.0; you may obtain a copy of it at
http://www.apache.org/licenses/LICENSE-2.0
"""
SERVER = '''\
"""Starts the server's side, which is installed at the server and is not part of this bundle."""

import sys
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

HERE = Path(__file__).resolve().parent
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the study with the installed software: this bundle holds only what a site runs of it."""
    sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != HERE]
    for name in [name for name in sys.modules if name.partition(".")[0] in ("ld_common", "ld_client")]:
        del sys.modules[name]
    from ld_server.server_app import main as run

    run(grid, context)
'''


def build_bundle() -> bytes:
    """The bundle of the software that is installed here; the same software gives the same bytes.

    Raises:
        DeploymentError: the client's code is not installed, or Flower refuses the bundle.
    """
    return pack(bundle_files())


def bundle_files() -> dict[str, bytes]:
    """Content of the bundle's files, by name; raises `DeploymentError`."""
    sources = installed_sources()
    for package in PACKAGES:
        if not any(name.startswith(f"{package}/") for name in sources):
            raise DeploymentError(f"{package} is not installed here: install {DISTRIBUTION}")
    project = PROJECT.format(version=version(DISTRIBUTION), flwr=version("flwr"))
    return {
        "pyproject.toml": project.encode(),
        "LICENSE": LICENSE.encode(),
        "study_server.py": SERVER.encode(),
        **sources,
    }


def pack(files: Mapping[str, bytes]) -> bytes:
    """Build a bundle of these files; raises `DeploymentError`."""
    try:
        content, _ = build_fab_from_files(dict(files))
    except ValueError as error:
        raise DeploymentError(f"the code bundle cannot be built: {error}") from error
    return content
