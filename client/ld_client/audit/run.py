"""Attacks a release with this site's own patients.

Members are the patients who were trained on, non-members those whom `held_out` excluded from training by chance. The
canary audit needs a rehearsal: a training of the study at this site only, whose result is discarded.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor

from ld_client.audit.canaries import CanaryTest, audit_canaries, cast_rehearsal
from ld_client.audit.copies import CopyReport, Reference, find_copies
from ld_client.audit.membership import AttackOptions, MembershipReport, Scans, audit_membership
from ld_client.audit.one_run import EpsilonBound
from ld_client.data.store import Store
from ld_client.privacy.dp_sgd import train_round_privately
from ld_client.site_config import SiteConfig
from ld_client.train import computing, train_round
from ld_common.adapters.base import inject
from ld_common.adapters.prior_preservation import draw_prior
from ld_common.adapters.registry import read_adapter
from ld_common.core.seeding import torch_generator
from ld_common.diffusion.base_model import BaseModel, Denoiser, load_denoiser
from ld_common.diffusion.drift import LatentDrift, at_designs
from ld_common.diffusion.sampling import make_sampler, sample
from ld_common.diffusion.training import TrainingData
from ld_common.protocol.study_config import StudyConfig
from ld_common.release.release import Release, load_release_base

Progress = Callable[[str, int, int], None]
SAMPLED_TOGETHER = 32
SAMPLER, SAMPLER_STEPS = "dpm-solver++", 20


@dataclass(frozen=True)
class AuditOptions:
    """Sizes of the attacks."""

    points: int = 32
    """Pairs of timestep and noise for each scan's loss."""
    generated: int = 200
    """Images that are generated and searched for copies."""
    canaries: int = 1000
    """Most patients whose participation in the rehearsal a coin decides; 0 for no rehearsal."""
    seed: int = 0
    """Seed of the attacks; coins always use the operating system's entropy."""


@dataclass(frozen=True)
class Audit:
    """Results of all attacks. `CopyReport.pairs` points to scans, so an audit must stay at the site."""

    time: str
    site: str
    study: str
    study_digest: str
    adapter_sha256: str
    differential_privacy: bool
    options: AuditOptions
    membership: tuple[MembershipReport, ...]
    copies: CopyReport
    canaries: EpsilonBound | None

    def to_mapping(self) -> dict[str, Any]:
        """The audit ready for JSON."""
        return asdict(self)


def audit_release(
    site: SiteConfig, members: Store, held_out: Store, release: Release, options: AuditOptions, progress: Progress
) -> Audit:
    """Attack a release with this site's own patients.

    Args:
        site: the site.
        members: visits of the patients who were trained on.
        held_out: visits of the others.
        release: of a study that this site took part in.
        options: sizes of the attacks.
        progress: called with a stage, the steps done and all steps.

    Raises:
        LdError: the release is of another base, or too few patients are held out.
    """
    tuned, base = load_release_base(release, site.base_model, site.device), load_denoiser(site.base_model, site.device)
    drift = training_drift(site, release)
    inside, outside = (
        Scans(store.latents, store.prompts, store.pseudonyms, drift, store.condition_vectors(release.modality))
        for store in (members, held_out)
    )
    attack = AttackOptions(points=options.points, noise_offset=release.study.training.noise_offset, seed=options.seed)
    membership = audit_membership(
        base,
        tuned,
        inside,
        outside,
        attack,
        progress=lambda done, total: progress("membership", done, total),
    )
    generated = _draw(tuned, release, (members, held_out), options.generated, options.seed, progress)
    training, others = (Reference(store.latents, store.pseudonyms) for store in (members, held_out))
    canaries = None
    if options.canaries:
        canaries = _rehearse(site, (inside, outside), release, options.canaries, attack, progress)
    return Audit(
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        site=site.site,
        study=release.study.name,
        study_digest=release.study.digest(),
        adapter_sha256=release.adapter_sha256,
        differential_privacy=release.study.privacy.enabled,
        options=options,
        membership=membership,
        copies=find_copies(generated, training, others, seed=options.seed),
        canaries=canaries,
    )


def training_drift(site: SiteConfig, release: Release) -> LatentDrift | None:
    """The drift that this site trained with: its own, or else the release's; a conditional one is not used in
    training."""
    drift = release.site_drifts.get(site.site, release.drift)
    return drift if isinstance(drift, LatentDrift) else None


@torch.no_grad()
def _draw(
    tuned: BaseModel, release: Release, sides: Sequence[Store], count: int, seed: int, progress: Progress
) -> Tensor:
    """Latents `(count,C,h,w)` of generated images, with prompts of both sides in turn."""
    rows = range((count + 1) // 2)
    attributes = [store.attributes[row % len(store.attributes)] for row in rows for store in sides][:count]
    noise = torch.randn((count, *tuned.latent_shape), generator=torch_generator(seed, "audit", "samples"))
    sampler, parts = make_sampler(tuned.scheduler, SAMPLER, SAMPLER_STEPS), []
    for start in range(0, count, SAMPLED_TOGETHER):
        batch = attributes[start : start + SAMPLED_TOGETHER]
        context = tuned.embed([release.modality.prompt(visit) for visit in batch])
        drift = at_designs(release.drift, [release.modality.design_vector(visit) for visit in batch])
        parts.append(sample(tuned, context, noise[start : start + len(batch)], sampler, drift, SAMPLED_TOGETHER).cpu())
        progress("drawing", start + len(batch), count)
    return torch.cat(parts).float()


def _rehearse(
    site: SiteConfig,
    sides: tuple[Scans, Scans],
    release: Release,
    count: int,
    attack: AttackOptions,
    progress: Progress,
) -> EpsilonBound:
    """Train like the study on patients of both sides, with coins deciding who takes part, and audit the result."""
    study = release.study
    everybody = Scans(
        torch.cat([scans.latents for scans in sides]),
        [prompt for scans in sides for prompt in scans.prompts],
        [name for scans in sides for name in scans.pseudonyms],
        sides[0].drift,
        torch.cat([scans.condition_vectors for scans in sides]),
    )
    rehearsal = cast_rehearsal(everybody, count, secrets.randbits(63))
    tuned = _rehearsed(site, rehearsal.training, study, progress)
    delta = study.privacy.target_delta if study.privacy.enabled else 0.0
    return audit_canaries(
        load_denoiser(site.base_model, site.device),
        tuned,
        rehearsal.canaries,
        rehearsal.included,
        CanaryTest(delta),
        options=attack,
        progress=lambda done, total: progress("canaries", done, total),
    )


def _rehearsed(site: SiteConfig, scans: Scans, study: StudyConfig, progress: Progress) -> Denoiser:
    """All rounds of a study at this site only, without the study's `start`, which is unknown here."""
    model, adapter = load_denoiser(site.base_model, site.device), read_adapter(study.site_adapter(site.site))
    prior = None if adapter.prior is None else draw_prior(model, adapter.prior, study.seed)
    adapted = inject(model, adapter, study.seed)
    data = TrainingData(scans.latents, scans.prompts, scans.drift, prior, scans.pseudonyms, scans.condition_vectors)
    total, done = study.federation.rounds * study.training.steps, 0

    def advance(*_: object) -> None:
        nonlocal done
        done += 1
        progress("rehearsal", done, total)

    for number in range(1, study.federation.rounds + 1):
        if study.privacy.enabled:
            noise = study.privacy_plan().step.noise_multiplier
            train_round_privately(adapted, data, study, number, noise, advance)
        else:
            train_round(adapted, data, study, number, site.site, computing(site), advance)
    return adapted.model
