"""Sites of a secure aggregation in one process: what several test files drive."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import ConfigRecord
from numpy.typing import NDArray

from ld_client.privacy.secagg import SiteState, answer_stage, begun, mask_update, open_shares
from ld_common.protocol.secagg.messages import (
    Payload,
    RoutedShares,
    SecaggSetting,
    Stage,
    UnmaskRequest,
    default_threshold,
    pack,
    unpack,
)
from ld_server.secagg import SecureAggregation, SecureSum

Vector = NDArray[np.float64]
Tamper = Callable[[Stage, str, Payload], Payload]


@dataclass
class Sites:
    """Sites that keep their state as bytes, and are silent from the stage at which they drop out."""

    setting: SecaggSetting
    updates: dict[str, Vector]
    silent: dict[str, Stage] = field(default_factory=dict)
    tamper: Tamper = lambda stage, site, answer: answer
    states: dict[str, bytes] = field(default_factory=dict)
    requests: dict[Stage, dict[str, Payload]] = field(default_factory=dict)
    answers: dict[Stage, dict[str, Payload]] = field(default_factory=dict)

    def exchange(self, stage: Stage, requests: dict[str, Payload]) -> Mapping[str, Mapping[str, object]]:
        stages = list(Stage)
        self.requests[stage] = requests
        self.answers[stage] = {}
        for site, request in requests.items():
            if site in self.silent and stages.index(self.silent[site]) <= stages.index(stage):
                continue
            delivered = dict(ConfigRecord(request))
            answer = pack(self.answer(stage, site, delivered))
            self.answers[stage][site] = self.tamper(stage, site, dict(ConfigRecord(answer)))
        return self.answers[stage]

    def answer(self, stage: Stage, site: str, request: Mapping[str, object]) -> Any:
        answer: Any
        state = SiteState.from_bytes(self.states[site]) if site in self.states else None
        if stage is Stage.VECTOR:
            opened = open_shares(begun(state), unpack(RoutedShares, request), self.setting.study, self.setting.round)
            state, answer, _ = mask_update(SiteState.from_bytes(opened.to_bytes()), self.updates[site])
        else:
            state, answer = answer_stage(stage, site, request, state)
        self.states[site] = state.to_bytes()
        return answer

    def run(self) -> SecureSum:
        server = SecureAggregation(self.setting, list(self.updates))
        requests = server.agree(self.exchange)
        server.collect(self.exchange(Stage.VECTOR, requests))
        return server.unmask(self.exchange)


def make_sites(count: int, length: int = 5, seed: int = 0, threshold: int | None = None) -> Sites:
    setting = SecaggSetting("study", 3, count, threshold or default_threshold(count), length, clip=1.0)
    generator = np.random.default_rng(seed)
    return Sites(setting, {f"s{place:02}": generator.uniform(-1, 1, length) for place in range(count)})


def check_sum(result: SecureSum, sites: Sites, expected: list[str]) -> None:
    assert result.sites == expected
    plain = np.sum([sites.updates[site] for site in expected], axis=0)
    bound = len(expected) * sites.setting.step / 2
    assert np.abs(result.vector - plain).max() <= bound * (1 + 1e-6)


def numbers(answer: Payload) -> NDArray[np.uint32]:
    return np.frombuffer(answer["vector"], "<u4")


def masked_sites(count: int = 5) -> tuple[Sites, SiteState, UnmaskRequest]:
    """Sites of which all sent their vectors; the first one's state, and the request that it is due."""
    sites = make_sites(count)
    server = SecureAggregation(sites.setting, list(sites.updates))
    server.collect(sites.exchange(Stage.VECTOR, server.agree(sites.exchange)))
    state = SiteState.from_bytes(sites.states["s00"])
    return sites, state, UnmaskRequest(state.session, sorted(sites.updates), [])
