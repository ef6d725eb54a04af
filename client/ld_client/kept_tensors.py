"""Tensors that a site keeps from round to round of a study, beside its ledger.

    residuals/<study digest>/<round>.safetensors   what rounding took from the site's update (`federation.wire`)
    own/<study digest>/<round>.safetensors         the factors that each site has its own of (aggregator `fedsa`)

Both are made of the site's scans and are as confidential as an update. Under differential privacy they come of noised
gradients, and using them again is post-processing: it costs no ε.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save

from ld_client.site_config import OWN_PARTS, RESIDUALS
from ld_common.adapters.state_dict import check_state, read_tensors
from ld_common.core.atomic_files import write_bytes
from ld_common.core.errors import AdapterError
from ld_common.core.state import State, Tensors

KEPT_ROUNDS = 4
"""Rounds of a study whose tensors stay: a server that continues after an older checkpoint repeats rounds."""
LOST = {
    RESIDUALS: "rounding errors are lost once",
    OWN_PARTS: "the site begins again with the factors that the study sends",
}
"""What it costs to delete a file."""


class KeptTensors:
    """One file a round: a round that is repeated finds what it found the first time."""

    def __init__(self, folder: Path, kind: str, study_digest: str, site: str = "") -> None:
        """Tensors of a study.

        Args:
            folder: the ledger's.
            kind: `RESIDUALS` or `OWN_PARTS`.
            study_digest: the study's.
            site: the site's name, which the files repeat.
        """
        self._kind, self._metadata = kind, {"kind": kind, "site": site, "study_digest": study_digest}
        self._folder = folder / kind / study_digest

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
            kept, _ = read_tensors(file)
            check_state(kept, expected)
        except AdapterError as error:
            raise AdapterError(f"'{file}' is damaged ({error}): delete it, and {LOST[self._kind]}") from error
        return kept

    def write(self, round_number: int, kept: State, most: int = KEPT_ROUNDS) -> None:
        """Keep what a round left, and delete what rounds did before the last `most`; raises `CheckpointError`."""
        content = save(kept, {**self._metadata, "round": str(round_number)})
        write_bytes(self._file(round_number), content, 0o600)
        for number in [number for number in self._rounds() if number <= round_number][:-most]:
            self._file(number).unlink(missing_ok=True)

    def _rounds(self) -> list[int]:
        return sorted(int(file.stem) for file in self._folder.glob("*.safetensors") if file.stem.isdecimal())

    def _file(self, round_number: int) -> Path:
        return self._folder / f"{round_number}.safetensors"
