"""Training in bfloat16, compiled, with blocks computed again, and in several batches a step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ld_common.adapters.base import inject
from ld_common.adapters.lora import Lora
from ld_common.core.errors import ConfigError
from ld_common.core.seeding import torch_generator
from ld_common.diffusion.base_model import load_base
from ld_common.diffusion.computing import Computing
from ld_common.diffusion.options import LR_SCHEDULERS, TrainingConfig
from ld_common.diffusion.training import LossSampler, TrainingData, optimize, scheduled_rate

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
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_trains_float32_parameters_to_nearly_the_same(smallest_base: Path, precision: str) -> None:
    losses, exact = learned(smallest_base, Computing())
    rounded_losses, rounded = learned(smallest_base, Computing(precision))
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


def test_a_step_whose_scaled_gradients_overflow_is_left_out(
    smallest_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scale is halved until one fits, so later steps train."""
    scalers: list[torch.amp.GradScaler] = []

    def too_large(self: Computing, device: torch.device) -> torch.amp.GradScaler:
        scalers.append(torch.amp.GradScaler(device.type, init_scale=2.0**127, growth_interval=1000))
        return scalers[0]

    monkeypatch.setattr(Computing, "scaler", too_large)
    steps: list[dict[str, torch.Tensor]] = []
    adapted = inject(load_base(str(smallest_base)), Lora(rank=2), 0)
    start = adapted.trainable_state()
    latents = 1e3 * torch.randn(2, *adapted.model.latent_shape, generator=torch_generator(0, "latents"))
    data, options = TrainingData(latents, ["a scan"] * 2), TrainingConfig(steps=1, batch_size=2)
    draws = torch_generator(0, "training")
    optimize(adapted.model, adapted.trainable, data, options, lambda _: draws, lambda _: 1e-2, Computing("float16"))
    steps.append(adapted.trainable_state())
    assert all(torch.equal(steps[0][name], value) for name, value in start.items())
    assert scalers[0].get_scale() == 2.0**126


def test_the_average_of_a_rounds_weights_is_sent(smallest_base: Path) -> None:
    """By hand: the decay is that of the options, or smaller in the first steps."""

    def states(ema: float, steps: int) -> dict[str, torch.Tensor]:
        adapted = inject(load_base(str(smallest_base)), Lora(rank=2), 0)
        latents = torch.randn(4, *adapted.model.latent_shape, generator=torch_generator(0, "latents"))
        options = TrainingConfig(steps=steps, batch_size=2, ema=ema)
        optimize(
            adapted.model,
            adapted.trainable,
            TrainingData(latents, ["a scan"] * 4),
            options,
            lambda step: torch_generator(step, "training"),
            lambda _: 1e-2,
        )
        return adapted.trainable_state()

    start = inject(load_base(str(smallest_base)), Lora(rank=2), 0).trainable_state()
    expected = {name: value.clone() for name, value in start.items()}
    for step in (1, 2, 3):
        for name, value in states(0.0, step).items():
            expected[name].lerp_(value, 1 - min(0.15, step / (step + 10)))
    averaged = states(0.15, 3)
    assert all(torch.allclose(averaged[name], value, atol=1e-6) for name, value in expected.items())
    assert any(not torch.allclose(averaged[name], value, atol=1e-4) for name, value in states(0.0, 3).items())


def test_learning_rates_fall_as_their_name_says() -> None:
    def rates(name: str) -> list[float]:
        options = TrainingConfig(steps=20, learning_rate=1.0, lr_scheduler=name)
        return [scheduled_rate(options, step, 2, number) for number in (1, 2) for step in range(20)]

    cosine, linear, constant = (rates(name) for name in LR_SCHEDULERS)
    for fallen in (cosine, linear, constant):
        assert fallen[0] == pytest.approx(0.2, rel=0.01)  # warm-up of the fresh optimizer
        assert fallen[20] < fallen[19]  # and again in the second round
    assert constant[5:20] == [1.0] * 15
    assert linear[10] == pytest.approx(0.05 + 0.95 * 0.75)
    assert cosine[10] == pytest.approx(0.05 + 0.95 * 0.5 * (1 + 2**-0.5))
    assert cosine[39] < 0.06
    with pytest.raises(ConfigError, match="lr_scheduler is 'step': known: cosine, linear, constant"):
        TrainingConfig(lr_scheduler="step")


@pytest.mark.parametrize("precision", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_checkpointing_learns_the_same(smallest_base: Path, precision: str) -> None:
    losses, plain = learned(smallest_base, Computing(precision))
    again, recomputed = learned(smallest_base, Computing(precision, checkpointing=True))
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
