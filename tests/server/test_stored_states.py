"""Replies wait in files until a round ends, and give what they would have given from memory."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullAppMessagesResponse
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid.http_grid import HttpGrid

from ld_common.adapters.state_dict import checked_update_norm, update_norm
from ld_common.core.errors import AdapterError, CheckpointError
from ld_common.core.state import State, grouped_names, part_of, tensor_sizes
from ld_common.protocol import messages
from ld_common.protocol.messages import TrainTask
from ld_common.release.release import read_release
from ld_server import aggregation, resilient_grid, stored_states
from ld_server.aggregation import Mean, Median, TrimmedMean, clip_update
from ld_server.resilient_grid import ResilientGrid
from ld_server.server_app import run_study
from ld_server.stored_states import FOLDER, FlatReference, RoundFolder, ScaledState, StoredState, stored_state
from tests.server.test_strategy import MODALITY, LocalGrid, honest, load_channels, study


@pytest.fixture(autouse=True)
def task_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Flower's processes set before an app runs."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def some_state(seed: int) -> State:
    draw = torch.Generator().manual_seed(seed)
    shapes = {"a": (3, 5), "b": (70_001,), "c": (2, 2, 2), "d": ()}
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def in_memory(state: State) -> StoredState:
    """A state as it came in a message."""
    stored = stored_state(messages.pack_tensors(state))
    assert isinstance(stored, StoredState)
    return stored


@pytest.fixture(params=["files", "memory"])
def stored(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[StoredState]:
    if request.param == "files":
        monkeypatch.setattr(stored_states, "HELD_BYTES", 0)
    folder = RoundFolder(tmp_path)
    kept = [folder.keep(f"site-{seed}", in_memory(some_state(seed))) for seed in range(5)]
    found = [state for state in kept if isinstance(state, StoredState)]
    assert [isinstance(state.content, Path) for state in found] == [request.param == "files"] * 5
    return found


def test_a_stored_state_has_the_tensors_that_came_and_reads_the_ones_that_are_asked_for(
    stored: list[StoredState], tmp_path: Path
) -> None:
    state = some_state(2)
    assert list(stored[2]) == sorted(state)
    assert tensor_sizes(stored[2]) == {"a": 60, "b": 280_004, "c": 32, "d": 4}
    assert all(torch.equal(stored[2][name], value) for name, value in state.items())
    assert list(part_of(stored[2], ["c", "a"])) == ["c", "a"]
    with pytest.raises(KeyError):
        stored[2]["z"]
    files = list(tmp_path.rglob("*"))
    assert {path.stat().st_mode & 0o077 for path in files} <= {0}


def test_replies_that_memory_does_not_hold_are_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = in_memory(some_state(0))
    size = len(messages.tensor_bytes(messages.pack_tensors(some_state(0))))
    monkeypatch.setattr(stored_states, "HELD_BYTES", 2 * size + 1)
    folder = RoundFolder(tmp_path)
    for number in range(5):
        folder.keep(f"site-{number}", state)
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == [f"site-{n}.safetensors" for n in (2, 3, 4)]
    folder.clear()
    assert not (tmp_path / FOLDER).exists()


@pytest.mark.parametrize("aggregator", [Mean(), Median(), TrimmedMean(beta=0.2)])
@pytest.mark.parametrize("group_bytes", [1, 100, 2**26])
def test_states_in_files_aggregate_to_the_same_bits_as_states_in_memory(
    aggregator: Any, group_bytes: int, stored: list[StoredState], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = [1.0, 2.0, 0.5, 3.0, 1.0] if aggregator.weighted else [1.0] * 5
    expected = aggregator.aggregate([some_state(seed) for seed in range(5)], weights)
    monkeypatch.setattr(aggregation, "GROUP_BYTES", group_bytes)
    found = aggregator.aggregate(stored, weights)
    assert list(found) == sorted(expected)
    for name, value in expected.items():
        assert (found[name].dtype, found[name].shape) == (torch.float32, value.shape)
        assert torch.equal(found[name], value)


def test_the_mean_is_the_weighted_mean_in_float64() -> None:
    states, weights = [some_state(seed) for seed in range(7)], [1.0, 2, 3, 4, 5, 6, 7]
    mean = Mean().aggregate(states, weights)
    for name in states[0]:
        exact = sum(state[name].double() * weight for state, weight in zip(states, weights, strict=True)) / 28
        torch.testing.assert_close(mean[name], exact.float(), atol=0, rtol=2e-7)


def test_a_clipped_update_has_the_norm_of_its_limit_and_the_direction_that_came(stored: list[StoredState]) -> None:
    reference = some_state(9)
    norm = checked_update_norm(stored[0], reference)
    assert norm == pytest.approx(update_norm(some_state(0), reference), rel=1e-12)
    clipped = clip_update(stored[0], reference, norm / 3, norm)
    assert isinstance(clipped, ScaledState)
    assert update_norm(clipped, reference) == pytest.approx(norm / 3, rel=1e-5)
    assert (list(clipped), tensor_sizes(clipped)) == (list(stored[0]), tensor_sizes(stored[0]))
    given, kept = some_state(0)["b"] - reference["b"], clipped["b"] - reference["b"]
    torch.testing.assert_close(kept, given / 3, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_number_that_is_not_finite_is_found_wherever_it_is(value: float) -> None:
    reference = some_state(1)
    for name, place in (("a", 0), ("b", 70_000), ("b", 32_768), ("c", 7), ("d", 0)):
        spoilt = {key: tensor.clone() for key, tensor in reference.items()}
        spoilt[name].view(-1)[place] = value
        with pytest.raises(AdapterError, match=f"'{name}' holds NaN or infinite"):
            checked_update_norm(spoilt, reference)
    largest = {key: torch.full_like(tensor, torch.finfo(torch.float32).max) for key, tensor in reference.items()}
    lowest = {key: -tensor for key, tensor in largest.items()}
    assert np.isfinite(checked_update_norm(largest, lowest))


def test_the_fast_check_and_the_careful_one_agree(stored: list[StoredState]) -> None:
    reference = some_state(9)
    flat = FlatReference(reference)
    assert flat.update_norm(stored[1]) == pytest.approx(update_norm(some_state(1), reference), rel=1e-6)
    assert flat.update_norm(some_state(1)) is None  # no file
    other = {name: value for name, value in reference.items() if name != "a"}
    assert FlatReference(other).update_norm(stored[1]) is None
    turned = reference | {"a": reference["a"].T.contiguous()}
    assert FlatReference(turned).update_norm(stored[1]) is None


HEADERS = {
    "no JSON": b"{",
    "a list": b"[]",
    "nested": b"[" * 5000,
    "no shape": b'{"a": {"dtype": "F32", "data_offsets": [0, 4]}}',
    "a type of its own": b'{"a": {"dtype": "F4", "shape": [1], "data_offsets": [0, 4]}}',
    "a negative length": b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
    "a true length": b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}',
    "too long": b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
    "too short": b'{"a": {"dtype": "I8", "shape": [3], "data_offsets": [0, 3]}}',
    "beside its shape": b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
    "two on one place": b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, '
    b'"b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
    "three ends": b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]}}',
    "huge": b'{"a": {"dtype": "F32", "shape": [99999999999, 99999999999], "data_offsets": [0, 4]}}',
}


@pytest.mark.attack
@pytest.mark.parametrize("kind", HEADERS)
def test_a_header_that_does_not_describe_its_data_is_refused(kind: str, tmp_path: Path) -> None:
    header = HEADERS[kind]
    content = len(header).to_bytes(8, "little") + header + bytes(4)
    with pytest.raises(ValueError, match=r"safetensors|tensors overlap|its data"):
        StoredState(memoryview(content))
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match=r"safetensors|tensors overlap|its data"):
        StoredState(tmp_path / "a")
    for start in (b"", b"abc", (2**60).to_bytes(8, "little") + b"{}"):
        with pytest.raises(ValueError, match="not a safetensors file"):
            StoredState(memoryview(start))


@pytest.mark.parametrize("most", [1, 60, 100, 10**9])
def test_groups_hold_every_name_once_and_no_more_than_they_may(most: int) -> None:
    state = some_state(0)
    groups = list(grouped_names(state, most))
    assert [name for group in groups for name in group] == sorted(state)
    sizes = tensor_sizes(state)
    assert all(len(group) == 1 or sum(sizes[name] for name in group) <= most for group in groups)


def test_large_tensors_are_packed_as_small_ones_are(monkeypatch: pytest.MonkeyPatch) -> None:
    small = messages.pack_tensors(some_state(0))
    monkeypatch.setattr(messages, "LARGE_BYTES", 1)
    large = messages.pack_tensors(some_state(0))
    back = messages.unpack_tensors(large)
    assert all(torch.equal(back[name], value) for name, value in some_state(0).items())
    assert bytes(messages.tensor_bytes(large)) == bytes(messages.tensor_bytes(small))
    (array,) = large.values()
    assert isinstance(array, Array) and np.array_equal(array.numpy(), next(iter(small.values())).numpy())


def test_tasks_share_what_is_the_same() -> None:
    state = some_state(0)
    tasks = {name: TrainTask(state, 1, "{}", "", "", nonce=name) for name in ("p", "q")}
    packed = messages.pack_tasks(tasks)
    assert packed["p"].array_records["state"] is packed["q"].array_records["state"]
    assert [messages.unpack_task(packed[name]).nonce for name in ("p", "q")] == ["p", "q"]


@pytest.mark.parametrize(
    "array",
    [
        Array("uint8", (4,), "numpy.ndarray", b"junk"),
        Array("uint8", (4,), "other", b"junk"),
        Array(np.zeros(8, np.float32)),
        Array(np.zeros((2, 2), np.uint8)),
        Array(np.arange(16, dtype=np.uint8)),
    ],
)
@pytest.mark.attack
def test_what_is_no_file_of_tensors_is_refused(array: Array) -> None:
    for read in (messages.unpack_tensors, stored_state):
        with pytest.raises((ValueError, KeyError, SyntaxError)):
            cast(Any, read)(ArrayRecord({"safetensors": array}))


@pytest.mark.parametrize(("weighting", "files"), [("num_examples", 2), ("equal", 0)])
def test_a_round_leaves_no_reply_behind_and_an_equal_mean_writes_none(
    weighting: str, files: int, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(stored_states, "HELD_BYTES", 0)

    class Watched(LocalGrid):
        def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
            return self.watched(super().send_and_receive(messages, timeout=timeout))

        def watched(self, replies: Iterable[Message]) -> Iterable[Message]:
            for reply in replies:
                yield reply
                folder = tmp_path / "run" / FOLDER
                seen.append(len(list(folder.iterdir())) if folder.exists() else 0)

    (tmp_path / "run" / FOLDER).mkdir(parents=True)
    (tmp_path / "run" / FOLDER / "old.safetensors").write_bytes(b"of a run that was killed")
    grid = Watched({"p": honest, "q": honest}, load_channels(tiny_base))
    read_release(run_study(grid, study(tiny_base, tmp_path / "run", ["p", "q"], weighting=weighting), MODALITY))
    assert max(seen[2:]) == files  # after the answers to `join`
    assert not (tmp_path / "run" / FOLDER).exists()


def test_a_full_disk_is_no_sites_fault(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_states, "HELD_BYTES", 0)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    class Filling(LocalGrid):
        def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
            return self.filled(super().send_and_receive(messages, timeout=timeout))

        def filled(self, replies: Iterable[Message]) -> Iterable[Message]:
            for reply in replies:
                with monkeypatch.context() as patch:
                    patch.setattr("ld_server.stored_states.os.open", full)
                    yield reply

    grid = Filling({"p": honest, "q": honest}, load_channels(tiny_base))
    with pytest.raises(CheckpointError, match="is the disk full"):
        run_study(grid, study(tiny_base, tmp_path / "run", ["p", "q"], weighting="num_examples"), MODALITY)


class PlayedClient:
    """The SuperLink of three messages, which counts its requests; it gives each reply once."""

    def __init__(self) -> None:
        self.requests: list[list[str]] = []
        self.ready: list[str] = []

    def PullMessages(self, request: PullAppMessagesRequest) -> PullAppMessagesResponse:
        self.requests.append(list(request.message_ids))
        found = [one for one in self.ready if one in request.message_ids]
        self.ready = [one for one in self.ready if one not in found]
        protos = []
        for one in found:
            proto = ProtoMessage()
            proto.metadata.message_id, proto.metadata.reply_to_message_id = uuid4().hex, one
            protos.append(proto)
        trees = [ObjectTree(object_id=uuid4().hex) for _ in found]
        return PullAppMessagesResponse(messages_list=protos, message_object_trees=trees)


class PlayedGrid(HttpGrid):
    """Flower's grid up to where it asks for a reply's objects."""

    def __init__(self, client: PlayedClient) -> None:
        super().__init__(token="token")
        self._client = cast(Any, client)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return ["1", "2", "3"]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        answer = self._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=message_ids))
        assert [proto.metadata.reply_to_message_id for proto in answer.messages_list] == list(message_ids)
        if message_ids == ["2"]:
            raise ValueError("malformed")
        return [cast(Any, PlayedReply(message_ids[0]))]  # type: ignore[index]


class PlayedReply(Message):
    """A reply to a message."""

    def __init__(self, message_id: str) -> None:
        self.message_id = message_id


def test_one_request_asks_for_all_replies_and_each_is_pulled_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resilient_grid, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(resilient_grid, "_replies_to", lambda reply, message_id: reply.message_id == message_id)
    client = PlayedClient()
    tasks = [cast(Any, None)] * 3
    replies = ResilientGrid(PlayedGrid(client)).send_and_receive(tasks, timeout=30)
    client.ready = ["3", "2"]
    assert cast(Any, next(iter(replies))).message_id == "3"
    client.ready.append("1")
    assert [cast(Any, reply).message_id for reply in replies] == ["1"]
    assert client.requests[0] == ["1", "2", "3"]
    assert client.requests[-1] == ["1"]


def test_many_messages_are_pushed_in_several_requests() -> None:
    pushed: list[int] = []

    class CountingGrid(PlayedGrid):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            pushed.append(len(list(messages)))
            return [f"{len(pushed)}-{number}" for number in range(pushed[-1])]

    count = 2 * resilient_grid.PUSHED_AT_ONCE + 1
    ids = list(ResilientGrid(CountingGrid(PlayedClient())).push_messages([cast(Any, None)] * count))
    assert pushed == [resilient_grid.PUSHED_AT_ONCE, resilient_grid.PUSHED_AT_ONCE, 1]
    assert len(set(ids)) == count
