"""What the formats of a site's update (`federation.wire`) cost: bytes, and how far they lead from float32's result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ld_client.train import train_round
from ld_common.adapters.base import AdaptedModel, inject
from ld_common.adapters.registry import read_adapter
from ld_common.adapters.state_dict import update_norm
from ld_common.core.config import from_mapping
from ld_common.core.state import State
from ld_common.diffusion.base_model import load_base
from ld_common.diffusion.training import TrainingData
from ld_common.protocol import messages
from ld_common.protocol.study_config import FLOAT32, StudyConfig
from ld_common.protocol.wire_formats import decode_state, encode_state
from ld_server.aggregation import Mean
from ld_simulations.benchmarks.performance.scale import lora_shapes

Train = Callable[[State, int, int], State]
"""A site's trained state, of the weights, the round from 1, and the site from 0."""


@dataclass(frozen=True)
class WireVariant:
    """A format, and whether sites add what rounding took to their next update."""

    wire: str
    feedback: bool = True

    @property
    def name(self) -> str:
        """As the table has it."""
        return self.wire if self.feedback else f"{self.wire} without error feedback"


VARIANTS = (WireVariant(FLOAT32), WireVariant("bfloat16"), WireVariant("int8"), WireVariant("int8", feedback=False))


def measure_wire(base_model: str = "simulations/tiny_base", sites: int = 4, rounds: int = 20) -> dict[str, Any]:
    """Compare the formats on updates of Stable Diffusion 1.4's LoRA of rank 4, and on a short training.

    The updates are drawn: a part that all sites and rounds share, as large as what differs between them, and sizes that
    differ from tensor to tensor. They do not depend on the weights, so what is measured is the formats' own error.

    Args:
        base_model: that is trained, by two sites in three rounds, on latents around a common image.
        sites: that send drawn updates.
        rounds: of drawn updates.

    Returns:
        By format: `reply_mb` and its share of float32's (`of_float32`), `relative_error` of the weights after all
        rounds, over the distance that float32 moved them, and after the first round (`relative_error_1`); the
        training's `final_loss`, a mean over its sites, and the `weights_error` of its result.
    """
    start = {name: torch.zeros(shape) for name, shape in sorted(lora_shapes(4).items())}
    drawn = [list(_rounds(variant, start, rounds, sites, _draw_update)) for variant in VARIANTS]
    trained = [_train(variant, base_model) for variant in VARIANTS]
    exact, (first, _, result) = drawn[0], trained[0]
    formats = {}
    for variant, states, (_, loss, state) in zip(VARIANTS, drawn, trained, strict=True):
        sent = encode_state(variant.wire, exact[0], start, {}).tensors
        size = len(messages.tensor_bytes(messages.pack_tensors(sent))) / 10**6
        formats[variant.name] = {
            "reply_mb": round(size, 3),
            "relative_error_1": update_norm(states[0], exact[0]) / update_norm(exact[0], start),
            "relative_error": update_norm(states[-1], exact[-1]) / update_norm(exact[-1], start),
            "final_loss": loss,
            "weights_error": update_norm(state, result) / update_norm(result, first),
        }
    for row in formats.values():
        row["of_float32"] = round(row["reply_mb"] / formats[FLOAT32]["reply_mb"], 3)
    return {"wire_sites": sites, "wire_rounds": rounds, "formats": formats}


def wire_table(result: dict[str, Any]) -> list[str]:
    """The formats as a table of Markdown."""
    lines = [
        "| format | MB a reply | of float32 | error, 1 round | error, "
        f"{result['wire_rounds']} rounds | final loss of a training | error of its weights |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in result["formats"].items():
        errors = " | ".join(f"{row[key]:.1e}" for key in ("relative_error_1", "relative_error"))
        sizes = f"{row['reply_mb']:.2f} | {row['of_float32']:.2f}"
        lines.append(f"| {name} | {sizes} | {errors} | {row['final_loss']:.5f} | {row['weights_error']:.1e} |")
    return lines


def _rounds(variant: WireVariant, start: State, rounds: int, sites: int, train: Train) -> Iterator[State]:
    """The server's weights after each round."""
    state, residuals = start, [State() for _ in range(sites)]
    for number in range(1, rounds + 1):
        received = []
        for site in range(sites):
            sent = encode_state(variant.wire, train(state, number, site), state, residuals[site])
            residuals[site] = sent.residual if variant.feedback else {}
            received.append(decode_state(variant.wire, sent.tensors, state))
        state = Mean().aggregate(received, [1.0] * sites)
        yield state


def _draw_update(state: State, number: int, site: int) -> State:
    shared, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1000 * number + site)
    trained: State = {}
    for name, value in state.items():
        size = 1e-3 * float(torch.randn((), generator=shared).exp())
        update = torch.randn(value.shape, generator=shared) + torch.randn(value.shape, generator=own)
        trained[name] = value + size * update
    return trained


def _train(variant: WireVariant, base_model: str, sites: int = 2, rounds: int = 3) -> tuple[State, float, State]:
    """The first weights of a short federated training, the loss of its last round, and its result."""
    study = from_mapping(
        StudyConfig,
        {
            "adapter": {"rank": 4},
            "training": {"steps": 5, "batch_size": 4, "learning_rate": 1e-3},
            "federation": {"rounds": rounds, "sites": [f"site-{number}" for number in range(sites)]},
        },
    )
    base = load_base(base_model)
    adapted: AdaptedModel[Any] = inject(base, read_adapter(study.adapter), study.seed)
    draw = torch.Generator().manual_seed(0)
    image = torch.randn(base.latent_shape, generator=draw)
    prompts = [f"brain MRI of a patient of {60 + number} years" for number in range(16)]
    data = [
        TrainingData(image + 0.3 * torch.randn(len(prompts), *base.latent_shape, generator=draw), prompts)
        for _ in range(sites)
    ]
    losses: dict[tuple[int, int], float] = {}

    def train(state: State, number: int, site: int) -> State:
        adapted.load({**adapted.frozen_state(), **state})
        losses[number, site] = train_round(adapted, data[site], study, number, study.federation.sites[site]).last
        return {name: value.clone() for name, value in adapted.trainable_state().items()}

    start = {name: value.clone() for name, value in adapted.trainable_state().items()}
    *_, result = _rounds(variant, start, rounds, sites, train)
    return start, sum(losses[rounds, site] for site in range(sites)) / sites, result
