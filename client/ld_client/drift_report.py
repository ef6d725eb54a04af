"""`ld-client drift`: the drift that a study gives a site, before anything is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from rich.console import RenderableType
from rich.table import Table

from ld_client.data.store import Store, open_store, split_store
from ld_client.policy import check_store, check_study
from ld_client.site_config import SiteConfig, load_modality
from ld_client.site_drift import search_delta, site_drift, visit_table
from ld_common.core.errors import RequestError
from ld_common.diffusion.base_model import Denoiser, base_digest, load_denoiser
from ld_common.diffusion.drift import INERT, LatentDrift, by_channel, is_inert
from ld_common.diffusion.drift_search import Trial, best
from ld_common.diffusion.longitudinal_fit import fit_tables
from ld_common.diffusion.options import SearchConfig
from ld_common.editing.counterfactuals import Edit, edit_to
from ld_common.editing.delta_search import search_counterfactual
from ld_common.editing.registry import read_editor
from ld_common.imaging.modality import Modality
from ld_common.protocol.dp_accounting import DpConfig
from ld_common.protocol.study_config import StudyConfig
from ld_common.release.release import Release, load_release_base


@dataclass(frozen=True)
class TrialLoss:
    """The loss of one δ of a search."""

    delta: float
    loss: float
    parts: dict[str, float]


@dataclass(frozen=True)
class OwnLongitudinalFit:
    """What a site's own visits say about change with the years; it does not leave the site."""

    patients: int
    visits: int
    pairs: int
    """Of an earlier and a later visit of a patient."""
    patients_with_pairs: int
    parts: int
    """Principal components by which the change is predicted."""
    error: float
    """Of patients who were held back, as a share of what predicting no change leaves."""
    years: dict[str, float]
    """Category -> the years of change that it acts like; 0 where it has an effect of its own."""

    def table(self, site: str) -> Table:
        """For a terminal."""
        table = Table("", "", title=f"{site}: longitudinal, this site's visits alone", show_header=False)
        table.add_row("patients", f"{self.patients}, {self.patients_with_pairs} of them with visits on two days")
        table.add_row("visits", f"{self.visits}, {self.pairs} pairs")
        table.add_row("principal components", str(self.parts))
        table.add_row("error on held-back patients", f"{self.error:.0%} of predicting no change")
        for name, years in self.years.items():
            acts = f"acts like {years:+.1f} years" if years else "does not act like years"
            table.add_row(name, acts)
        return table


@dataclass(frozen=True)
class DriftReport:
    """A site's drift by moments, or a search for a scalar δ."""

    site: str
    estimator: str
    shape: str
    drift: list[float] = field(default_factory=list)
    """By moments: μ of each latent channel, or one value for all; empty for a study without a drift."""
    final_deltas: list[float] = field(default_factory=list)
    """By moments: δ = a(T) μ, what the drift adds at the last timestep."""
    trials: list[TrialLoss] = field(default_factory=list)
    """By a search: the loss of each δ."""
    best_delta: float | None = None
    inert: bool = False
    """Whether the study's formulation changes nothing with this base, whose schedule ends without signal."""
    longitudinal: OwnLongitudinalFit | None = None

    def renderables(self) -> list[RenderableType]:
        """The report as tables for a terminal."""
        return [*self._tables(), *([INERT] if self.inert else [])]

    def _tables(self) -> list[RenderableType]:
        if self.longitudinal is not None:
            return [self.longitudinal.table(self.site)]
        if self.trials:
            table = Table("δ", "loss", *self.trials[0].parts, title=f"{self.site}: {self.estimator}")
            for trial in self.trials:
                mark = "[bold]" if trial.delta == self.best_delta else ""
                parts = (f"{part:.5f}" for part in trial.parts.values())
                table.add_row(f"{mark}{trial.delta:+g}", f"{trial.loss:.5f}", *parts)
            return [table, f"δ = {self.best_delta:+g}"]
        if not self.drift:
            return ["drift.shape is none: no drift"]
        table = Table("latent channel", "drift μ", "δ = a(T) μ", title=f"{self.site}: {self.shape}, by moments")
        for channel, (mean, delta) in enumerate(zip(self.drift, self.final_deltas, strict=True)):
            table.add_row("all" if len(self.drift) == 1 else str(channel), f"{mean:+.4f}", f"{delta:+.4f}")
        return [table]


