"""A site's own latent drift, found the way that the study says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence

from torch import Tensor

from ld_client.site import SiteConfig, load_modality
from ld_client.store import Store
from ld_common.adapters import read_tensors, write_tensors
from ld_common.config import to_mapping
from ld_common.counterfactual import Edit
from ld_common.drift import drift_from_moments, drift_from_shift
from ld_common.drift_search import SearchConfig, Trial, best, search_counterfactual, search_grid
from ld_common.errors import RequestError
from ld_common.modality import Modality
from ld_common.models import Denoiser
from ld_common.study import StudyConfig


def site_drift(site: SiteConfig, store: Store, model: Denoiser, study: StudyConfig) -> Tensor | None:
    """μ of a site, float32, in the study's shape; None for no drift.

    What a search finds is kept in the store, so that it runs in the first round alone.

    Raises:
        LdError: the search's targets or steps cannot be used.
    """
    if study.drift.mean == "none":
        return None
    if study.drift.choice == "moments":
        return drift_from_moments(store.latents, store.base_latent_mean, study.drift.mean)
    cache = site.store_path / f"drift-{_digest(store, study)}.safetensors"
    if cache.exists():
        return read_tensors(cache)[0]["drift"]
    found = best(search(load_modality(site), store, model, study))
    drift = drift_from_shift(found.delta, model.scheduler.alphas_cumprod)
    write_tensors(cache, {"drift": drift}, {"delta": str(found.delta)})
    return drift


def search(
    modality: Modality,
    store: Store,
    model: Denoiser,
    study: StudyConfig,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Trial]:
    """Every δ of the study's search on a site's scans; raises `RequestError` where no scan can be asked."""
    drift = study.drift
    if drift.choice == "counterfactual":
        edits = ask(modality, store, drift.search)
        return search_counterfactual(
            model, store.latents, store.prompts, edits, drift.search, study.edit, study.seed, None, progress
        )
    return search_grid(model, store.latents, store.prompts, drift.search, drift.formulation, study.seed, progress)


def ask(modality: Modality, store: Store, config: SearchConfig) -> list[Edit]:
    """The edits of `drift.search.targets`: each target of each scan that does not show it yet."""
    targets = [modality.parse_all(text) for text in config.targets]
    edits = [
        Edit(row, modality.describe(attributes | target))
        for row, attributes in enumerate(store.attributes)
        for target in targets
        if (attributes | target) != attributes
    ]
    if not edits:
        raise RequestError("drift.search.targets asks nothing of these scans: name targets such as diagnosis=AD")
    return edits


def _digest(store: Store, study: StudyConfig) -> str:
    parts: Sequence[object] = [study.seed, to_mapping(study.drift), to_mapping(study.edit)]
    parts = [*parts, store.base_digest, store.modality_digest, store.prompts, store.latents.double().sum().item()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
