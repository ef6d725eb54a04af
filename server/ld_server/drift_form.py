"""What a site's drift must look like in one round."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ld_common.core.errors import AdapterError


@dataclass(frozen=True)
class DriftForm:
    """Shape, type and range of a drift."""

    shape: torch.Size
    dtype: torch.dtype
    largest: float

    def check(self, drift: Tensor | None) -> None:
        """Raise `AdapterError` unless a drift has this form and is finite."""
        shape = None if drift is None else tuple(drift.shape)
        if drift is None or drift.shape != self.shape:
            raise AdapterError(f"its drift has shape {shape}, not {tuple(self.shape)}")
        if drift.dtype != self.dtype:
            raise AdapterError(f"its drift is {drift.dtype}, not {str(self.dtype).removeprefix('torch.')}")
        if not bool(torch.isfinite(drift).all()):
            raise AdapterError("its drift holds NaN or infinite values")
        if float(drift.abs().max()) > self.largest:
            raise AdapterError(f"its drift reaches {float(drift.abs().max()):.3g}, more than {self.largest:g}")
