"""A private study's drift: noised once, and kept in the ledger that it was charged to.

Charge and noised drift are one entry of the ledger, written in one transaction. So a drift that may leave is one that
was paid for, whoever computed it and whatever was killed, and it is the same in every round.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict

import torch
from safetensors.torch import load, save
from torch import Tensor

from ld_client.data.store import Store
from ld_client.privacy.ledger import Ledger, Once
from ld_client.privacy.secure_rng import secret_normal
from ld_client.site_config import SiteConfig
from ld_common.core.errors import PrivacyError
from ld_common.diffusion.drift import drift_from_moments
from ld_common.protocol.dp_accounting import Charge
from ld_common.protocol.study_config import StudyConfig

TENSOR = "drift"


def drift_release(store: Store, study: StudyConfig, charge: Charge) -> Once:
    """What the ledger charges for a study's drift on this store, if it does not hold that drift yet."""
    return Once(_key(store, study), charge, lambda: save({TENSOR: noised_drift(store, study)}))


def drift_is_free(site: SiteConfig, store: Store, study: StudyConfig) -> bool:
    """Whether nothing more is to be charged for a private study's drift: its noised one is paid for."""
    return Ledger(site.ledger_path).kept(_key(store, study)) is not None


def paid_drift(site: SiteConfig, store: Store, study: StudyConfig) -> Tensor | None:
    """The noised drift as it travels, float32, in the study's shape, or None.

    Raises:
        PrivacyError: none was charged for.
    """
    if study.drift.shape == "none":
        return None
    kept = Ledger(site.ledger_path).kept(_key(store, study))
    if kept is None:
        raise PrivacyError(f"no drift of study '{study.name}' is paid for on this store: nothing of it may leave")
    return load(kept)[TENSOR]


def noised_drift(store: Store, study: StudyConfig) -> Tensor:
    """The mean drift over patients, noised: `privacy.drift_noise_multiplier` over what one patient can change.

    Each patient gives the drift of the own mean latent, clipped to `privacy.drift_clip_norm` C, and a C that counts
    the patient; both sums are noised, so one patient changes them by at most sqrt(2) C, and then divided. A mean of
    clipped drifts is no longer than C, so a quotient that is longer, as few patients leave it, is shortened to C.
    """
    privacy, rows = study.privacy, defaultdict(list)
    for row, owner in enumerate(store.pseudonyms):
        rows[owner].append(row)
    total, shape = torch.zeros(0, dtype=torch.float64), torch.Size()
    for own in rows.values():
        drift = drift_from_moments(store.latents[own], store.base_latent_mean, study.drift.shape)
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


def _key(store: Store, study: StudyConfig) -> str:
    """Of this drift among the ledger's: another study, or other scans, make another."""
    scans = [store.prompts, float(store.latents.double().sum()), store.base_digest, store.modality_digest]
    return hashlib.sha256(json.dumps([study.digest(), *scans]).encode()).hexdigest()
