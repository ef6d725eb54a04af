"""Facts for the privacy report: what the release, the ledger and the store say about the site's part in a study."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ld_client.data.exclusions import read_exclusions
from ld_client.data.store import count_split, open_store
from ld_client.privacy.ledger import DRIFT, TRAINING, LedgerEntry, by_study, private_charges
from ld_client.site_config import SiteConfig
from ld_common.core.config import from_mapping
from ld_common.core.errors import ConfigError, ReleaseError
from ld_common.protocol.dp_accounting import Charge, epsilon, epsilon_rdp
from ld_common.release.release import Release


@dataclass
class PrivacyStatement:
    """The privacy statement of a release; unit: one patient of one site; horizon: all rounds of the study."""

    differential_privacy: bool
    unit: str
    horizon: str
    epsilon: float
    epsilon_by_renyi: float
    delta: float
    accountant: str
    noise_multiplier: float
    sampling_rate: float
    sampling: str
    max_grad_norm: float
    steps: int
    drift_noise_multiplier: float | None

    @property
    def charges(self) -> list[Charge]:
        """The mechanisms that the statement accounts for."""
        drift = [] if self.drift_noise_multiplier is None else [Charge(self.drift_noise_multiplier, 1.0, 1)]
        return [Charge(self.noise_multiplier, self.sampling_rate, self.steps), *drift]


@dataclass(frozen=True)
class RoundParticipation:
    """This site's part in one round."""

    number: int
    outcome: str
    sent_bytes: int | None
    """None when the server has no result of the site."""
    charged: int
    """Number of the ledger's charges for training in this round."""


@dataclass(frozen=True)
class StudyUse:
    """One study in the ledger of the data set."""

    name: str
    digest: str
    first: str
    last: str
    rounds: int
    """Charged rounds; a round that ran again counts again."""
    charges: str
    """As text; empty without differential privacy."""
    epsilon: float | None
    """ε of this study alone at the site's δ; None without differential privacy, or for a report that shows no ε."""


@dataclass(frozen=True)
class BudgetSpent:
    """Sums over the ledger; unit: one patient; horizon: all private studies on the data set so far."""

    total: float
    """ε at `policy.delta`."""
    by_renyi: float
    this_study: float
    """ε at the study's own δ of the study's charges."""
    recomputed: float
    """The study's ε from the σ, sampling rate and steps that the release states."""


@dataclass(frozen=True)
class DatasetSummary:
    """Numbers of patients, visits and exclusions in the store."""

    trained_patients: int
    held_out_patients: int
    visits: int
    exclusions: list[tuple[str, int, int]]
    """Reason, entries, files."""
    same_study: bool
    """Whether the store was made with the release's base model and modality."""


def read_privacy_statement(release: Release) -> PrivacyStatement | None:
    """The release's own privacy statement, None without differential privacy.

    Raises:
        ReleaseError: it is absent, malformed, or contradicts the study.
    """
    stated = release.manifest.get("privacy")
    private = stated.get("differential_privacy") if isinstance(stated, dict) else None
    if private is not release.study.privacy.enabled:
        raise ReleaseError(
            f"the release states differential_privacy={private}, but its study has privacy.enabled="
            f"{release.study.privacy.enabled}: ask the server for a release made with this version"
        )
    if not private:
        return None
    try:
        return from_mapping(PrivacyStatement, stated)
    except ConfigError as error:
        raise ReleaseError(
            f"the release's privacy statement is incomplete ({error}): ask the server for a new release"
        ) from error


def round_participations(name: str, release: Release, charges: Sequence[LedgerEntry]) -> list[RoundParticipation]:
    """A site's part in every round of a release, with the ledger's charges for it.

    Raises:
        ReleaseError: the site took no part.
    """
    charged = Counter(entry.round for entry in charges if entry.purpose == TRAINING)
    rounds, present = [], False
    for record in release.manifest["rounds"]:
        seen, left_out = record["sites"].get(name), record["left_out"].get(name)
        present |= seen is not None or left_out is not None
        if seen is None:
            outcome = "took no part" if left_out is None else f"left out: {left_out}"
        else:
            outcome = "in the release" if record["counted"] else "not used: the round had too few sites"
        sent = None if seen is None else int(seen["uplink_bytes"])
        rounds.append(RoundParticipation(int(record["round"]), outcome, sent, charged[int(record["round"])]))
    if not present:
        took_part = sorted({site for record in release.manifest["rounds"] for site in record["sites"]})
        raise ReleaseError(
            f"site '{name}' took no part in this release, whose sites are {', '.join(took_part)}: give a release of "
            "a study that this site trained in, or this site's own config"
        )
    return rounds


def study_uses(entries: Sequence[LedgerEntry], delta: float | None) -> list[StudyUse]:
    """The ledger's studies in the order of their first charge; no ε is computed without a `delta`."""
    uses = []
    for digest, charged in by_study(entries).items():
        charges = private_charges(charged)
        uses.append(
            StudyUse(
                name=charged[0].study,
                digest=digest,
                first=charged[0].time,
                last=charged[-1].time,
                rounds=sum(entry.purpose == TRAINING for entry in charged),
                charges="; ".join(_charge_texts(charged)),
                epsilon=_composed(tuple(charges), delta) if charges and delta is not None else None,
            )
        )
    return uses


def _charge_texts(charged: Sequence[LedgerEntry]) -> list[str]:
    steps: Counter[tuple[str, float, float]] = Counter()
    for entry in charged:
        if entry.charge is not None:
            key = entry.purpose, entry.charge.noise_multiplier, entry.charge.sampling_rate
            steps[key] += entry.charge.steps
    return [
        f"drift released {_times(count)}, σ {number(noise)}"
        if purpose == DRIFT
        else f"{count:,} steps, σ {number(noise)}, sampling rate {number(rate)}"
        for (purpose, noise, rate), count in steps.items()
    ]


def spent_budget(
    statement: PrivacyStatement, site_delta: float, entries: Sequence[LedgerEntry], charged: Sequence[LedgerEntry]
) -> BudgetSpent:
    """Sums over a ledger's `entries`, of which `charged` are the study's."""
    charges = private_charges(entries)
    return BudgetSpent(
        total=_composed(tuple(charges), site_delta),
        by_renyi=epsilon_rdp(charges, site_delta),
        this_study=_composed(tuple(private_charges(charged)), statement.delta),
        recomputed=_composed(tuple(statement.charges), statement.delta),
    )


@functools.cache
def _composed(charges: tuple[Charge, ...], delta: float) -> float:
    """`epsilon`, cached: it takes a second, and the sums of a ledger with one study are the same."""
    return epsilon(charges, delta)


def summarize_dataset(site: SiteConfig, release: Release) -> DatasetSummary:
    """Counts of the site's store."""
    store, entries = open_store(site.store_path), read_exclusions(site.store_path)
    split = count_split(store, site.held_out, release.study.privacy.enabled)
    reasons = Counter(exclusion.reason for exclusion in entries)
    return DatasetSummary(
        trained_patients=split.trained,
        held_out_patients=split.held_out,
        visits=len(store.prompts),
        exclusions=[
            (reason.value, count, sum(exclusion.files for exclusion in entries if exclusion.reason == reason))
            for reason, count in reasons.most_common()
        ],
        same_study=(store.base_digest, store.modality_digest) == (release.base_digest, release.modality.digest()),
    )


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def number(value: Any) -> str:
    """A number as text: whole and large ones in full, others with four significant digits."""
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4g}"


def decimal(value: float) -> str:
    """A small number without an exponent: 0.00001."""
    return f"{value:.15f}".rstrip("0")
