from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ld_client.privacy.secagg import SiteState
from ld_common.core.errors import FederationError
from ld_common.protocol.secagg.crypto import crowd_digest, masking_key, pair_mask, self_mask
from ld_common.protocol.secagg.messages import (
    CHECK_WORDS,
    MOST_SITES,
    SecaggSetting,
    Stage,
    default_threshold,
    dequantise,
    drift_numbers,
    flatten,
    quantise,
    restore,
)
from ld_server.secagg import SecureAggregation
from tests.support.secure_sites import check_sum, make_sites, masked_sites, numbers


@pytest.mark.parametrize(("count", "length"), [(3, 1000), (10, 300)])
def test_the_sum_is_the_plain_sum_within_the_quantisation_bound(count: int, length: int) -> None:
    sites = make_sites(count, length)
    check_sum(sites.run(), sites, sorted(sites.updates))


@pytest.mark.slow
def test_fifty_sites_of_which_some_drop_out_at_each_stage() -> None:
    sites = make_sites(50, 20)
    names = sorted(sites.updates)
    sites.silent = dict(zip(names, [*[Stage.KEYS] * 3, *[Stage.SHARES] * 3, *[Stage.VECTOR] * 4], strict=False))
    sites.silent |= dict.fromkeys(names[-3:], Stage.UNMASK)
    check_sum(sites.run(), sites, names[10:])


@pytest.mark.parametrize("stage", list(Stage))
def test_sites_drop_out_down_to_the_threshold_and_no_further(stage: Stage) -> None:
    for gone in range(4):
        sites = make_sites(7)
        names = sorted(sites.updates)
        sites.silent = dict.fromkeys(names[:gone], stage)
        if gone <= 7 - sites.setting.threshold:
            check_sum(sites.run(), sites, names if stage is Stage.UNMASK else names[gone:])
        else:
            with pytest.raises(FederationError, match=f"{7 - gone} of 7 sites remain after stage '{stage}'"):
                sites.run()
            later = list(Stage)[list(Stage).index(stage) + 1 :]
            assert not set(sites.requests) & set(later), "nothing is asked of the sites once the round has failed"


@pytest.mark.slow
def test_any_pattern_of_drop_outs_gives_the_sum_of_the_survivors_or_an_error() -> None:
    generator = np.random.default_rng(1)
    summed = 0
    for seed in range(200):
        sites = make_sites(int(generator.integers(3, 6)), 2, seed)
        stages = [None, None, None, *Stage]
        chosen = {name: stages[generator.integers(len(stages))] for name in sites.updates}
        sites.silent = {name: stage for name, stage in chosen.items() if stage is not None}
        survivors = [name for name, stage in sorted(chosen.items()) if stage in (None, Stage.UNMASK)]
        answering = sum(stage is None for stage in chosen.values())
        if answering >= sites.setting.threshold:
            check_sum(sites.run(), sites, survivors)
            summed += 1
        else:
            with pytest.raises(FederationError):
                sites.run()
    assert 20 < summed < 180


def chi_square(values: NDArray[np.uint8]) -> float:
    counts = np.bincount(values, minlength=256)
    return float(((counts - len(values) / 256) ** 2).sum() / (len(values) / 256))


@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0])
@pytest.mark.attack
def test_a_single_masked_vector_is_uniform_whatever_the_update(value: float) -> None:
    sites = make_sites(3, 40_000)
    sites.updates["s00"] = np.full(40_000, value)
    sites.run()
    masked = numbers(sites.answers[Stage.VECTOR]["s00"]).view(np.uint8).reshape(-1, 4)
    # chi-square with 255 degrees of freedom: mean 255, deviation 23; beyond 6 deviations once in 10^7 runs
    assert all(chi_square(masked[:, byte]) < 255 + 6 * 23 for byte in range(4))


@pytest.mark.attack
def test_either_kind_of_mask_hides_the_update_from_who_removes_the_other() -> None:
    sites = make_sites(3, 40_000)
    sites.updates["s00"] = np.ones(40_000)
    server = SecureAggregation(sites.setting, list(sites.updates))
    requests = server.agree(sites.exchange)
    before = {name: SiteState.from_bytes(content) for name, content in sites.states.items()}
    server.collect(sites.exchange(Stage.VECTOR, requests))
    masked = numbers(sites.answers[Stage.VECTOR]["s00"])
    public = masking_key(before["s00"].masking_secret, sites.setting.digest(), "s00").public_key().public_bytes_raw()
    crowd = crowd_digest(before["s00"].session, sorted(sites.updates))
    own = self_mask(before["s00"].seed, crowd, "s00", len(masked))
    pairs = np.zeros_like(own)
    for name in ("s01", "s02"):
        private = masking_key(before[name].masking_secret, sites.setting.digest(), name)
        pairs += pair_mask(private, public, crowd, "s00", name, len(masked))
    for rest in (masked - own, masked - pairs):
        assert chi_square((rest & 255).astype(np.uint8)) < 255 + 6 * 23
        assert chi_square((rest >> 24).astype(np.uint8)) < 255 + 6 * 23
    assert set((masked - own - pairs)[:-CHECK_WORDS]) == {sites.setting.levels - 1}


