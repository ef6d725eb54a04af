"""The soak's bookkeeping sees what is lost, and the page says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest

from ld_server.checkpoint import Checkpoint
from ld_simulations.benchmarks.deployment.report import write_report
from ld_simulations.benchmarks.deployment.soak import Soak
from ld_simulations.benchmarks.deployment.stage import Deployment
from ld_simulations.benchmarks.harness import ResultStore

RESULTS = Path(__file__).parents[2] / "docs" / "benchmarks" / "deployment.json"


def checkpoint(number: int, rounds: list[int]) -> Checkpoint:
    return Checkpoint("s", "b", "m", number, {}, [{"round": row, "sites": {}, "counted": True} for row in rounds])


@pytest.mark.parametrize(
    ("seen", "lost"),
    [
        ([checkpoint(1, [1]), checkpoint(2, [1, 2]), checkpoint(2, [1, 2])], 0),
        ([checkpoint(2, [1, 2]), checkpoint(1, [1])], 1),
        ([checkpoint(3, [1, 2, 3]), checkpoint(1, [1])], 2),
        ([checkpoint(2, [1, 1, 2])], 1),
        ([checkpoint(3, [1, 3])], 1),
        ([checkpoint(1, [1, 2])], 1),
    ],
)
def test_a_round_that_is_gone_doubled_or_missing_is_counted(seen: list[Checkpoint], lost: int) -> None:
    lines: list[str] = []
    soak = Soak(cast(Deployment, None), 0, lines.append)
    for found in seen:
        soak._compare(found)
    assert soak.seen.rounds_lost == lost
    assert any(line.startswith("LOST") for line in lines) == bool(lost)


def parts(**changed: Any) -> dict[str, dict[str, Any]]:
    soak = {"kills": {"server": 20, "site": 12}, "rounds": 9, "rounds_lost": 0, "ledger_under_counts": 0, "resumed": 5}
    soak |= {"recovered": True, "used_updates": 25, "charges": 33, "seconds": 600.0, "sites": 3}
    return {"soak": soak | changed, "intruders": {"attempts": {"a": True, "b": changed.get("held", True)}}}


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        ({}, 0),
        ({"rounds_lost": 1}, 1),
        ({"ledger_under_counts": 2}, 1),
        ({"held": False}, 1),
        ({"recovered": False}, 1),
    ],
)
def test_the_page_says_what_was_missed(changed: dict[str, Any], missed: int, tmp_path: Path) -> None:
    numbers, page = write_report(ResultStore(tmp_path, parts(**changed)), tmp_path)
    text = page.read_text()
    assert text.count("**missed**") == missed
    assert ("**accepted**" in text) == ("held" in changed)
    found = json.loads(numbers.read_text())
    assert (found["kills"], found["unauthorised_attempts"]) == (32, 2)
    assert found["unauthorised_accepted"] == ("held" in changed)
    assert "resumed_identical" not in found  # that part has not run


def test_the_published_numbers_are_those_of_the_page() -> None:
    numbers, page = json.loads(RESULTS.read_text()), RESULTS.with_suffix(".md").read_text()
    for key in ("kills", "rounds_lost", "ledger_under_counts", "unauthorised_attempts", "unauthorised_accepted"):
        assert f"| {numbers[key]} |" in page
    assert isinstance(numbers["resumed_identical"], bool)
