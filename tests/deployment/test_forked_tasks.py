"""Tasks that are forks of a process with the model libraries: each a process of its own, whose token nobody sees."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from ld_client.deployment.executor import ForkedTasks, fresh_tasks, launch_for
from ld_client.deployment.site_home import SiteHome
from ld_client.site_config import SiteConfig
from ld_common.core.errors import DeploymentError
from ld_common.core.processes import free_port, stop_family

TOKEN = "5ecret" * 12
SECONDS = 60.0


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def tasks(tmp_path: Path) -> Iterator[ForkedTasks]:
    forked = ForkedTasks(SiteHome(tmp_path))
    yield forked
    stop_family(forked.process.pid)
    forked.process.wait()


def waiting_task() -> list[str]:
    """Arguments of a task that asks a node for its input which is not there."""
    return ["--runtime-api-address", f"127.0.0.1:{free_port()}", "--insecure", "--parent-pid", str(os.getpid())]


def pipes_of(process: psutil.Process) -> list[Path]:
    """The open pipes of the process that forks tasks."""
    opened = Path(f"/proc/{process.pid}/fd").iterdir()
    return [place for place in opened if place.readlink().name.startswith("pipe:") and place.name != "2"]


@pytest.mark.slow
def test_each_task_is_a_process_that_reads_no_other_task(tasks: ForkedTasks) -> None:
    ended = tasks(["--help"], TOKEN)
    first, second = (tasks(waiting_task(), TOKEN) for _ in range(2))
    wait_until(lambda: not ended())
    assert first() and second()
    loaded = psutil.Process(tasks.process.pid)
    forks = loaded.children()
    assert len(forks) == 2  # the one that ended is no zombie
    # none sees another's request: the pipes of the process that forks them are closed in them
    held = [place.readlink() for fork in forks for place in Path(f"/proc/{fork.pid}/fd").iterdir()]
    assert not {pipe.readlink() for pipe in pipes_of(loaded)} & set(held)
    for process in [loaded, *forks]:
        assert TOKEN not in " ".join(process.cmdline())
        assert TOKEN not in process.environ().values()
    for fork in forks:
        fork.kill()
    wait_until(lambda: not first() and not second())


@pytest.mark.slow
def test_a_dead_process_is_replaced(tasks: ForkedTasks) -> None:
    tasks.process.kill()
    tasks.process.wait()
    lives = tasks(["--help"], TOKEN)
    wait_until(lambda: not lives())
    tasks.process.kill()  # while it is asked
    with pytest.raises(DeploymentError, match="ask again"):
        while True:
            tasks(["--help"], TOKEN)


@pytest.mark.slow
def test_it_ends_with_the_executor(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from ld_client.deployment.executor import ForkedTasks as Forked; "
    code += "from ld_client.deployment.site_home import SiteHome; "
    code += "print(Forked(SiteHome(Path(sys.argv[1]))).process.pid)"
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    wait_until(lambda: not psutil.pid_exists(int(ended.stdout)))


@pytest.mark.parametrize(("device", "forks"), [("cpu", True), ("cuda", False)])
def test_a_task_on_a_gpu_is_a_new_process(device: str, forks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SiteConfig(site="aster", modality="m.yaml", base_model="b", device=device)
    monkeypatch.setattr(SiteHome, "site", lambda home: config)
    monkeypatch.setattr(ForkedTasks, "_start", lambda tasks: None)
    launch = launch_for(SiteHome(Path("/nowhere")))
    assert isinstance(launch, ForkedTasks) == forks
    assert forks or launch.__qualname__.startswith(fresh_tasks.__name__)


LOAD = """\
import sys
from ld_client.deployment import launcher
launcher.load_libraries()
loaded = set(sys.modules)
from ld_common.adapters.base import inject
from ld_common.adapters.registry import read_adapter
from ld_common.diffusion.base_model import load_denoiser
inject(load_denoiser(sys.argv[1]), read_adapter({"name": "lora", "rank": 1}), 0)
print(len([name for name in set(sys.modules) - loaded if not name.startswith("ld_")]))
"""
LEFT = 30
"""Modules of others that a task may still have to load; all of them are some 800."""


@pytest.mark.slow
def test_a_task_finds_its_libraries_loaded(smallest_base: Path) -> None:
    command = [sys.executable, "-c", LOAD, str(smallest_base)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(ended.stdout.split()[-1]) < LEFT
