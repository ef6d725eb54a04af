from __future__ import annotations

import itertools
import os
import resource
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ld_common.errors import AdapterError, CheckpointError
from ld_common.messages import TrainNumbers, TrainResult
from ld_server.aggregate import average_states, check_result
from ld_server.checkpoint import NAME, Checkpoint, read_checkpoint, write_checkpoint

REFERENCE = {"a": torch.zeros(3), "b": torch.zeros(2, 2)}
GOOD = TrainResult(
    site="x",
    round=1,
    state={"a": torch.ones(3), "b": torch.ones(2, 2)},
    drift=torch.zeros(4, 1, 1),
    numbers=TrainNumbers(visits=10, patients=4, loss_first=1.0, loss_last=0.5, seconds=2.0),
)


def test_the_average_does_not_depend_on_the_order_of_arrival() -> None:
    generator = torch.Generator().manual_seed(0)
    states = {
        name: {"w": torch.randn(50, generator=generator) * 10.0**power}
        for name, power in zip("pqr", (-6, 0, 6), strict=True)
    }
    weights = {"p": 3.0, "q": 7.0, "r": 1.0}
    averages = [
        average_states({name: states[name] for name in order}, {name: weights[name] for name in order})["w"]
        for order in itertools.permutations("pqr")
    ]
    assert all(torch.equal(averages[0], other) for other in averages)


def test_the_average_is_weighted_and_exact_in_double_precision() -> None:
    states = {"p": {"w": torch.tensor([0.0])}, "q": {"w": torch.tensor([4.0])}}
    assert average_states(states, {"p": 1.0, "q": 3.0})["w"].item() == 3.0
    one = {"w": torch.tensor([0.1])}
    assert torch.equal(average_states({"p": one, "q": one, "r": one}, {"p": 1, "q": 1, "r": 1})["w"], one["w"])


def test_a_good_answer_passes_with_its_norm() -> None:
    assert check_result(GOOD, REFERENCE, torch.Size((4, 1, 1)), 10.0) == pytest.approx(7**0.5)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"state": {**GOOD.state, "a": torch.tensor([1.0, float("nan"), 0.0])}}, "NaN"),
        ({"state": {**GOOD.state, "a": torch.ones(4)}}, "shape"),
        ({"state": {**GOOD.state, "a": torch.ones(3) * 1e6}}, "norm"),
        ({"drift": None}, "drift"),
        ({"drift": torch.zeros(3, 1, 1)}, "drift"),
        ({"drift": torch.full((4, 1, 1), float("nan"))}, "NaN"),
        ({"numbers": TrainNumbers(10, 4, 1.0, float("inf"), 2.0)}, "infinite"),
        ({"numbers": TrainNumbers(0, 4, 1.0, 0.5, 2.0)}, "0 visits"),
        ({"numbers": TrainNumbers(10, 11, 1.0, 0.5, 2.0)}, "11 patients"),
    ],
)
def test_a_bad_answer_is_refused_with_its_reason(changed: dict[str, object], words: str) -> None:
    with pytest.raises(AdapterError, match=words):
        check_result(replace(GOOD, **changed), REFERENCE, torch.Size((4, 1, 1)), 10.0)


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    saved = Checkpoint("digest", 3, {"a": torch.randn(4)}, [{"round": 1, "sites": {}}])
    write_checkpoint(tmp_path, saved)
    read = read_checkpoint(tmp_path)
    assert (read.study_digest, read.round, read.records) == ("digest", 3, saved.records)
    assert torch.equal(read.state["a"], saved.state["a"])


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path: Path) -> None:
    """The kernel refuses to let any file of the child grow past 4 kB, as a full disk would."""
    write_checkpoint(tmp_path, Checkpoint("digest", 1, {"a": torch.ones(10)}, []))
    large = Checkpoint("digest", 2, {"a": torch.ones(100_000)}, [])
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            write_checkpoint(tmp_path, large)
        except CheckpointError as error:
            os._exit(7 if "free some space" in str(error) else 8)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert read_checkpoint(tmp_path).round == 1
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_a_damaged_checkpoint_is_an_error(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path)
