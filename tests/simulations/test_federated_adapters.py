"""Every adapter through a whole study: server, two sites that train, release, a loaded generator."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from ld_client.client_app import handle_train
from ld_client.site_config import SiteConfig, load_modality, load_site
from ld_common.adapters.registry import ADAPTERS
from ld_common.core.config import from_mapping
from ld_common.core.errors import PolicyError, PrivacyError, ReleaseError
from ld_common.diffusion.base_model import load_base
from ld_common.diffusion.drift import ConditionalDrift
from ld_common.protocol import messages as wire
from ld_common.protocol.study_config import StudyConfig
from ld_common.release.release import load_release_base, read_release
from ld_server.server_app import run_study
from tests.server.test_strategy import LocalGrid
from tests.support.adapter_options import OPTIONS
from tests.support.site_homes import index_site


@pytest.fixture(autouse=True)
def task_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.fixture
def site(site_yaml: Path, tiny_base: Path, smallest_base: Path) -> SiteConfig:
    """An indexed site with the smallest base."""
    site_yaml.write_text(site_yaml.read_text().replace(str(tiny_base), str(smallest_base)))
    loaded = load_site(site_yaml)
    index_site(loaded)
    return loaded


class RealSites(LocalGrid):
    """Nodes that answer as two sites with one store do."""

    def __init__(self, site: SiteConfig) -> None:
        super().__init__({name: wire.pack_result for name in ("p", "q")}, 4)
        self.site = site

    def _reply(self, message: Message) -> Message | None:
        name, _ = self.sites[message.metadata.dst_node_id]
        if message.metadata.message_type.startswith(("query", "evaluate")):
            return super()._reply(message)
        task = wire.unpack_task(message.content)
        content: RecordDict = wire.pack_result(handle_train(replace(self.site, site=name), task))
        return Message(content, reply_to=message)


@pytest.mark.slow
def test_a_conditional_drift_is_regressed_at_sites_averaged_released_and_drawn_with(
    site: SiteConfig, smallest_base: Path, tmp_path: Path
) -> None:
    modality = load_modality(site)
    options: dict[str, Any] = {
        "base_model": str(smallest_base),
        "output": str(tmp_path / "study"),
        "adapter": {"name": "lora", "rank": 2},
        "drift": {"shape": "conditional"},
        "training": {"steps": 1, "batch_size": 2},
        "federation": {"rounds": 1, "sites": ["p", "q"], "wait_seconds": 1},
    }
    study = from_mapping(StudyConfig, options)
    with pytest.raises(PolicyError, match=r"drift\.shape=conditional"):
        run_study(RealSites(site), study, modality)  # a site's policy keeps mean images by default
    willing = replace(site, policy=replace(site.policy, drift=["conditional"]))
    release = read_release(run_study(RealSites(willing), study, modality))
    assert isinstance(release.drift, ConditionalDrift)
    base = load_base(str(smallest_base))
    assert release.drift.coefficients.shape == (1 + modality.design_width, *base.latent_shape)
    old, young = (modality.design_vector({"age": age, "sex": "F", "diagnosis": "CN"}) for age in (90.0, 50.0))
    means = release.drift.at([old, young]).mean
    assert not torch.allclose(means[0], means[1])


QUICK = [("lora", "centred"), ("textual_inversion", "prior"), ("instruct_pix2pix", "prior")]
ALL = [
    pytest.param(name, formulation, marks=() if (name, formulation) in QUICK else pytest.mark.slow)
    for name in ADAPTERS
    for formulation in ("prior", "centred")
]


@pytest.mark.parametrize(("name", "formulation"), ALL)
@pytest.mark.slow
def test_an_adapter_is_trained_by_sites_averaged_released_and_loaded(
    site: SiteConfig, smallest_base: Path, tmp_path: Path, name: str, formulation: str
) -> None:
    options: dict[str, Any] = {
        "base_model": str(smallest_base),
        "output": str(tmp_path / "study"),
        "adapter": {"name": name, **OPTIONS[name]},
        "drift": {"formulation": formulation},
        "training": {"steps": 2, "batch_size": 2, "learning_rate": 0.01},
        "federation": {"rounds": 2, "sites": ["p", "q"], "wait_seconds": 1},
    }
    folder = run_study(RealSites(site), from_mapping(StudyConfig, options), load_modality(site))
    release = read_release(folder)
    assert [record["counted"] for record in release.manifest["rounds"]] == [True, True]
    base = load_release_base(release)
    prompt = release.modality.prompt({"age": 70.0, "sex": "F", "diagnosis": "CN"})
    latents = torch.randn(1, *base.latent_shape, generator=torch.Generator().manual_seed(0))
    plain = load_base(str(smallest_base))
    with torch.no_grad():
        adapted, untouched = (model.unet(latents, 10, model.embed([prompt])).sample for model in (base, plain))
    assert not torch.allclose(adapted, untouched)
    assert release.drift is not None
    assert release.drift.formulation == formulation


@pytest.mark.slow
def test_a_private_study_is_released_with_its_statement_and_goes_on_from_a_public_one(
    site: SiteConfig, smallest_base: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "base_model": str(smallest_base),
        "output": str(tmp_path / "public"),
        "adapter": {"name": "lora", "rank": 1, "targets": ["to_k"]},
        "training": {"steps": 2, "batch_size": 2},
        "federation": {"rounds": 1, "sites": ["p", "q"], "wait_seconds": 1, "weighting": "equal"},
    }
    modality = load_modality(site)
    public = run_study(RealSites(site), from_mapping(StudyConfig, options), modality)
    private = {
        **options,
        "output": str(tmp_path / "private"),
        "start": str(public),
        "seed": 1,
        "privacy": {
            "enabled": True,
            "patients": 10,
            "expected_batch_size": 2,
            "target_delta": 1e-5,
            "augmentation_multiplicity": 1,
        },
    }
    with pytest.raises(ReleaseError, match="trained without differential privacy at p, q"):
        run_study(RealSites(site), from_mapping(StudyConfig, private), modality)
    manifest = json.loads((public / "manifest.json").read_text())
    manifest["study"]["federation"]["sites"] = ["x", "y"]  # as a study of other hospitals, on public data
    (public / "manifest.json").write_text(json.dumps(manifest))
    tight = replace(site, policy=replace(site.policy, max_epsilon=0.5))
    with pytest.raises(PrivacyError, match=r"limit 0\.5"):
        run_study(RealSites(tight), from_mapping(StudyConfig, private), modality)
    # both sites charge one store's ledger, which takes the second's round for the first's again
    willing = replace(site, policy=replace(site.policy, max_epsilon=20.0, repeated_rounds=1))
    folder = run_study(RealSites(willing), from_mapping(StudyConfig, private), modality)
    release = read_release(folder)
    record = release.manifest["rounds"][0]["sites"]["p"]
    assert {record[key] for key in ("visits", "patients", "loss_first", "loss_last", "seconds")} == {None}
    assert release.manifest["privacy"]["epsilon"] <= 8.0
    card = (folder / "README.md").read_text()
    assert "Differential privacy: ε = " in card
    assert "| p | withheld | withheld |" in card
    assert "ε" not in (public / "README.md").read_text().replace("no ε is claimed", "")
    public_state = read_release(public).state  # A and B; privacy then freezes A by default
    assert {name for name, value in public_state.items() if torch.equal(release.state[name], value)} == {
        name for name in public_state if ".lora_A." in name
    }
    with pytest.raises(ReleaseError, match="does not fit the study's adapter"):
        other = {**private, "adapter": {**options["adapter"], "rank": 2}}
        run_study(RealSites(willing), from_mapping(StudyConfig, other), modality)
