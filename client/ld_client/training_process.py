"""One of the processes that train a site's round together: `accelerate launch -m ld_client.training_process FOLDER`.

`ld_client.several_processes` makes the folder and starts them. Each loads the site's store and base, and trains by
`Ranks`; the first writes the trained tensors.

    work.safetensors     what the round trains, mode 0600
    lock                 held by the process that handles the task; where it is free, that one has died
    group                where the processes meet
    outcome.safetensors  the trained tensors and the losses
    problem.json         code and text of the first error that a user can cause
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save
from torch import Tensor

import ld_common.core.offline  # noqa: F401  (before any model library)
from ld_client.data.store import Store, open_store, split_store
from ld_client.data.store_key import training_secret
from ld_client.policy import within_memory
from ld_client.site_config import SiteConfig, load_modality
from ld_client.site_drift import site_prior
from ld_client.train import computing, learning_rate, round_draws
from ld_common.adapters.base import AdaptedModel, inject
from ld_common.adapters.registry import read_adapter
from ld_common.adapters.state_dict import read_tensors
from ld_common.core.atomic_files import held, write_bytes, write_new
from ld_common.core.config import from_mapping, to_mapping
from ld_common.core.errors import LdError, StoreError
from ld_common.core.registry import Registry
from ld_common.core.state import State
from ld_common.diffusion.base_model import Denoiser, load_denoiser
from ld_common.diffusion.drift import LatentDrift
from ld_common.diffusion.ranks import Ranks, SharedComputing
from ld_common.diffusion.training import Losses, TrainingData, optimize
from ld_common.protocol.study_config import StudyConfig

WORK, LOCK, GROUP, OUTCOME, PROBLEM = "work.safetensors", "lock", "group", "outcome.safetensors", "problem.json"
STALL_MINUTES = 10
"""How long a process waits for the others."""
DRIFT, WEIGHTS, CARRIED = "drift", "weights/", "carried/"


@dataclass(frozen=True, eq=False)
class RoundWork:
    """What a round trains, beside the site's store."""

    site: SiteConfig
    study: StudyConfig
    round: int
    base_digest: str
    modality_digest: str
    store_digest: str
    """Of the visits that are trained on."""
    weights: State
    """The adapter's tensors at the start of the round."""
    carried: State
    """Factors that are added to the base's weights."""
    drift: LatentDrift | None
    """The drift by which the latents are trained."""
    noise_multiplier: float | None
    """None without differential privacy."""

    def write(self, folder: Path) -> None:
        """Write it with mode 0600; raises `CheckpointError`."""
        text = {
            **{name: getattr(self, name) for name in ("round", "base_digest", "modality_digest", "store_digest")},
            "noise_multiplier": self.noise_multiplier,
            "site": to_mapping(self.site),
            "study": to_mapping(self.study),
            "formulation": None if self.drift is None else self.drift.formulation,
            "packages": None if Registry.allowed is None else sorted(Registry.allowed),
        }
        tensors = {WEIGHTS + name: value.contiguous() for name, value in self.weights.items()}
        tensors |= {CARRIED + name: value.contiguous() for name, value in self.carried.items()}
        tensors |= {} if self.drift is None else {DRIFT: self.drift.mean.contiguous()}
        write_bytes(folder / WORK, save(tensors, {"work": json.dumps(text)}), 0o600)

    @classmethod
    def read(cls, folder: Path) -> RoundWork:
        """Read it, and limit this process to the packages of the one that wrote it; raises `LdError`."""
        tensors, metadata = read_tensors(folder / WORK)
        text = json.loads(metadata["work"])
        Registry.allow(text.pop("packages"))
        formulation, drift = text.pop("formulation"), tensors.get(DRIFT)
        site, study = from_mapping(SiteConfig, text.pop("site")), from_mapping(StudyConfig, text.pop("study"))
        return cls(
            **text,
            site=site,
            study=study,
            weights=_below(tensors, WEIGHTS),
            carried=_below(tensors, CARRIED),
            drift=None if drift is None else LatentDrift(drift, formulation),
        )


