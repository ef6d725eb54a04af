from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ld_common.adapters.base import AdaptedModel, inject
from ld_common.adapters.prior_preservation import draw_prior
from ld_common.adapters.registry import ADAPTERS, complete_adapter, read_adapter
from ld_common.adapters.state_dict import check_state, update_norm
from ld_common.adapters.textual_inversion import TextualInversion
from ld_common.core.errors import AdapterError, ConfigError
from ld_common.core.seeding import torch_generator
from ld_common.diffusion.base_model import Denoiser, load_denoiser
from tests.support.adapter_options import OPTIONS

PROMPT = "axial T1 brain MRI, woman, 70 years, healthy"
CHANGES_NOTHING = ("lora", "full", "custom_diffusion", "instruct_pix2pix")
"""Untrained, these adapters leave the base as it is; the others change the prompt from the start."""


def adapted_model(base: Path, seed: int = 0, **options: Any) -> AdaptedModel[Denoiser]:
    return inject(load_denoiser(str(base)), read_adapter({"name": "lora", **options}), seed)


@torch.no_grad()
def output(model: Denoiser) -> torch.Tensor:
    latents = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    return model.unet(latents, 10, model.embed([PROMPT])).sample


def test_every_adapter_is_tried_here() -> None:
    assert set(OPTIONS) == set(ADAPTERS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_starts_from_the_base_trains_and_survives_the_disk(
    smallest_base: Path, tmp_path: Path, name: str
) -> None:
    plain = load_denoiser(str(smallest_base))
    first = adapted_model(smallest_base, name=name, **OPTIONS[name])
    if name in CHANGES_NOTHING:
        assert torch.equal(output(first.model), output(plain))
    again = adapted_model(smallest_base, name=name, **OPTIONS[name])
    assert torch.equal(output(first.model), output(again.model))
    learned = first.trainable_state()
    assert list(learned) == sorted(learned)
    before = output(first.model)
    changed = {key: value + 0.05 * torch.randn_like(value) for key, value in learned.items()}
    first.load(changed)
    assert not torch.allclose(output(first.model), before)
    first.save_pretrained(tmp_path)
    read = first.adapter.read_files(tmp_path)
    assert list(read) == sorted(read)
    check_state(read, again.state())
    again.load(read)
    assert torch.equal(output(again.model), output(first.model))


@pytest.mark.parametrize("name", ADAPTERS)
def test_only_what_travels_has_a_gradient(smallest_base: Path, name: str) -> None:
    adapted = adapted_model(smallest_base, name=name, **OPTIONS[name])
    model = adapted.model
    latents = torch.randn(2, *model.latent_shape)
    loss = model.unet(latents, torch.tensor([10, 500]), model.embed([PROMPT, PROMPT])).sample.square().mean()
    loss.backward()
    moved = [
        value for part in (model.unet, model.text_encoder) for value in part.parameters() if value.grad is not None
    ]
    learned = list(adapted.trainable.values())
    assert {id(value) for value in moved} <= {id(value) for value in learned}
    assert any(bool(value.grad.abs().sum() > 0) for value in moved if value.grad is not None)


def test_every_side_starts_from_the_same_adapter(smallest_base: Path) -> None:
    states = [adapted_model(smallest_base, seed, rank=2).state() for seed in (3, 3, 4)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_with_frozen_a_only_b_travels(smallest_base: Path) -> None:
    adapted = adapted_model(smallest_base, rank=2, freeze_a=True)
    assert all(".lora_B." in name for name in adapted.trainable)
    assert set(adapted.trainable) < set(adapted.parameters)


def test_custom_diffusion_is_keys_and_values_of_the_attention_to_the_prompt(smallest_base: Path) -> None:
    adapted = adapted_model(smallest_base, name="custom_diffusion")
    assert adapted.trainable
    assert all(name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")) for name in adapted.trainable)


def test_full_is_the_whole_unet(smallest_base: Path) -> None:
    adapted = adapted_model(smallest_base, name="full")
    assert sum(value.numel() for value in adapted.trainable.values()) == adapted.model.unet.num_parameters()


def test_words_are_replaced_whole_and_the_longest_first() -> None:
    adapter = TextualInversion(vectors=1, words=["man", "woman", "a man"])
    assert adapter.transform_prompt("a man, woman") == "<scan> <a-man>, <woman>"
    assert adapter.transform_prompt("human, man") == "<scan> human, <man>"


def test_learned_tokens_start_as_their_phrases_and_are_read_in_their_place(smallest_base: Path) -> None:
    plain = load_denoiser(str(smallest_base))
    adapted = adapted_model(smallest_base, name="textual_inversion", vectors=1, words=["woman"])
    ids = plain.tokenizer("woman", add_special_tokens=False).input_ids
    mean = plain.text_encoder.get_input_embeddings().weight[ids].mean(0)
    assert torch.allclose(adapted.parameters["text_encoder.<woman>"][0], mean, atol=1e-6)
    tokens = adapted.model.tokenizer.tokenize(adapted.model.transform_prompt(PROMPT))
    assert "<woman>" in tokens
    assert tokens[0] == "<scan>"
    assert adapted.model.embed([""]).shape == plain.embed([""]).shape
    assert torch.allclose(adapted.model.embed([""]), plain.embed([""]))


def test_the_preserved_prior_is_the_bases_own_and_the_same_everywhere(smallest_base: Path) -> None:
    prior = read_adapter({"name": "dreambooth", **OPTIONS["dreambooth"]}).prior
    assert prior is not None
    first, again = (draw_prior(load_denoiser(str(smallest_base)), prior, 5) for _ in range(2))
    assert torch.equal(first.latents, again.latents)
    assert first.latents.shape == (3, *load_denoiser(str(smallest_base)).latent_shape)
    other = draw_prior(load_denoiser(str(smallest_base)), prior, 6)
    assert not torch.equal(first.latents, other.latents)


def test_dreambooth_of_a_rank_is_a_lora(smallest_base: Path) -> None:
    adapted = adapted_model(smallest_base, name="dreambooth", rank=2)
    assert all(".lora_" in name for name in adapted.parameters)
    assert adapted.model.transform_prompt("a scan") == "sks a scan"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "lroa"}, "did you mean 'lora'"),
        ({"name": "basic"}, "full"),
        ({"rank": 2}, "adapter.name is missing"),
        ({"name": "lora", "ranc": 2}, "did you mean 'rank'"),
        ({"name": "lora", "rank": 0}, "adapter.rank is 0"),
        ({"name": "full", "rank": 2}, "unknown config key 'adapter.rank'"),
        ({"name": "textual_inversion", "words": ["scan"]}, "scan"),
        ({"name": "textual_inversion", "words": ["a-b", "a b"]}, "'a b'"),
        ({"name": "dreambooth", "class_prompt": " "}, "class_prompt"),
    ],
)
def test_a_wrong_adapter_is_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_adapter(options)


