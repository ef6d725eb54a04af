"""`ld-client budget`: what a data set's privacy has been spent on, what is left, what a study would cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ld_client.data.store import Store, open_store, split_store
from ld_client.privacy.dp_drift import drift_is_free
from ld_client.privacy.ledger import DRIFT, TRAINING, Ledger, LedgerEntry, by_study, private_charges
from ld_client.site_config import SiteConfig
from ld_common.adapters.base import inject
from ld_common.adapters.registry import read_adapter
from ld_common.diffusion.base_model import load_denoiser
from ld_common.protocol.dp_accounting import Charge, epsilon, epsilon_rdp, noise_over_signal
from ld_common.protocol.study_config import StudyConfig, load_study

DRIFT_NOISE = 0.2
"""Deviation of a drift's noise above which it says little."""


def budget_lines(site: SiteConfig, study_file: Path | None, overrides: Sequence[str]) -> list[str]:
    """The report's lines.

    Raises:
        LdError: the ledger, the study or the store cannot be read.
    """
    entries = Ledger(site.ledger_path).entries()
    lines = [f"ledger {site.ledger_path}: {len(entries)} charges", *_by_study(entries)]
    lines += _spent(site, private_charges(entries))
    open_studies = sorted({entry.study for entry in entries if entry.charge is None})
    if open_studies:
        lines.append(f"outside any ε, trained without differential privacy: {', '.join(open_studies)}")
    if study_file is not None:
        study, _ = load_study(study_file, list(overrides))
        lines += _asked(site, study, entries)
    return lines


def _by_study(entries: Sequence[LedgerEntry]) -> list[str]:
    lines = []
    for digest, own in by_study(entries).items():
        trained = [entry for entry in own if entry.purpose == TRAINING]
        words = f"  {own[0].study} ({digest[:12]}), {own[0].time} to {own[-1].time}: {len(trained)} rounds"
        drifts = sum(entry.purpose == DRIFT for entry in own)
        lines.append(words + (f", {drifts} drift" if drifts else ""))
    return lines


def _spent(site: SiteConfig, charges: Sequence[Charge]) -> list[str]:
    delta, limit = site.policy.delta, site.policy.max_epsilon
    if not charges:
        return [f"nothing is spent of ε {limit:g} at δ {delta:g} (policy.max_epsilon, policy.delta)"]
    spent, check = epsilon(charges, delta), epsilon_rdp(charges, delta)
    return [
        f"spent: ε {spent:.4g} of {limit:g} at δ {delta:g} for one patient, all studies together "
        f"(PRV accountant; {check:.4g} by Rényi DP); left: {max(0.0, limit - spent):.4g}"
    ]


def still_to_charge(
    site: SiteConfig, store: Store, study: StudyConfig, entries: Sequence[LedgerEntry]
) -> tuple[list[Charge], list[Charge]]:
    """What the next round of a private study will charge here, and all that are left, when none runs again."""
    planned = study.privacy_plan()
    done = [one for one in entries if (one.study_digest, one.purpose) == (study.digest(), TRAINING)]
    left = max(0, study.federation.rounds - len(done))
    drift = [] if planned.drift is None or drift_is_free(site, store, study) else [planned.drift]
    one, every = (
        [replace(planned.step, steps=rounds * study.training.steps), *drift] for rounds in (min(1, left), left)
    )
    return one, every


def _asked(site: SiteConfig, study: StudyConfig, entries: Sequence[LedgerEntry]) -> list[str]:
    if not study.privacy.enabled:
        refused = "; this site refuses it (policy.private_only)" if site.policy.private_only else ""
        return [f"study {study.name}: without differential privacy, no ε can be said{refused}"]
    planned, delta, limit = study.privacy_plan(), site.policy.delta, site.policy.max_epsilon
    store, _ = split_store(open_store(site.store_path), site.held_out)
    charges, (one, every) = private_charges(entries), still_to_charge(site, store, study, entries)
    adapted = inject(load_denoiser(site.base_model), read_adapter(study.adapter), study.seed)
    parameters = sum(parameter.numel() for parameter in adapted.trainable.values())
    ratio = noise_over_signal(planned.step.noise_multiplier, parameters, study.privacy.expected_batch_size)
    after_one, after_all = epsilon([*charges, *one], delta), epsilon([*charges, *every], delta)
    fits = "fits" if after_all <= limit else "does not fit: the site will refuse a round of it"
    return [
        f"study {study.name}: ε {planned.epsilon:.4g} at its δ {study.privacy.target_delta:g}, noise multiplier "
        f"{planned.step.noise_multiplier:.4g}, sampling rate {planned.step.sampling_rate:.4g}, "
        f"{planned.step.steps} steps",
        f"  its next round brings the data set to ε {after_one:.4g}, all its {study.federation.rounds} rounds to "
        f"{after_all:.4g} of {limit:g}: {fits}",
        f"  {parameters:,} numbers learn; the noise of a step is at least {ratio:.2g} times its gradient's norm"
        + (": little will be learned; larger batches or fewer numbers help" if ratio > 1 else ""),
        *([] if planned.drift is None else [_drift_noise(study)]),
    ]


def _drift_noise(study: StudyConfig) -> str:
    privacy = study.privacy
    deviation = privacy.drift_noise_multiplier * 2**0.5 * privacy.drift_clip_norm / privacy.patients
    return f"  each value of its drift has noise of deviation {deviation:.2g}, where latents have about 1" + (
        ": set drift.shape to none, or more patients" if deviation > DRIFT_NOISE else ""
    )
