"""`ld-client budget`: what a data set's privacy budget was spent on, what is left, and what a study would cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ld_client.data.store import Store, open_store, split_store
from ld_client.privacy.dp_drift import drift_is_free
from ld_client.privacy.ledger import DRIFT, TRAINING, Ledger, LedgerEntry, by_study, private_charges
from ld_client.site_config import SiteConfig, load_modality
from ld_common.adapters.base import inject
from ld_common.adapters.registry import read_adapter
from ld_common.diffusion.base_model import load_denoiser
from ld_common.diffusion.longitudinal_sums import feature_columns
from ld_common.diffusion.private_longitudinal import signal_to_noise
from ld_common.protocol.dp_accounting import Charge, epsilon, epsilon_rdp, noise_over_signal
from ld_common.protocol.study_config import StudyConfig

LARGE_DRIFT_NOISE = 0.2
"""Standard deviation of a drift's noise above which the drift says little; latents have about 1."""


GOOD_SIGNAL, LEAST_SIGNAL = 20.0, 8.0
"""Signal over noise of a longitudinal drift's coefficient from which simulated brains keep three quarters of what the
sites' patients add to the public drift, and below which hardly anything."""


@dataclass(frozen=True)
class StudyCharges:
    """One study in the ledger."""

    study: str
    digest: str
    first: str
    """Time of its first charge; ISO 8601, UTC."""
    last: str
    rounds: int
    drifts: int


@dataclass(frozen=True)
class StudyCost:
    """What a study would cost here; unit: one patient."""

    study: str
    differential_privacy: bool
    refused: bool
    """Whether the site refuses a round of it."""
    rounds: int
    epsilon: float | None = None
    """ε of the study at its own δ; None, like all below, without differential privacy."""
    delta: float | None = None
    noise_multiplier: float | None = None
    sampling_rate: float | None = None
    steps: int | None = None
    epsilon_after_next_round: float | None = None
    """ε of the data set at `policy.delta`."""
    epsilon_after_study: float | None = None
    trainable_parameters: int | None = None
    noise_over_signal: float | None = None
    """Norm of a step's noise over the largest norm of its mean gradient; above 1 little is learned."""
    drift_noise: float | None = None
    """Standard deviation of the noise on each value of the drift; None for a study without one, or a longitudinal."""
    patients: int = 0
    """Trained on here."""
    sites: int = 0
    """Of the study."""
    signal_to_noise: float | None = None
    """Of a coefficient of a longitudinal drift, if every site has as many patients; None for other drifts."""

    def lines(self, limit: float) -> list[str]:
        """The cost as text; `limit` is `policy.max_epsilon`."""
        if not self.differential_privacy:
            refused = "; this site refuses it (policy.private_only)" if self.refused else ""
            return [f"study {self.study}: without differential privacy, no ε is defined{refused}"]
        ratio = self.noise_over_signal or 0.0
        hint = ": little will be learned; larger batches or fewer parameters help" if ratio > 1 else ""
        fits = "does not fit: the site will refuse a round of it" if self.refused else "fits"
        lines = [
            f"study {self.study}: ε {self.epsilon:.4g} at its δ {self.delta:g}, noise multiplier "
            f"{self.noise_multiplier:.4g}, sampling rate {self.sampling_rate:.4g}, {self.steps} steps",
            f"  ε of the data set after its next round: {self.epsilon_after_next_round:.4g}, after all {self.rounds} "
            f"rounds: {self.epsilon_after_study:.4g} of {limit:g}: {fits}",
            f"  {self.trainable_parameters:,} trainable parameters; the noise of a step is at least {ratio:.2g} times "
            f"the norm of its gradient{hint}",
        ]
        if self.signal_to_noise is not None:
            lines.append(self._verdict(ratio))
        if self.drift_noise is not None:
            hint = ": set drift.shape to none, or use more patients" if self.drift_noise > LARGE_DRIFT_NOISE else ""
            lines.append(
                f"  noise on each value of the drift: standard deviation {self.drift_noise:.2g}, where latents have "
                f"about 1{hint}"
            )
        return lines

    def _verdict(self, step_noise: float) -> str:
        """Which of a longitudinal drift and the adapter this many patients can afford, as one sentence."""
        signal = self.signal_to_noise or 0.0
        if signal >= GOOD_SIGNAL:
            drift = "is affordable here, close to one without privacy"
        elif signal >= LEAST_SIGNAL:
            drift = "is affordable here, at some loss"
        else:
            drift = "would be little more than the public start's"
        if step_noise <= 1:
            adapter = "training the adapter by DP-SGD is affordable too"
        else:
            adapter = f"the adapter would learn little by DP-SGD (noise {step_noise:.2g} times the gradient)"
        return (
            f"  with {self.patients} patients at each of {self.sites} sites the longitudinal drift, one query, {drift} "
            f"(signal {signal:.2g} times the noise of a coefficient); {adapter}"
        )


