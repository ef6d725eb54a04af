"""`ld-client drift`: which drift a study gives a site, before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import RenderableType
from rich.table import Table

from ld_client.site import SiteConfig, load_modality
from ld_client.site_drift import search
from ld_client.store import open_store
from ld_common.drift import Drift, drift_from_moments, shift_of
from ld_common.drift_search import best
from ld_common.models import base_digest, load_denoiser
from ld_common.release import load_release_base, read_release
from ld_common.study import load_study


def show_drift(
    site: SiteConfig,
    study_file: Path,
    release: Path | None,
    overrides: Sequence[str],
    progress: Callable[[str, int, int], None],
) -> list[RenderableType]:
    """What to print: the drift by moments, or a table of the search; raises `LdError` as training would."""
    study, _ = load_study(study_file, list(overrides))
    modality = load_modality(site)
    store = open_store(site.store_path, base_digest=base_digest(site.base_model), modality_digest=modality.digest())
    if release is None:
        model = load_denoiser(site.base_model, site.device)
    else:
        model = load_release_base(read_release(release), site.base_model, site.device)
    if study.drift.choice == "moments":
        mean = drift_from_moments(store.latents, store.base_latent_mean, study.drift.mean)
        if mean is None:
            return ["drift.mean is none: no drift"]
        delta = shift_of(Drift(mean, study.drift.formulation), model.scheduler.alphas_cumprod)
        table = Table("latent channel", "drift μ", "δ = a(T) μ", title=f"{site.site}: {study.drift.mean}, by moments")
        for channel, (value, shift) in enumerate(zip(mean.mean((1, 2)), delta.mean((1, 2)), strict=True)):
            table.add_row("all" if len(mean) == 1 else str(channel), f"{value:+.4f}", f"{shift:+.4f}")
        return [table]
    trials = search(modality, store, model, study, lambda done, total: progress("searching δ", done, total))
    found = best(trials)
    table = Table("δ", "loss", *trials[0].parts, title=f"{site.site}: {study.drift.choice}")
    for trial in trials:
        mark = "[bold]" if trial is found else ""
        table.add_row(f"{mark}{trial.delta:+g}", f"{trial.loss:.5f}", *(f"{part:.5f}" for part in trial.parts.values()))
    return [table, f"δ = {found.delta:+g}"]
