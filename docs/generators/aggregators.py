"""The table of what goes with which aggregator, from the aggregators themselves and from the check of a study."""

from __future__ import annotations

from generators import table
from ld_common.core.config import from_mapping
from ld_common.core.errors import ConfigError
from ld_common.protocol.study_config import StudyConfig
from ld_server.aggregation import AGGREGATORS, check_aggregation

SITES = ["a", "b", "c"]
PRIVATE = {"privacy": {"enabled": True}, "drift": {"shape": "none"}}
UP = {"ffa": "half", "rolora": "half", "fedsa": "half"}
DOWN = {"ffa": "half", "fedex": "grows", "flora": "grows"}
EXACT = {"ffa": "yes", "rolora": "yes", "flexlora": "up to its rank", "fedex": "yes", "flora": "yes"}
EXACT |= {"fedsa": "of A, sites differ"}
HEADER = [
    "aggregator",
    "exact for LoRA",
    "bytes up",
    "down",
    "secure sums",
    "private",
    "ranks by site",
    "other adapters",
]


def aggregation_table() -> str:
    """One row an aggregator of ours."""
    rows = [
        [
            f"`{name}`",
            EXACT.get(name, "no"),
            UP.get(name, "1"),
            DOWN.get(name, "1"),
            _answer(name, federation={"secure_aggregation": True}),
            _private(name),
            _answer(name, federation={"ranks": {"a": 2}}),
            _answer(name, adapter={"name": "full"}),
        ]
        for name in AGGREGATORS
    ]
    return table(HEADER, rows)


def _private(name: str) -> str:
    if _answer(name, **PRIVATE) == "yes":
        return "yes"
    both = _answer(name, adapter={"name": "lora", "freeze_a": False}, **PRIVATE)
    return "with `freeze_a: false`" if both == "yes" else "no"


def _answer(name: str, **changes: dict[str, object]) -> str:
    """Whether a study with these sections passes the check."""
    federation = {"sites": SITES, "min_train_nodes": 3, "aggregation": {"name": name}, **changes.pop("federation", {})}
    sections = {"adapter": {"name": "lora", "rank": 4}, **changes, "federation": federation}
    try:
        check_aggregation(from_mapping(StudyConfig, sections))
    except ConfigError:
        return "no"
    return "yes"
