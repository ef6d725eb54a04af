"""The Slurm scripts stop a node before its time limit and queue it again."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from typer.main import get_command

from ld_client.cli import app

SCRIPTS = Path(__file__).parents[2] / "configs/deployment/slurm"
NAMES = ["node", "index"]
CLIENT = """\
#!/bin/bash
trap 'echo stopped >> {log}; exit 143' TERM
echo "$@" >> {log}
while true; do sleep 0.05; done
"""
CONTROL = '#!/bin/bash\necho "scontrol $@" >> {log}\n'
SECONDS = 20.0


def options(text: str) -> dict[str, str]:
    """The job's options, without those that are commented out."""
    return dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?", text, re.MULTILINE))


@pytest.mark.parametrize("name", NAMES)
def test_a_script_is_bash_and_asks_for_its_signal(name: str) -> None:
    path = SCRIPTS / f"{name}.sbatch"
    subprocess.run(["bash", "-n", str(path)], check=True)
    found = options(path.read_text())
    assert found["signal"].startswith("B:USR1@")
    assert found["dependency"] == "singleton"
    assert {"requeue", "open-mode", "time", "mem"} <= set(found)


@pytest.mark.parametrize("name", NAMES)
def test_a_script_calls_a_command_that_there_is(name: str) -> None:
    called = re.findall(r'^ *ld-client (\S+) (--\S+) "\$home"', (SCRIPTS / f"{name}.sbatch").read_text(), re.MULTILINE)
    assert called
    for command, option in called:
        parameters = get_command(app).commands[command].params  # type: ignore[attr-defined]
        assert option in {flag for parameter in parameters for flag in parameter.opts}


@pytest.mark.parametrize(("sent", "requeued"), [(signal.SIGUSR1, ["scontrol requeue 7"]), (signal.SIGTERM, [])])
def test_a_node_is_stopped_before_its_job_is_queued_again(sent: int, requeued: list[str], tmp_path: Path) -> None:
    log = tmp_path / "log"
    for command, text in (("ld-client", CLIENT), ("scontrol", CONTROL)):
        (tmp_path / command).write_text(text.format(log=log))
        (tmp_path / command).chmod(0o700)
    surroundings = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    script = subprocess.Popen(["bash", str(SCRIPTS / "node.sbatch"), "/site"], env=surroundings, stdout=subprocess.PIPE)
    try:
        deadline = time.monotonic() + SECONDS
        while not log.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        script.send_signal(sent)
        assert script.wait(SECONDS) == 0
    finally:
        script.kill()
        script.communicate()
    assert log.read_text().splitlines() == ["start --home /site", "stopped", *requeued]
