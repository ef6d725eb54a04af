"""What `flwr run .` starts: the study's ServerApp, and a ClientApp that plays every hospital of a simulation.

Only here may the run config name site configs (`sites`): in a deployment that is the site's own word.
"""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from ld_client.client_app import register
from ld_common.core.errors import ConfigError
from ld_server import server_app as study_app
from ld_simulations.demo import load_demo, prepare_sites

server = ServerApp()
client = ClientApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Prepare the sites of the demo that `prepare` names (nothing when it is empty), then run the study."""
    demo = str(context.run_config.get("prepare", ""))
    if demo:
        prepare_sites(load_demo(Path(demo)))
    study_app.main(grid, context)


def simulated_site(context: Context) -> Path:
    """The site config of a node's number in the run's folder; raises `ConfigError` when there are fewer."""
    files = sorted(Path(str(context.run_config["sites"])).glob("*.yaml"))
    number = int(context.node_config["partition-id"])
    if number >= len(files):
        raise ConfigError(f"node {number} plays no site: '{context.run_config['sites']}' holds {len(files)}")
    return files[number]


register(client, simulated_site)
