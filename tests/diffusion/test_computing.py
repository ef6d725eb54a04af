"""Training in bfloat16, compiled, with blocks computed again, and in several batches a step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ld_common.adapters.base import inject
from ld_common.adapters.lora import Lora
from ld_common.core.seeding import torch_generator
from ld_common.diffusion.base_model import load_base
from ld_common.diffusion.computing import Computing
from ld_common.diffusion.options import TrainingConfig
from ld_common.diffusion.training import LossSampler, TrainingData, optimize

CPU = torch.device("cpu")


def learned(base_folder: Path, computing: Computing) -> tuple[list[float], dict[str, torch.Tensor]]:
    base = load_base(str(base_folder))
    adapted = inject(base, Lora(rank=2), 0)
    latents = torch.randn(4, *base.latent_shape, generator=torch_generator(0, "latents"))
    data, options = TrainingData(latents, ["a scan"] * 4), TrainingConfig(steps=3, batch_size=2)
    generator = torch_generator(0, "training")
    losses = optimize(adapted.model, adapted.trainable, data, options, lambda _: generator, lambda _: 1e-2, computing)
    return losses.values, adapted.trainable_state()


@pytest.mark.slow
def test_bfloat16_trains_float32_parameters_to_nearly_the_same(smallest_base: Path) -> None:
    losses, exact = learned(smallest_base, Computing())
    rounded_losses, rounded = learned(smallest_base, Computing("bfloat16"))
    assert losses == pytest.approx(rounded_losses, rel=0.05)
    assert losses != rounded_losses
    assert {value.dtype for value in rounded.values()} == {torch.float32}
    moved = sum(float((rounded[name] - exact[name]).square().sum()) for name in exact) ** 0.5
    assert moved < 0.2 * sum(float(value.square().sum()) for value in exact.values()) ** 0.5


def test_attention_on_a_cpu_stays_float32() -> None:
    query, key, value = (torch.randn(1, 2, 5, 8, generator=torch_generator(number, "x")) for number in range(3))
    halves = [part.bfloat16() for part in (query, key, value)]
    exact = F.scaled_dot_product_attention(*(half.float() for half in halves))
    with Computing("bfloat16").on(CPU):
        answer = F.scaled_dot_product_attention(*halves)
        named = F.scaled_dot_product_attention(query=halves[0], key=halves[1], value=halves[2])
        product = query[0, 0] @ key[0, 0].T
    assert answer.dtype == named.dtype == product.dtype == torch.bfloat16
    assert torch.equal(answer, exact.bfloat16())
    assert torch.equal(named, answer)
    with Computing().on(CPU):
        assert (query[0, 0] @ key[0, 0].T).dtype == torch.float32


@pytest.mark.slow
def test_a_compiled_network_learns_the_same(smallest_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[type] = []

    def trace_only(network: torch.nn.Module) -> torch.nn.Module:
        compiled.append(type(network))
        return compile_network(network, backend="eager")  # what a C++ compiler would be given

    compile_network = torch.compile
    monkeypatch.setattr(torch, "compile", trace_only)
    losses, plain = learned(smallest_base, Computing())
    assert not compiled
    compiled_losses, ours = learned(smallest_base, Computing(compiled=True))
    assert len(compiled) == 1
    assert losses == pytest.approx(compiled_losses, rel=1e-4)
    assert all(torch.allclose(ours[name], value, atol=1e-4) for name, value in plain.items())


def test_checkpointing_learns_the_same(smallest_base: Path) -> None:
    losses, plain = learned(smallest_base, Computing())
    again, recomputed = learned(smallest_base, Computing(checkpointing=True))
    assert again == pytest.approx(losses, rel=1e-5)
    assert all(torch.allclose(recomputed[name], value, atol=1e-5) for name, value in plain.items())


def test_a_step_takes_the_mean_gradient_of_its_batches(smallest_base: Path) -> None:
    """The step of two batches is that of their mean loss, with the draws of one after the other."""
    options = TrainingConfig(steps=1, batch_size=3, gradient_accumulation=2)
    assert options.visits_in_a_step == 6
    base = load_base(str(smallest_base))
    latents = torch.randn(6, *base.latent_shape, generator=torch_generator(0, "latents"))
    data = TrainingData(latents, ["a scan"] * 6)
    by_hand = inject(base, Lora(rank=2), 0)
    draws = torch_generator(0, "training")
    sampler = LossSampler(by_hand.model, by_hand.trainable, data, options, draws)
    mean = (sampler.loss() + sampler.loss()) / 2
    mean.backward()
    torch.nn.utils.clip_grad_norm_(by_hand.trainable.values(), 1.0)
    torch.optim.AdamW(by_hand.trainable.values(), lr=0.01, weight_decay=0.0).step()

    ours, same_draws = inject(load_base(str(smallest_base)), Lora(rank=2), 0), torch_generator(0, "training")
    losses = optimize(ours.model, ours.trainable, data, options, lambda _: same_draws, lambda _: 0.01)
    assert losses.values == [pytest.approx(float(mean.detach()), rel=1e-5)]
    expected = by_hand.trainable_state()
    assert all(torch.allclose(value, expected[name], atol=1e-5) for name, value in ours.trainable_state().items())
