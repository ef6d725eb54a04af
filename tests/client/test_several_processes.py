"""Several processes train a site's round together: the same adapter as one process, and no process is left behind."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.multiprocessing as spawning
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor

from ld_client import client_app as app
from ld_client.data.store import open_store
from ld_client.privacy import dp_sgd
from ld_client.round import handle_train
from ld_client.several_processes import FOLDERS, process_count, train_in_processes
from ld_client.site_config import SiteConfig, load_site
from ld_client.train import learning_rate, round_draws
from ld_client.training_process import RoundWork, join_ranks
from ld_common.adapters.base import AdaptedModel, inject
from ld_common.adapters.registry import read_adapter
from ld_common.core.config import from_mapping, to_mapping
from ld_common.core.errors import ConfigError, DeploymentError, StoreError
from ld_common.core.state import State
from ld_common.diffusion.base_model import base_digest, load_denoiser
from ld_common.diffusion.drift import LatentDrift
from ld_common.diffusion.ranks import ALONE, Ranks, SharedComputing
from ld_common.diffusion.training import Losses, PriorImages, TrainingData, optimize
from ld_common.protocol import messages
from ld_common.protocol.messages import TrainTask
from ld_common.protocol.study_config import StudyConfig
from tests.support.site_homes import approved, asked, index_site, make_home, node_of, task_of

CLOSE = 1e-6
"""Largest difference of a number of an adapter that one process and several train."""
ROUNDED = 1e-4
"""Of all weights of a network: some, such as a bias before a normalisation, have a gradient of rounding errors alone,
and AdamW divides a gradient by its size."""
TWO = ["launcher=accelerate", "training_processes=2"]
LORA = {"name": "lora", "rank": 2, "targets": ["to_k", "to_v"]}
TRAINING = {"steps": 2, "batch_size": 4}
PRIVACY = {"enabled": True, "patients": 4, "expected_batch_size": 3, "target_delta": 1e-5}
PATIENTS = ["a", "a", "b", "c", "c", "c", "d"]
PLAIN: dict[str, dict[str, Any]] = {
    "lora": {"adapter": LORA, "training": TRAINING},
    "uneven": {"adapter": LORA, "training": {"steps": 3, "batch_size": 3, "noise_offset": 0.1}},
    "one row": {"adapter": LORA, "training": {"steps": 3, "batch_size": 1}},
    "accumulated": {"adapter": LORA, "training": TRAINING | {"gradient_accumulation": 3, "min_snr_gamma": 5.0}},
    "proximal": {"adapter": LORA, "training": TRAINING | {"proximal_mu": 0.1, "conditioning_dropout_prob": 0.5}},
    "prior": {"adapter": LORA, "training": TRAINING | {"batch_size": 3}},
    "dreambooth": {"adapter": {"name": "dreambooth"}, "training": TRAINING | {"batch_size": 3}},
    "tokens": {"adapter": {"name": "textual_inversion"}, "training": TRAINING | {"batch_size": 3}},
    "one token": {"adapter": {"name": "textual_inversion"}, "training": TRAINING | {"batch_size": 1}},
    "image": {"adapter": {"name": "instruct_pix2pix", "rank": 2}, "training": TRAINING | {"batch_size": 3}},
    "one image": {"adapter": {"name": "instruct_pix2pix", "rank": 2}, "training": TRAINING | {"batch_size": 1}},
}
PRIVATE: dict[str, dict[str, Any]] = {
    "lora": {"privacy": {"max_grad_norm": 0.01}},
    "less clipping": {"privacy": {"max_grad_norm": 0.3}},
    "several draws in chunks": {"privacy": {"augmentation_multiplicity": 3, "ema": 0.5}},
    "often empty": {"privacy": {"expected_batch_size": 2, "patients": 8}, "training": {"steps": 8}},
    "prior": {},
    "full": {"adapter": {"name": "full"}, "training": {"batch_size": 8}},
    "image": {"adapter": {"name": "instruct_pix2pix", "rank": 2}},
}


def study_of(case: dict[str, Any], private: bool = False) -> StudyConfig:
    found: dict[str, Any] = {"adapter": LORA, "drift": {"shape": "none"}} | case
    if private:
        found["privacy"] = PRIVACY | case.get("privacy", {})
        found["training"] = {"steps": 4, "batch_size": 4} | case.get("training", {})
    return from_mapping(StudyConfig, found)


def adapted_of(base: Path, study: StudyConfig) -> AdaptedModel[Any]:
    adapted = inject(load_denoiser(str(base)), read_adapter(study.adapter), study.seed)
    generator = torch.Generator().manual_seed(3)
    for parameter in adapted.trainable.values():  # B of a LoRA starts at zero, where A has no gradient
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return adapted


def data_of(adapted: AdaptedModel[Any], preserving: bool) -> TrainingData:
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    prompts = ["woman" if row % 3 else "man" for row in range(len(PATIENTS))]
    prior = None
    if preserving:
        prior = PriorImages(draw(5, 4, 4, 4), adapted.model.embed(["person"])[0].detach(), 0.5)
    drift = LatentDrift(draw(4, 1, 1))
    return TrainingData(draw(len(PATIENTS), 4, 4, 4), prompts, drift, prior, PATIENTS, draw(len(PATIENTS), 3))


def trained(base: Path, case: dict[str, Any], ranks: Ranks = ALONE) -> tuple[State, Losses]:
    study = study_of(case)
    preserving = case is PLAIN["prior"] or case is PLAIN["dreambooth"]
    adapted = adapted_of(base, study)
    return trained_model(adapted, study, data_of(adapted, preserving), ranks)


def trained_model(
    adapted: AdaptedModel[Any], study: StudyConfig, data: TrainingData, ranks: Ranks = ALONE
) -> tuple[State, Losses]:
    draws = round_draws(study, 1, "aster", b"secret")
    losses = optimize(
        adapted.model,
        adapted.trainable,
        data,
        study.training,
        draws,
        lambda step: learning_rate(study, 1, step),
        SharedComputing(ranks=ranks),
    )
    return adapted.trainable_state(), losses


def privately_trained(base: Path, case: dict[str, Any], ranks: Ranks = ALONE) -> State:
    """As at a site, but the numbers of the operating system are those of a seed, another one in each process."""
    study = study_of(case, private=True)
    adapted = adapted_of(base, study)
    secret = torch.Generator().manual_seed(10 + ranks.rank)
    uniform = lambda shape: torch.rand(tuple(shape), generator=secret, dtype=torch.float64)  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dp_sgd, "secret_uniform", uniform)
        patch.setattr(dp_sgd, "secret_normal", lambda shape: torch.special.ndtri(uniform(shape)))
        patch.setattr(dp_sgd, "secret_generator", lambda: torch.Generator().manual_seed(20 + ranks.rank))
        data = data_of(adapted, case is PRIVATE["prior"])
        dp_sgd.train_round_privately(adapted, data, study, 1, 0.01, ranks=ranks)
    return adapted.trainable_state()


def largest_difference(one: State, other: State) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def in_threads(count: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """What `count` ranks return that are threads of this process."""
    barrier, given, results = threading.Barrier(count, timeout=60), [torch.empty(0)] * count, [None] * count

    def run(rank: int) -> None:
        def total(tensor: Tensor) -> Tensor:
            given[rank] = tensor
            barrier.wait()
            summed = torch.stack(given).sum(0, dtype=tensor.dtype)
            barrier.wait()
            return summed

        results[rank] = work(Ranks(rank, count, total))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("count", [2, 3])
def test_ranks_share_a_batch_that_does_not_divide_evenly(smallest_base: Path, count: int) -> None:
    study = study_of(PLAIN["lora"])
    one, losses = trained(smallest_base, PLAIN["lora"])
    models = [adapted_of(smallest_base, study) for _ in range(count)]
    data = data_of(models[0], False)
    several = in_threads(count, lambda ranks: trained_model(models[ranks.rank], study, data, ranks))
    for state, their_losses in several:
        assert largest_difference(one, state) < CLOSE
        assert their_losses.values == pytest.approx(losses.values, rel=1e-5)
        assert their_losses.rows == losses.rows
    assert all(torch.equal(several[0][0][name], several[1][0][name]) for name in one)


def test_shares_are_disjoint_and_whole_and_keep_groups_together() -> None:
    for rows, group in ((7, 1), (12, 3), (1, 1), (0, 2)):
        shares = [Ranks(rank, 3).share(rows, group).tolist() for rank in range(3)]
        assert sorted(row for share in shares for row in share) == list(range(rows))
        owners = [{rank for rank, share in enumerate(shares) if row in share} for row in range(rows)]
        assert all(owners[row] == owners[row - row % group] for row in range(rows))


def _train_all(rank: int, folder: Path, base: Path) -> None:
    os.environ |= dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)) | dict.fromkeys(
        ("WORLD_SIZE", "LOCAL_WORLD_SIZE"), "2"
    )
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    ranks = join_ranks(folder, "cpu")
    plain = {name: trained(base, case, ranks) for name, case in PLAIN.items()}
    private = {name: privately_trained(base, case, ranks) for name, case in PRIVATE.items()}
    torch.save((plain, private), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_the_adapter_of_one(smallest_base: Path, tmp_path: Path) -> None:
    spawning.spawn(_train_all, (tmp_path, smallest_base), nprocs=2)
    (plain, private), other = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    for name, case in PLAIN.items():
        state, losses = trained(smallest_base, case)
        start = adapted_of(smallest_base, study_of(case)).trainable_state()
        close = ROUNDED if name == "dreambooth" else CLOSE
        assert largest_difference(state, plain[name][0]) < close < largest_difference(state, start)
        assert largest_difference(plain[name][0], other[0][name][0]) == 0.0
        assert plain[name][1].values == pytest.approx(losses.values, rel=1e-5)
        assert plain[name][1].rows == losses.rows
    for name, case in PRIVATE.items():
        state = privately_trained(smallest_base, case)
        start = adapted_of(smallest_base, study_of(case, private=True)).trainable_state()
        close = ROUNDED if name == "full" else CLOSE
        assert largest_difference(state, private[name]) < close < largest_difference(state, start)
        assert largest_difference(private[name], other[1][name]) == 0.0


@pytest.fixture
def task(site_yaml: Path) -> TrainTask:
    """Round 1 of a study without differential privacy, at a site that is indexed."""
    return task_at(load_site(site_yaml), study_of({"training": {"steps": 3, "batch_size": 3}, "drift": {}}))


def task_at(site: SiteConfig, study: StudyConfig) -> TrainTask:
    index_site(site)
    state = inject(load_denoiser(site.base_model), read_adapter(study.adapter), study.seed).trainable_state()
    modality_digest = open_store(site.store_path).modality_digest
    return TrainTask(state, 1, json.dumps(to_mapping(study)), base_digest(site.base_model), modality_digest)


def workers(launchers: bool = False) -> list[psutil.Process]:
    """The training processes of this machine that ranks run in, with `launchers` also those that start them."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            words = process.cmdline()
            if "ld_client.training_process" in words and (launchers or "accelerate.commands.launch" not in words):
                found.append(process)
    return found


