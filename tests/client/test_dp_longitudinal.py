"""A private longitudinal drift at a site: charged once, the same in every round, in the basis of the study's start."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ld_client.data.store import open_store
from ld_client.deployment.approval_summary import sums_leaving
from ld_client.drift_report import report_drift
from ld_client.policy import check_store
from ld_client.privacy.budget import GOOD_SIGNAL, LEAST_SIGNAL, read_budget
from ld_client.privacy.ledger import Ledger
from ld_client.round import handle_train
from ld_client.site_config import PolicyConfig, SiteConfig, load_modality, load_site
from ld_common.adapters.base import inject
from ld_common.adapters.registry import read_adapter
from ld_common.adapters.state_dict import state_digest
from ld_common.core.config import from_mapping, to_mapping
from ld_common.core.errors import AdapterError, ConfigError, PolicyError, PrivacyError
from ld_common.diffusion.base_model import base_digest, load_denoiser
from ld_common.diffusion.private_longitudinal import signal_to_noise
from ld_common.diffusion.public_basis import PublicBasis
from ld_common.protocol.messages import TrainTask
from ld_common.protocol.study_config import StudyConfig
from tests.support.longitudinal import random_drift
from tests.support.site_homes import index_site

SHAPE = (4, 4, 4)


@pytest.fixture
def site(site_yaml: Path, tiny_base: Path, smallest_base: Path) -> SiteConfig:
    site_yaml.write_text(site_yaml.read_text().replace(str(tiny_base), str(smallest_base)))
    site = load_site(site_yaml, ["policy.drift=[longitudinal]"])
    index_site(site)
    return site


def options(**privacy: object) -> dict[str, object]:
    return {
        "adapter": {"name": "lora", "rank": 1, "targets": ["to_k"]},
        "training": {"steps": 1},
        "drift": {"shape": "longitudinal"},
        "start": "public",
        "federation": {"weighting": "equal", "rounds": 2},
        "privacy": {
            "enabled": True,
            "patients": 10,
            "expected_batch_size": 2,
            "augmentation_multiplicity": 1,
            **privacy,
        },
    }


@pytest.fixture
def basis(site: SiteConfig) -> PublicBasis:
    return PublicBasis.of(random_drift(load_modality(site), SHAPE))


@pytest.fixture
def task(site: SiteConfig, basis: PublicBasis) -> TrainTask:
    study = from_mapping(StudyConfig, options())
    adapted = inject(load_denoiser(site.base_model), read_adapter(study.adapter), study.seed)
    state, frozen = adapted.trainable_state(), adapted.frozen_state()
    study = replace(
        study,
        start_digest=state_digest({**frozen, **state}),
        start_drift_digest=state_digest(basis.public.state()),
    )
    said, digests = json.dumps(to_mapping(study)), (base_digest(site.base_model), load_modality(site).digest())
    return TrainTask(state, 1, said, *digests, frozen=frozen, basis=basis.state())


@pytest.mark.slow
def test_it_is_charged_once_and_the_same_in_every_round(site: SiteConfig, task: TrainTask, basis: PublicBasis) -> None:
    first, second = handle_train(site, task).drift, handle_train(site, replace(task, round=2)).drift
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)
    assert (first.dtype, first.shape) == (torch.float64, (basis.size,))
    entries = Ledger(site.ledger_path).entries()
    assert sorted(entry.purpose for entry in entries) == ["drift", "training", "training"]
    (charge,) = [entry.charge for entry in entries if entry.purpose == "drift"]
    assert charge is not None
    assert (charge.noise_multiplier, charge.sampling_rate, charge.steps) == (10.0, 1.0, 1)


@pytest.mark.slow
def test_another_basis_than_the_starts_is_refused_before_anything_is_charged(
    site: SiteConfig, task: TrainTask, basis: PublicBasis
) -> None:
    public = basis.public
    for crafted, error in (
        ({}, AdapterError),
        (PublicBasis(replace(public, yearly=2 * public.yearly), basis.changes).state(), PolicyError),
        (PublicBasis(replace(public, numeric=1 - public.numeric), basis.changes).state(), AdapterError),
        ({**basis.state(), "changes": torch.zeros(0, 64).double()}, AdapterError),
    ):
        with pytest.raises(error):
            handle_train(site, replace(task, basis=crafted))
    assert Ledger(site.ledger_path).entries() == []


@pytest.mark.slow
def test_other_directions_in_a_later_round_are_refused(site: SiteConfig, task: TrainTask, basis: PublicBasis) -> None:
    handle_train(site, task)
    turned = PublicBasis(basis.public, basis.changes.flip(0))
    with pytest.raises(PolicyError, match="another one than in the first round"):
        handle_train(site, replace(task, round=2, basis=turned.state()))


def test_a_budget_that_does_not_suffice_is_refused(site: SiteConfig, task: TrainTask) -> None:
    poor = replace(site, policy=replace(site.policy, max_epsilon=0.1))
    with pytest.raises(PrivacyError, match="max_epsilon"):
        handle_train(poor, task)


def test_a_private_study_without_a_public_start_is_refused() -> None:
    with pytest.raises(ConfigError, match="set start to a release"):
        from_mapping(StudyConfig, {**options(), "start": ""})
    with pytest.raises(ConfigError, match=r"longitudinal drift: set drift\.estimator"):
        from_mapping(StudyConfig, {**options(), "drift": {"shape": "conditional"}})
    one_round = {**options(), "federation": {"weighting": "equal", "rounds": 1}}
    assert from_mapping(StudyConfig, one_round).federation.rounds == 1


def test_the_budget_says_what_so_many_patients_can_afford(site: SiteConfig) -> None:
    cost = read_budget(site, from_mapping(StudyConfig, options())).cost
    assert cost is not None
    assert cost.drift_noise is None
    assert cost.signal_to_noise == pytest.approx(signal_to_noise(10.0, 3, 2, 5))

    def sentence(**numbers: float) -> str:
        lines = replace(cost, **numbers).lines(10.0)
        (said,) = [line for line in lines if "longitudinal" in line]
        return said

    assert "with 3 patients at each of 2 sites" in sentence()
    assert "little more than the public start's" in sentence()
    assert "affordable here, close to one without privacy" in sentence(signal_to_noise=GOOD_SIGNAL)
    assert "affordable here, at some loss" in sentence(signal_to_noise=LEAST_SIGNAL)
    assert "the adapter would learn little by DP-SGD" in sentence(noise_over_signal=1.5)
    assert "training the adapter by DP-SGD is affordable too" in sentence(noise_over_signal=0.5)


def test_few_patients_with_two_visits_send_no_sums(site: SiteConfig) -> None:
    store = open_store(site.store_path)
    study = from_mapping(StudyConfig, {**options(), "privacy": {"enabled": False}})
    check_store(PolicyConfig(min_patients=2), store, study)
    with pytest.raises(PolicyError, match="visits on two days"):
        check_store(PolicyConfig(min_patients=3), store, study)  # the third has one visit
    check_store(PolicyConfig(min_patients=3), store, from_mapping(StudyConfig, options(target_delta=1e-5)))


def test_a_policy_without_longitudinal_refuses_it(site: SiteConfig, task: TrainTask) -> None:
    with pytest.raises(PolicyError, match=r"drift\.shape=longitudinal"):
        handle_train(replace(site, policy=replace(site.policy, drift=["none"])), task)


@pytest.mark.parametrize("private", [False, True])
def test_a_site_sees_its_own_longitudinal_fit(site: SiteConfig, private: bool) -> None:
    study = from_mapping(StudyConfig, options() if private else {**options(), "privacy": {"enabled": False}})
    report = report_drift(site, study, "moments", None, lambda *_: None)
    own = report.longitudinal
    assert own is not None
    assert (own.patients, own.visits, own.pairs, own.patients_with_pairs) == (3, 6, 4, 2)
    assert set(own.years) == {"sex=M", "diagnosis=CN"}
    assert own.error > 0
    assert len(report.renderables()) == 1
    assert report.drift == []
    assert Ledger(site.ledger_path).entries() == []


def test_approving_reads_in_plain_words_what_the_sums_are() -> None:
    plain = " ".join(sums_leaving(from_mapping(StudyConfig, {**options(), "privacy": {"enabled": False}})))
    assert "means and covariances" in plain
    assert "can show a scan's latents" in plain
    private = " ".join(sums_leaving(from_mapping(StudyConfig, options())))
    assert "cut to norm 4" in private
    assert sums_leaving(from_mapping(StudyConfig, {})) == []
