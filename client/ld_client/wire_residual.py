"""What rounding took from a site's updates (`federation.wire`), kept at the site for its next round.

It is made of the update that leaves and of the one that was trained, so it is as confidential as an update. Under
differential privacy both are noised, and using it again is post-processing: it costs no ε.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save

from ld_common.adapters.state_dict import check_state, read_tensors
from ld_common.core.atomic_files import write_bytes
from ld_common.core.errors import AdapterError
from ld_common.core.state import State, Tensors

KEPT_ROUNDS = 4
"""Rounds of a study whose residuals stay: a server that continues after an older checkpoint repeats rounds."""


class UpdateResiduals:
    """A study's residuals, one file a round: a round that is repeated finds what it found the first time."""

    def __init__(self, folder: Path, study_digest: str) -> None:
        self._folder = folder / study_digest

    def before(self, round_number: int, expected: Tensors) -> State:
        """What the last round before this one left; empty where there was none.

        Raises:
            AdapterError: the file is damaged, or of other tensors than `expected`.
        """
        earlier = [number for number in self._rounds() if number < round_number]
        if not earlier:
            return {}
        file = self._file(earlier[-1])
        try:
            residual, _ = read_tensors(file)
            check_state(residual, expected)
        except AdapterError as error:
            raise AdapterError(
                f"'{file}' is damaged ({error}): delete it, and rounding errors are lost once"
            ) from error
        return residual

    def write(self, round_number: int, residual: State) -> None:
        """Keep what a round left, and delete what the oldest ones did; raises `CheckpointError`."""
        write_bytes(self._file(round_number), save(residual), 0o600)
        for number in [number for number in self._rounds() if number <= round_number][:-KEPT_ROUNDS]:
            self._file(number).unlink(missing_ok=True)

    def _rounds(self) -> list[int]:
        return sorted(int(file.stem) for file in self._folder.glob("*.safetensors") if file.stem.isdecimal())

    def _file(self, round_number: int) -> Path:
        return self._folder / f"{round_number}.safetensors"
