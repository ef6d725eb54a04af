"""`ld-client drift`: which drift a study gives a site, before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import RenderableType
from rich.table import Table

from ld_client.policy import check_store, check_study
from ld_client.site import SiteConfig, load_modality
from ld_client.site_drift import ask, search_delta
from ld_client.store import Store, open_store
from ld_common.config import require
from ld_common.drift import Drift, drift_from_moments, shift_of
from ld_common.drift_search import best, search_counterfactual
from ld_common.models import Denoiser, base_digest, load_denoiser
from ld_common.release import load_release_base, read_release
from ld_common.study import StudyConfig, load_study

CHOICES = ("moments", "grid", "counterfactual")


def show_drift(
    site: SiteConfig,
    study_file: Path,
    choice: str,
    release: Path | None,
    overrides: Sequence[str],
    progress: Callable[[str, int, int], None],
) -> list[RenderableType]:
    """What to print: the drift by moments, or a table of a search.

    Args:
        choice: `moments`, `grid` or `counterfactual`; empty for the study's own.
        release: its adapter is searched with, in place of the plain base.

    Raises:
        LdError: as training would, and where the search cannot be done.
    """
    study, _ = load_study(study_file, list(overrides))
    choice = choice or study.drift.choice
    require(choice in CHOICES, f"--choice is '{choice}': known: {', '.join(CHOICES)}")
    check_study(site.policy, study)
    modality = load_modality(site)
    store = open_store(site.store_path, base_digest=base_digest(site.base_model), modality_digest=modality.digest())
    check_store(site.policy, store)
    trained = None if release is None else read_release(release)
    model: Denoiser = (
        load_denoiser(site.base_model, site.device)
        if trained is None
        else load_release_base(trained, site.base_model, site.device)
    )
    if choice == "moments":
        return [_moments(site.site, store, model, study)]

    def advance(done: int, total: int) -> None:
        progress("searching δ", done, total)

    if choice == "grid":
        trials = search_delta(store, model, study, advance)
    else:
        edits, search = ask(modality, store, study.drift.search), study.drift.search
        drift = None if trained is None else trained.drift
        trials = search_counterfactual(
            model, store.latents, store.prompts, edits, search, study.edit, study.seed, drift, advance
        )
    found = best(trials)
    table = Table("δ", "loss", *trials[0].parts, title=f"{site.site}: {choice}")
    for trial in trials:
        mark = "[bold]" if trial is found else ""
        table.add_row(f"{mark}{trial.delta:+g}", f"{trial.loss:.5f}", *(f"{part:.5f}" for part in trial.parts.values()))
    return [table, f"δ = {found.delta:+g}"]


def _moments(name: str, store: Store, model: Denoiser, study: StudyConfig) -> RenderableType:
    mean = drift_from_moments(store.latents, store.base_latent_mean, study.drift.mean)
    if mean is None:
        return "drift.mean is none: no drift"
    delta = shift_of(Drift(mean, study.drift.formulation), model.scheduler.alphas_cumprod)
    table = Table("latent channel", "drift μ", "δ = a(T) μ", title=f"{name}: {study.drift.mean}, by moments")
    for channel, (value, shift) in enumerate(zip(mean.mean((1, 2)), delta.mean((1, 2)), strict=True)):
        table.add_row("all" if len(mean) == 1 else str(channel), f"{value:+.4f}", f"{shift:+.4f}")
    return table
