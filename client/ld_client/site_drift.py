"""What a site finds out once for a study: its own latent drift, and the base's pictures that an adapter preserves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from ld_client.data.store import Store
from ld_client.site_config import SiteConfig
from ld_common.adapters.base import Prior
from ld_common.adapters.prior_preservation import draw_prior
from ld_common.adapters.state_dict import read_tensors, write_tensors
from ld_common.core.config import to_mapping
from ld_common.core.errors import PrivacyError
from ld_common.core.state import State
from ld_common.diffusion.base_model import Denoiser
from ld_common.diffusion.drift import drift_from_attributes, drift_from_moments, drift_from_shift
from ld_common.diffusion.drift_search import Trial, best, search_grid
from ld_common.diffusion.training import PriorImages
from ld_common.imaging.modality import Modality
from ld_common.protocol.study_config import StudyConfig


def site_drift(
    site: SiteConfig, modality: Modality, store: Store, model: Denoiser, study: StudyConfig
) -> Tensor | None:
    """A site's drift as it travels, float32, in the study's shape, or None. A search runs in the first round only.

    Raises:
        LdError: the search cannot be done with these scans or this base.
        PrivacyError: of a private study it is not this, the exact one, that may leave.
    """
    if study.drift.shape == "none":
        return None
    if study.privacy.enabled:
        raise PrivacyError("a private study's drift leaves noised and paid for alone: see privacy.private_drift")
    if study.drift.shape == "conditional":
        design = [modality.design_vector(attributes) for attributes in store.attributes]
        return drift_from_attributes(store.latents, store.base_latent_mean, design)
    if study.drift.estimator == "moments":
        return drift_from_moments(store.latents, store.base_latent_mean, study.drift.shape)

    def compute() -> State:
        found = best(search_delta(store, model, study))
        return {"drift": drift_from_shift(found.delta, model.scheduler.alphas_cumprod)}

    said = [study.seed, to_mapping(study.drift), store.prompts, float(store.latents.double().sum())]
    return _kept(site, store, "drift", said, compute)["drift"]


def site_prior(site: SiteConfig, store: Store, model: Denoiser, prior: Prior, seed: int) -> PriorImages:
    """The base's own pictures that an adapter preserves; drawn in the first round alone."""

    def compute() -> State:
        drawn = draw_prior(model, prior, seed)
        return {"latents": drawn.latents.cpu(), "context": drawn.context.cpu()}

    state = _kept(site, store, "prior", [seed, vars(prior)], compute)
    on_device = {name: value.to(model.device) for name, value in state.items()}
    return PriorImages(on_device["latents"], on_device["context"], prior.weight)


def search_delta(
    store: Store,
    model: Denoiser,
    study: StudyConfig,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Trial]:
    """The paper's grid search on a site's scans; raises `ConfigError` for one scan, or a base without a leak."""
    drift = study.drift
    return search_grid(model, store.latents, store.prompts, drift.search, drift.formulation, study.seed, progress)


def _kept(site: SiteConfig, store: Store, what: str, said: Sequence[object], compute: Callable[[], State]) -> State:
    """What does not change between rounds, kept in the store for its owner alone; one file for each kind."""
    file = _kept_file(site, store, what, said)
    if not file.exists():
        write_tensors(file, compute(), {})
        file.chmod(0o600)
        for old in site.store_path.glob(f"{what}-*.safetensors"):
            if old != file:
                old.unlink()
    return read_tensors(file)[0]


def _kept_file(site: SiteConfig, store: Store, what: str, said: Sequence[object]) -> Path:
    words = json.dumps([*said, store.base_digest, store.modality_digest], sort_keys=True)
    return site.store_path / f"{what}-{hashlib.sha256(words.encode()).hexdigest()[:16]}.safetensors"
