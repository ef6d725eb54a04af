"""Trains a site's round in several processes of this machine, which Hugging Face accelerate starts.

The process that handles a task checks, charges and signs it as always. The others only train, one to a GPU or several
on the processors (`ld_client.training_process`). They meet in a folder beside the ledger, which is deleted afterwards,
and talk over loopback alone.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

import ld_client
import ld_common
from ld_client import training_process
from ld_client.site_config import ACCELERATE, SiteConfig
from ld_client.training_process import LOCK, PROBLEM, RoundWork, read_outcome
from ld_common.adapters.base import AdaptedModel
from ld_common.core.ahead import available_processors
from ld_common.core.atomic_files import held
from ld_common.core.errors import ConfigError, DeploymentError, LdError
from ld_common.core.offline import DEFAULTS
from ld_common.diffusion.training import Losses

FOLDERS = "training-processes"
"""Folder beside the ledger."""
LAUNCHERS_OWN = re.compile(r"(?:ACCELERATE|PET|TORCHELASTIC)_.*|(?:LOCAL_|GROUP_|ROLE_)?(?:RANK|WORLD_SIZE)|MASTER_.*")
"""Variables of another launcher, under which this process may run."""
STOP_SECONDS = 10.0
SHOWN_BYTES = 8192
"""Of the log of processes that died."""


def process_count(site: SiteConfig) -> int:
    """Number of processes that train a round.

    Raises:
        ConfigError: accelerate is not installed, or there are fewer GPUs.
    """
    if site.launcher != ACCELERATE:
        return 1
    if importlib.util.find_spec("accelerate") is None:
        raise ConfigError("launcher is 'accelerate', which is not installed: pip install accelerate")
    if site.device == "cpu":
        return site.training_processes
    gpus = torch.cuda.device_count()
    if max(1, site.training_processes) > gpus:
        raise ConfigError(
            f"training_processes is {max(1, site.training_processes)} on device cuda, and this process sees {gpus} "
            "GPUs: each process needs one of its own"
        )
    return site.training_processes or gpus


def train_in_processes(work: RoundWork, count: int, adapted: AdaptedModel[Any]) -> Losses | None:
    """Train a round in `count` processes and load what they trained into `adapted`.

    Returns:
        The losses of the whole batches; None under differential privacy.

    Raises:
        DeploymentError: a process died.
        LdError: what training in one process raises.
    """
    _free_gpu(adapted)
    with _round_folder(work.site.ledger_path.parent / FOLDERS) as folder:
        work.write(folder)
        _run(folder, count)
        state, losses = read_outcome(folder)
    adapted.load(state)
    return losses


@contextmanager
def _round_folder(parent: Path) -> Iterator[Path]:
    """A folder of this process, mode 0700, and its lock; what killed processes left is deleted first."""
    parent.mkdir(mode=0o700, exist_ok=True)
    for former in parent.iterdir():
        owner = former.name.partition("-")[0]
        if not owner.isdecimal() or not psutil.pid_exists(int(owner)):
            shutil.rmtree(former, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=parent))
    try:
        with held(folder / LOCK):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(folder: Path, count: int) -> None:
    """Run the processes until all have ended; raises `LdError` if one of them failed."""
    log = folder / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            _command(folder, count), env=_environment(folder), stdin=subprocess.DEVNULL, stdout=stream, stderr=stream
        )
        try:
            code = process.wait()
        finally:
            if process.poll() is None:
                _stop(process.pid)
    if code:
        raise _failure(folder, count, log.read_bytes()[-SHOWN_BYTES:].decode(errors="replace"))


def _stop(pid: int) -> None:
    """Terminate a process and its descendants, and kill those that do not end."""
    try:
        family = [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]
    except psutil.NoSuchProcess:  # it has ended, or is a zombie
        return
    for end in (psutil.Process.terminate, psutil.Process.kill):
        for process in family:
            with suppress(psutil.NoSuchProcess):
                end(process)
        _, family = psutil.wait_procs(family, timeout=STOP_SECONDS)


def _command(folder: Path, count: int) -> list[str]:
    """The command that starts the processes; nothing of the account's own defaults of accelerate enters."""
    config = folder / "accelerate.yaml"
    defaults = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "mixed_precision": "no"}
    config.write_text(yaml.safe_dump({**defaults, "debug": False, "use_cpu": False, "num_processes": count}))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    # accelerate's way to start several processes on one machine, with GPUs or without
    command += ["--multi_gpu", "--num_machines", "1", "--num_processes", str(count), "--machine_rank", "0"]
    # a file in place of the server through which the processes find each other: it would listen on every address
    command += ["--rdzv_backend", "c10d", "--rdzv_conf", "store_type=file", "--main_process_port", "0"]
    threads = max(1, available_processors() // count)
    command += ["--num_cpu_threads_per_process", str(threads)]
    return [*command, "--module", training_process.__name__, str(folder)]


def _environment(folder: Path) -> dict[str, str]:
    """Offline, on loopback, and with the code that this process runs: a task's own, approved bundle."""
    kept = {name: value for name, value in os.environ.items() if not LAUNCHERS_OWN.fullmatch(name)}
    sources = dict.fromkeys(str(Path(package.__path__[0]).parent) for package in (ld_client, ld_common))
    loopback = dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), "lo")
    meeting = {"PET_LOCAL_ADDR": "127.0.0.1", "PET_RDZV_ENDPOINT": str(folder / "rendezvous")}
    meeting["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    paths = {"PYTHONPATH": os.pathsep.join(sources), "PYTHONSAFEPATH": "1", "TMPDIR": str(folder)}
    return kept | DEFAULTS | loopback | meeting | paths


def _failure(folder: Path, count: int, log: str) -> LdError:
    """The error that a process reported, or one that says how it died, after its log is printed."""
    if (folder / PROBLEM).exists():
        problem = json.loads((folder / PROBLEM).read_text())
        return _errors().get(problem["code"], LdError)(problem["text"])
    print(log, file=sys.stderr, flush=True)
    found = re.findall(r"Signal (\d+)", log)
    how = f" of {signal.Signals(int(found[-1])).name}" if found else ""
    hint = " The kernel ends a process so that needs more memory than there is." if how == " of SIGKILL" else ""
    return DeploymentError(
        f"one of the {count} processes that trained the round died{how}, so the round ended: their log is above.{hint}"
    )


def _errors() -> dict[str, type[LdError]]:
    """All errors that a user can cause, by code."""
    classes, pending = [LdError], [LdError]
    while pending:
        found = pending.pop().__subclasses__()
        classes += found
        pending += found
    return {each.code: each for each in reversed(classes)}


def _free_gpu(adapted: AdaptedModel[Any]) -> None:
    """Move a model to the processor: the processes load their own."""
    model = adapted.model
    if model.device.type == "cuda":
        for part in model.networks:
            torch.nn.Module.to(part, device="cpu")
        torch.cuda.empty_cache()
