from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from ld_common import schemes
from ld_common.adapters import check_state, read_tensors, update_norm, write_tensors
from ld_common.errors import AdapterError
from ld_common.models import load_unet
from ld_common.study import SchemeConfig


def attached(base: Path, scheme: SchemeConfig, seed: int = 0) -> UNet2DConditionModel:
    unet, _ = load_unet(str(base))
    schemes.attach(unet, scheme, seed)
    return unet


def output(unet: UNet2DConditionModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    channels, size = unet.config["in_channels"], unet.config["sample_size"]
    latents = torch.randn(1, channels, size, size, generator=generator)
    context = torch.randn(1, 8, unet.config["cross_attention_dim"], generator=generator)
    with torch.no_grad():
        return unet(latents, 10, context).sample


def test_an_untrained_adapter_changes_nothing_and_a_changed_one_does(tiny_base: Path) -> None:
    plain, _ = load_unet(str(tiny_base))
    unet = attached(tiny_base, SchemeConfig(rank=2))
    assert torch.equal(output(unet), output(plain))
    state = {name: value + 0.05 for name, value in schemes.learned_state(unet).items()}
    schemes.load_state(unet, state)
    assert not torch.allclose(output(unet), output(plain))


def test_every_side_starts_from_the_same_adapter(tiny_base: Path) -> None:
    first, again, other = (attached(tiny_base, SchemeConfig(rank=2), seed) for seed in (3, 3, 4))
    states = [schemes.adapter_state(unet) for unet in (first, again, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_only_the_adapter_learns_and_with_frozen_a_only_b_travels(tiny_base: Path) -> None:
    unet = attached(tiny_base, SchemeConfig(rank=2, freeze_a=True))
    learned, whole = schemes.learned_state(unet), schemes.adapter_state(unet)
    assert all(".lora_B." in name for name in learned)
    assert set(learned) < set(whole)
    trainable = {name for name, value in unet.named_parameters() if value.requires_grad}
    assert len(trainable) == len(learned)


def test_the_adapter_survives_the_disk(tiny_base: Path, tmp_path: Path) -> None:
    unet = attached(tiny_base, SchemeConfig(rank=2))
    state = {name: torch.randn_like(value) for name, value in schemes.adapter_state(unet).items()}
    schemes.load_state(unet, state)
    expected = output(unet)
    write_tensors(tmp_path / "a.safetensors", state, {"note": "x"})
    read, metadata = read_tensors(tmp_path / "a.safetensors")
    fresh = attached(tiny_base, SchemeConfig(rank=2), seed=9)
    schemes.load_state(fresh, read)
    assert metadata == {"note": "x"}
    assert torch.equal(output(fresh), expected)


def test_diffusers_itself_loads_the_adapter(tiny_base: Path) -> None:
    unet = attached(tiny_base, SchemeConfig(rank=2))
    state = {name: 0.1 * torch.randn_like(value) for name, value in schemes.adapter_state(unet).items()}
    schemes.load_state(unet, state)
    plain, _ = load_unet(str(tiny_base))
    plain.load_lora_adapter(dict(state), prefix="unet")
    assert torch.allclose(output(plain), output(unet), atol=1e-6)


def test_targets_that_fit_nothing_are_named(tiny_base: Path) -> None:
    with pytest.raises(AdapterError, match="nowhere"):
        attached(tiny_base, SchemeConfig(targets=["nowhere"]))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda state: {**state, "b": torch.full((2, 2), float("nan"))}, "NaN"),
        (lambda state: {**state, "b": torch.full((2, 2), float("inf"))}, "infinite"),
        (lambda state: {**state, "b": torch.zeros(3, 2)}, "shape"),
        (lambda state: {**state, "b": torch.zeros(2, 2, dtype=torch.float16)}, "float16"),
        (lambda state: {"a": state["a"]}, "missing"),
        (lambda state: {**state, "c": torch.zeros(1)}, "unknown"),
    ],
)
def test_a_foreign_state_is_refused(spoil: object, words: str) -> None:
    expected = {"a": torch.zeros(1), "b": torch.zeros(2, 2)}
    with pytest.raises(AdapterError, match=words):
        check_state(spoil(expected), expected)  # type: ignore[operator]


def test_update_norm_is_the_distance_over_all_tensors() -> None:
    assert (
        update_norm({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}, {"a": torch.zeros(1), "b": torch.zeros(1)})
        == 5
    )
