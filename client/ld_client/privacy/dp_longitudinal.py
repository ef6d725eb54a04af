"""A site's part of a private longitudinal drift: one noised vector, charged once and the same in every round.

The mechanism is that of `ld_common.diffusion.private_longitudinal`: every patient's vector is clipped to
`privacy.drift_clip_norm`, and Gaussian noise hides whether a patient is among them. The study's start, which saw none
of the patients, gives the basis; what the site sent is kept in its ledger with the basis that it was computed in.
"""

from __future__ import annotations

import hashlib

import torch
from safetensors.torch import load, save
from torch import Tensor

from ld_client.data.store import Store
from ld_client.privacy.dp_drift import TENSOR, drift_key
from ld_client.privacy.ledger import Ledger, NoisedRelease
from ld_client.privacy.secure_rng import secret_normal
from ld_client.site_config import SiteConfig
from ld_client.site_drift import visit_table
from ld_common.adapters.state_dict import state_digest
from ld_common.core.errors import AdapterError, PolicyError, PrivacyError
from ld_common.core.state import State
from ld_common.diffusion.longitudinal_sums import VisitTable, feature_columns
from ld_common.diffusion.private_longitudinal import mean_vectors, noise_deviations, regression_vectors, site_means
from ld_common.diffusion.public_basis import PublicBasis, public_state
from ld_common.imaging.modality import Modality
from ld_common.protocol.dp_accounting import Charge, DpConfig
from ld_common.protocol.study_config import StudyConfig

BASIS = "basis"


def read_basis(store: Store, modality: Modality, study: StudyConfig, state: State) -> PublicBasis:
    """The basis of a task, checked against the study's start and against the site's scans.

    Raises:
        AdapterError: it is not whole, or does not fit the site's latents or the modality.
        PolicyError: it is not the drift of the study's start.
    """
    basis = PublicBasis.from_state(state)
    public = basis.public
    shape = [int(size) for size in public.latent_shape]
    numeric = [bool(number) for number in public.numeric]
    columns = list(modality.numeric_columns)
    if shape != list(store.latents.shape[1:]) or numeric != columns or basis.features != len(feature_columns(columns)):
        raise AdapterError("the public basis of the longitudinal drift is of other latents or of another modality")
    if state_digest(public_state(state)) != study.start_drift_digest:
        raise PolicyError("the task's basis is not the drift of the study's start (start_drift_digest): refused")
    return basis


def longitudinal_release(
    store: Store, modality: Modality, study: StudyConfig, state: State, charge: Charge
) -> NoisedRelease:
    """The site's noised vector, for the ledger to charge unless it holds it; raises as `read_basis`."""
    basis = read_basis(store, modality, study, state)

    def make() -> bytes:
        vector = noised_vector(visit_table(modality, store), basis, study.privacy)
        return save({TENSOR: vector, BASIS: _basis_mark(state)})

    return NoisedRelease(drift_key(store, study), charge, make)


def paid_longitudinal(site: SiteConfig, store: Store, study: StudyConfig, state: State) -> Tensor:
    """The noised vector as it travels, float64.

    Raises:
        PrivacyError: none was charged.
        PolicyError: it was computed in another basis than the task's.
    """
    kept = Ledger(site.ledger_path).noised_release(drift_key(store, study))
    if kept is None:
        raise PrivacyError(f"the drift of study '{study.name}' was not charged on this store: it may not leave")
    tensors = load(kept)
    if not torch.equal(tensors[BASIS], _basis_mark(state)):
        raise PolicyError(
            f"the task's basis is another one than in the first round of study '{study.name}' here: refused"
        )
    return tensors[TENSOR]


def noised_vector(table: VisitTable, basis: PublicBasis, privacy: DpConfig) -> Tensor:
    """The site's noised sums, `(basis.size,)` float64; neighbouring tables differ by one patient with all visits.

    The means come first, because the regressions are centred on them: as noised, so that the regressions of the
    others do not depend on a patient.
    """
    norm = privacy.drift_clip_norm
    deviations = noise_deviations(privacy.drift_noise_multiplier, norm)
    means = _noised(clipped_sum(mean_vectors(table, basis), norm), deviations[0])
    centre = site_means(basis.split(torch.cat([means, torch.zeros(basis.size - len(means)).double()]))[0])
    regressions = _noised(clipped_sum(regression_vectors(table, basis, centre), norm), deviations[1])
    return torch.cat([means, regressions])


def clipped_sum(vectors: Tensor, norm: float) -> Tensor:
    """The sum of patients' vectors `(P,V)`, each scaled down to at most `norm`; one that is not finite counts as 0."""
    lengths = vectors.norm(dim=1)
    vectors = torch.where(lengths.isfinite()[:, None], vectors, 0.0)
    factors = (norm / lengths.nan_to_num(0.0, 0.0).clamp_min(1e-12)).clamp_max(1.0)
    return (factors[:, None] * vectors).sum(0)


def _noised(total: Tensor, deviation: float) -> Tensor:
    return total + deviation * secret_normal(total.shape)


def _basis_mark(state: State) -> Tensor:
    """SHA-256 of a basis as a tensor."""
    return torch.frombuffer(bytearray(hashlib.sha256(state_digest(state).encode()).digest()), dtype=torch.uint8)
