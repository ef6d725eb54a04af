"""What `flwr run .` starts: the study's ServerApp, and a ClientApp that simulates every hospital.

Only in a simulation does the run config name the site configs (`sites`); a deployed site uses its own.
"""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from ld_client.client_app import register
from ld_common.core.errors import ConfigError
from ld_server import server_app as study_app
from ld_simulations.demo import load_demo
from ld_simulations.preparation import prepare_sites
from ld_simulations.run_folder import claim

server = ServerApp()
client = ClientApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Prepare the sites of the demo whose YAML `prepare` names (empty for none), then run the study."""
    demo = str(context.run_config.get("prepare", ""))
    if demo:
        loaded = load_demo(Path(demo))
        claim(loaded.output, loaded.content())
        prepare_sites(loaded)
    study_app.main(grid, context)


def simulated_site(context: Context) -> Path:
    """The site config of a node, by its partition number; raises `ConfigError` when there are fewer configs."""
    files = sorted(Path(str(context.run_config["sites"])).glob("*.yaml"))
    number = int(context.node_config["partition-id"])
    if number >= len(files):
        raise ConfigError(f"node {number} has no site config: '{context.run_config['sites']}' holds {len(files)}")
    return files[number]


register(client, simulated_site)
