"""The ServerApp of `flwr run .`: makes the demo hospitals when they are not there yet, then runs the study."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from ld_server import app as study_app
from ld_simulations.demo import load_demo, prepare_sites

server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Prepare the sites of the demo that `prepare` names (nothing when it is empty), then run the study."""
    demo = str(context.run_config.get("prepare", ""))
    if demo:
        prepare_sites(load_demo(Path(demo)))
    study_app.main(grid, context)
