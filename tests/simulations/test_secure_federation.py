"""Secure aggregation through the real ClientApp and strategy gives the plain average, whoever drops out."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from ld_client.client_app import app
from ld_client.site_config import load_modality, load_site
from ld_common.core.config import from_mapping
from ld_common.core.errors import ConfigError, FederationError
from ld_common.protocol import messages as wire
from ld_common.protocol.secagg.messages import Stage
from ld_common.protocol.study_config import StudyConfig
from ld_common.release.release import Release, read_release
from ld_server.server_app import run_study
from tests.server.test_strategy import LocalGrid
from tests.support.site_homes import index_site

SITES = ["p", "q", "r", "s", "t"]


@pytest.fixture(autouse=True)
def task_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


class Nodes(LocalGrid):
    """Nodes that run the real ClientApp; a site in `silent` stops answering at its stage, in its round."""

    def __init__(self, files: dict[str, Path], silent: dict[str, tuple[str, int]] | None = None) -> None:
        super().__init__({name: lambda result: None for name in files}, 4)
        self.contexts = {
            node: Context(1, node, {"site-config": str(files[name])}, RecordDict(), {})
            for node, (name, _) in self.sites.items()
        }
        self.silent, self.rounds, self.sent = silent or {}, 0, []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        batch = list(messages)
        self.rounds += any(message.metadata.message_type == "query.keys" for message in batch)
        return super().send_and_receive(batch, timeout=timeout)

    def _reply(self, message: Message) -> Message | None:
        node, kind = message.metadata.dst_node_id, message.metadata.message_type
        name, _ = self.sites[node]
        stages = ["query.keys", "query.shares", "train", "query.unmask"]
        if name in self.silent and kind in stages:
            stage, number = self.silent[name]
            if self.rounds >= number and stages.index(kind) >= stages.index(stage):
                return None
        reply: Message = app(message, self.contexts[node])
        reply.metadata.__dict__["_message_id"] = str(uuid4())
        self.sent.append((kind, name, reply.content))
        return reply


@pytest.fixture
def files(site_yaml: Path, tiny_base: Path, smallest_base: Path) -> dict[str, Path]:
    """Site configs of five sites with one store of the smallest base."""
    site_yaml.write_text(site_yaml.read_text().replace(str(tiny_base), str(smallest_base)))
    index_site(load_site(site_yaml))
    text = site_yaml.read_text()
    files = {name: site_yaml.with_name(f"{name}.yaml") for name in SITES}
    for name, file in files.items():
        file.write_text(text.replace("site: aster", f"site: {name}"))
    return files


def options(smallest_base: Path, output: Path, **federation: Any) -> dict[str, Any]:
    settings = {"rounds": 2, "sites": SITES, "wait_seconds": 0, "weighting": "equal", "secure_aggregation": True}
    return {
        "base_model": str(smallest_base),
        "output": str(output),
        "adapter": {"name": "lora", "rank": 1, "targets": ["to_k"]},
        "training": {"steps": 1, "batch_size": 2},
        "federation": {**settings, **federation},
    }


def run(grid: Nodes, options: dict[str, Any], files: dict[str, Path]) -> Release:
    study = from_mapping(StudyConfig, options)
    return read_release(run_study(grid, study, load_modality(load_site(files["p"]))))


@pytest.mark.slow
def test_the_adapter_is_the_plain_averages_within_quantisation_and_no_site_is_seen(
    smallest_base: Path, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ld_client.round.training_secret", lambda store: b"")  # else each study has draws of its own
    grid = Nodes(files)
    masked = run(grid, options(smallest_base, tmp_path / "masked"), files)
    plain = run(Nodes(files), options(smallest_base, tmp_path / "plain", secure_aggregation=False), files)
    assert masked.state.keys() == plain.state.keys()
    for name, value in plain.state.items():
        assert torch.allclose(masked.state[name], value, atol=1e-5)
        assert value.abs().max() > 1e-4
    assert masked.drift is not None
    assert plain.drift is not None
    assert torch.allclose(masked.drift.mean, plain.drift.mean, atol=1e-5)
    assert masked.site_drifts == {}
    card = (tmp_path / "masked/release/README.md").read_text()
    assert "| p | withheld | withheld | 2 | hidden in the sum |" in card
    assert "| mean of the sites |" in card
    assert "Secure aggregation" in card
    for record in masked.manifest["rounds"]:
        assert record["counted"]
        assert list(record["sites"]) == SITES
        for site in record["sites"].values():
            assert {value for key, value in site.items() if key != "uplink_bytes"} == {None}
    for kind, _, content in grid.sent:
        if kind == "train":
            assert not any(len(record) for record in content.array_records.values())
            assert not any(len(record) for record in content.metric_records.values())
            assert set(content.config_records) == {"site", wire.SECURE}


SLOW = pytest.mark.slow


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage",
    [
        pytest.param("query.keys", marks=SLOW),
        pytest.param("query.shares", marks=SLOW),
        pytest.param("train", marks=SLOW),
        "query.unmask",
    ],
)
def test_a_site_may_drop_out_at_any_stage(
    smallest_base: Path, files: dict[str, Path], tmp_path: Path, stage: str
) -> None:
    release = run(Nodes(files, {"r": (stage, 2)}), options(smallest_base, tmp_path / "study"), files)
    first, second = release.manifest["rounds"]
    assert first["counted"]
    assert second["counted"]
    assert ("r" in second["sites"]) == (stage == "query.unmask")  # its vector came before


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage", [pytest.param("query.shares", marks=SLOW), pytest.param("train", marks=SLOW), "query.unmask"]
)
def test_below_the_threshold_a_round_fails_clean_and_the_study_keeps_what_it_had(
    smallest_base: Path, files: dict[str, Path], tmp_path: Path, stage: str
) -> None:
    grid = Nodes(files, {name: (stage, 2) for name in "rst"})
    release = run(grid, options(smallest_base, tmp_path / "study", secure_threshold=4), files)
    first, second = release.manifest["rounds"]
    assert (first["counted"], second["counted"]) == (True, False)
    assert "4 are needed" in second["failure"]
    assert second["sites"] == {}
    assert first["mean_update_norm"] > 0
    assert second["mean_update_norm"] is None
    unmasked = [kind for kind, _, _ in grid.sent if kind == "query.unmask"]
    assert len(unmasked) == (7 if stage == "query.unmask" else 5)


def test_a_site_refuses_a_sum_over_fewer_sites_than_its_policy_says(
    smallest_base: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    for file in files.values():
        file.write_text(file.read_text().replace("min_patients: 1", "min_patients: 1, min_summed_sites: 5"))
    with pytest.raises(FederationError, match="no round"):
        run(Nodes(files), options(smallest_base, tmp_path / "study", rounds=1), files)
    rounds = (tmp_path / "study/rounds.jsonl").read_text()
    assert "0 of 5 sites" in rounds


def test_a_stage_out_of_turn_is_refused_with_a_code(
    smallest_base: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    study = from_mapping(StudyConfig, options(smallest_base, tmp_path))
    grid = Nodes(files)
    node = next(iter(grid.sites))
    message = Message(wire.pack_secure({"session": b"x"}), dst_node_id=node, message_type=f"query.{Stage.UNMASK.value}")
    (reply,) = grid.send_and_receive([message])
    assert wire.unpack_error(reply.content) == wire.ERROR_SENTENCES["federation"]
    assert study.withholds_numbers


@pytest.mark.parametrize(
    ("federation", "words"),
    [
        ({"weighting": "num_examples"}, "weighting"),
        ({"sites": ["p", "q"]}, "3 sites"),
        ({"secure_clip": 0.0}, "secure_clip is 0"),
        ({"secure_threshold": 9}, "secure_threshold is 9"),
    ],
)
def test_a_study_that_cannot_be_summed_securely_is_refused(
    smallest_base: Path, tmp_path: Path, federation: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        from_mapping(StudyConfig, options(smallest_base, tmp_path, **federation))
