"""One adapter that several processes train together, against that of one."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
import torch.multiprocessing
from safetensors.torch import load_file, save_file

from ld_client.training_process import join_ranks
from ld_common.adapters.base import inject
from ld_common.adapters.lora import Lora
from ld_common.core.state import State
from ld_common.diffusion.base_model import load_denoiser
from ld_common.diffusion.options import TrainingConfig
from ld_common.diffusion.ranks import ALONE, Ranks, SharedComputing
from ld_common.diffusion.training import TrainingData, optimize

LEARNING_RATE = 1e-4
"""That of diffusers' scripts for LoRA. AdamW takes steps of its size whatever the size of a gradient, so where a
gradient is rounding alone, the difference is proportional to it."""
STEPS, BATCH, ROWS = 3, 5, 8
"""The batch is odd, so that the processes have shares of different sizes."""


def together_difference(folder: Path, processes: int, device: str = "cpu") -> float:
    """Largest difference of a number of a LoRA after three steps; on `cuda` each process has a GPU."""
    with tempfile.TemporaryDirectory() as place:
        # they meet over loopback in a file of this folder
        torch.multiprocessing.spawn(_train_as_one_of, (processes, folder, Path(place), device), nprocs=processes)
        several = load_file(Path(place) / "state.safetensors")
    alone = _trained(folder, ALONE, device)
    return max(float((several[name] - alone[name]).abs().max()) for name in alone)


def _train_as_one_of(rank: int, processes: int, folder: Path, place: Path, device: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes))
    torch.set_num_threads(1)
    state = _trained(folder, join_ranks(place, device), device if device == "cpu" else f"{device}:{rank}")
    if rank == 0:
        save_file(state, place / "state.safetensors")
    torch.distributed.destroy_process_group()


def _trained(folder: Path, ranks: Ranks, device: str) -> State:
    adapted, generator = inject(load_denoiser(str(folder), device), Lora(rank=2), 0), torch.Generator().manual_seed(2)
    latents = torch.randn(ROWS, *adapted.model.latent_shape, generator=generator)
    data = TrainingData(latents, ["a scan", "a woman"] * (ROWS // 2))
    options = TrainingConfig(steps=STEPS, batch_size=BATCH)
    optimize(
        adapted.model,
        adapted.trainable,
        data,
        options,
        lambda step: torch.Generator().manual_seed(step),
        lambda step: LEARNING_RATE,
        SharedComputing(ranks=ranks),
    )
    return adapted.trainable_state()
