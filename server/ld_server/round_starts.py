"""What each site of a round starts from, and what it is expected to send: its own rank, and the factors that train."""

from __future__ import annotations

from ld_common.adapters.low_rank import cut_rank
from ld_common.core.state import State
from ld_common.protocol.study_config import StudyConfig
from ld_server.stored_states import FlatReference


class RoundStarts:
    """The starts of a round; sites of the same rank share theirs."""

    def __init__(self, study: StudyConfig, state: State, round_number: int) -> None:
        """Start with the adapter's trainable part, of the study's own rank."""
        self._study, self._round = study, round_number
        self._ranks = study.federation.ranks
        self._starts: dict[int | None, State] = {None: state}
        self._expected: dict[int | None, State] = {}
        self._flat: dict[int | None, FlatReference] = {}

    def state(self, site: str) -> State:
        """The trainable tensors that a site gets."""
        rank = self._ranks.get(site)
        if rank not in self._starts:
            self._starts[rank] = cut_rank(self._starts[None], rank or 0)
        return self._starts[rank]

    def expected(self, site: str = "") -> State:
        """Those of them that it sends, as it gets them; without a site, of the study's own rank."""
        rank = self._ranks.get(site)
        if rank not in self._expected:
            start, study = self.state(site), self._study
            self._expected[rank] = {name: value for name, value in start.items() if study.sends(name, self._round)}
        return self._expected[rank]

    def flat(self, site: str = "") -> FlatReference:
        """`expected` as one vector; empty under secure aggregation, where no state comes."""
        rank = self._ranks.get(site)
        if rank not in self._flat:
            secure = self._study.federation.secure_aggregation
            self._flat[rank] = FlatReference({} if secure else self.expected(site))
        return self._flat[rank]