@dataclass(frozen=True)
class BudgetReport:
    """The privacy budget of a data set; unit: one patient; horizon: all studies so far."""

    ledger: str
    charges: int
    studies: list[StudyCharges]
    max_epsilon: float
    """`policy.max_epsilon`."""
    delta: float
    """`policy.delta`."""
    spent: float
    """ε at `delta`, by the PRV accountant."""
    spent_by_renyi: float
    """The same by Rényi differential privacy, a looser bound."""
    studies_without_privacy: list[str]
    """Studies that no ε covers."""
    cost: StudyCost | None
    """Cost of the study that was asked about."""

    def lines(self) -> list[str]:
        """The report as text."""
        lines = [f"ledger {self.ledger}: {self.charges} charges"]
        for entry in self.studies:
            drifts = f", {entry.drifts} drift" if entry.drifts else ""
            period = f"{entry.first} to {entry.last}"
            lines.append(f"  {entry.study} ({entry.digest[:12]}), {period}: {entry.rounds} rounds{drifts}")
        limit = f"{self.max_epsilon:g} at δ {self.delta:g}"
        if self.spent:
            lines.append(
                f"spent: ε {self.spent:.4g} of {limit} for one patient, all studies together (PRV accountant; "
                f"{self.spent_by_renyi:.4g} by Rényi DP); left: {max(0.0, self.max_epsilon - self.spent):.4g}"
            )
        else:
            lines.append(f"spent: nothing of ε {limit} (policy.max_epsilon, policy.delta)")
        if self.studies_without_privacy:
            names = ", ".join(self.studies_without_privacy)
            lines.append(f"not covered by any ε, trained without differential privacy: {names}")
        return [*lines, *([] if self.cost is None else self.cost.lines(self.max_epsilon))]


def read_budget(site: SiteConfig, study: StudyConfig | None) -> BudgetReport:
    """The budget of a site's data set, with the cost of `study` unless it is None.

    Raises:
        LdError: the ledger or the store cannot be read, or no noise keeps the study within its target.
    """
    entries = Ledger(site.ledger_path).entries()
    charges, delta = private_charges(entries), site.policy.delta
    return BudgetReport(
        ledger=str(site.ledger_path),
        charges=len(entries),
        studies=[_study_charges(digest, charged) for digest, charged in by_study(entries).items()],
        max_epsilon=site.policy.max_epsilon,
        delta=delta,
        spent=epsilon(charges, delta),
        spent_by_renyi=epsilon_rdp(charges, delta),
        studies_without_privacy=sorted({entry.study for entry in entries if entry.charge is None}),
        cost=None if study is None else _study_cost(site, study, entries),
    )


def _study_charges(digest: str, charged: Sequence[LedgerEntry]) -> StudyCharges:
    rounds, drifts = (sum(entry.purpose == purpose for entry in charged) for purpose in (TRAINING, DRIFT))
    return StudyCharges(charged[0].study, digest, charged[0].time, charged[-1].time, rounds, drifts)


def remaining_charges(
    site: SiteConfig, store: Store, study: StudyConfig, entries: Sequence[LedgerEntry]
) -> tuple[list[Charge], list[Charge]]:
    """Charges of a private study's next round, and of all its remaining rounds, if none runs again."""
    planned = study.privacy_plan()
    charged = [entry for entry in entries if (entry.study_digest, entry.purpose) == (study.digest(), TRAINING)]
    left = max(0, study.federation.rounds - len(charged))
    drift = [] if planned.drift is None or drift_is_free(site, store, study) else [planned.drift]
    next_round, all_rounds = (
        [replace(planned.step, steps=rounds * study.training.steps), *drift] for rounds in (min(1, left), left)
    )
    return next_round, all_rounds


def _study_cost(site: SiteConfig, study: StudyConfig, entries: Sequence[LedgerEntry]) -> StudyCost:
    if not study.privacy.enabled:
        return StudyCost(study.name, False, site.policy.private_only, study.federation.rounds)
    planned, delta, privacy = study.privacy_plan(), site.policy.delta, study.privacy
    store, _ = split_store(open_store(site.store_path), site.held_out, independent=True)
    charges, (next_round, all_rounds) = private_charges(entries), remaining_charges(site, store, study, entries)
    adapted = inject(load_denoiser(site.base_model), read_adapter(study.site_adapter(site.site)), study.seed)
    parameters = sum(parameter.numel() for parameter in adapted.trainable.values())
    after_study = epsilon([*charges, *all_rounds], delta)
    longitudinal = study.drift.shape == "longitudinal"
    signal = None
    if longitudinal:
        features = len(feature_columns(load_modality(site).numeric_columns))
        sites = len(study.federation.sites)
        signal = signal_to_noise(privacy.drift_noise_multiplier, store.patients, sites, features)
    return StudyCost(
        study=study.name,
        differential_privacy=True,
        refused=after_study > site.policy.max_epsilon,
        rounds=study.federation.rounds,
        epsilon=planned.epsilon,
        delta=privacy.target_delta,
        noise_multiplier=planned.step.noise_multiplier,
        sampling_rate=planned.step.sampling_rate,
        steps=planned.step.steps,
        epsilon_after_next_round=epsilon([*charges, *next_round], delta),
        epsilon_after_study=after_study,
        trainable_parameters=parameters,
        noise_over_signal=noise_over_signal(planned.step.noise_multiplier, parameters, privacy.expected_batch_size),
        patients=store.patients,
        sites=len(study.federation.sites),
        signal_to_noise=signal,
        drift_noise=None
        if planned.drift is None or longitudinal
        else privacy.drift_noise_multiplier * 2**0.5 * privacy.drift_clip_norm / privacy.patients,
    )
