"""The drift of a private study: noised once, and kept in the ledger that it was charged to.

Charge and noised drift are written in one transaction. So every drift that leaves was charged, even if a process was
killed, and it is the same in every round.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict

import torch
from safetensors.torch import load, save
from torch import Tensor

from ld_client.data.store import Store
from ld_client.privacy.ledger import Ledger, NoisedRelease
from ld_client.privacy.secure_rng import secret_normal
from ld_client.site_config import SiteConfig
from ld_common.core.errors import PrivacyError
from ld_common.diffusion.drift import drift_from_moments
from ld_common.protocol.dp_accounting import Charge
from ld_common.protocol.study_config import StudyConfig

TENSOR = "drift"


def drift_release(store: Store, study: StudyConfig, charge: Charge) -> NoisedRelease:
    """The drift of a study on this store, for the ledger to charge unless it holds it."""
    return NoisedRelease(drift_key(store, study), charge, lambda: save({TENSOR: noised_drift(store, study)}))


def drift_is_free(site: SiteConfig, store: Store, study: StudyConfig) -> bool:
    """Whether the ledger holds the noised drift of a private study, so that it costs nothing more."""
    return Ledger(site.ledger_path).noised_release(drift_key(store, study)) is not None


def paid_drift(site: SiteConfig, store: Store, study: StudyConfig) -> Tensor | None:
    """The noised drift as it travels, float32, in the study's shape; None for a study without a drift.

    Raises:
        PrivacyError: none was charged.
    """
    if study.drift.shape == "none":
        return None
    noised = Ledger(site.ledger_path).noised_release(drift_key(store, study))
    if noised is None:
        raise PrivacyError(f"the drift of study '{study.name}' was not charged on this store: it may not leave")
    return load(noised)[TENSOR]


def noised_drift(store: Store, study: StudyConfig) -> Tensor:
    """The mean drift over patients, with noise of `privacy.drift_noise_multiplier` times its sensitivity.

    Each patient contributes the drift of the patient's mean latent, clipped to norm C (`privacy.drift_clip_norm`), and
    C itself as a count. Both sums are noised, so one patient changes them by at most sqrt(2) C, and then divided. The
    mean of clipped drifts has at most norm C, so a longer quotient, as few patients give it, is scaled down to C.
    """
    privacy, rows = study.privacy, defaultdict(list)
    for row, owner in enumerate(store.pseudonyms):
        rows[owner].append(row)
    total, shape = torch.zeros(0, dtype=torch.float64), torch.Size()
    for visits in rows.values():
        drift = drift_from_moments(store.latents[visits], store.base_latent_mean, study.drift.shape)
        if drift is None or not bool(drift.isfinite().all()):
            continue
        clip = min(1.0, privacy.drift_clip_norm / max(float(drift.norm()), 1e-12))
        share = torch.cat([drift.double().flatten() * clip, torch.tensor([privacy.drift_clip_norm]).double()])
        total, shape = total + share if len(total) else share, drift.shape
    spread = privacy.drift_noise_multiplier * 2**0.5 * privacy.drift_clip_norm
    total = total + spread * secret_normal(total.shape)
    patients = max(1.0, float(total[-1]) / privacy.drift_clip_norm)
    mean = total[:-1] / patients
    return (mean * min(1.0, privacy.drift_clip_norm / float(mean.norm()))).view(shape).float()


def drift_key(store: Store, study: StudyConfig) -> str:
    """The drift's key in the ledger; it depends on the study and on the scans."""
    scans = [store.prompts, float(store.latents.double().sum()), store.base_digest, store.modality_digest]
    return hashlib.sha256(json.dumps([study.digest(), *scans]).encode()).hexdigest()
