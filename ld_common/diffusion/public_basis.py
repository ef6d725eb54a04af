"""The basis of a private longitudinal drift, which public patients give: directions, scales and what they predict.

A private study starts from a release with a longitudinal drift. Sites correct it along V, a few directions of change
`(M,D)`, by vectors of `private_longitudinal`. Each of a vector's blocks is divided by its norm for a typical patient,
which the public drift tells, so that one clip norm serves for all of a patient's numbers. A symmetric matrix is its
upper triangle with √2 off the diagonal: the norm of the vector is that of the matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ld_common.core.errors import AdapterError, ReleaseError
from ld_common.core.state import State
from ld_common.diffusion.longitudinal import LongitudinalDrift
from ld_common.diffusion.longitudinal_sums import flat_size, unflatten

PARTS, CHANGES = 24, 48
"""Most parts of a scan that are read, and most directions of change: more of them need more patients."""
TYPICAL_YEARS = 2.0
"""Between two visits, for `scales` only."""
TYPICAL_NORM = 4.0
"""Norm of a typical patient's `x rᵀ` after scaling: the default of `privacy.drift_clip_norm`."""
LEAST_SINGULAR = 1e-4
"""Of a direction of change, as a share of the largest."""
CHANGE_NAME = "changes"


@dataclass(frozen=True, eq=False)
class PublicBasis:
    """The drift of public patients, and the directions along which a private study corrects it."""

    public: LongitudinalDrift
    changes: Tensor
    """V, `(M,D)` float64 with orthonormal rows."""

    @classmethod
    def of(cls, public: LongitudinalDrift) -> PublicBasis:
        """V: the directions of the predicted changes, then those in which the public patients differ."""
        predicted = torch.cat([public.yearly.double(), public.effect.double() / 10])
        _, sizes, rows = torch.linalg.svd(predicted, full_matrices=False)
        rows = rows[sizes > LEAST_SINGULAR * sizes[0]]
        parts = public.directions.double()
        units = parts / parts.norm(dim=1, keepdim=True)
        beyond = (units - units @ rows.T @ rows) * public_deviations(public)[:, None]
        _, sizes, more = torch.linalg.svd(beyond, full_matrices=False)
        more = more[sizes > LEAST_SINGULAR * public_deviations(public).max()]
        return cls(public, torch.cat([rows, more])[:CHANGES].contiguous())

    def state(self) -> State:
        """As a message carries it."""
        return {**self.public.state(), CHANGE_NAME: self.changes}

    @classmethod
    def from_state(cls, state: State) -> PublicBasis:
        """Undo `state`; raises `AdapterError` for tensors that are not a basis."""
        try:
            public = LongitudinalDrift.from_state(public_state(state))
            changes = state[CHANGE_NAME].double()
        except (ReleaseError, KeyError, TypeError, ValueError, IndexError) as error:
            raise AdapterError("the public basis of the longitudinal drift is not whole: refused") from error
        fits = changes.dim() == 2 and 1 <= len(changes) <= CHANGES and changes.shape[1] == len(public.mean)
        if not fits or not bool(changes.isfinite().all()):
            raise AdapterError("the public basis of the longitudinal drift has directions of another size: refused")
        if float((changes @ changes.T - torch.eye(len(changes)).double()).abs().max()) > 1e-6:
            raise AdapterError("the public basis of the longitudinal drift has directions that are not orthonormal")
        return cls(public, changes)

    @property
    def parts(self) -> int:
        """Number K of parts that are read."""
        return min(PARTS, len(self.public.directions))

    @property
    def features(self) -> int:
        """Number F of features."""
        return len(self.public.effect)

    @property
    def row(self) -> int:
        """Length of x."""
        return 1 + self.features + self.parts

    @property
    def scales(self) -> dict[str, float]:
        """What each block is multiplied by."""
        half, third = TYPICAL_NORM / 2, TYPICAL_NORM / 3**0.5
        squares = TYPICAL_YEARS**2 * (2 + self.parts)
        missed = _spread(self.public.part_spread, self.public)
        changed = _spread(self.public.change_spread, self.public)
        return {
            "patients": third,
            "features": third,
            "missed": third / missed,
            "time_features": half / squares,
            "time_changes": TYPICAL_NORM / (squares**0.5 * changed),
            "across_features": half,
            "across_missed": half / missed,
        }

    @property
    def means_layout(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the means."""
        return {"patients": (1,), "features": (self.features,), "missed": (len(self.changes),)}

    @property
    def regressions_layout(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the regressions."""
        return {
            "time_features": (_triangle_size(self.row),),
            "time_changes": (self.row, len(self.changes)),
            "across_features": (_triangle_size(self.features),),
            "across_missed": (self.features, len(self.changes)),
        }

    @property
    def size(self) -> int:
        """How many numbers a site sends."""
        return flat_size(self.means_layout) + flat_size(self.regressions_layout)

    def split(self, vector: Tensor) -> tuple[State, State]:
        """Means and regressions of a vector that sites sent or of a sum of such, with the scales undone."""
        means, regressions = vector.split([flat_size(self.means_layout), flat_size(self.regressions_layout)])
        return (
            self._unscaled(unflatten(means, self.means_layout)),
            self._unscaled(unflatten(regressions, self.regressions_layout)),
        )

    def scaled(self, blocks: Mapping[str, Tensor]) -> Tensor:
        """Patients' blocks as vectors of the layout's order, `(P, ...)`."""
        scales = self.scales
        return torch.cat([(scales[name] * value).flatten(1) for name, value in blocks.items()], 1)

    def _unscaled(self, state: State) -> State:
        return {name: value / self.scales[name] for name, value in state.items()}


def public_state(state: State) -> State:
    """The public drift's tensors among those of a basis."""
    return {name: value for name, value in state.items() if name != CHANGE_NAME}


def public_deviations(public: LongitudinalDrift) -> Tensor:
    """Standard deviation of latents along each of a drift's directions, `(K,)`."""
    return 1 / public.directions.double().norm(dim=1)


def triangle(matrices: Tensor) -> Tensor:
    """Symmetric matrices `(P,n,n)` as vectors of the same norm `(P,n(n+1)/2)`."""
    rows, columns = torch.triu_indices(matrices.shape[1], matrices.shape[1])
    return matrices[:, rows, columns] * torch.where(rows == columns, 1.0, 2**0.5).double()


def symmetric(vector: Tensor, size: int) -> Tensor:
    """Undo `triangle` for one matrix `(size,size)`."""
    rows, columns = torch.triu_indices(size, size)
    matrix = torch.zeros(size, size).double()
    matrix[rows, columns] = vector / torch.where(rows == columns, 1.0, 2**0.5).double()
    return matrix + matrix.triu(1).T


def _spread(covariance: Tensor, public: LongitudinalDrift) -> float:
    """Root of the energy in latents of a covariance of parts `(K,K)`."""
    energy = covariance.double().diagonal().clamp_min(0) @ public_deviations(public).square()
    return float(energy.sqrt().clamp(1e-3, 1e3))


def _triangle_size(size: int) -> int:
    return size * (size + 1) // 2
