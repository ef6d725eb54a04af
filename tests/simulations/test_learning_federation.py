"""Aggregators of LoRA and validation through the real ClientApp and strategy."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message

from ld_client.privacy.ledger import VALIDATION, Ledger
from ld_client.site_config import load_modality, load_site
from ld_client.validation import HeldOutError, handle_validate
from ld_common.adapters.base import inject
from ld_common.adapters.low_rank import dense_update, down_names, rank_of
from ld_common.adapters.registry import read_adapter
from ld_common.core.config import from_mapping, to_mapping
from ld_common.core.errors import ConfigError, PolicyError
from ld_common.core.state import State
from ld_common.diffusion.base_model import base_digest, load_denoiser
from ld_common.protocol import messages
from ld_common.protocol.messages import LOSS, SCORED_VISITS, TrainTask
from ld_common.protocol.study_config import StudyConfig
from ld_common.release.release import Release, load_release_base
from ld_server.checkpoint import read_best, read_checkpoint
from ld_server.server_app import run_study
from tests.simulations.test_secure_federation import Nodes, files, options, run, task_identity

__all__ = ["files", "task_identity"]

SITES = ["p", "q", "r"]


@pytest.fixture
def three(files: dict[str, Path]) -> dict[str, Path]:
    """Three sites that hold some patients out, with ledgers of their own."""
    for name, file in files.items():
        file.write_text(f"{file.read_text()}\nheld_out: 0.4\nledger: {name}.sqlite\n")
    return {name: files[name] for name in SITES}


def setting(base: Path, output: Path, aggregation: dict[str, Any] | None = None, **federation: Any) -> dict[str, Any]:
    federation |= {"sites": SITES, "secure_aggregation": False, "min_train_nodes": 2}
    if aggregation:
        federation["aggregation"] = aggregation
    values = options(base, output, **federation)
    return {**values, "adapter": {"name": "lora", "rank": 2, "targets": ["to_k"]}, "seed": 3}


def updates(state: State) -> dict[str, torch.Tensor]:
    return {name: dense_update(state, name) for name in down_names(state)}


class Recording(Nodes):
    """Nodes that keep a copy of each state that a site sent: the server frees the replies."""

    def __init__(self, files: dict[str, Path]) -> None:
        super().__init__(files)
        self.states: list[State] = []

    def _reply(self, message: Message) -> Message | None:
        reply = super()._reply(message)
        if reply is not None and message.metadata.message_type == "train":
            assert messages.unpack_error(reply.content) is None
            self.states.append(dict(messages.unpack_result(reply.content).state))
        return reply


SLOW = pytest.mark.slow


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["rolora", "fedex", *(pytest.param(name, marks=SLOW) for name in ("ffa", "flexlora", "flora", "fedadam"))],
)
def test_two_rounds_of_each_aggregator_give_a_release_that_loads(
    name: str, smallest_base: Path, three: dict[str, Path], tmp_path: Path
) -> None:
    aggregation = {"name": name, **({"eta": 0.01} if name == "fedadam" else {})}
    release = run(Nodes(three), setting(smallest_base, tmp_path, aggregation), three)
    assert all(record["counted"] for record in release.manifest["rounds"])
    assert max(float(update.abs().max()) for update in updates(release.state).values()) > 1e-5
    base, adapted = load_denoiser(str(smallest_base)), load_release_base(release, str(smallest_base))
    plain, merged = dict(base.unet.named_parameters()), dict(adapted.unet.named_parameters())
    for layer, update in updates(release.state).items():
        weight = layer.removeprefix("unet.").replace("lora_A.weight", "weight")
        torch.testing.assert_close((merged[weight] - plain[weight]).double(), update, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_the_release_of_what_is_carried_holds_all_rounds_and_is_of_its_own_rank(
    smallest_base: Path, three: dict[str, Path], tmp_path: Path
) -> None:
    """FLoRA: the release is the sum over rounds of the sites' mean product."""
    grid = Recording(three)
    values = setting(smallest_base, tmp_path, {"name": "flora"}, rounds=2)
    release = run(grid, values, three)
    states = grid.states
    assert len(states) == 6
    expected = {name: torch.zeros_like(update) for name, update in updates(states[0]).items()}
    for state in states:
        for name, update in updates(state).items():
            expected[name] += update / 3
    found = updates(release.state)
    for name, update in expected.items():
        torch.testing.assert_close(found[name], update, rtol=1e-4, atol=1e-7)
    assert release.study.adapter["rank"] == rank_of(release.state) > 2
    assert values["adapter"]["rank"] == 2


