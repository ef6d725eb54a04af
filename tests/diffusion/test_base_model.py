"""The tiny base model's recipe: its pictures, its words, and a training that goes on where it stopped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ld_common.diffusion.base_model import load_base
from ld_simulations.tiny_base.generic_images import generic_picture
from ld_simulations.tiny_base.networks import PROMPT_WORDS, StageConfig, make_tokenizer
from ld_simulations.tiny_base.train import cli, train_stage

CONFIG = Path(__file__).parents[2] / "configs/base_model.yaml"
SMALL = [
    "device=cpu",
    "pictures=24",
    "side=32",
    "vae_channels=[8,8,16]",
    "unet_channels=[16,32]",
    "text_width=32",
    *(f"{stage}.{key}" for stage in ("vae", "unet") for key in ("steps=2", "batch_size=4")),
]


def test_a_known_word_and_a_whole_number_are_one_token_and_nothing_is_unknown() -> None:
    tokenizer = make_tokenizer(["two dark holes 74, ground 20"] * 10, 32)
    for word in [*PROMPT_WORDS.split(), "holes", "0", "74", "120"]:
        assert len(tokenizer.tokenize(word)) == 1, word
    assert tokenizer.tokenize("174 years")[-1] == "years</w>"
    for text in ("174", "hippocampus", "ümlaut", "磁共振"):
        ids = tokenizer(text).input_ids[1:-1]
        assert len(ids) > 1
        assert tokenizer.eos_token_id not in ids
    with_numbers = tokenizer("axial T1 brain MRI, woman, 74 years, Alzheimer's disease").input_ids
    assert len(with_numbers) < 20


def test_pictures_keep_to_their_range_and_say_what_they_show() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        picture = generic_picture(rng, 32)
        assert picture.pixels.shape == (32, 32)
        assert -1 <= picture.pixels.min() <= picture.pixels.max() <= 1
        assert picture.caption


def test_a_stopped_stage_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ld_simulations.tiny_base.train.CHECKPOINT_STEPS", 1)

    def train(work: Path, stop_at: int | None = None) -> torch.Tensor:
        work.mkdir(exist_ok=True)
        draws = torch.Generator().manual_seed(0)
        network = torch.nn.Linear(3, 1, bias=False)
        torch.nn.init.ones_(network.weight)
        calls = 0

        def loss() -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls == stop_at:
                raise KeyboardInterrupt
            return network(torch.randn(4, 3, generator=draws)).square().mean()

        train_stage("stage", StageConfig(steps=5, batch_size=4, learning_rate=0.1), network, loss, [draws], work)
        return network.weight.detach()

    whole = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", stop_at=3)
    assert torch.equal(train(tmp_path / "stopped"), whole)
    assert not torch.equal(whole, torch.ones(1, 3))


@pytest.mark.slow
def test_the_recipe_makes_a_base_that_loads(tmp_path: Path) -> None:
    paths = [f"work={tmp_path / 'work'}", f"output={tmp_path / 'base'}"]
    with torch.random.fork_rng():
        cli(["--config", str(CONFIG), *paths, *SMALL], standalone_mode=False)
    base = load_base(str(tmp_path / "base"))
    assert base.decode(base.encode(torch.zeros(1, 1, 32, 32))).shape == (1, 1, 32, 32)
    assert base.embed(["ellipse, size 74"]).shape == (1, 32, 32)
