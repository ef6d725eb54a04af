"""`ld-client drift`: which drift a study gives a site, before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import RenderableType
from rich.table import Table

from ld_client.data.store import Store, open_store, split_store
from ld_client.policy import check_store, check_study
from ld_client.site_config import SiteConfig, load_modality
from ld_client.site_drift import search_delta, site_drift
from ld_common.core.config import require
from ld_common.core.errors import RequestError
from ld_common.diffusion.base_model import Denoiser, base_digest, load_denoiser
from ld_common.diffusion.drift import LatentDrift, by_channel
from ld_common.diffusion.drift_search import best
from ld_common.diffusion.options import ESTIMATORS, SearchConfig
from ld_common.editing.counterfactuals import Edit, edit_to
from ld_common.editing.delta_search import search_counterfactual
from ld_common.editing.registry import read_editor
from ld_common.imaging.modality import Modality
from ld_common.protocol.dp_accounting import DpConfig
from ld_common.protocol.study_config import StudyConfig, load_study
from ld_common.release.release import Release, load_release_base

KNOWN = (*ESTIMATORS, "counterfactual")


def show_drift(
    site: SiteConfig,
    study_file: Path,
    estimator: str,
    release: Release | None,
    overrides: Sequence[str],
    progress: Callable[[str, int, int], None],
) -> list[RenderableType]:
    """What to print: the drift by moments, or a table of a search.

    Args:
        estimator: `moments`, `grid` or `counterfactual`; empty for the study's own.
        release: its adapter is searched with, in place of the plain base.

    Raises:
        LdError: as training would, and where the search cannot be done.
    """
    study, _ = load_study(study_file, list(overrides))
    estimator = estimator or study.drift.estimator
    require(estimator in KNOWN, f"--estimator is '{estimator}': known: {', '.join(KNOWN)}")
    check_study(site.policy, study)
    modality = load_modality(site)
    store = open_store(site.store_path, base_digest=base_digest(site.base_model), modality_digest=modality.digest())
    store, _ = split_store(store, site.held_out)
    check_store(site.policy, store, study)
    model: Denoiser = (
        load_denoiser(site.base_model, site.device)
        if release is None
        else load_release_base(release, site.base_model, site.device)
    )
    if estimator == "moments":
        return [_moments(site, modality, store, model, study)]

    def advance(done: int, total: int) -> None:
        progress("searching δ", done, total)

    if estimator == "grid":
        trials = search_delta(store, model, study, advance)
    else:
        edits, search = edits_of_targets(modality, store, study.drift.search), study.drift.search
        drift = release.drift if release is not None and isinstance(release.drift, LatentDrift) else None
        trials = search_counterfactual(
            model, store.latents, store.prompts, edits, search, read_editor(study.edit), study.seed, drift, advance
        )
    found = best(trials)
    table = Table("δ", "loss", *trials[0].parts, title=f"{site.site}: {estimator}")
    for trial in trials:
        mark = "[bold]" if trial is found else ""
        table.add_row(f"{mark}{trial.delta:+g}", f"{trial.loss:.5f}", *(f"{part:.5f}" for part in trial.parts.values()))
    return [table, f"δ = {found.delta:+g}"]


def edits_of_targets(modality: Modality, store: Store, config: SearchConfig) -> list[Edit]:
    """The edits of `drift.search.targets`: each target of each scan that does not show it yet."""
    targets = [modality.parse_all(text) for text in config.targets]
    edits = [
        edit_to(modality, row, attributes, target)
        for row, attributes in enumerate(store.attributes)
        for target in targets
        if (attributes | target) != attributes
    ]
    if not edits:
        raise RequestError("drift.search.targets asks nothing of these scans: name targets such as diagnosis=AD")
    return edits


def _moments(site: SiteConfig, modality: Modality, store: Store, model: Denoiser, study: StudyConfig) -> RenderableType:
    found = replace(study.drift, estimator="moments")
    # for the site's own eyes, exact: what a private study sends is noised, and charged when it is made
    mean = site_drift(site, modality, store, model, replace(study, drift=found, privacy=DpConfig()))
    if mean is None:
        return "drift.shape is none: no drift"
    level = float(model.scheduler.alphas_cumprod[-1]) ** 0.5
    table = Table("latent channel", "drift μ", "δ = a(T) μ", title=f"{site.site}: {found.shape}, by moments")
    values = by_channel(mean)
    for channel, value in enumerate(values):
        table.add_row("all" if len(values) == 1 else str(channel), f"{value:+.4f}", f"{level * value:+.4f}")
    return table
