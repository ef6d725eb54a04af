"""The benchmark on real latents: its statistics on numbers drawn here, and its autoencoder on the real weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from ld_common.core.errors import ConfigError, ModelError
from ld_common.diffusion.drift import LatentDrift
from ld_simulations.benchmarks.real_latents.autoencoder import TinyAutoencoder
from ld_simulations.benchmarks.real_latents.network import (
    LatentTraining,
    contexts,
    draw_latents,
    new_network,
    train_network,
)
from ld_simulations.benchmarks.real_latents.pictures import SourcedPictures, everyday_crops, few_of_each
from ld_simulations.benchmarks.real_latents.plan import WEIGHTS, RealLatentsBenchmark, load_real_latents
from ld_simulations.benchmarks.real_latents.report import table_rows
from ld_simulations.benchmarks.real_latents.rows import BASE, DRAWN, MATCHED, METRICS, NO_DRIFT, WITHOUT_TRAINING
from ld_simulations.benchmarks.real_latents.run import run
from ld_simulations.benchmarks.real_latents.statistics import (
    chance_of_halves,
    drift_estimate,
    jackknife_variance,
    leave_one_out,
    paired_estimate,
    seeds_interval,
    site_distances,
    split_patients,
    tell_sites,
)

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs/benchmark_real_latents.yaml"
PATIENTS, IMAGES, CHANNELS = 40, 5, 6
RESAMPLES = 300


def drawn_values(seed: int, shift: float = 0.0) -> tuple[np.ndarray, list[str]]:
    """Images of patients who differ by a deviation of 1, their images by .1; all moved by `shift`."""
    random = np.random.default_rng(seed)
    own = np.repeat(random.normal(size=(PATIENTS, CHANNELS)), IMAGES, 0)
    values = own + 0.1 * random.normal(size=own.shape) + shift
    return values, [f"p{patient:02}" for patient in range(PATIENTS) for _ in range(IMAGES)]


def benchmark_with(*overrides: str) -> RealLatentsBenchmark:
    return load_real_latents(CONFIG, list(overrides))


def test_an_interval_is_over_patients_not_over_their_images() -> None:
    others, other_groups = drawn_values(1)
    covered, widths = [], []
    for seed in range(2, 22):
        values, groups = drawn_values(seed, shift=0.5)
        found = drift_estimate(values, groups, others, other_groups, RESAMPLES)
        low, high = np.array(found["low"]), np.array(found["high"])
        widths.append((high - low).mean())
        truth = 0.5 - others.mean(0)
        # the others' mean is known here, so its part of the width is on the safe side
        covered.append(((low <= truth) & (truth <= high)).mean())
    assert np.mean(covered) > 0.93
    assert np.mean(widths) == pytest.approx(2 * 1.96 * (2 / PATIENTS) ** 0.5, rel=0.15)


def test_a_drift_is_corrected_for_noise_and_beyond_chance_only_where_it_is_one() -> None:
    others, other_groups = drawn_values(1)
    (same, groups), (moved, _) = drawn_values(2), drawn_values(2, shift=1.0)
    none, real = (drift_estimate(values, groups, others, other_groups, RESAMPLES) for values in (same, moved))
    assert real["rms"] == pytest.approx(1.0, abs=0.3)
    assert real["corrected"] < real["rms"]
    assert real["channels_apart"] == CHANNELS
    assert none["corrected"] < 0.2
    assert none["channels_apart"] <= 2
    assert (real["pictures"], real["groups"]) == (PATIENTS * IMAGES, PATIENTS)


def test_versions_of_the_same_pictures_are_compared_in_pairs() -> None:
    values, groups = drawn_values(5)
    moved = values + 0.01
    paired = paired_estimate(moved - values, groups, RESAMPLES)
    apart = drift_estimate(moved, groups, values, groups, RESAMPLES)
    assert paired["channels_apart"] == CHANNELS
    assert paired["corrected"] == pytest.approx(0.01)
    assert apart["channels_apart"] == 0


def test_chance_is_split_by_source() -> None:
    values, groups = drawn_values(3)
    by_source = chance_of_halves(values, groups, RESAMPLES)
    by_image = chance_of_halves(values, [str(row) for row in range(len(values))], RESAMPLES)
    assert by_source["chance"] == pytest.approx((4 / PATIENTS) ** 0.5, rel=0.3)  # of halves of 20 patients
    assert by_source["chance"] > 1.5 * by_image["chance"]
    assert by_source["chance_high"] > by_source["chance"]
    with pytest.raises(ValueError, match="two groups"):
        chance_of_halves(values, ["one"] * len(values), 3)


def test_sites_are_told_apart_only_where_they_differ() -> None:
    values, patients = drawn_values(4)
    sites = [("a", "b")[int(patient[1:]) % 2] for patient in patients]
    same_distance, same = site_distances(values, patients, sites, 200), tell_sites(values, patients, sites, 50)
    moved = values + 3.0 * (np.array(sites) == "b")[:, None]
    far_distance, far = site_distances(moved, patients, sites, 200), tell_sites(moved, patients, sites, 50)
    assert same_distance[0]["p"] > 0.05
    assert far_distance[0]["p"] < 0.01
    assert far_distance[0]["corrected_low"] > far_distance[0]["chance_high"]
    assert far["balanced"] == 1.0
    assert same["balanced"] <= same["chance_high"]
    assert same["chance"] == pytest.approx(0.5, abs=0.1)
    assert same["balanced_low"] < same["balanced"] < same["balanced_high"]
    assert far["cases"] == PATIENTS


def test_a_patient_is_not_judged_by_the_own_images() -> None:
    """Everyone differs from everyone: whoever knows the patient already tells the site."""
    values = np.eye(8).repeat(2, 0)
    patients = [f"p{row // 2}" for row in range(16)]
    sites = ["ab"[row % 2] for row in range(16)]  # every patient is seen at both
    found = tell_sites(values, patients, sites, 20)
    assert found["balanced"] == 0.5
    assert found["cases"] == 16


def test_patients_are_held_out_with_all_their_images_and_from_every_site() -> None:
    patients = [f"p{number // 3}" for number in range(90)]
    sites = [("big", "small")[number // 3 >= 24] for number in range(90)]
    held = split_patients(patients, sites, 1 / 3, 0)
    assert len(held) == 10
    assert len(held & {f"p{number}" for number in range(24, 30)}) == 2
    assert held == split_patients(patients[::-1], sites[::-1], 1 / 3, 0)
    assert held != split_patients(patients, sites, 1 / 3, 1)


def test_the_jackknife_is_the_variance_of_a_mean() -> None:
    values = np.random.default_rng(0).normal(size=30)
    groups = [f"g{number:02}" for number in range(30)]
    left_out = leave_one_out(lambda rows: float(values[rows].mean()), groups)
    assert jackknife_variance(left_out) == pytest.approx(values.var(ddof=1) / 30)
    interval = seeds_interval([1.0, 3.0], [left_out, left_out], own_variance=0.5)
    assert interval["mean"] == 2.0
    assert interval["half_width"] == pytest.approx(1.96 * (values.var(ddof=1) / 30 + 1.0 + 0.5) ** 0.5, rel=1e-3)


def test_a_change_is_of_the_same_seed_and_patients() -> None:
    def row(value: float) -> dict[str, object]:
        left_out = [value - 1, value, value + 1]
        return {"grey": 0.0} | {name: {"value": value, "left_out": left_out, "own_variance": 0.0} for name in METRICS}

    names = [NO_DRIFT, MATCHED, *(drawn.name for drawn in DRAWN[1:])]
    parts = {"references": {"rows": {name: row(5.0) for name in (*WITHOUT_TRAINING, BASE)}}}
    for seed, level in enumerate((10.0, 20.0)):
        rows = {name: row(level if name == NO_DRIFT else level - 2) for name in names}
        parts[f"seed-{seed}"] = {"rows": rows}
    table = table_rows(parts)
    assert table[MATCHED]["frechet"]["mean"] == 13.0
    assert table[MATCHED]["frechet"]["half_width"] > 5
    assert table[MATCHED]["frechet_change"] == {"mean": -2.0, "half_width": 0.0}


def test_few_of_each_source_are_taken_evenly() -> None:
    sources = ["a"] * 7 + ["b"]
    pictures = SourcedPictures(torch.arange(8.0).view(8, 1, 1, 1), sources, ["s"] * 8)
    assert few_of_each(pictures, 3).pictures.flatten().tolist() == [0, 3, 6, 7]


def test_everyday_crops_are_square_coloured_and_the_same_each_time() -> None:
    crops = everyday_crops(16, 2)
    assert crops.pictures.shape[1:] == (3, 16, 16)
    assert len(set(crops.sources)) >= 10
    assert float(crops.pictures.abs().max()) <= 1
    assert torch.equal(crops.pictures, everyday_crops(16, 2).pictures)
    assert crops.grey().pictures.shape[1:] == (1, 16, 16)


def test_the_network_learns_centred_latents_and_draws_with_a_drift() -> None:
    network = new_network(2)
    latents, context = torch.full((4, 32, 2, 2), 3.0), contexts(["a", "b", "b", "a"], ["a", "b"])
    centred = LatentDrift(torch.full((32, 1, 1), 3.0), "centred")
    loss = train_network(network, latents, context, LatentTraining(3, 2, 1e-3, 0), centred)
    assert 0 < loss < 3
    drawn = [draw_latents(network, context, 0, 4, drift) for drift in (None, centred)]
    assert torch.allclose(drawn[1], drawn[0] + 3.0, atol=1e-4)
    assert torch.equal(drawn[0], draw_latents(network, context, 0, 4))


def test_without_the_data_it_is_skipped_in_one_sentence(tmp_path: Path) -> None:
    console = Console(record=True, width=400)
    benchmark = benchmark_with(f"data={tmp_path / 'nowhere'}", f"output={tmp_path / 'out'}", f"results={tmp_path}")
    assert run(benchmark, False, console) == []
    assert console.export_text().startswith("skipped: there is no ")
    assert not list(tmp_path.glob("*"))
    with pytest.raises(ConfigError, match="holds no result of"):
        run(benchmark, True, console)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1)}, tmp_path / "taef2_encoder.pth")
    with pytest.raises(ModelError, match="is not TAEF2's"):
        TinyAutoencoder(tmp_path)
    with pytest.raises(ModelError, match="is not TAEF2's"):
        TinyAutoencoder(tmp_path / "nowhere")


@pytest.mark.slow
def test_the_published_weights_reconstruct_everyday_pictures() -> None:
    benchmark = benchmark_with(f"data={ROOT / '../shared/data'}")
    if benchmark.missing() is not None:
        pytest.skip(f"there is no '{benchmark.missing()}'")
    crops = everyday_crops(96, 1).pictures[:4]
    psnr = {}
    for groups in (4, 8):
        autoencoder = TinyAutoencoder(benchmark.data / WEIGHTS, groups)
        latents = autoencoder.encode(crops)
        assert latents.shape == (4, 32, 12, 12)
        error = (autoencoder.decode(latents) - crops).square().mean()
        psnr[groups] = float(10 * torch.log10(4 / error))
    assert psnr[4] > 26
    assert psnr[4] > psnr[8] + 1
