"""The code bundle of a study (Flower's FAB): all that runs at a site, in one file with one hash.

It holds the sources of `ld_common` and `ld_client` as they are installed at the server, and a few lines that start the
server's side, whose code stays there.
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
license = "Apache-2.0"
description = "What a site of a latent drift federation runs"

[tool.flwr.app]
publisher = "latent-drift"
fab-include = ["ld_common/**/*.py", "ld_client/**/*.py", "study_server.py"]

[tool.flwr.app.components]
serverapp = "study_server:app"
clientapp = "ld_client.client_app:app"

[tool.flwr.app.config]
home = ""
study = ""
overrides = ""
resume = false
"""
SERVER = '''\
"""Starts the server's side, which is installed at the server and is no part of this bundle."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the study."""
    from ld_server.server_app import main as run

    run(grid, context)
'''


def build_bundle() -> bytes:
    """The bundle of the software that is installed here; the same bytes each time.

    Raises:
        DeploymentError: the client's code is not installed, or Flower refuses the bundle.
    """
    return pack(bundle_files())


def bundle_files() -> dict[str, bytes]:
    """What is in the bundle, by name; raises `DeploymentError`."""
    sources = installed_sources()
    for package in PACKAGES:
        if not any(name.startswith(f"{package}/") for name in sources):
            raise DeploymentError(f"{package} is not installed here: install {DISTRIBUTION}")
    project = PROJECT.format(version=version(DISTRIBUTION))
    return {"pyproject.toml": project.encode(), "study_server.py": SERVER.encode(), **sources}


def pack(files: Mapping[str, bytes]) -> bytes:
    """Files as a bundle; raises `DeploymentError`."""
    try:
        content, _ = build_fab_from_files(dict(files))
    except ValueError as error:
        raise DeploymentError(f"the code bundle cannot be built: {error}") from error
    return content
