"""Cost of secure aggregation against a plain average: seconds at server and site, and bytes, in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from ld_client.privacy.secagg import SiteState, answer_stage, mask_update, open_shares
from ld_common.protocol.secagg.messages import (
    Payload,
    RoutedShares,
    SecaggSetting,
    Stage,
    default_threshold,
    pack,
    unpack,
)
from ld_server.secagg import SecureAggregation

TURNS = 3


def measure_sum(sites: int, length: int) -> dict[str, Any]:
    """Medians over turns of a round without drop-outs, and its largest error against the plain mean."""
    turns = [_round(sites, length, turn) for turn in range(TURNS)]
    row: dict[str, Any] = {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
    return {"sites": sites, "numbers": length, **row}


def _round(count: int, length: int, seed: int) -> dict[str, float]:
    names, rng = [f"site{number}" for number in range(count)], np.random.default_rng(seed)
    updates = {name: rng.uniform(-1, 1, length) for name in names}
    setting = SecaggSetting("0" * 64, 1, count, default_threshold(count), length, 1.0)
    states: dict[str, SiteState] = {}
    spent, sent, received = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0), dict.fromkeys(names, 0)

    def exchange(stage: Stage, requests: dict[str, Payload]) -> dict[str, Mapping[str, object]]:
        answers: dict[str, Mapping[str, object]] = {}
        for name, request in requests.items():
            received[name] += _bytes(request)
            started = time.perf_counter()
            states[name], answer = _answer(stage, name, request, states, updates[name])
            spent[name] += time.perf_counter() - started
            answers[name] = pack(answer)
            sent[name] += _bytes(pack(answer))
        return answers

    server = SecureAggregation(setting, names)
    started = time.perf_counter()
    requests = server.agree(exchange)
    server.collect(exchange(Stage.VECTOR, requests))
    total = server.unmask(exchange)
    whole = time.perf_counter() - started
    started = time.perf_counter()
    plain = np.mean([updates[name] for name in names], axis=0)
    plain_seconds = time.perf_counter() - started
    return {
        "site_seconds": statistics.median(spent.values()),
        "server_seconds": whole - sum(spent.values()),
        "plain_server_seconds": plain_seconds,
        "uplink_bytes": statistics.median(sent.values()),
        "downlink_bytes": statistics.median(received.values()),
        "plain_uplink_bytes": 4 * length,
        "largest_error": float(np.abs(total.vector / count - plain).max()),
    }


def _answer(
    stage: Stage, name: str, request: Payload, states: dict[str, SiteState], update: np.ndarray
) -> tuple[SiteState, Any]:
    if stage is not Stage.VECTOR:
        return answer_stage(stage, name, request, states.get(name))
    opened = open_shares(states[name], unpack(RoutedShares, request), "0" * 64, 1)
    state, answer, _ = mask_update(opened, update)
    return state, answer


def _bytes(payload: Payload) -> int:
    """Bytes of a payload's values; names and framing are Flower's."""
    total = 0
    for value in payload.values():
        for item in value if isinstance(value, list) else [value]:
            total += len(item) if isinstance(item, str | bytes) else 8
    return total