def long_task(site_yaml: Path) -> TrainTask:
    """A round that takes longer than its test."""
    return task_at(load_site(site_yaml), study_of({"training": {"steps": 5000, "batch_size": 4}, "drift": {}}))


def when_training(site: SiteConfig, act: Callable[[Path], None]) -> threading.Thread:
    """Call `act` with the round's folder once both processes have met."""

    def run() -> None:
        end = time.monotonic() + 90
        while time.monotonic() < end:
            folders = list((site.ledger_path.parent / FOLDERS).glob("*/group"))
            if folders and len(workers()) == 2:
                time.sleep(1.0)
                act(folders[0].parent)
                return
            time.sleep(0.05)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not condition():
        time.sleep(0.05)
    return condition()


@pytest.mark.slow
@pytest.mark.parametrize("private", [False, True])
def test_a_deployed_site_answers_a_task_with_two_processes(
    site_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, private: bool
) -> None:
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    training = {"training": {"steps": 3, "batch_size": 3}, "drift": {}}
    home = approved(make_home(tmp_path, site_yaml, study_of(training, private)))
    content = messages.pack_task(task_of(home))
    node = node_of(home)
    node.node_config |= {"launcher": "accelerate", "training-processes": 2}
    replies = [app.app(asked(content, "train"), each) for each in ((node,) if private else (node, node_of(home)))]
    errors = [messages.unpack_error(reply.content) for reply in replies]
    assert errors == [None] * len(replies)
    results = [messages.unpack_result(reply.content) for reply in replies]
    assert not list((home.site().ledger_path.parent / FOLDERS).iterdir())
    start = task_of(home).state
    assert largest_difference(dict(results[0].state), dict(start)) > CLOSE
    if private:
        assert results[0].numbers is None
        return
    two, one = results
    assert largest_difference(dict(two.state), dict(one.state)) < CLOSE
    assert two.numbers is not None
    assert one.numbers is not None
    assert two.numbers.loss_first == pytest.approx(one.numbers.loss_first, rel=1e-5)
    assert two.numbers.loss_last == pytest.approx(one.numbers.loss_last, rel=1e-5)
    assert two.attestation is not None


