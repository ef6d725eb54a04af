"""Seconds and memory of the server's part of a round, by the number of sites and the size of what they train.

    python -m ld_simulations.benchmarks.performance.scale KIND RANK SITES

measures one round in a process of its own, in which nothing else takes memory, and prints JSON.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from uuid import uuid4

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from ld_common.adapters.state_dict import update_norm
from ld_common.core.config import from_mapping
from ld_common.core.errors import DeploymentError
from ld_common.core.state import State
from ld_common.protocol import messages
from ld_common.protocol.messages import TrainNumbers, TrainResult
from ld_common.protocol.study_config import StudyConfig
from ld_server.aggregation import read_aggregator
from ld_server.drift_collection import MeanDrifts
from ld_server.strategy import DriftFederation

LORA, FULL = "lora", "full"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
MEGABYTE, GIGABYTE = 10**6, 10**9
SPREAD = 1e-3
"""Standard deviation of a number's change in a round."""
REPEATS, MANY_SITES = 5, 1000
Report = Callable[[str], None]


@dataclass(frozen=True)
class ScaleCase:
    """One round: `sites` sites that train a LoRA of `rank` on all attention of Stable Diffusion 1.4, or its UNet."""

    sites: int
    rank: int = 4
    kind: str = LORA

    @property
    def name(self) -> str:
        """Such as `lora_rank4_1000_sites`."""
        trained = f"{LORA}_rank{self.rank}" if self.kind == LORA else "full_unet"
        return f"{trained}_{self.sites}_sites"


CASES = (*(ScaleCase(sites, rank) for rank in (4, 16) for sites in (10, 100, 1000)), ScaleCase(3, kind=FULL))


def measure_scale(cases: Iterable[ScaleCase] = CASES, report: Report = lambda _: None) -> dict[str, Any]:
    """Measure each case in a process of its own.

    Returns:
        The results of `measure_round` by case, and the headline numbers of the cases that were measured: peak memory
        over base in MB or GB, and the server's seconds over those of one NumPy pass.

    Raises:
        DeploymentError: a process failed.
    """
    rounds: dict[str, dict[str, Any]] = {}
    for case in cases:
        rounds[case.name] = _in_process(case)
        report(f"{case.name}: {rounds[case.name]}")
    headline = {
        "peak_mb_1000_sites_rank4": ("lora_rank4_1000_sites", "peak_mb", 1),
        "aggregate_over_numpy_pass_100": ("lora_rank4_100_sites", "over_numpy_pass", 1),
        "aggregate_over_numpy_pass_1000": ("lora_rank4_1000_sites", "over_numpy_pass", 1),
        "full_unet_3_sites_peak_gb": ("full_unet_3_sites", "peak_mb", MEGABYTE / GIGABYTE),
    }
    found = {key: round(rounds[name][what] * unit, 2) for key, (name, what, unit) in headline.items() if name in rounds}
    return {"rounds": rounds, **found}


def _in_process(case: ScaleCase) -> dict[str, Any]:
    command = [sys.executable, "-m", "ld_simulations.benchmarks.performance.scale"]
    ended = subprocess.run([*command, case.kind, str(case.rank), str(case.sites)], capture_output=True, text=True)
    if ended.returncode:
        raise DeploymentError(f"'{case.name}' could not be measured: {ended.stderr.strip()[-500:]}")
    result: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return result