@SLOW
def test_a_killed_server_goes_on_with_what_is_carried(
    smallest_base: Path, three: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ld_client.round.training_secret", lambda store: b"")
    studies = {
        name: from_mapping(StudyConfig, setting(smallest_base, tmp_path / name, {"name": "fedex"}, rounds=3))
        for name in ("whole", "broken")
    }
    modality = load_modality(load_site(three["p"]))
    whole = run_study(Nodes(three), studies["whole"], modality)

    class Broken(Nodes):
        def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
            begun = (tmp_path / "broken/checkpoint.safetensors").exists()
            if begun and read_checkpoint(tmp_path / "broken").round == 2:
                raise KeyboardInterrupt
            return super().send_and_receive(messages, timeout=timeout)

    with pytest.raises(KeyboardInterrupt):
        run_study(Broken(three), studies["broken"], modality)
    resumed = run_study(Nodes(three), studies["broken"], modality, resume=True)
    weights = "pytorch_lora_weights.safetensors"
    assert (resumed / weights).read_bytes() == (whole / weights).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("flexlora", marks=SLOW), "flora"])
def test_a_site_of_a_smaller_rank_takes_part(
    name: str, smallest_base: Path, three: dict[str, Path], tmp_path: Path
) -> None:
    grid = Recording(three)
    release = run(grid, setting(smallest_base, tmp_path, {"name": name}, ranks={"q": 1}), three)
    assert sorted(map(rank_of, grid.states)) == [1, 1, 2, 2, 2, 2]
    assert all(set(record["sites"]) == set(SITES) for record in release.manifest["rounds"])
    assert rank_of(release.state) >= 2


def scores(release: Release) -> list[dict[str, dict[str, float]]]:
    return [record["validation"] for record in release.manifest["rounds"]]


@pytest.mark.slow
def test_sites_score_each_round_on_patients_who_are_held_out(
    smallest_base: Path, three: dict[str, Path], tmp_path: Path
) -> None:
    release = run(Nodes(three), setting(smallest_base, tmp_path, rounds=3), three)
    for record in release.manifest["rounds"]:
        assert set(record["validation"]) == set(SITES)
        losses = [values[LOSS] for values in record["validation"].values()]
        assert len(set(losses)) == 1  # one adapter, one store
        assert record["validation_mean"][LOSS] == pytest.approx(losses[0])
        assert record["validation_mean"][SCORED_VISITS] == 3 * record["validation"]["p"][SCORED_VISITS]
    by_round = [values["p"][LOSS] for values in scores(release)]
    assert len(set(by_round)) == 3
    entries = Ledger(load_site(three["p"]).ledger_path).entries()
    assert [entry.round for entry in entries if entry.purpose == VALIDATION] == [1, 2, 3]


@SLOW
def test_every_other_round_and_the_last_are_scored(smallest_base: Path, three: dict[str, Path], tmp_path: Path) -> None:
    release = run(Nodes(three), setting(smallest_base, tmp_path, rounds=3, validate_every=2), three)
    assert [bool(values) for values in scores(release)] == [False, True, True]
    release = run(Nodes(three), setting(smallest_base, tmp_path / "off", rounds=2, validate_every=0), three)
    assert scores(release) == [{}, {}]


@pytest.mark.slow
def test_a_site_without_held_out_patients_is_a_line_and_is_asked_once(
    smallest_base: Path, three: dict[str, Path], tmp_path: Path
) -> None:
    three["q"].write_text(three["q"].read_text().replace("held_out: 0.4", "held_out: 0.0"))
    grid = Nodes(three)
    release = run(grid, setting(smallest_base, tmp_path), three)
    for record in release.manifest["rounds"]:
        assert set(record["validation"]) == {"p", "r"}
        assert "holds out no patients" in record["not_validated"]["q"]
        assert "q" in record["sites"]
    assert [name for kind, name, _ in grid.sent if kind == "evaluate"].count("q") == 1


class Worse(Nodes):
    """Sites whose scores get worse after round 2, and whose node fails once."""

    def _reply(self, message: Any) -> Any:
        reply = super()._reply(message)
        if message.metadata.message_type == "evaluate":
            result = messages.unpack_result(reply.content)
            assert result.scores is not None
            loss = {1: 3.0, 2: 1.0}.get(result.round, 2.0)
            told = replace(result, scores={**result.scores, LOSS: loss})
            reply.content = messages.pack_result(told)
        return reply


