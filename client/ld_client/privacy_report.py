"""`ld-client privacy-report`: what a data protection officer reads and signs about one release.

The page names no patient, pseudonym, file or folder, as it may be filed elsewhere. For a release without differential
privacy nothing of an ε is computed, so none can be shown.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2

from ld_client.audit.findings import findings, read_audit
from ld_client.ledger import DRIFT, TRAINING, Entry, Ledger, private_charges
from ld_client.site import SiteConfig
from ld_client.store import open_store, read_left_out, split_store
from ld_common.adapters import write_bytes
from ld_common.config import from_mapping
from ld_common.errors import ConfigError, ReleaseError
from ld_common.privacy import Charge, epsilon, epsilon_rdp
from ld_common.release import MANIFEST, Release, read_release
from ld_common.secure_aggregation import default_threshold

TEMPLATE = "privacy_report.html.j2"
TOLERANCE = 1e-3
"""Relative difference up to which two computations of an ε agree."""


@dataclass
class Promise:
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
    clip_norm: float
    steps: int
    drift_noise_multiplier: float | None

    @property
    def charges(self) -> list[Charge]:
        """What the statement says was done with the site's patients."""
        drift = [] if self.drift_noise_multiplier is None else [Charge(self.drift_noise_multiplier, 1.0, 1)]
        return [Charge(self.noise_multiplier, self.sampling_rate, self.steps), *drift]


@dataclass(frozen=True)
class OwnRound:
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
class Spent:
    """What the ledger adds up to; unit: one patient; horizon: all private studies on the data set so far."""

    total: float
    """ε at `policy.delta`."""
    by_renyi: float
    this_study: float
    """ε at the study's own δ of what the ledger holds of it."""
    recomputed: float
    """The study's ε from the σ, sampling rate and steps that the release states."""


@dataclass(frozen=True)
class Holdings:
    """What the store holds and what indexing left out, in numbers."""

    trained_patients: int
    held_out_patients: int
    visits: int
    left_out: list[tuple[str, int, int]]
    """Reason, entries, files."""
    same_study: bool
    """Whether the store is of the release's base model and modality."""


def write_privacy_report(site: SiteConfig, release_folder: Path, audit_file: Path | None, out: Path) -> list[str]:
    """Write the page, one HTML file that needs nothing else, and return what to say.

    Raises:
        LdError: the release, the ledger, the store or the audit cannot be read; this site took no part in the release;
            the audit is of another release or site.
    """
    release = read_release(release_folder)
    promise = read_promise(release)
    entries = Ledger(site.ledger_path).entries()
    digest = str(release.manifest["study_digest"])
    own = [entry for entry in entries if entry.study_digest == digest]
    rounds = own_rounds(site.site, release, own)
    spent = None if promise is None else _spent(promise, site.policy.delta, entries, own)
    studies = study_uses(entries, site.policy.delta if promise else None)
    holdings = _holdings(site, release)
    audit = None if audit_file is None else read_audit(audit_file, site.site, release)
    found = [] if audit is None else findings(audit, None if promise is None else promise.epsilon)
    warnings = [
        *_promise_warnings(site, promise, spent, holdings, studies),
        *_ledger_warnings(rounds, own),
        *[finding.warning for finding in found if finding.warning],
        *_site_warnings(site, holdings),
    ]
    sites = release.study.federation.sites
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ld_client", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(number=_number, decimal=_decimal, minute=_minute)
    page = environment.get_template(TEMPLATE).render(
        site=site,
        release=release,
        study=release.study,
        manifest=release.manifest,
        base_name=Path(release.base_name).name if Path(release.base_name).is_absolute() else release.base_name,
        hashes=_hashes(release_folder, audit_file),
        version=version("latent-drift-federation"),
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        parameters=sum(math.prod(tensor["shape"]) for tensor in release.manifest["tensors"].values()),
        promise=promise,
        odds=None if promise is None else math.exp(promise.epsilon),
        spent=spent,
        studies=studies,
        digest=digest,
        rounds=rounds,
        holdings=holdings,
        audit=audit,
        findings=found,
        warnings=warnings,
        threshold=release.study.federation.secure_threshold or default_threshold(len(sites)),
    )
    write_bytes(out, page.encode())
    return [*warnings, f"wrote {out}: {len(warnings)} points to weigh before it is signed"]


def read_promise(release: Release) -> Promise | None:
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
        return from_mapping(Promise, stated)
    except ConfigError as error:
        raise ReleaseError(f"the release's privacy statement is not whole ({error}): ask for it again") from error


def own_rounds(name: str, release: Release, own: Sequence[Entry]) -> list[OwnRound]:
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
        found.append(OwnRound(int(record["round"]), outcome, sent, charged[int(record["round"])]))
    if not present:
        took_part = sorted({site for record in release.manifest["rounds"] for site in record["sites"]})
        raise ReleaseError(
            f"site '{name}' took no part in this release, whose sites are {', '.join(took_part)}: give a release of "
            "a study that this site trained in, or this site's own config"
        )
    return found


def study_uses(entries: Sequence[Entry], delta: float | None) -> list[StudyUse]:
    """The ledger by study, in the order of their first charge; without a `delta` no ε is computed."""
    uses = []
    for digest in dict.fromkeys(entry.study_digest for entry in entries):
        own = [entry for entry in entries if entry.study_digest == digest]
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