def test_a_complete_adapter_has_every_option_and_reads_back() -> None:
    options = complete_adapter({"name": "lora", "rank": 3})
    assert (options["name"], options["rank"], options["freeze_a"]) == ("lora", 3, False)
    assert complete_adapter(options) == options
    assert complete_adapter({"name": "lora"}, private=True)["freeze_a"] is True


def test_multi_vector_tokens_are_single_tokens(smallest_base: Path) -> None:
    adapted = adapted_model(smallest_base, name="textual_inversion", vectors=3, words=["woman"])
    tokens = adapted.model.tokenizer.tokenize(adapted.model.transform_prompt("scan, woman."))
    assert tokens[:3] == ["<scan>", "<scan>_1", "<scan>_2"]
    assert [token for token in tokens if "woman" in token] == ["<woman>", "<woman>_1", "<woman>_2"]


def test_targets_that_fit_nothing_are_named(smallest_base: Path) -> None:
    with pytest.raises(AdapterError, match="nowhere"):
        adapted_model(smallest_base, targets=["nowhere"])


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
    zeros = {"a": torch.zeros(1), "b": torch.zeros(1)}
    assert update_norm({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}, zeros) == 5


def test_a_stream_of_the_start_depends_on_its_name() -> None:
    draws = [torch.randn(4, generator=torch_generator(0, "lora", name)) for name in ("a", "b")]
    assert not torch.equal(*draws)
