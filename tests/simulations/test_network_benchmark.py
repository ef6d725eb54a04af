"""What the trained network adds: fair rows beside it, a rule that draws what it says, and words that follow numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

from ld_common.core.errors import ConfigError
from ld_common.core.seeding import torch_generator
from ld_common.diffusion.base_model import BaseModel, load_base
from ld_common.editing.counterfactuals import draw_counterfactuals, edit_to
from ld_common.imaging.modality import Modality
from ld_simulations.benchmarks.individual.plan import PatientsConfig
from ld_simulations.benchmarks.network.judge import CLOSED, COPY, GAUSSIAN, NETWORK, TRUE, gaussian_latents
from ld_simulations.benchmarks.network.plan import CENTRED, MIRRORED, PLAIN, NetworkConfig
from ld_simulations.benchmarks.network.refined import RefinedDrift
from ld_simulations.benchmarks.network.report import draw_numbers, page_lines, verdict_lines
from ld_simulations.benchmarks.network.run import run
from tests.support.longitudinal import random_drift

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def base(smallest_base: Path) -> BaseModel:
    return load_base(str(smallest_base))


def test_nobody_is_trained_on_and_judged() -> None:
    with pytest.raises(ConfigError, match="they must differ"):
        NetworkConfig(test=PatientsConfig(0, 60))
    with pytest.raises(ConfigError, match="bigger is not one of"):
        NetworkConfig(trainings=[PLAIN, "bigger"])
    with pytest.raises(ConfigError, match="must have 'plain'"):
        NetworkConfig(trainings=[CENTRED])
    with pytest.raises(ConfigError, match="must not be above"):
        NetworkConfig(asked_patients=2, drawn_patients=3)


def test_the_rule_without_a_network_draws_the_drifts_mean_and_covariance(base: BaseModel, brain_mri: Modality) -> None:
    drift = random_drift(brain_mri, base.latent_shape)
    drift = replace(drift, base_mean=base.latent_mean.float())
    design = [brain_mri.design_vector({"age": 70.0, "sex": "F", "diagnosis": "AD"})] * 4000
    drawn = gaussian_latents(drift, base, drift.at(design), torch_generator(0, "test")).flatten(1)
    expected = drift.mean + drift.features(torch.tensor(design[:1]))[0] @ drift.effect
    assert float((drawn.mean(0) - expected).abs().max()) < 0.1 * float(drawn.std(0).max())
    values, vectors = torch.linalg.eigh(drift.part_spread)
    wanted = vectors * values.clamp_min(0) @ vectors.T
    found = torch.cov(drift.parts(drawn).T)
    assert float((found - wanted).norm() / wanted.norm()) < 0.1


def test_redrawing_a_change_of_nothing_returns_the_scan_and_a_change_moves_it(
    base: BaseModel, brain_mri: Modality
) -> None:
    drift = random_drift(brain_mri, base.latent_shape)
    scan = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    source = {"age": 60.0, "sex": "F", "diagnosis": "CN"}
    edits = [edit_to(brain_mri, 0, source, target) for target in (source, {"age": 80.0})]
    editor = RefinedDrift(num_inference_steps=10, noise_fraction=0.3, guidance_scale=0.0)
    drawn = draw_counterfactuals(base, scan, [brain_mri.prompt(source)], edits, editor, drift=drift)
    assert float((drawn.images[0] - drawn.reconstructions[0]).abs().max()) < 1e-3
    assert float((drawn.images[1] - drawn.reconstructions[0]).abs().max()) > 0.05


def drawn_records(spread: float) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [
        {
            "patient": str(number),
            "growths_mm2": list(true + 30 * rng.standard_normal() + spread * rng.standard_normal(8)),
            "true_growth_mm2": true,
            "gain_db": 3.0,
            "one_gain_db": 2.0,
        }
        for number, true in enumerate(rng.uniform(100, 900, 200))
    ]


def test_the_spread_of_answers_is_judged_by_their_error() -> None:
    honest, sure = draw_numbers(drawn_records(30.0)), draw_numbers(drawn_records(3.0))
    assert 0.8 < honest["coverage_90"] < 0.95
    assert honest["deviation_mm2"] == pytest.approx(30, rel=0.1)
    assert sure["coverage_90"] < 0.2
    assert sure["error_mm2"] == pytest.approx(30, rel=0.2)


def measured(kernel: float, gain: float) -> tuple[dict[str, float], dict[str, float]]:
    names = ("frechet_efficientnet_lite0", "kernel_efficientnet_lite0", "frechet_gabor", "kernel_gabor")
    noise = dict.fromkeys(names, kernel) | {"sharpness_ratio": 1.0, "size_slope": 1.0}
    answer = {
        "gain_db": gain,
        "gain_db_low": gain,
        "gain_db_high": gain,
        "other_sex_gain_db": gain,
        "written_kernel_efficientnet_lite0": kernel,
        "decoded_kernel_efficientnet_lite0": kernel,
    }
    return noise, answer


def test_the_words_follow_from_the_numbers() -> None:
    low, high = measured(0.1, 1.0), measured(0.2, 5.0)
    numbers: dict[str, Any] = {
        "noise": {GAUSSIAN: low[0], PLAIN: high[0]},
        "answers": {COPY: low[1], TRUE: low[1], CLOSED: high[1], NETWORK: low[1]},
        "draws": {},
    }
    said = "\n".join(verdict_lines(numbers))
    assert "does not win by any distance" in said
    assert "1.00 dB by the network, 5.00 dB by the closed form; the network is nearer to the truth in no kind" in said
    numbers["noise"] = {GAUSSIAN: high[0], PLAIN: low[0]}
    numbers["answers"] |= {CLOSED: low[1], NETWORK: high[1]}
    said = "\n".join(verdict_lines(numbers))
    assert "wins by FD efficientnet_lite0, KD efficientnet_lite0, FD gabor, KD gabor" in said
    assert "nearer to the truth in other sex" in said
    assert "Not run yet." in page_lines(NetworkConfig(), {"noise": {}, "answers": {}, "draws": {}})


@pytest.mark.slow
def test_a_small_benchmark_writes_its_page(tmp_path: Path, smallest_base: Path) -> None:
    study = yaml.safe_load((ROOT / "configs/demo_study.yaml").read_text())
    study |= {"base_model": str(smallest_base), "modality": str(ROOT / "configs" / study["modality"])}
    study["adapter"] = {"name": "lora", "rank": 2}
    study["training"] |= {"steps": 2}
    study["federation"] |= {"rounds": 2}
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(study))
    config = NetworkConfig(
        output=str(tmp_path / "out"),
        results=str(tmp_path),
        hospitals=str(ROOT / "configs/hospitals.yaml"),
        study=str(file),
        training=PatientsConfig(0, 4),
        test=PatientsConfig(505, 3),
        others=PatientsConfig(506, 3),
        sampling_steps=3,
        asked_patients=1,
        drawn_patients=1,
        draws=2,
        closed_form={"name": "drift"},
        network={"name": "ddpm", "num_inference_steps": 4},
        refinements=[{"num_inference_steps": 4, "noise_fraction": 0.5, "guidance_scale": 0.0}],
        workers=1,
    )
    run(config, False, Console(quiet=True))
    numbers, page = json.loads((tmp_path / "network.json").read_text()), (tmp_path / "network.md").read_text()
    assert set(numbers["noise"]) >= {GAUSSIAN, PLAIN, CENTRED, MIRRORED}
    plain, centred = (numbers["noise"][row]["frechet_efficientnet_lite0"] for row in (PLAIN, CENTRED))
    assert plain != centred
    assert numbers["answers"][COPY]["gain_db"] == 0
    assert "gain_db" not in numbers["answers"][TRUE]  # it is the truth
    assert numbers["draws"][NETWORK]["draws"] == 2
    for row in (CLOSED, NETWORK, "closed form, redrawn from noise 0.5, guidance 0"):
        assert f"| {row} | {numbers['answers'][row]['gain_db']:.2f}" in page
    with pytest.raises(ConfigError, match="another sampling_steps"):
        run(replace(config, sampling_steps=4), False, Console(quiet=True))
    assert run(config, True, Console(quiet=True)) == [tmp_path / "network.json", tmp_path / "network.md"]
