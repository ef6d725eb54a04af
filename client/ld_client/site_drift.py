"""What a site computes once for a study: its latent drift, and the class images of prior preservation."""

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
from ld_common.core.errors import AdapterError, PrivacyError
from ld_common.core.state import State
from ld_common.diffusion.base_model import Denoiser
from ld_common.diffusion.drift import drift_from_attributes, drift_from_moments, drift_from_shift
from ld_common.diffusion.drift_search import Trial, best, search_grid
from ld_common.diffusion.longitudinal_sums import (
    Basis,
    VisitTable,
    directions_of,
    feature_columns,
    flatten,
    layout,
    sketch,
    sketch_layout,
    sums,
)
from ld_common.diffusion.training import PriorImages
from ld_common.imaging.modality import Modality
from ld_common.protocol.study_config import StudyConfig


def site_drift(
    site: SiteConfig, modality: Modality, store: Store, model: Denoiser, study: StudyConfig
) -> Tensor | None:
    """A site's exact drift, float32, in the study's shape, or None. A search runs in the first round only.

    Raises:
        LdError: the search cannot be done with these scans or this base.
        PrivacyError: the study is private, so only a noised drift may leave.
    """
    if study.drift.shape == "none":
        return None
    if study.privacy.enabled:
        raise PrivacyError("the study is private: its drift must be noised and charged (ld_client.privacy.dp_drift)")
    if study.drift.shape == "conditional":
        design = [modality.design_vector(attributes) for attributes in store.attributes]
        return drift_from_attributes(store.latents, store.base_latent_mean, design)
    if study.drift.estimator == "moments":
        return drift_from_moments(store.latents, store.base_latent_mean, study.drift.shape)

    def compute() -> State:
        delta = best(search_delta(store, model, study)).delta
        return {"drift": drift_from_shift(delta, model.scheduler.alphas_cumprod)}

    inputs = [study.seed, to_mapping(study.drift), store.prompts, float(store.latents.double().sum())]
    return _cached(site, store, "drift", inputs, compute)["drift"]


def visit_table(modality: Modality, store: Store) -> VisitTable:
    """A store's visits for a longitudinal drift, with what is measured in them."""
    designs = [modality.design_vector(attributes) for attributes in store.attributes]
    mirrored = store.mirrored if len(store.mirrored) else None
    return VisitTable.of(
        store.latents, designs, modality.numeric_columns, store.pseudonyms, store.days, store.structure, mirrored
    )


def longitudinal_sums(modality: Modality, store: Store, study: StudyConfig, basis: State) -> Tensor:
    """A site's sums for a longitudinal drift as one vector, float64: of the sketch, or with a basis the regression's.

    Raises:
        AdapterError: the basis does not fit the latents.
    """
    table, columns = visit_table(modality, store), modality.numeric_columns
    size = table.latents.shape[1]
    if not basis:
        return flatten(sketch(table, study.seed), sketch_layout(size))
    shapes = {"mean": (size,), "directions": (directions_of(size), size)}
    fits = {name: tuple(value.shape) for name, value in basis.items()} == shapes
    if not fits or not all(bool(value.isfinite().all()) for value in basis.values()):
        raise AdapterError("the basis of the longitudinal drift does not fit the site's latents")
    state = sums(table, Basis(basis["mean"].double(), basis["directions"].double()))
    return flatten(state, layout(size, len(feature_columns(columns))))


def site_prior(site: SiteConfig, store: Store, model: Denoiser, prior: Prior, seed: int) -> PriorImages:
    """The class images of an adapter's prior, drawn by the base in the first round only."""

    def compute() -> State:
        images = draw_prior(model, prior, seed)
        return {"latents": images.latents.cpu(), "context": images.context.cpu()}

    state = _cached(site, store, "prior", [seed, vars(prior)], compute)
    on_device = {name: value.to(model.device) for name, value in state.items()}
    return PriorImages(on_device["latents"], on_device["context"], prior.weight)


def search_delta(
    store: Store,
    model: Denoiser,
    study: StudyConfig,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Trial]:
    """Grid search for δ on a site's scans (arXiv 2412.20651); raises `ConfigError` where it is not possible."""
    drift = study.drift
    return search_grid(model, store.latents, store.prompts, drift.search, drift.formulation, study.seed, progress)


def _cached(site: SiteConfig, store: Store, kind: str, inputs: Sequence[object], compute: Callable[[], State]) -> State:
    """A result that is the same in every round, cached in the store; one file a kind, readable by its owner only."""
    file = _cache_file(site, store, kind, inputs)
    if not file.exists():
        write_tensors(file, compute(), {})
        file.chmod(0o600)
        for old in site.store_path.glob(f"{kind}-*.safetensors"):
            if old != file:
                old.unlink()
    return read_tensors(file)[0]


def _cache_file(site: SiteConfig, store: Store, kind: str, inputs: Sequence[object]) -> Path:
    content = json.dumps([*inputs, store.base_digest, store.modality_digest], sort_keys=True)
    return site.store_path / f"{kind}-{hashlib.sha256(content.encode()).hexdigest()[:16]}.safetensors"
