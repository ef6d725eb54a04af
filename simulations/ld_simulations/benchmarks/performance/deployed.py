"""A deployed round of one site against the bare training loop of the same steps.

    python -m ld_simulations.benchmarks.performance.deployed

Server, node and executor are those of `ld-server start` and `ld-client start`, as processes on loopback; one thread
each, as is the bare loop.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from ld_simulations.benchmarks.deployment.rounds import overhead, rounds_of, run_to_release
from ld_simulations.benchmarks.deployment.stage import Deployment
from ld_simulations.demo import load_demo
from ld_simulations.preparation import prepare_sites

DEMO = "configs/soak_demo.yaml"
SITE = "aster"
STEPS, ROUNDS = 45, 4


def run(folder: Path, steps: int = STEPS, rounds: int = ROUNDS, config: str = DEMO) -> dict[str, float]:
    """Deploy a study without differential privacy at one site, and run it to its release.

    Args:
        folder: where hospitals and deployment are made; empty.
        steps: of training in a round; choose them so that a round takes some 20 s.
        rounds: of the study; the first, in which the node pulls the code, is not counted.
        config: YAML of the demo whose study is deployed.

    Returns:
        `deployed_round_over_bare_loop`, and the seconds of `overhead`: medians over the counted rounds.

    Raises:
        DeploymentError: the study ended without a release.
    """
    changes = [f"federation.sites=[{SITE}]", "federation.min_train_nodes=1", f"federation.rounds={rounds}"]
    changes += ["privacy.enabled=false", f"training.steps={steps}", "patients=6", "test_patients=1"]
    demo = load_demo(Path(config), [f"output={folder / 'demo'}", *changes])
    configs = prepare_sites(demo)
    stage = Deployment(demo.study_file, demo.study_overrides, configs, folder / "deployed")
    with stage.served():
        run_to_release(stage)
    seconds: dict[str, Any] = overhead(demo, rounds_of(stage))
    return {"deployed_round_over_bare_loop": seconds["round_seconds"] / seconds["bare_seconds"], **seconds}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="ld-") as place:
        print(json.dumps(run(Path(place)), indent=1))