@pytest.mark.slow
def test_the_best_round_is_released_and_patience_ends_the_study(
    smallest_base: Path, three: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = setting(smallest_base, tmp_path, rounds=6, keep="best", patience=2)
    release = run(Worse(three), values, three)
    assert [record["round"] for record in release.manifest["rounds"]] == [1, 2, 3, 4]
    assert "the release is of round 2" in capsys.readouterr().out
    card = (tmp_path / "release/README.md").read_text()
    assert "Loss on held-out patients: 3 after round 1, 2 after round 4. The release is of round 2, the lowest." in card
    best = read_best(tmp_path)
    assert best.round == 2
    last = read_checkpoint(tmp_path).state
    for name, value in best.state.items():
        assert torch.equal(release.state[name], value)
    assert any(not torch.equal(release.state[name], value) for name, value in last.items())
    again = run_study(Worse(three), from_mapping(StudyConfig, values), release.modality, resume=True)
    assert json.loads((again / "manifest.json").read_text())["rounds"][-1]["round"] == 4  # it is over, and stays so


@pytest.mark.slow
@pytest.mark.parametrize(
    "content",
    [
        {LOSS: float("nan"), SCORED_VISITS: 5.0},
        pytest.param({SCORED_VISITS: 5.0}, marks=SLOW),
        pytest.param({LOSS: 1.0, SCORED_VISITS: 0.0}, marks=SLOW),
        pytest.param({LOSS: 1.0, SCORED_VISITS: 5.0, **{f"x{number}": 0.0 for number in range(20)}}, marks=SLOW),
    ],
)
def test_scores_that_cannot_be_are_left_out(
    content: dict[str, float], smallest_base: Path, three: dict[str, Path], tmp_path: Path
) -> None:
    class Liar(Nodes):
        def _reply(self, message: Any) -> Any:
            reply = super()._reply(message)
            if message.metadata.message_type == "evaluate" and self.sites[message.metadata.dst_node_id][0] == "r":
                reply.content = messages.pack_result(replace(messages.unpack_result(reply.content), scores=content))
            return reply

    release = run(Liar(three), setting(smallest_base, tmp_path, rounds=1), three)
    (record,) = release.manifest["rounds"]
    assert set(record["validation"]) == {"p", "q"}
    assert "scores" in record["not_validated"]["r"]


def task_of(base: Path, study: StudyConfig, shift: float = 0.0) -> TrainTask:
    state = inject(load_denoiser(str(base)), read_adapter(study.adapter), study.seed).trainable_state()
    moved = {name: value + shift for name, value in state.items()}
    return TrainTask(moved, 1, json.dumps(to_mapping(study)), base_digest(str(base)), "")


@pytest.mark.slow
def test_a_round_is_scored_for_one_set_of_weights_only(
    smallest_base: Path, three: dict[str, Path], tmp_path: Path
) -> None:
    study = from_mapping(StudyConfig, setting(smallest_base, tmp_path))
    site = load_site(three["p"])
    task = replace(task_of(smallest_base, study), modality_digest=load_modality(site).digest())
    first, again = handle_validate(site, task).scores, handle_validate(site, task).scores
    assert first == again
    moved = replace(task, state={name: value + 0.01 for name, value in task.state.items()})
    with pytest.raises(PolicyError, match="was scored here from other weights"):
        handle_validate(site, moved)
    few = replace(site, policy=replace(site.policy, min_patients=100))
    with pytest.raises((HeldOutError, PolicyError), match="min_patients"):
        handle_validate(few, task)


@pytest.mark.slow
def test_private_and_secret_studies_score_nothing(smallest_base: Path, three: dict[str, Path], tmp_path: Path) -> None:
    grid = Nodes(three)
    values = setting(smallest_base, tmp_path)
    values["federation"]["secure_aggregation"] = True
    release = run(grid, values, three)
    assert not any(kind == "evaluate" for kind, _, _ in grid.sent)
    assert scores(release) == [{}, {}]
    study = from_mapping(StudyConfig, values)
    site = load_site(three["p"])
    task = replace(task_of(smallest_base, study), modality_digest=load_modality(site).digest())
    with pytest.raises(PolicyError, match="does not validate"):
        handle_validate(site, task)
    with pytest.raises(ConfigError, match="withholds"):
        from_mapping(StudyConfig, {**values, "federation": {**values["federation"], "keep": "best"}})
    with pytest.raises(ConfigError, match="withholds losses"):
        from_mapping(StudyConfig, {"privacy": {"enabled": True}, "federation": {"sites": ["a", "b"], "patience": 1}})
