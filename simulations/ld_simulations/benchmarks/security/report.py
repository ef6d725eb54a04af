"""The page of the security benchmark, and its flat numbers."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from ld_common.core.atomic_files import write_bytes
from ld_simulations.aims import Aim, aims_table
from ld_simulations.benchmarks.harness import ResultStore, json_bytes
from ld_simulations.benchmarks.security.fuzz import FAILURES, batches, totals
from ld_simulations.benchmarks.security.plan import SecurityConfig

NUMBERS, PAGE = "security.json", "security.md"
GAP = "best_reconstruction_gap_db"
"""A number of the privacy benchmark."""
AIMS = {
    "attempts": Aim(">= 150", at_least=150),
    "accepted": Aim("0", at_most=0),
    "files_fuzzed": Aim(">= 20,000", at_least=20_000),
    "crashes": Aim("0", at_most=0),
    "hangs_over_10s": Aim("0", at_most=0),
    "memory_over_1gib": Aim("0", at_most=0),
    GAP: Aim("<= 1 dB", at_most=1.0),
}


def write_report(store: ResultStore, config: SecurityConfig) -> list[Path]:
    """Write the page of what has a result; returns the files."""
    folder = Path(config.results)
    fuzz = store.collect(batch.name for batch in batches(config))
    attempts = store.read("attempts")
    numbers: dict[str, Any] = {} if attempts is None else _attempt_numbers(attempts)
    numbers |= totals(list(fuzz.values())) if fuzz else {}
    gap = _reconstruction_gap(folder)
    numbers |= {} if gap is None else {GAP: gap}
    write_bytes(folder / NUMBERS, json_bytes(numbers | {"fuzz": _by_kind(fuzz), "attempted": attempts}))
    write_bytes(folder / PAGE, ("\n".join(_page(numbers, fuzz, attempts)) + "\n").encode())
    return [folder / NUMBERS, folder / PAGE]


def _attempt_numbers(attempts: dict[str, Any]) -> dict[str, int]:
    return {"attempts": sum(attempts["by_module"].values()), "accepted": len(attempts["accepted"])}


def _reconstruction_gap(folder: Path) -> float | None:
    file = folder / "privacy.json"
    gap = json.loads(file.read_text(encoding="utf-8")).get(GAP) if file.exists() else None
    return None if gap is None else float(gap)


def _by_kind(fuzz: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Files, outcomes, slowest and largest of each kind."""
    kinds: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for name, result in fuzz.items():
        kinds[name.removeprefix("fuzz/").rpartition("-")[0]].append(result)
    return {
        kind: {
            "files": sum(result["files"] for result in results),
            **{
                outcome: sum(result["outcomes"].get(outcome, 0) for result in results)
                for outcome in ("read", "refused", "failed")
            },
            "slowest_seconds": max(result["slowest_seconds"] for result in results),
            "largest_mib": max(result["largest_mib"] for result in results),
        }
        for kind, results in kinds.items()
    }


def _page(numbers: dict[str, Any], fuzz: dict[str, Any], attempts: dict[str, Any] | None) -> list[str]:
    lines = [
        "# Attempts of an attacker, and hostile files",
        "",
        "Written by `make benchmark-security` (`ld-benchmark security`), in some minutes on two cores.",
        "",
        aims_table(numbers, {key: aim for key, aim in AIMS.items() if key in numbers}),
    ]
    if fuzz:
        lines += _fuzz_section(fuzz)
    if attempts is not None:
        lines += _attempts_section(attempts)
    return lines


def _fuzz_section(fuzz: dict[str, Any]) -> list[str]:
    rows = [
        f"| {kind} | {row['files']:,} | {row['read']:,} | {row['refused']:,} | {row['failed']} | "
        f"{row['slowest_seconds']:.2f} | {row['largest_mib']:,.0f} |"
        for kind, row in _by_kind(fuzz).items()
    ]
    failures = [failure for result in fuzz.values() for failure in result["failures"]]
    lines = [
        "## Files",
        "",
        "Whole files of each kind are damaged at random (flipped bits, cuts, lengths, repeated, removed and spliced "
        "parts, words that parsers dislike; also inside gzip, ZIP and PNG chunks) and given to the product's own "
        "reader of that kind; those of `hostile` are built to hurt. Each must be read or refused by an error of the "
        "product, in 10 s of processor time and 1 GiB of memory (resident, beyond the reader's own). The readers of "
        "images run here without the child process that protects commands, so a crash would count. A damaged file "
        "that is read is no failure: many bytes carry no meaning.",
        "",
        "| kind | files | read | refused | failed | slowest, s | most memory, MiB |",
        "|---|---|---|---|---|---|---|",
        *rows,
        "",
    ]
    if failures:
        lines += [f"Failed (kept in `{FAILURES}/` of the output, or made again from the seed):", ""]
        lines += [
            f"- {failure['kind']} {failure['number']}, `{failure['file']}`: {failure['outcome']}"
            for failure in failures[:50]
        ]
        lines.append("")
    return lines


def _attempts_section(attempts: dict[str, Any]) -> list[str]:
    rows = [f"| `{module}` | {count} |" for module, count in attempts["by_module"].items()]
    lines = [
        "## Attempts",
        "",
        "Tests that are an attacker's attempt (`pytest -m attack`); each passes only if the attempt is refused or "
        "gains nothing. A test with several parameters counts once for each.",
        "",
        "| tests | attempts |",
        "|---|---|",
        *rows,
        "",
    ]
    for title, names in (("Accepted", attempts["accepted"]), ("Skipped here, not counted", attempts["skipped"])):
        if names:
            lines += [f"{title}:", "", *[f"- {name}" for name in names], ""]
    return lines[:-1]