def _charge_words(own: Sequence[Entry]) -> list[str]:
    steps: Counter[tuple[str, float, float]] = Counter()
    for entry in own:
        if entry.charge is not None:
            key = entry.purpose, entry.charge.noise_multiplier, entry.charge.sampling_rate
            steps[key] += entry.charge.steps
    return [
        f"drift released {_times(count)}, σ {_number(noise)}"
        if purpose == DRIFT
        else f"{count:,} steps, σ {_number(noise)}, sampling rate {_number(rate)}"
        for (purpose, noise, rate), count in steps.items()
    ]


def _spent(promise: Promise, site_delta: float, entries: Sequence[Entry], own: Sequence[Entry]) -> Spent:
    charges = private_charges(entries)
    return Spent(
        total=_composed(tuple(charges), site_delta),
        by_renyi=epsilon_rdp(charges, site_delta),
        this_study=_composed(tuple(private_charges(own)), promise.delta),
        recomputed=_composed(tuple(promise.charges), promise.delta),
    )


@functools.cache
def _composed(charges: tuple[Charge, ...], delta: float) -> float:
    """As `epsilon`, which takes a second: where a ledger holds one study, its several sums are one."""
    return epsilon(charges, delta)


def _holdings(site: SiteConfig, release: Release) -> Holdings:
    store, entries = open_store(site.store_path), read_left_out(site.store_path)
    trained, held_out = (len(set(side.pseudonyms)) for side in split_store(store, site.held_out))
    reasons = Counter(one.reason for one in entries)
    return Holdings(
        trained_patients=trained,
        held_out_patients=held_out,
        visits=len(store.prompts),
        left_out=[
            (reason.value, count, sum(one.files for one in entries if one.reason == reason))
            for reason, count in reasons.most_common()
        ],
        same_study=(store.base_digest, store.modality_digest) == (release.base_digest, release.modality.digest()),
    )


def _promise_warnings(
    site: SiteConfig, promise: Promise | None, spent: Spent | None, holdings: Holdings, studies: Sequence[StudyUse]
) -> list[str]:
    if promise is None or spent is None:
        return [
            "The study ran without differential privacy: nothing bounds what its release reveals of a patient, and "
            "pictures that it generates may show training patients."
        ]
    said, policy = [], site.policy
    if spent.recomputed > promise.epsilon * (1 + TOLERANCE):
        said.append(
            f"The release states ε {_number(promise.epsilon)}, but its noise, sampling rate and steps give "
            f"{_number(spent.recomputed)}: do not sign before the server has explained it."
        )
    if spent.this_study > promise.epsilon * (1 + TOLERANCE):
        said.append(
            f"This site's ledger holds ε {_number(spent.this_study)} for this study, more than the "
            f"{_number(promise.epsilon)} that the release states: rounds that ran again were charged again, and what "
            "they sent may have left. For this site the ledger's number holds."
        )
    if spent.total > policy.max_epsilon:
        said.append(
            f"All studies together have cost ε {_number(spent.total)}, above the site's limit "
            f"{_number(policy.max_epsilon)}: the limit or its δ was changed afterwards."
        )
    patients = holdings.trained_patients
    for delta in sorted({promise.delta, policy.delta}):
        if delta * patients >= 1:
            said.append(f"δ {_decimal(delta)} is not below one in {patients:,} patients: one of them might be shown.")
    outside = [use.name for use in studies if not use.charges]
    if outside:
        said.append(
            f"Studies without differential privacy used the same patients ({', '.join(outside)}): no ε in this report "
            "covers them."
        )
    return said


def _ledger_warnings(rounds: Sequence[OwnRound], own: Sequence[Entry]) -> list[str]:
    if not own:
        return [
            "The site's ledger holds nothing of this study, though the site took part: it was lost, replaced, or this "
            "is another data set's. Restore it from a backup before anything else trains."
        ]
    missing = [str(one.number) for one in rounds if one.sent_bytes is not None and not one.charged]
    if missing:
        return [f"The ledger holds no charge for round {', '.join(missing)}, in which the site sent an update."]
    return []


def _site_warnings(site: SiteConfig, holdings: Holdings) -> list[str]:
    said = []
    if site.held_out == 0:
        said.append(
            "The site holds no patients back (held_out is 0), so nobody can test whether this release gives training "
            "patients away. It must be set before a study, not after it."
        )
    if not holdings.same_study:
        said.append(
            "The store was indexed again for another base model or modality: its numbers are not those of this study."
        )
    return said


def _hashes(release_folder: Path, audit_file: Path | None) -> dict[str, str]:
    files = {"manifest.json": release_folder / MANIFEST, **({"audit.json": audit_file} if audit_file else {})}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _number(value: Any) -> str:
    """Whole numbers in full, others with four digits."""
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4g}"


def _decimal(value: float) -> str:
    """A small number without an exponent: 0.00001."""
    return f"{value:.15f}".rstrip("0")


def _minute(time: str) -> str:
    """`2026-07-01T09:30:00+00:00` as `2026-07-01 09:30`."""
    return time[:16].replace("T", " ")
