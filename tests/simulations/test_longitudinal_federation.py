"""A longitudinal drift through the real ClientApp and strategy: two rounds, plain or under secure aggregation."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ld_client.data.store import open_store, split_store
from ld_client.privacy.dp_longitudinal import paid_longitudinal
from ld_client.privacy.ledger import Ledger
from ld_client.site_config import load_modality, load_site
from ld_client.site_drift import longitudinal_sums
from ld_common.adapters.base import inject
from ld_common.adapters.registry import read_adapter
from ld_common.adapters.state_dict import state_digest
from ld_common.core.config import from_mapping
from ld_common.core.errors import AdapterError, ConfigError, ReleaseError
from ld_common.diffusion.base_model import base_digest, base_latent_mean, load_denoiser
from ld_common.diffusion.longitudinal import LongitudinalDrift
from ld_common.diffusion.longitudinal_fit import fit
from ld_common.diffusion.longitudinal_sums import Basis, basis_of, layout, sketch_layout, unflatten
from ld_common.diffusion.private_longitudinal import noise_deviations
from ld_common.diffusion.private_longitudinal_fit import SumNoise, fit_private
from ld_common.diffusion.public_basis import PublicBasis
from ld_common.imaging.modality import Modality
from ld_common.pipeline import CounterfactualPipeline
from ld_common.protocol.study_config import StudyConfig
from ld_common.release.release import ReleaseContent, read_release, write_release
from ld_server.checkpoint import read_checkpoint
from ld_server.server_app import run_study
from tests.simulations.test_secure_federation import SITES, Nodes, files, options, run, task_identity
from tests.support.longitudinal import random_drift

__all__ = ["files", "task_identity"]

POLICY = "policy: {drift: [longitudinal], "
SHAPE = (4, 4, 4)


@pytest.fixture
def willing(files: dict[str, Path]) -> dict[str, Path]:
    """Sites that let the sums of a longitudinal drift leave."""
    for file in files.values():
        file.write_text(file.read_text().replace("policy: {", POLICY))
    return files


def longitudinal(base: Path, output: Path, **federation: object) -> dict[str, object]:
    return {**options(base, output, **federation), "drift": {"shape": "longitudinal"}, "edit": {"name": "drift"}}


def test_two_rounds_give_the_fit_of_the_pooled_sums(
    smallest_base: Path, willing: dict[str, Path], tmp_path: Path
) -> None:
    release = run(Nodes(willing), longitudinal(smallest_base, tmp_path / "plain", secure_aggregation=False), willing)
    site = load_site(willing["p"])
    store, modality = open_store(site.store_path), load_modality(site)
    study = from_mapping(StudyConfig, longitudinal(smallest_base, tmp_path / "plain"))
    sketched = sum(longitudinal_sums(modality, store, study, {}) for _ in SITES)
    assert isinstance(sketched, torch.Tensor)
    basis = basis_of(unflatten(sketched, sketch_layout(64)), study.seed)
    summed = sum(longitudinal_sums(modality, store, study, basis.state()) for _ in SITES)
    assert isinstance(summed, torch.Tensor)
    pooled, _ = fit(
        unflatten(summed, layout(64, 5)),
        basis,
        modality.numeric_columns,
        base_latent_mean(str(smallest_base), 4),
        SHAPE,
    )
    assert isinstance(release.drift, LongitudinalDrift)
    for name, value in pooled.state().items():
        assert torch.equal(release.drift.state()[name], value), name
    assert release.site_drifts == {}
    assert float(release.drift.yearly.abs().max()) > 1e-4


@pytest.mark.slow
def test_a_secure_sum_gives_the_same_within_its_levels_and_an_answer_can_be_drawn(
    smallest_base: Path, willing: dict[str, Path], tmp_path: Path
) -> None:
    grid = Nodes(willing)
    masked = run(grid, longitudinal(smallest_base, tmp_path / "masked"), willing)
    assert isinstance(masked.drift, LongitudinalDrift)
    kept = read_checkpoint(tmp_path / "masked").drifts
    assert kept.sites == {}
    assert kept.mean is not None
    site = load_site(willing["p"])
    study = from_mapping(StudyConfig, longitudinal(smallest_base, tmp_path))
    modality, store = load_modality(site), open_store(site.store_path)
    own = longitudinal_sums(modality, store, study, kept.basis)
    assert float((kept.mean - own).abs().max() / own.abs().max()) < 1e-9  # all sites have the same visits
    pipe = CounterfactualPipeline.from_release(masked.folder)
    scan = torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    result = pipe(scan, {"age": 60, "sex": "F", "diagnosis": "CN"}, target={"age": 80})
    assert result.record["edit"]["name"] == "drift"
    assert float(abs(result.difference).max()) > 0


def test_a_basis_of_another_size_is_refused(smallest_base: Path, willing: dict[str, Path], tmp_path: Path) -> None:
    site = load_site(willing["p"])
    store, modality = open_store(site.store_path), load_modality(site)
    study = from_mapping(StudyConfig, longitudinal(smallest_base, tmp_path))
    good = Basis(torch.zeros(64).double(), torch.eye(64).double()).state()
    assert longitudinal_sums(modality, store, study, good).isfinite().all()
    for basis in (
        {"mean": good["mean"]},
        {**good, "mean": torch.zeros(63).double()},
        {**good, "directions": torch.full((64, 64), torch.nan).double()},
    ):
        with pytest.raises(AdapterError, match="basis"):
            longitudinal_sums(modality, store, study, basis)


def test_one_round_is_too_few_and_medians_do_not_add_up(
    smallest_base: Path, willing: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="two rounds"):
        from_mapping(StudyConfig, longitudinal(smallest_base, tmp_path, rounds=1))
    medians = longitudinal(
        smallest_base, tmp_path, secure_aggregation=False, aggregation={"name": "median"}, min_train_nodes=3
    )
    with pytest.raises(ConfigError, match="adds sums up"):
        run(Nodes(willing), medians, willing)


@pytest.mark.slow
def test_sites_refuse_it_by_default(smallest_base: Path, files: dict[str, Path], tmp_path: Path) -> None:
    grid = Nodes(files)
    with pytest.raises(Exception, match="no round had enough"):
        run(grid, longitudinal(smallest_base, tmp_path, secure_aggregation=False), files)
    assert "asks for more than the site allows" in (tmp_path / "rounds.jsonl").read_text()


def public_release(base: Path, modality: Modality, folder: Path, drift: LongitudinalDrift | None) -> Path:
    """What a private study starts from: the first weights of its adapter, and a drift of public patients."""
    study = from_mapping(StudyConfig, {**options(base, folder, secure_aggregation=False), "name": "public"})
    study = replace(study, federation=replace(study.federation, sites=["outer", "rim"]))
    state = inject(load_denoiser(str(base)), read_adapter(study.adapter), study.seed).state()
    return write_release(folder, study, modality, ReleaseContent(base_digest(str(base)), state, drift))


@pytest.fixture
def start(smallest_base: Path, willing: dict[str, Path], tmp_path: Path) -> Path:
    """A public release; every site has a ledger of its own."""
    for name, file in willing.items():
        file.write_text(file.read_text() + f"ledger: {name}.sqlite\n")
    modality = load_modality(load_site(willing["p"]))
    return public_release(smallest_base, modality, tmp_path / "public", random_drift(modality, SHAPE))


def private(base: Path, output: Path, start: Path, **federation: object) -> dict[str, object]:
    privacy = {"enabled": True, "patients": 10, "expected_batch_size": 2, "augmentation_multiplicity": 1}
    return {**longitudinal(base, output, **federation), "start": str(start), "privacy": privacy}


@pytest.mark.slow
@pytest.mark.parametrize("secure", [False, True])
def test_a_private_study_corrects_its_starts_drift_by_one_query(
    smallest_base: Path, willing: dict[str, Path], start: Path, tmp_path: Path, secure: bool
) -> None:
    grid = Nodes(willing)
    release = run(grid, private(smallest_base, tmp_path / "private", start, secure_aggregation=secure), willing)
    public = read_release(start).drift
    assert isinstance(public, LongitudinalDrift)
    assert isinstance(release.drift, LongitudinalDrift)
    assert release.site_drifts == {}
    kept = read_checkpoint(tmp_path / "private").drifts
    vectors = []
    for name in SITES:
        site = load_site(willing[name])
        ledger = Ledger(site.ledger_path)
        study = release.study
        store, _ = split_store(open_store(site.store_path), site.held_out, independent=True)
        vectors.append(paid_longitudinal(site, store, study, kept.basis))
        charged = [entry for entry in ledger.entries() if entry.study_digest == study.digest()]
        assert [entry.purpose for entry in charged].count("drift") == 1
    summed = torch.stack(vectors).sum(0)
    received = len(SITES) * kept.mean if kept.mean is not None else torch.stack(list(kept.sites.values())).sum(0)
    assert secure == (kept.sites == {})
    assert float((received - summed).abs().max() / summed.abs().max()) < 1e-6
    means, regressions = (len(SITES) ** 0.5 * noise for noise in noise_deviations(10.0, 4.0))
    expected = fit_private(summed, PublicBasis.of(public), SumNoise(means, regressions))
    for name, value in expected.state().items():
        assert torch.allclose(release.drift.state()[name], value, atol=1e-3), name
    assert release.manifest["privacy"]["drift_noise_multiplier"] == 10.0
    assert release.study.start_drift_digest == state_digest(public.state())


@pytest.mark.slow
def test_a_resumed_private_study_has_the_same_basis(
    smallest_base: Path, willing: dict[str, Path], start: Path, tmp_path: Path
) -> None:
    chosen = private(smallest_base, tmp_path / "study", start, secure_aggregation=False, min_train_nodes=3)
    study = from_mapping(StudyConfig, chosen)
    modality = load_modality(load_site(willing["p"]))
    run_study(Nodes(willing), study, modality)
    first = read_checkpoint(tmp_path / "study").drifts.basis
    shutil.rmtree(start)
    again = read_release(run_study(Nodes(willing), study, modality, resume=True))
    assert isinstance(again.drift, LongitudinalDrift)
    assert state_digest(read_checkpoint(tmp_path / "study").drifts.basis) == state_digest(first)


def test_a_start_without_a_longitudinal_drift_is_refused(
    smallest_base: Path, willing: dict[str, Path], tmp_path: Path
) -> None:
    modality = load_modality(load_site(willing["p"]))
    plain = public_release(smallest_base, modality, tmp_path / "plain", None)
    with pytest.raises(ReleaseError, match="no longitudinal drift"):
        run(Nodes(willing), private(smallest_base, tmp_path / "study", plain), willing)