@pytest.mark.attack
def test_the_same_update_is_masked_afresh_and_its_masked_vector_is_uncorrelated_with_it() -> None:
    runs = [make_sites(3, 20_000), make_sites(3, 20_000)]
    masked = []
    for sites in runs:
        sites.run()
        masked.append(numbers(sites.answers[Stage.VECTOR]["s00"])[:-CHECK_WORDS])
    assert np.mean(masked[0] == masked[1]) < 1e-3
    assert abs(np.corrcoef(masked[0], runs[0].updates["s00"])[0, 1]) < 6 / np.sqrt(20_000)


def test_the_state_survives_as_bytes_and_damage_is_refused() -> None:
    sites, masked, _ = masked_sites()
    dealt = make_sites(3)
    SecureAggregation(dealt.setting, list(dealt.updates)).agree(dealt.exchange)
    for content in (sites.states["s01"], dealt.states["s01"]):
        assert SiteState.from_bytes(content).to_bytes() == content
    assert SiteState.from_bytes(masked.to_bytes()) == masked
    for damaged in (
        b"",
        b"{}",
        b"[]",
        b"\xff",
        masked.to_bytes()[:-20],
        masked.to_bytes().replace(b'"round": 3', b'"r": 3'),
    ):
        with pytest.raises(FederationError, match="cannot be read"):
            SiteState.from_bytes(damaged)


def test_quantisation_counts_what_it_clips_and_refuses_nan() -> None:
    setting = SecaggSetting("study", 1, 3, 2, 4, clip=0.5)
    levels, clipped = quantise(np.array([-2.0, -0.5, 0.5, 0.6]), setting)
    assert levels.tolist() == [0, 0, setting.levels - 1, setting.levels - 1] and clipped == 2
    for bad in (np.array([0.0, np.nan, 0.0, 0.0]), np.array([0.0, np.inf, 0.0, 0.0]), np.zeros(3)):
        with pytest.raises(FederationError):
            quantise(bad, setting)


@pytest.mark.parametrize("shape", ["channel", "longitudinal"])
def test_a_vector_carries_tensors_and_drift_there_and_back(shape: str) -> None:
    generator = torch.Generator().manual_seed(0)
    update = {"b": torch.randn(2, 3, generator=generator), "a": torch.randn(4, generator=generator)}
    drift = torch.randn(4, 1, 1, generator=generator, dtype=torch.float64)
    length = 10 + drift_numbers(4, shape)
    setting = SecaggSetting("study", 1, 3, 2, length, clip=5.0)
    vector = flatten(update, drift, shape, setting)
    assert vector[:4].tolist() == update["a"].double().tolist()
    state, back = restore(vector, update, drift.shape, shape, setting)
    assert back is not None and torch.allclose(back, drift, rtol=1e-12, atol=1e-12)
    assert set(state) == set(update) and all(torch.equal(state[name], update[name].double()) for name in update)
    assert restore(flatten(update, None, shape, setting), update, None, shape, setting)[1] is None
    with pytest.raises(FederationError, match="13 numbers"):
        restore(np.zeros(13), update, drift.shape, shape, setting)


def test_sums_of_a_longitudinal_drift_keep_more_digits_than_the_levels() -> None:
    setting = SecaggSetting("study", 1, 3, 2, 2 * 50, clip=0.1)
    drifts = [1000 * torch.randn(50, generator=torch.Generator().manual_seed(site)).double() for site in range(3)]
    total = sum(quantise(flatten({}, drift, "longitudinal", setting), setting)[0].astype(np.uint64) for drift in drifts)
    mean = dequantise((total % 2**32).astype(np.uint32), 3, setting) / 3
    back = restore(mean, {}, torch.Size([50]), "longitudinal", setting)[1]
    assert back is not None
    assert float((back - torch.stack(drifts).mean(0)).abs().max()) < 1e-6


@pytest.mark.parametrize(
    "changes",
    [
        {"sites": 2, "threshold": 2},
        {"sites": MOST_SITES + 1, "threshold": MOST_SITES},
        {"sites": 4, "threshold": 2},
        {"threshold": 1},
        {"threshold": 6},
        {"length": 0},
        {"round": -1},
        {"clip": 0.0},
        {"clip": float("nan")},
        {"levels": 1},
        {"levels": 2**31},
    ],
)
def test_a_setting_that_is_unsafe_or_overflows_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(FederationError):
        replace(SecaggSetting("study", 1, 5, 4, 3, clip=1.0), **changes)


def test_the_default_threshold_is_a_majority_of_any_number_of_sites() -> None:
    for count in range(3, MOST_SITES + 1):
        SecaggSetting("study", 1, count, default_threshold(count), 1, clip=1.0)
