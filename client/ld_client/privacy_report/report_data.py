"""What a release, the site's ledger and its store say of the site's part in a study: facts for the privacy report."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ld_client.data.store import open_store, read_exclusions, split_store
from ld_client.privacy.ledger import DRIFT, TRAINING, LedgerEntry, by_study, private_charges
from ld_client.site_config import SiteConfig
from ld_common.core.config import from_mapping
from ld_common.core.errors import ConfigError, ReleaseError
from ld_common.protocol.dp_accounting import Charge, epsilon, epsilon_rdp
from ld_common.release.release import Release


@dataclass
class PrivacyStatement:
    """What a private release states of itself; unit: one patient of one site; horizon: all rounds of the study."""

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
        """What the statement says was done with the site's patients."""
        drift = [] if self.drift_noise_multiplier is None else [Charge(self.drift_noise_multiplier, 1.0, 1)]
        return [Charge(self.noise_multiplier, self.sampling_rate, self.steps), *drift]


@dataclass(frozen=True)
class RoundParticipation:
    """This site's part in one round."""

    number: int
    outcome: str
    sent_bytes: int | None
    """None when the server has no answer of the site."""
    charged: int
    """How often the ledger was charged for training in it."""


@dataclass(frozen=True)
class StudyUse:
    """One study in the ledger of the site's data set."""

    name: str
    digest: str
    first: str
    last: str
    rounds: int
    """Charged ones; a round that ran again counts again."""
    charges: str
    """In words; empty without differential privacy."""
    epsilon: float | None
    """Of this study alone at the site's δ; None without differential privacy, or where no ε may be shown."""


@dataclass(frozen=True)
class BudgetSpent:
    """What the ledger adds up to; unit: one patient; horizon: all private studies on the data set so far."""

    total: float
    """ε at `policy.delta`."""
    by_renyi: float
    this_study: float
    """ε at the study's own δ of what the ledger holds of it."""
    recomputed: float
    """The study's ε from the σ, sampling rate and steps that the release states."""


@dataclass(frozen=True)
class DatasetSummary:
    """What the store holds and what indexing left out, in numbers."""

    trained_patients: int
    held_out_patients: int
    visits: int
    left_out: list[tuple[str, int, int]]
    """Reason, entries, files."""
    same_study: bool
    """Whether the store is of the release's base model and modality."""


def read_promise(release: Release) -> PrivacyStatement | None:
    """The release's own privacy statement, None without differential privacy.

    Raises:
        ReleaseError: it is absent, malformed, or at odds with the study.
    """
    stated = release.manifest.get("privacy")
    private = stated.get("differential_privacy") if isinstance(stated, dict) else None
    if private is not release.study.privacy.enabled:
        raise ReleaseError(
            f"the release says of differential privacy '{private}', its study privacy.enabled="
            f"{release.study.privacy.enabled}: have the server release it with this version"
        )
    if not private:
        return None
    try:
        return from_mapping(PrivacyStatement, stated)
    except ConfigError as error:
        raise ReleaseError(f"the release's privacy statement is not whole ({error}): ask for it again") from error


def own_rounds(name: str, release: Release, own: Sequence[LedgerEntry]) -> list[RoundParticipation]:
    """A site's part in every round of a release, beside what its ledger was charged.

    Raises:
        ReleaseError: the site took no part.
    """
    charged = Counter(entry.round for entry in own if entry.purpose == TRAINING)
    found, present = [], False
    for record in release.manifest["rounds"]:
        seen, left_out = record["sites"].get(name), record["left_out"].get(name)
        present |= seen is not None or left_out is not None
        if seen is None:
            outcome = "took no part" if left_out is None else f"left out: {left_out}"
        else:
            outcome = "in the release" if record["counted"] else "not used: the round had too few sites"
        sent = None if seen is None else int(seen["uplink_bytes"])
        found.append(RoundParticipation(int(record["round"]), outcome, sent, charged[int(record["round"])]))
    if not present:
        took_part = sorted({site for record in release.manifest["rounds"] for site in record["sites"]})
        raise ReleaseError(
            f"site '{name}' took no part in this release, whose sites are {', '.join(took_part)}: give a release of "
            "a study that this site trained in, or this site's own config"
        )
    return found


def study_uses(entries: Sequence[LedgerEntry], delta: float | None) -> list[StudyUse]:
    """The ledger by study, in the order of their first charge; without a `delta` no ε is computed."""
    uses = []
    for digest, own in by_study(entries).items():
        charges = private_charges(own)
        uses.append(
            StudyUse(
                name=own[0].study,
                digest=digest,
                first=own[0].time,
                last=own[-1].time,
                rounds=sum(entry.purpose == TRAINING for entry in own),
                charges="; ".join(_charge_words(own)),
                epsilon=_composed(tuple(charges), delta) if charges and delta is not None else None,
            )
        )
    return uses


def _charge_words(own: Sequence[LedgerEntry]) -> list[str]:
    steps: Counter[tuple[str, float, float]] = Counter()
    for entry in own:
        if entry.charge is not None:
            key = entry.purpose, entry.charge.noise_multiplier, entry.charge.sampling_rate
            steps[key] += entry.charge.steps
    return [
        f"drift released {_times(count)}, σ {number(noise)}"
        if purpose == DRIFT
        else f"{count:,} steps, σ {number(noise)}, sampling rate {number(rate)}"
        for (purpose, noise, rate), count in steps.items()
    ]


def spent_on(
    promise: PrivacyStatement, site_delta: float, entries: Sequence[LedgerEntry], own: Sequence[LedgerEntry]
) -> BudgetSpent:
    charges = private_charges(entries)
    return BudgetSpent(
        total=_composed(tuple(charges), site_delta),
        by_renyi=epsilon_rdp(charges, site_delta),
        this_study=_composed(tuple(private_charges(own)), promise.delta),
        recomputed=_composed(tuple(promise.charges), promise.delta),
    )


@functools.cache
def _composed(charges: tuple[Charge, ...], delta: float) -> float:
    """As `epsilon`, which takes a second: where a ledger holds one study, its several sums are one."""
    return epsilon(charges, delta)


def holdings_of(site: SiteConfig, release: Release) -> DatasetSummary:
    """What the site's store holds and what of it the release was trained on."""
    store, entries = open_store(site.store_path), read_exclusions(site.store_path)
    trained, held_out = (len(set(side.pseudonyms)) for side in split_store(store, site.held_out))
    reasons = Counter(one.reason for one in entries)
    return DatasetSummary(
        trained_patients=trained,
        held_out_patients=held_out,
        visits=len(store.prompts),
        left_out=[
            (reason.value, count, sum(one.files for one in entries if one.reason == reason))
            for reason, count in reasons.most_common()
        ],
        same_study=(store.base_digest, store.modality_digest) == (release.base_digest, release.modality.digest()),
    )


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def number(value: Any) -> str:
    """Whole numbers in full, others with four digits."""
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4g}"