def report_drift(
    site: SiteConfig,
    study: StudyConfig,
    estimator: str,
    release: Release | None,
    progress: Callable[[str, int, int], None],
) -> DriftReport:
    """Estimate a site's drift as a study would.

    Args:
        site: the site.
        study: the study.
        estimator: `moments`, `grid` or `counterfactual`.
        release: searched with its adapter in place of the plain base.
        progress: called with a stage, the steps done and all steps.

    Raises:
        LdError: as training would, or the search cannot be done with these scans.
    """
    check_study(site.policy, study)
    modality = load_modality(site)
    store = open_store(site.store_path, base_digest=base_digest(site.base_model), modality_digest=modality.digest())
    store, _ = split_store(store, site.held_out, study.privacy.enabled)
    check_store(site.policy, store, study)
    model: Denoiser = (
        load_denoiser(site.base_model, site.device)
        if release is None
        else load_release_base(release, site.base_model, site.device)
    )
    if estimator == "moments" and study.drift.shape == "longitudinal":
        return DriftReport(site.site, estimator, study.drift.shape, longitudinal=own_fit(modality, store, model))
    if estimator == "moments":
        return _by_moments(site, modality, store, model, study)

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
    return _of_trials(site, study, estimator, trials)


def own_fit(modality: Modality, store: Store, model: Denoiser) -> OwnLongitudinalFit:
    """Fit a longitudinal drift to one site; raises `ConfigError` where no patient has visits on two days."""
    table = visit_table(modality, store)
    numeric = modality.numeric_columns
    pairs = [pair for pair in table.pairs() if pair[0] < len(store.latents)]  # those after are of mirror images
    drift, choice = fit_tables([table], numeric, store.base_latent_mean, model.latent_shape)
    return OwnLongitudinalFit(
        patients=store.patients,
        visits=len(store.latents),
        pairs=len(pairs),
        patients_with_pairs=len({table.patients[first] for first, _ in pairs}),
        parts=choice.parts,
        error=choice.error,
        years={
            name: float(drift.years[column])
            for column, name in enumerate(_column_names(modality))
            if not numeric[column]
        },
    )


def _column_names(modality: Modality) -> list[str]:
    """Names of the columns of a design vector, `diagnosis=AD` for a category."""
    return [
        f"{name}={word}" if word else name
        for name, attribute in modality.attributes.items()
        for word in (list(attribute.categories)[1:] or [""])
    ]


def _of_trials(site: SiteConfig, study: StudyConfig, estimator: str, trials: list[Trial]) -> DriftReport:
    rows = [TrialLoss(trial.delta, trial.loss, dict(trial.parts)) for trial in trials]
    return DriftReport(site.site, estimator, study.drift.shape, trials=rows, best_delta=best(trials).delta)


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
        raise RequestError("drift.search.targets changes none of these scans: set targets such as diagnosis=AD")
    return edits


def _by_moments(site: SiteConfig, modality: Modality, store: Store, model: Denoiser, study: StudyConfig) -> DriftReport:
    options = replace(study.drift, estimator="moments")
    # exact, for the site itself; the drift that a private study sends is noised, and charged when it is computed
    mean = site_drift(site, modality, store, model, replace(study, drift=options, privacy=DpConfig()))
    if mean is None:
        return DriftReport(site.site, "moments", options.shape)
    level = float(model.scheduler.alphas_cumprod[-1]) ** 0.5
    values = by_channel(mean)
    deltas, inert = [level * value for value in values], is_inert(study.drift.formulation, model)
    return DriftReport(site.site, "moments", options.shape, values, deltas, inert=inert)
