"""Factors that a study leaves at each site (aggregator `fedsa`): trained, kept, released where the site says so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity

from ld_client.kept_tensors import KeptTensors
from ld_client.round import handle_train
from ld_client.site_config import OWN_PARTS, SiteConfig, load_modality, load_site
from ld_client.validation import handle_validate
from ld_common.adapters.state_dict import read_tensors, write_tensors
from ld_common.core.config import from_mapping
from ld_common.core.errors import ReleaseError
from ld_common.core.state import State
from ld_common.pipeline import CounterfactualPipeline
from ld_common.protocol import messages as wire
from ld_common.protocol.messages import TrainResult, TrainTask
from ld_common.protocol.study_config import StudyConfig
from ld_common.release.release import load_release_base, read_release
from ld_server.checkpoint import read_checkpoint
from ld_server.server_app import run_study
from tests.client.test_crafted_rounds import OPTIONS, site, task_of  # noqa: F401  (`site` is a fixture)
from tests.server.test_resume import Crash
from tests.server.test_strategy import MODALITY, LocalGrid, honest, load_channels
from tests.server.test_strategy import study as study_of
from tests.simulations.test_secure_federation import Nodes, files, options  # noqa: F401  (`files` is a fixture)

FEDSA: dict[str, Any] = {"aggregation": {"name": "fedsa"}}


@pytest.fixture(autouse=True)
def task_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


class OwnSites(LocalGrid):
    """Sites with stores of one hospital and ledgers of their own; `releasing` ones let their factors leave."""

    def __init__(self, place: SiteConfig, folder: Path, names: list[str], releasing: str) -> None:
        super().__init__(dict.fromkeys(names, honest), 4)
        self.places = {
            name: replace(
                place,
                site=name,
                ledger=str(folder / name / "ledger.sqlite"),
                held_out=0.3,
                policy=replace(place.policy, release_own_part=name in releasing, min_patients=1),
            )
            for name in names
        }
        self.sent: dict[tuple[str, int], TrainResult] = {}
        for name in names:
            (folder / name).mkdir(parents=True)

    def _reply(self, message: Message) -> Message | None:
        name, _ = self.sites[message.metadata.dst_node_id]
        if message.metadata.message_type != "train":
            return super()._reply(message)
        result = handle_train(self.places[name], wire.unpack_task(message.content))
        self.sent[name, result.round] = replace(
            result, state={key: value.clone() for key, value in result.state.items()}, own=dict(result.own)
        )
        return Message(wire.pack_result(result), reply_to=message)


def kept_file(folder: Path, name: str, number: int) -> Path:
    (file,) = (folder / name / OWN_PARTS).glob(f"*/{number}.safetensors")
    return file


def of_factor(state: State, factor: str) -> State:
    return {name: value for name, value in state.items() if f"lora_{factor}" in name}


def same(first: State, second: State) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.slow
@pytest.mark.parametrize("keeps", ["b", "a"])
def test_each_site_trains_factors_of_its_own_and_releases_them_only_if_it_says_so(
    site: SiteConfig,  # noqa: F811
    tmp_path: Path,
    keeps: str,
) -> None:
    federation = {"rounds": 2, "sites": ["p", "q"], "wait_seconds": 0, "aggregation": {"name": "fedsa", "keeps": keeps}}
    values = {
        **OPTIONS,
        "base_model": site.base_model,
        "output": str(tmp_path / "study"),
        "drift": {"shape": "channel"},
        "federation": {**federation, "max_update_norm": 9.0},
    }
    grid = OwnSites(site, tmp_path, ["p", "q"], "p")
    release = read_release(run_study(grid, from_mapping(StudyConfig, values), load_modality(site)))
    shared, own = ("A", "B") if keeps == "b" else ("B", "A")
    for result in grid.sent.values():
        assert result.state.keys() == of_factor(dict(result.state), shared).keys()
    assert not grid.sent["q", 2].own
    assert sorted(release.own_parts) == ["p"]
    kept = {name: read_tensors(kept_file(tmp_path, name, 2))[0] for name in ("p", "q")}
    assert not same(kept["p"], kept["q"])  # their draws and what they began round 2 with differ
    assert same(release.own_parts["p"], kept["p"])
    assert same(of_factor(release.state, own), kept["p"])  # the mean over the only site that releases its own
    for name, value in of_factor(release.state, shared).items():
        mean = torch.stack([grid.sent[place, 2].state[name].double() for place in "pq"]).mean(0)
        torch.testing.assert_close(value.double(), mean)
    card = (release.folder / "README.md").read_text()
    assert f"Each site has its own {own} of the adapter; it is the mean of p, or one (`--site NAME`)." in card

    at_p = release.of_site("p")
    assert (at_p.site, at_p.drift) == ("p", release.site_drifts["p"])
    assert same(of_factor(at_p.state, own), kept["p"])
    with pytest.raises(ReleaseError, match="does not hold the factors of 'q', but of p"):
        release.of_site("q")
    at_q = release.of_site(str(kept_file(tmp_path, "q", 2)))  # at the site itself
    assert (at_q.site, at_q.drift) == ("q", release.site_drifts["q"])
    assert same(of_factor(at_q.state, own), kept["q"])
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    outputs = []
    for drawn in (at_p, at_q):
        base = load_release_base(drawn)
        latents = latents[..., : base.latent_shape[1], : base.latent_shape[2]]
        with torch.no_grad():
            outputs.append(base.unet(latents, 10, base.embed(["a scan"])).sample)
    assert not torch.allclose(*outputs)


def test_a_file_of_another_study_or_of_other_tensors_is_refused(site: SiteConfig, tmp_path: Path) -> None:  # noqa: F811
    values = {
        **OPTIONS,
        "base_model": site.base_model,
        "output": str(tmp_path / "study"),
        "federation": {"rounds": 1, "sites": ["p", "q"], "wait_seconds": 0, **FEDSA},
    }
    grid = OwnSites(site, tmp_path, ["p", "q"], "")
    release = read_release(run_study(grid, from_mapping(StudyConfig, values), load_modality(site)))
    assert release.own_parts == {}
    assert "without a site's file, the adapter changes nothing" in (release.folder / "README.md").read_text()
    assert not any(bool(value.any()) for value in of_factor(release.state, "B").values())
    own, metadata = read_tensors(kept_file(tmp_path, "q", 1))
    wrong = {
        "of another study": (own, {**metadata, "study_digest": "0" * 64}),
        "NaN": ({name: value * float("nan") for name, value in own.items()}, metadata),
        "8 tensors are missing": ({"x": torch.zeros(1)}, metadata),
        "cannot name a site": (own, {**metadata, "site": "../x"}),
        "no factors of its own": (own, {**metadata, "kind": "residuals"}),
        "is of round 7, the release of round 1": (own, {**metadata, "round": "7"}),
        "missing": (dict(list(own.items())[:1]), metadata),
        "tensors are missing": ({}, metadata),
        "tensors": (of_factor(release.state, "A"), metadata),
    }
    for reason, (tensors, named) in wrong.items():
        write_tensors(tmp_path / "own.safetensors", tensors, named)
        with pytest.raises(ReleaseError, match=reason):
            release.of_site(str(tmp_path / "own.safetensors"))
    with pytest.raises(ReleaseError, match=r"nowhere\.safetensors"):
        release.of_site(str(tmp_path / "nowhere.safetensors"))
    with pytest.raises(ReleaseError, match="but of no site"):
        CounterfactualPipeline.from_release(release.folder, site.base_model, site="q")


def test_a_validation_and_the_next_round_begin_with_what_the_site_kept(site: SiteConfig, tmp_path: Path) -> None:  # noqa: F811
    place = OwnSites(site, tmp_path, ["p"], "").places["p"]

    def task(number: int) -> TrainTask:
        return task_of(place, number, federation={**OPTIONS["federation"], **FEDSA})

    def loss(task: TrainTask) -> float:
        scores = handle_validate(place, task).scores
        assert scores is not None
        return scores["loss"]

    sent = handle_train(place, task(1))
    after = replace(task(1), state={**task(1).state, **sent.state})
    study_digest = kept_file(tmp_path, "p", 1).parent.name
    kept = KeptTensors(tmp_path / "p", OWN_PARTS, study_digest, "p")
    own = kept.before(2, of_factor(after.state, "B"))
    with_own = loss(after)
    handle_train(place, task(2))
    grown = kept.before(3, own)
    for name, value in own.items():
        assert 0 < float((grown[name] - value).abs().max()) < 2 * float(value.abs().max() + 0.01)
    kept_file(tmp_path, "p", 1).unlink()
    assert loss(replace(after, nonce="again")) != with_own


@pytest.mark.slow
def test_a_secure_sum_holds_the_shared_factors_alone(
    smallest_base: Path,
    files: dict[str, Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    for name, file in files.items():
        (tmp_path / name).mkdir()
        text = f"{file.read_text()}ledger: {tmp_path / name / 'ledger.sqlite'}\n"
        file.write_text(text.replace("policy: {", "policy: {release_own_part: true, ") if name == "p" else text)
    values = options(smallest_base, tmp_path / "study", **FEDSA)
    grid = Nodes(files)
    release = read_release(
        run_study(grid, from_mapping(StudyConfig, values), load_modality(load_site(files["p"]))),
    )
    assert sorted(release.own_parts) == ["p"]
    assert same(of_factor(release.state, "B"), release.own_parts["p"])
    own = sum(value.numel() * 4 for value in release.own_parts["p"].values())
    shared = sum(value.numel() * 4 for value in of_factor(release.state, "A").values())
    for record in release.manifest["rounds"]:
        sent = {name: entry["uplink_bytes"] for name, entry in record["sites"].items()}
        assert sent["p"] - sent["q"] == own
        assert shared < sent["q"] < shared + 200  # a drift of 4 channels and a few words besides


class Owners(LocalGrid):
    """Sites with factors that follow from name and round; the server dies in round `crash`, p gives up in `gone`."""

    def __init__(self, base: Path, crash: int = 0, gone: int = 9) -> None:
        super().__init__(dict.fromkeys("pq", honest), load_channels(base))
        self.crash, self.gone = crash, gone

    def _good(self, name: str, task: TrainTask) -> TrainResult:
        if task.round == self.crash:
            raise Crash
        good = super()._good(name, task)
        state = of_factor(dict(good.state), "A")
        shift = task.round + (name == "q")
        own = {key: value + 0.1 * shift for key, value in of_factor(task.state, "B").items()}
        return replace(good, state=state, own={} if name == "p" and task.round >= self.gone else own)


def test_own_factors_are_in_the_checkpoint_and_leave_with_a_sites_permission(tiny_base: Path, tmp_path: Path) -> None:
    whole, parts, less = (study_of(tiny_base, tmp_path / name, ["p", "q"], rounds=3, **FEDSA) for name in "abc")
    unbroken = read_release(run_study(Owners(tiny_base), whole, MODALITY))
    with pytest.raises(Crash):
        run_study(Owners(tiny_base, 3), parts, MODALITY)
    assert sorted(read_checkpoint(tmp_path / "b").own_parts) == ["p", "q"]
    resumed = read_release(run_study(Owners(tiny_base), parts, MODALITY, resume=True))
    assert same(resumed.state, unbroken.state)
    for name in "pq":
        assert same(resumed.own_parts[name], unbroken.own_parts[name])
        for value in resumed.own_parts[name].values():
            torch.testing.assert_close(value, torch.full_like(value, 0.1 * (3 + (name == "q"))))
    withdrawn = read_release(run_study(Owners(tiny_base, gone=3), less, MODALITY))
    assert sorted(withdrawn.own_parts) == ["q"]


class Scored(Owners):
    """Every site scores each round worse than the one before."""

    def _reply(self, message: Message) -> Message | None:
        if message.metadata.message_type != "evaluate":
            return super()._reply(message)
        name, _ = self.sites[message.metadata.dst_node_id]
        number = wire.unpack_task(message.content).round
        scores = {"loss": 0.1 * number, "visits": 5.0}
        return Message(wire.pack_result(TrainResult(name, number, {}, None, None, scores=scores)), reply_to=message)


def test_the_best_round_brings_back_no_factors_that_a_site_took_back(tiny_base: Path, tmp_path: Path) -> None:
    study = study_of(tiny_base, tmp_path, ["p", "q"], rounds=3, keep="best", **FEDSA)
    release = read_release(run_study(Scored(tiny_base, gone=3), study, MODALITY))
    assert (release.manifest["round"], sorted(release.own_parts)) == (1, ["q"])
    for value in release.own_parts["q"].values():
        torch.testing.assert_close(value, torch.full_like(value, 0.2))


def test_a_site_keeps_its_factors_of_every_round_that_may_be_the_best(
    site: SiteConfig,  # noqa: F811
    tmp_path: Path,
) -> None:
    place = OwnSites(site, tmp_path, ["p"], "").places["p"]
    for keep, kept in (("last", 4), ("best", 6)):
        federation = {"rounds": 6, "max_update_norm": 9.0, "keep": keep, **FEDSA}
        for number in range(1, 7):
            handle_train(place, task_of(place, number, federation=federation))
        (folder,) = [path for path in (tmp_path / "p" / OWN_PARTS).iterdir() if len(list(path.iterdir())) == kept]
        assert (folder / "6.safetensors").exists()


BAD_OWN = {
    "of a study that leaves none": (
        {},
        lambda own: {"x": torch.zeros(1)},
        "leaves none at the sites",
    ),
    "of another shape": (FEDSA, lambda own: {name: value[:1] for name, value in own.items()}, "shape"),
    "not numbers": (FEDSA, lambda own: {name: value * float("nan") for name, value in own.items()}, "NaN"),
    "huge": (FEDSA, lambda own: {name: value + 1e6 for name, value in own.items()}, "its own factors have norm"),
    "some": (FEDSA, lambda own: dict(list(own.items())[:1]), "missing"),
    "shared ones": (FEDSA, lambda own: {name.replace("_B", "_A"): value for name, value in own.items()}, "missing"),
}


@pytest.mark.parametrize("kind", sorted(BAD_OWN))
def test_a_site_that_sends_wrong_factors_is_left_out(tiny_base: Path, tmp_path: Path, kind: str) -> None:
    federation, change, reason = BAD_OWN[kind]

    class Liar(Owners):
        def _good(self, name: str, task: TrainTask) -> TrainResult:
            good = LocalGrid._good(self, name, task)
            state = dict(good.state) if not federation else of_factor(dict(good.state), "A")
            own = change(of_factor(task.state, "B")) if name == "z" else {}
            return replace(good, state=state, own=own)

    grid = Liar(tiny_base)
    grid.sites[99] = ("z", honest)
    study = study_of(tiny_base, tmp_path, ["p", "q", "z"], rounds=1, **federation)
    (record,) = read_release(run_study(grid, study, MODALITY)).manifest["rounds"]
    assert sorted(record["sites"]) == ["p", "q"]
    assert reason in record["left_out"]["z"]
