"""The malicious server of the privacy benchmark: what it asks, what it sees, and what is reported of it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ld_client.site_config import PolicyConfig
from ld_common.diffusion.loss import training_timesteps
from ld_common.diffusion.training import TrainingData
from ld_simulations.benchmarks.privacy.reconstruction import ATTACKS, TRIVIAL, gap, interval
from ld_simulations.benchmarks.privacy.reconstruction_attacks import (
    Gradients,
    LatentPrior,
    LearnedInverse,
    gallery_scores,
    match_gradient,
    share_of_gradient,
)
from ld_simulations.benchmarks.privacy.reconstruction_plan import (
    CRAFTED,
    GATE_BELOW,
    HONEST,
    LORA,
    STRONGEST_ALLOWED,
    ReconstructionConfig,
    Request,
    passes_default_policy,
    requests,
    timestep_power,
)
from ld_simulations.benchmarks.privacy.reconstruction_server import GATE_ABOVE, MaliciousServer
from ld_simulations.benchmarks.privacy.reconstruction_table import (
    best_request,
    reconstruction_lines,
    reconstruction_numbers,
)

BASE = str(Path(__file__).parents[2] / "simulations/tiny_base")


@pytest.fixture(scope="module")
def crafted() -> MaliciousServer:
    return MaliciousServer(Request(CRAFTED, LORA, 1, 64), BASE)


def scans(count: int) -> TrainingData:
    generator = torch.Generator().manual_seed(0)
    return TrainingData(torch.randn((count, 8, 16, 16), generator=generator), ["brain MRI"] * count)


def test_the_default_policy_takes_no_round_of_few_visits() -> None:
    asked = requests(ReconstructionConfig())
    passing = {(request.steps, request.batch_size) for request in asked if passes_default_policy(request)}
    assert passing == {(1, 64), (4, 32), (16, 8), (16, 32), (110, 8), (110, 32)}


def test_one_visit_of_a_round_has_a_timestep_that_passes() -> None:
    generator = torch.Generator().manual_seed(0)
    for visits in (64, 512):
        drawn = training_timesteps(visits * 2000, 1000, timestep_power(visits), generator)
        assert float((drawn < GATE_BELOW).sum()) / 2000 == pytest.approx(1.0, abs=0.1)


def test_crafted_weights_hide_the_visits_that_do_not_pass(crafted: MaliciousServer) -> None:
    gradients = Gradients(crafted, ["brain MRI"], 0)
    latent, context = scans(1).latents, gradients.contexts["brain MRI"]
    passed, *blocked = [
        float(gradients.draw(latent, context, torch.tensor([timestep])).norm())
        for timestep in (GATE_BELOW - 2, GATE_ABOVE, 300, 999)
    ]
    assert max(blocked) < 1e-3 * passed


def test_one_step_of_adam_gives_the_gradient_away() -> None:
    """Its size too, though the step is lr times the sign but for epsilon."""
    server = MaliciousServer(Request(HONEST, LORA, 1, 1), BASE)
    data = scans(1)
    rounds = [server.round(data, secret) for secret in (b"a key", b"a key", b"another key")]
    seen = [server.gradient(round_.update) for round_ in rounds]
    assert torch.equal(seen[0], seen[1])
    assert not torch.allclose(seen[0], seen[2])
    gradients = Gradients(server, data.prompts, 0)
    wanted = gradients.draw(data.latents, gradients.contexts["brain MRI"], torch.tensor([0])).abs()
    sizes = [F.cosine_similarity(values.abs(), wanted, dim=0) for values in (seen[0], seen[0].sign())]
    assert sizes[0] > sizes[1]


def test_a_gradient_of_many_visits_is_taken_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    centre, blocked, own = torch.randn((3, 1000), generator=generator)
    own -= (own @ centre) / (centre @ centre) * centre
    observed = 0.5 * (centre + 0.1 * own) + 0.3 * blocked
    found = share_of_gradient(observed, centre, blocked)
    assert F.cosine_similarity(found - centre, own, dim=0) > 0.9
    assert torch.equal(share_of_gradient(0.3 * blocked, centre, blocked), centre)


def test_a_linear_gradient_is_inverted() -> None:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn((200, 2, 2, 2), generator=generator)
    features = latents.flatten(1) @ torch.randn((8, 50), generator=generator)
    inverse = LearnedInverse.fit(features[None, :190], latents[:190])
    for row in range(190, 200):
        assert float((inverse(features[row]) - latents[row].flatten()).square().mean()) < 1e-3
    scores = gallery_scores(features[195], features[None, 190:])
    assert int(scores.argmax()) == 5


@pytest.mark.slow
def test_gradient_matching_finds_a_latent_of_that_gradient(crafted: MaliciousServer) -> None:
    data, gradients = scans(40), Gradients(crafted, ["brain MRI"], 0)
    prior = LatentPrior(data.latents)

    def gradient(latent: torch.Tensor) -> torch.Tensor:
        drawn = gradients.draw(latent.view(1, 8, 16, 16), gradients.common, torch.tensor([2]))
        return drawn[gradients.chosen]

    observed = gradient(data.latents[:1])
    found = match_gradient(gradients, prior, observed, prior.mean, 6)
    angles = [1 - F.cosine_similarity(gradient(latent), observed, dim=0) for latent in (prior.mean, found)]
    assert angles[1] < 0.5 * angles[0]


def answer(right: float, other: float) -> dict[str, Any]:
    return {"right_db": right, "other_db": other, "right": 0, "other": 1}


def result(request: Request, gaps: list[float]) -> dict[str, Any]:
    rounds = []
    for number in gaps:
        answers = {ATTACKS[0]: answer(20 + number, 20)} | {name: answer(18, 18) for name in TRIVIAL}
        rounds.append({"drawn": 2, "answers": answers, "gallery_auc": 0.6, "gallery_names_a_member": True})
    passes = passes_default_policy(request)
    return {"request": asdict(request), "moved": 1.0, "passes_default_policy": passes, "rounds": rounds}


def test_the_number_of_the_promise_is_of_the_default_policy_and_lora() -> None:
    results = [
        result(Request(HONEST, LORA, 1, 64), [0.0, 0.2, 0.4]),
        result(Request(CRAFTED, LORA, 16, 8), [1.0, 2.0, 3.0]),
        result(Request(CRAFTED, LORA, 110, 32), [30.0]),
        result(Request(CRAFTED, LORA, 1, 64, gate=10.0), [50.0] * 3),
        result(Request(CRAFTED, LORA, 1, 1), [9.0] * 3),
        result(Request(HONEST, "full", 1, 64), [7.0] * 3),
    ]
    best = best_request(results)
    assert best == Request(CRAFTED, LORA, 16, 8)
    assert "best_reconstruction_gap_db" not in reconstruction_numbers(results, None)
    numbers = reconstruction_numbers(results, result(best, [0.5, 0.75, 1.0]))
    assert numbers["selected_reconstruction_gap_db"] == pytest.approx(2.0)
    assert numbers["best_reconstruction_gap_db"] == pytest.approx(0.75)
    assert 0.5 <= numbers["best_reconstruction_gap_db_low"] <= numbers["best_reconstruction_gap_db_high"] <= 1.0
    assert numbers["reconstruction_gap_db_default_policy_lora_honest"] == pytest.approx(0.2)
    assert numbers["reconstruction_gap_db_no_floors_lora_crafted"] == pytest.approx(9.0)
    assert any("| **16 × 8** |" in line for line in reconstruction_lines(results, None, ""))
    assert not reconstruction_lines([], None, "")
    far = result(Request(CRAFTED, LORA, 16, 8), [9.0] * 3) | {"moved": 101.0}
    assert best_request([*results, far]) == best


@pytest.mark.slow
@pytest.mark.attack
def test_allowed_weights_lie_within_the_default_distance_of_a_site() -> None:
    for blocks in (0, 1):
        server = MaliciousServer(Request(CRAFTED, LORA, 1, 64, gate=STRONGEST_ALLOWED, blocks=blocks), BASE)
        assert 99 < server.moved < PolicyConfig().max_distance
        assert passes_default_policy(server.request, server.moved)
    assert not passes_default_policy(server.request, 101.0)


def test_a_gap_is_of_the_better_attack() -> None:
    row = {"answers": {ATTACKS[0]: answer(20, 19), ATTACKS[1]: answer(25, 20), TRIVIAL[0]: answer(30, 20)}}
    assert gap(row) == 5
    assert gap(row, TRIVIAL[0]) == 10
    low, high = interval([1.0, 2.0, 3.0])
    assert 1.0 <= low < 2.0 < high <= 3.0
