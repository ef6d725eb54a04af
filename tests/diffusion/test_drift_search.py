from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ld_client.cli import app
from ld_client.data.store import open_store
from ld_client.drift_report import edits_of_targets
from ld_client.site_config import load_modality, load_site
from ld_client.site_drift import site_drift
from ld_common.core.config import from_mapping
from ld_common.core.errors import ConfigError, RequestError
from ld_common.diffusion.base_model import load_base, load_denoiser
from ld_common.diffusion.drift import LatentDrift, shift_of
from ld_common.diffusion.drift_search import best, search_grid
from ld_common.diffusion.options import SearchConfig
from ld_common.editing.counterfactuals import Edit
from ld_common.editing.ddim import DdimInversion
from ld_common.editing.delta_search import search_counterfactual
from ld_common.protocol.study_config import StudyConfig
from ld_simulations.benchmarks.bases.gaussian import DATA_MEAN, SCHEDULER, gaussian_model, unit_noise
from ld_simulations.tiny_base.networks import make_scheduler
from tests.support.site_homes import index_site


def test_the_grid_is_the_papers() -> None:
    assert SearchConfig().deltas == pytest.approx([-0.2, -0.15, -0.1, -0.05, 0, 0.05, 0.1, 0.15, 0.2])


@pytest.mark.slow
@pytest.mark.parametrize("sign", [1, -1])
def test_the_grid_search_finds_the_shift_that_the_moments_predict(sign: int) -> None:
    model = gaussian_model(mean=sign * DATA_MEAN)
    latents = sign * DATA_MEAN + 0.4**0.5 * unit_noise(256, seed=3)
    config = SearchConfig(images=256, steps=20)
    trials = search_grid(model, latents, ["a scan"] * 256, config, "prior", seed=0)
    predicted = sign * DATA_MEAN * float(SCHEDULER.alphas_cumprod[-1]) ** 0.5  # 0.102
    assert best(trials).delta == pytest.approx(predicted, abs=0.051)
    again = search_grid(model, latents, ["a scan"] * 256, config, "prior", seed=0)
    assert trials == again


@pytest.mark.slow
def test_a_counterfactual_without_weight_on_its_target_stays_with_the_patient(tiny_base: Path) -> None:
    base = load_base(str(tiny_base))
    latents = torch.randn(2, *base.latent_shape, generator=torch.Generator().manual_seed(0))
    factual, edits = ["a scan, healthy"] * 2, [Edit(0, "a scan, ill"), Edit(1, "a scan, ill")]
    seen: list[int] = []
    config = SearchConfig(lowest=-0.2, highest=0.2, spacing=0.1, weight=0.0)
    arguments = base, latents, factual, edits, config, DdimInversion(num_inference_steps=4, guidance_scale=0.0), 0
    trials = search_counterfactual(*arguments, progress=lambda done, total: seen.append(done))
    assert best(trials).delta == 0  # nothing is asked, so nothing should move
    assert all(trial.loss == trial.parts["inner"] for trial in trials)
    assert seen == [1, 2, 3, 4, 5]
    assert trials == search_counterfactual(*arguments)


def test_a_target_that_is_reached_costs_less(tiny_base: Path) -> None:
    """Swapping factual and target turns a reached target into a missed one: the two losses are of p and 1 - p."""
    base = load_base(str(tiny_base))
    latents = torch.randn(1, *base.latent_shape, generator=torch.Generator().manual_seed(0))
    config, edit = SearchConfig(lowest=0, highest=0), DdimInversion(num_inference_steps=2, guidance_scale=0.0)
    there, back = (
        search_counterfactual(base, latents, [first], [Edit(0, second)], config, edit, 0)[0].parts["outer"]
        for first, second in (("a scan, healthy", "a scan, ill"), ("a scan, ill", "a scan, healthy"))
    )
    # the reconstructions differ a little between the two prompts, and so do the errors on them
    assert torch.exp(torch.tensor(-there)) + torch.exp(torch.tensor(-back)) == pytest.approx(1, abs=0.1)


def test_a_site_searches_once_and_keeps_what_it_found(site_yaml: Path, tiny_base: Path) -> None:
    site = load_site(site_yaml)
    index_site(site)
    store, model = open_store(site.store_path), load_denoiser(str(tiny_base))
    drift = {"estimator": "grid", "shape": "scalar", "search": {"images": 4, "steps": 2, "spacing": 0.1}}
    study = from_mapping(StudyConfig, {"drift": drift})
    found = site_drift(site, load_modality(site), store, model, study)
    assert found is not None
    assert found.shape == (1, 1, 1)
    delta = float(shift_of(LatentDrift(found), model.scheduler.alphas_cumprod))
    assert min(abs(delta - tried) for tried in study.drift.search.deltas) < 1e-6
    (kept,) = site.store_path.glob("drift-*.safetensors")
    changed = kept.stat().st_mtime_ns
    assert torch.equal(site_drift(site, load_modality(site), store, model, study), found)  # type: ignore[arg-type]
    assert kept.stat().st_mtime_ns == changed
    assert kept.stat().st_mode & 0o077 == 0
    site_drift(site, load_modality(site), store, model, replace(study, seed=1))
    (other,) = site.store_path.glob("drift-*.safetensors")
    assert other != kept


def test_a_search_that_asks_nothing_is_refused(site_yaml: Path) -> None:
    site = load_site(site_yaml)
    index_site(site)
    with pytest.raises(RequestError, match="targets"):
        edits_of_targets(load_modality(site), open_store(site.store_path), SearchConfig())


def test_a_search_needs_two_scans_and_a_leak() -> None:
    model, config = gaussian_model(), SearchConfig(images=4, steps=2)
    with pytest.raises(ConfigError, match="1 is too few"):
        search_grid(model, unit_noise(1), ["a scan"], config, "prior", 0)
    tight = gaussian_model(make_scheduler(zero_terminal_snr=True))
    with pytest.raises(ConfigError, match="zero SNR"):
        search_grid(tight, unit_noise(4), ["a scan"] * 4, config, "prior", 0)


@pytest.mark.parametrize(
    ("drift", "words"),
    [
        ({"estimator": "grid"}, "set drift.shape to scalar"),
        ({"estimator": "grdi"}, "known: moments"),
        ({"formulation": "prio"}, "known: prior"),
        ({"search": {"spacing": 0}}, "spacing"),
        ({"search": {"highest": float("inf")}}, "must be numbers"),
        ({"search": {"spacing": 1e-6}}, "at most 1000"),
    ],
)
def test_a_wrong_drift_is_named(drift: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        from_mapping(StudyConfig, {"drift": drift})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], "by moments"),
        (["--estimator", "grid", "drift.search.images=4"], "energy_distance"),
        (["--estimator", "counterfactual", "drift.search.targets=[age=90]", "edit.num_inference_steps=2"], "outer"),
    ],
)
def test_a_data_manager_sees_the_drift_before_training(
    site_yaml: Path, tmp_path: Path, overrides: list[str], words: str
) -> None:
    index_site(load_site(site_yaml))
    study = tmp_path / "study.yaml"
    study.write_text(f"modality: {Path(__file__).parents[2] / 'configs/modalities/brain_mri.yaml'}\n")
    search = ["drift.search.steps=2", "drift.search.spacing=0.2"]
    said = CliRunner().invoke(app, ["drift", "--config", str(site_yaml), "--study", str(study), *search, *overrides])
    assert said.exit_code == 0, said.output
    assert words in said.output