def train_work(work: RoundWork, ranks: Ranks, device: str) -> tuple[State, Losses | None]:
    """Train a round as one of several processes.

    Args:
        work: the round.
        ranks: the processes.
        device: where this one trains, such as `cuda:1`.

    Returns:
        The trained tensors, and the losses where the study has no differential privacy; equal in all processes.

    Raises:
        LdError: the store or the base cannot be used, or training diverges.
    """
    site, study = work.site, work.study
    store = _store(work)
    model = load_denoiser(site.base_model, device)
    adapted = inject(model, read_adapter(study.site_adapter(site.site)), study.seed)
    data = _training_data(work, store, model, adapted)
    if work.carried:
        adapted.adapter.add_to_base(adapted.model, work.carried)
    adapted.load(work.weights)
    for name, parameter in adapted.trainable.items():
        parameter.requires_grad_(study.trains(name, work.round))
    losses = None
    if work.noise_multiplier is not None:
        from ld_client.privacy.dp_sgd import train_round_privately  # opacus takes seconds to import

        train_round_privately(adapted, data, study, work.round, work.noise_multiplier, ranks=ranks)
    else:
        draws = round_draws(study, work.round, site.site, training_secret(site.store_path))
        rate = functools.partial(learning_rate, study, work.round)
        how = SharedComputing(**vars(computing(site)), ranks=ranks)
        losses = optimize(adapted.model, adapted.trainable, data, study.training, draws, rate, how)
    return adapted.trainable_state(), losses


def join_ranks(folder: Path, device: str) -> Ranks:
    """Meet the other processes in a folder; rank and number come from the environment, as accelerate sets it.

    Args:
        folder: of the round.
        device: `cpu`, or `cuda` for a GPU of each process.
    """
    from accelerate import Accelerator

    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if device == "cuda":
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=(folder / GROUP).as_uri(),  # a file, as a TCP store would listen on all of the machine's addresses
        rank=rank,
        world_size=count,
        timeout=timedelta(minutes=STALL_MINUTES),
    )
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision="no")

    def total(tensor: Tensor) -> Tensor:
        summed: Tensor = accelerator.reduce(tensor.to(accelerator.device), reduction="sum")
        return summed.to(tensor.device)

    return Ranks(accelerator.process_index, accelerator.num_processes, total)


def read_outcome(folder: Path) -> tuple[State, Losses | None]:
    """What `train_work` returned in the first process; raises `AdapterError`."""
    state, metadata = read_tensors(folder / OUTCOME)
    losses = json.loads(metadata["losses"])
    return state, None if losses is None else Losses(losses["values"], frozenset(losses["rows"]))


def _store(work: RoundWork) -> Store:
    """The visits that are trained on; raises `StoreError` where they are not those that the round was charged for."""
    site = work.site
    store = open_store(site.store_path, base_digest=work.base_digest, modality_digest=work.modality_digest)
    store, _ = split_store(store, site.held_out, work.study.privacy.enabled)
    if store.digest() != work.store_digest:
        raise StoreError(f"the store '{site.store_path}' changed while the round began: it ends")
    return store


def _training_data(work: RoundWork, store: Store, model: Denoiser, adapted: AdaptedModel[Any]) -> TrainingData:
    """As for one process; `model` still draws as the plain base does."""
    wanted = adapted.adapter.prior
    prior = None if wanted is None else site_prior(work.site, store, model, wanted, work.study.seed)
    vectors = store.condition_vectors(load_modality(work.site))
    return TrainingData(store.latents, store.prompts, work.drift, prior, store.pseudonyms, vectors)


def _below(tensors: State, prefix: str) -> State:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _end_with_handler(folder: Path) -> None:
    """Delete the folder and end this process and accelerate's when the one that handles the task dies."""
    parent = psutil.Process().parent()

    def wait() -> None:
        try:
            with held(folder / LOCK):
                shutil.rmtree(folder, ignore_errors=True)
                with suppress(psutil.Error):  # else it would wait for the folder's files for minutes
                    if parent is not None and str(folder) in parent.cmdline():
                        parent.kill()
        finally:
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def main() -> None:
    """Train as one of the processes of a folder."""
    folder = Path(sys.argv[1])
    os.umask(0o077)
    _end_with_handler(folder)
    try:
        work = RoundWork.read(folder)
        with within_memory(work.site.policy):
            device = work.site.device
            ranks = join_ranks(folder, device)
            state, losses = train_work(work, ranks, device if device == "cpu" else f"{device}:{ranks.rank}")
        if ranks.rank == 0:
            text = None if losses is None else {"values": losses.values, "rows": sorted(losses.rows)}
            write_bytes(folder / OUTCOME, save(state, {"losses": json.dumps(text)}), 0o600)
        torch.distributed.destroy_process_group()
    except LdError as error:
        with suppress(FileExistsError):
            write_new(folder / PROBLEM, json.dumps({"code": error.code, "text": str(error)}).encode())
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