def measure_round(shapes: Mapping[str, tuple[int, ...]], sites: int, folder: Path, seed: int = 0) -> dict[str, Any]:
    """One round of the server, from the packing of the tasks to the checkpoint; replies come in a random order.

    The time that the grid takes to make the replies does not count. The baseline reads the same replies and adds each
    one's float32 numbers to a float64 sum.

    Args:
        shapes: of the trained tensors, by name.
        sites: number of sites; all send the same update.
        folder: for the run's files.
        seed: of weights and order.

    Returns:
        `parameters`, `reply_mb`, `seconds` of the round and of its checks, sum and checkpoint (`aggregate_seconds`),
        `numpy_pass_seconds` and how often it fits into the latter (`over_numpy_pass`), the server's largest memory in
        the round over that before it (`peak_mb`), and `write_mb_s`, the speed at which a reply is written to a file.

    Raises:
        DeploymentError: the round does not end with the update that all sites sent.
    """
    draw = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(shape, generator=draw).mul_(0.02) for name, shape in sorted(shapes.items())}
    size, packed = _write_reply(folder / "reply", state, draw)
    grid = ReplyingGrid(sites, folder / "reply", packed, seed)
    strategy = _strategy(state, grid, folder / "run")
    base = _restart_peak()
    started = time.perf_counter()
    tasks = strategy.configure_train(1, ArrayRecord({}), ConfigRecord({}), grid)
    configuring = time.perf_counter() - started - grid.making_seconds
    replies = grid.send_and_receive(tasks)
    del tasks
    started, grid.making_seconds = time.perf_counter(), 0.0
    strategy.aggregate_train(1, replies)
    seconds = time.perf_counter() - started - grid.making_seconds
    peak = _peak() - base
    record = strategy.records[-1]
    moved = update_norm(strategy.state, state)
    expected = SPREAD * sum(value.numel() for value in state.values()) ** 0.5
    if not record.counted or len(record.sites) != sites or not 0.9 < moved / expected < 1.1:
        raise DeploymentError(
            f"the round of {sites} sites moved the weights by {moved:g}, not {expected:g}; {record.failure}"
        )
    count = sum(value.numel() for value in state.values())
    del strategy, state  # a UNet's states and its sum would take 17 GB together
    numpy_pass = _numpy_pass(grid, count)
    return {
        "parameters": count,
        "reply_mb": round(size / MEGABYTE, 3),
        "seconds": round(configuring + seconds, 3),
        "aggregate_seconds": round(seconds, 3),
        "numpy_pass_seconds": round(numpy_pass, 3),
        "over_numpy_pass": round(seconds / numpy_pass, 2),
        "peak_mb": round(peak / MEGABYTE, 1),
        "write_mb_s": round(_write_speed(folder, grid) / MEGABYTE),
    }


@dataclass
class ReplyingGrid(Grid):
    """Sites that all send the same tensors; each reply is made when it is asked for."""

    sends_bytes: ClassVar[bool] = True

    sites: int
    file: Path
    head: Array
    """Array of the reply, without its bytes."""
    seed: int
    making_seconds: float = field(default=0.0, init=False)

    @property
    def names(self) -> list[str]:
        """One a site, in their order."""
        return [f"site-{number:04}" for number in range(self.sites)]

    def get_node_ids(self) -> Iterable[int]:
        return range(1, self.sites + 1)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Number the messages, forget them, and reply to them in a random order."""
        replies: list[Message] = []
        started = time.perf_counter()
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())
            replies.append(Message(self.answer(message), reply_to=message))
        random.Random(self.seed).shuffle(replies)
        self.making_seconds += time.perf_counter() - started
        return self._completed(replies)

    def _completed(self, replies: list[Message]) -> Iterator[Message]:
        while replies:
            started = time.perf_counter()
            reply = replies.pop()
            if "state" in reply.content:
                reply.content["state"] = ArrayRecord({messages.TENSORS: self.array()})
            self.making_seconds += time.perf_counter() - started
            yield reply
            del reply

    def answer(self, message: Message) -> RecordDict:
        """A site's name, or its result without the tensors."""
        name = self.names[message.metadata.dst_node_id - 1]
        if message.metadata.message_type.startswith("query"):
            return messages.pack_name(name)
        return messages.pack_result(TrainResult(name, 1, {}, None, TrainNumbers(100, 50, 1.0, 0.5, 60.0)))

    def array(self) -> Array:
        """A reply's tensors, in memory of their own."""
        return Array(self.head.dtype, self.head.shape, self.head.stype, self.file.read_bytes())

    def set_run(self, run: object) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *_: object) -> Message:  # type: ignore[override]
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError

    def get_nodes(self) -> Iterable[NodeInfo]:
        raise NotImplementedError