@pytest.mark.slow
def test_a_killed_process_ends_the_round_with_a_sentence(site_yaml: Path) -> None:
    task, site = long_task(site_yaml), load_site(site_yaml, TWO)
    seen: dict[str, Any] = {}

    def kill(folder: Path) -> None:
        seen["modes"] = {path.name: path.stat().st_mode & 0o077 for path in (folder, folder / "work.safetensors")}
        family = psutil.Process().children(recursive=True)
        seen["addresses"] = {
            connection.laddr.ip
            for process in family
            for connection in process.net_connections()
            if connection.status == psutil.CONN_LISTEN
        }
        workers()[1].kill()

    thread = when_training(site, kill)
    began = time.monotonic()
    with pytest.raises(DeploymentError, match="one of the 2 processes that trained the round died of SIGKILL"):
        handle_train(site, task)
    thread.join()
    assert time.monotonic() - began < 120
    assert set(seen["modes"].values()) == {0}
    assert seen["addresses"] <= {"127.0.0.1"}
    assert workers(launchers=True) == []
    assert not list((site.ledger_path.parent / FOLDERS).iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_the_one_that_handles_the_task(site_yaml: Path, end: signal.Signals) -> None:
    task, site = long_task(site_yaml), load_site(site_yaml, TWO)
    handler = spawning.get_context("spawn").Process(target=handle_train, args=(site, task))
    handler.start()
    when_training(site, lambda folder: os.kill(handler.pid or 0, end)).join()
    handler.join(60)
    assert handler.exitcode not in (None, 0)
    assert wait_for(lambda: not workers(launchers=True))
    assert wait_for(lambda: not list((site.ledger_path.parent / FOLDERS).iterdir()))


@pytest.mark.slow
def test_an_error_of_a_process_is_that_of_the_round(site_yaml: Path, task: TrainTask) -> None:
    site = load_site(site_yaml, TWO)
    study = from_mapping(StudyConfig, json.loads(task.study))
    adapted = inject(load_denoiser(site.base_model), read_adapter(study.adapter), study.seed)
    digests = task.base_digest, task.modality_digest, "of another store"
    work = RoundWork(site, study, 1, *digests, adapted.state(), {}, None, None)
    with pytest.raises(StoreError, match="changed while the round began"):
        train_in_processes(work, 2, adapted)


def test_what_several_processes_cannot_do_is_refused(site_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert process_count(load_site(site_yaml)) == 1
    assert process_count(load_site(site_yaml, TWO)) == 2
    for overrides, problem in (
        (["launcher=ray"], "use single or accelerate"),
        (["training_processes=2"], "needs launcher accelerate"),
        (["launcher=accelerate"], "on device cpu needs training_processes"),
        (["launcher=accelerate", "training_processes=-1"], "use 1 or more"),
    ):
        with pytest.raises(ConfigError, match=problem):
            load_site(site_yaml, overrides)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert process_count(load_site(site_yaml, ["launcher=accelerate", "device=cuda"])) == 3
    with pytest.raises(ConfigError, match="sees 3 GPUs"):
        process_count(load_site(site_yaml, ["launcher=accelerate", "device=cuda", "training_processes=4"]))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="not installed: pip install accelerate"):
        process_count(load_site(site_yaml, TWO))