def lora_shapes(rank: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a LoRA on all attention of Stable Diffusion 1.4: A `(rank, inputs)` and B `(outputs, rank)`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in unet_shapes().items():
        layer = name.removesuffix(".weight")
        if layer != name and layer.endswith(ATTENTION):
            outputs, inputs = shape
            shapes |= {f"unet.{layer}.lora_A": (rank, inputs), f"unet.{layer}.lora_B": (outputs, rank)}
    return shapes


def unet_shapes() -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of Stable Diffusion 1.4's UNet, from its config; no weights are made."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64,
            block_out_channels=(320, 640, 1280, 1280),
            layers_per_block=2,
            cross_attention_dim=768,
            attention_head_dim=8,
        )
    return {name: tuple(value.shape) for name, value in unet.state_dict().items()}


def _strategy(state: State, grid: ReplyingGrid, output: Path) -> DriftFederation:
    federation = {"rounds": 1, "sites": grid.names, "min_train_nodes": 2}
    study = from_mapping(
        StudyConfig, {"name": "scale", "output": str(output), "drift": {"shape": "none"}, "federation": federation}
    )
    aggregator = read_aggregator(study.federation)
    strategy = DriftFederation(study, "", "", MeanDrifts(study, None, aggregator), output)
    strategy.state = state
    return strategy


def _write_reply(file: Path, state: State, draw: torch.Generator) -> tuple[int, Array]:
    """Write the bytes of an updated state as a reply has them; returns their number, and the array without them."""
    moved = {name: torch.randn(value.shape, generator=draw).mul_(SPREAD).add_(value) for name, value in state.items()}
    array = messages.pack_tensors(moved)[messages.TENSORS]
    file.write_bytes(array.data)
    return len(array.data), Array(array.dtype, array.shape, array.stype, b"")


def _numpy_pass(grid: ReplyingGrid, count: int) -> float:
    """Seconds to add all replies' numbers to one sum."""
    sums, seconds = np.zeros(count), 0.0
    for _ in range(grid.sites):
        content = messages.tensor_bytes(ArrayRecord({messages.TENSORS: grid.array()}))
        started = time.perf_counter()
        np.add(sums, np.frombuffer(content[len(content) - 4 * count :], np.float32), out=sums)
        seconds += time.perf_counter() - started
    return seconds


def _write_speed(folder: Path, grid: ReplyingGrid) -> float:
    """Bytes a second of a reply that is written to a new file."""
    content, started = grid.array().data, time.perf_counter()
    (folder / "copy").write_bytes(content)
    return len(content) / (time.perf_counter() - started)


def _restart_peak() -> int:
    """Forget this process's largest memory; returns the bytes that it has."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def main() -> None:
    """Measure the case that the arguments name; of a short one the median of several rounds."""
    kind, rank, sites = sys.argv[1:]
    for key in ("task_id", "run_id", "node_id"):  # as Flower's processes have them before an app runs
        setattr(TaskIdentity, key, 1)
    shapes = lora_shapes(int(rank)) if kind == LORA else unet_shapes()
    rounds = []
    for _ in range(REPEATS if int(sites) < MANY_SITES and kind == LORA else 1):
        with tempfile.TemporaryDirectory() as folder:
            rounds.append(measure_round(shapes, int(sites), Path(folder)))
    rounds.sort(key=lambda one: one["over_numpy_pass"])
    print(json.dumps(rounds[len(rounds) // 2] | {"peak_mb": max(one["peak_mb"] for one in rounds)}))


if __name__ == "__main__":
    main()
