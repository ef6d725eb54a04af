"""What was measured of a deployed study, as flat JSON and a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ld_common.core.atomic_files import write_bytes

NUMBERS, PAGE = "deployment.json", "deployment.md"


def write_report(output: Path, results: Path) -> list[Path]:
    """Write the parts that are there; returns the files."""
    parts = {part: _read(output / f"{part}.json") for part in ("soak", "intruders", "resume", "overhead")}
    numbers = _numbers(parts)
    write_bytes(results / NUMBERS, (json.dumps(numbers, indent=1) + "\n").encode())
    write_bytes(results / PAGE, ("\n".join(_page(parts, numbers)) + "\n").encode())
    return [results / NUMBERS, results / PAGE]


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def _numbers(parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    numbers: dict[str, Any] = {}
    if soak := parts["soak"]:
        numbers |= {
            "kills": sum(soak["kills"].values()),
            "rounds": soak["rounds"],
            "rounds_lost": soak["rounds_lost"],
            "ledger_under_counts": soak["ledger_under_counts"],
            "times_resumed": soak["resumed"],
            "recovered_after_last_kill": soak["recovered"],
            "updates_counted": soak["used_updates"],
            "rounds_in_ledgers": soak["charges"],
            "soak_seconds": soak["seconds"],
        }
    if intruders := parts["intruders"]:
        attempts = intruders["attempts"]
        numbers |= {
            "unauthorised_attempts": len(attempts),
            "unauthorised_accepted": sum(not held for held in attempts.values()),
        }
    if resume := parts["resume"]:
        numbers["resumed_identical"] = resume["identical"]
    if parts["overhead"]:
        numbers |= parts["overhead"]
    return numbers


def _page(parts: dict[str, dict[str, Any]], numbers: dict[str, Any]) -> list[str]:
    lines = [
        "# A deployed study, killed, resumed and broken into",
        "",
        "`make soak` wrote this page: one server and "
        "three hospitals as real processes on one machine, TLS and keys as in a deployment, loopback instead of a "
        "network.",
        "",
        "| | measured | aim | |",
        "|---|---|---|---|",
    ]
    rows = (
        ("kills", "processes killed (SIGKILL)", ">= 30", lambda value: value >= 30),
        ("rounds_lost", "rounds lost beyond the one under way, or counted twice", "0", lambda value: value == 0),
        ("ledger_under_counts", "answers that counted and are in no ledger", "0", lambda value: value == 0),
        ("recovered_after_last_kill", "one more round after the last kill", "yes", bool),
        ("resumed_identical", "resumed adapter against unbroken: the same bytes", "yes", bool),
        ("unauthorised_attempts", "unauthorised attempts", "all kinds", bool),
        ("unauthorised_accepted", "of them accepted", "0", lambda value: value == 0),
    )
    for key, words, aim, held in rows:
        if key in numbers:
            lines.append(
                f"| {words} | {_shown(numbers[key])} | {aim} | {'held' if held(numbers[key]) else '**missed**'} |"
            )
    for part, write in (("soak", _soak), ("intruders", _intruders), ("resume", _resume), ("overhead", _overhead)):
        if parts[part]:
            lines += ["", *write(parts[part])]
    return lines


def _shown(value: object) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _soak(soak: dict[str, Any]) -> list[str]:
    killed = ", ".join(f"{count} x {what}" for what, count in soak["kills"].items())
    return [
        "## The soak",
        "",
        f"{soak['seconds'] / 60:.1f} minutes of a study under differential privacy at {soak['sites']} sites, three "
        "steps a "
        f"round. Every few seconds something was killed: {killed} (`sites` are two at once; a killed server, site or "
        "run "
        "leaves what it started as orphans, which whoever starts it again must end). What ended was started again, as "
        f"systemd would, and the study gone on with {soak['resumed']} times by `ld-server run --resume`. "
        f"{soak['rounds']} "
        f"rounds ended; {soak['used_updates']} answers counted in them; the sites' ledgers hold {soak['charges']} "
        "rounds: "
        "those that were killed half-way were paid for and came to nothing.",
    ]


def _intruders(intruders: dict[str, Any]) -> list[str]:
    rows = [f"| {name} | {'refused' if held else '**got in**'} |" for name, held in intruders["attempts"].items()]
    return ["## Who tried to get in", "", "| attempt | |", "|---|---|", *rows]


def _resume(resume: dict[str, Any]) -> list[str]:
    return [
        "## Resumed against unbroken",
        "",
        f"{resume['rounds']} rounds without differential privacy (its noise comes from the operating system and no "
        "two runs "
        f"are alike): once unbroken, once with SuperLink, ServerApp and `ld-server run` killed after round "
        f"{resume['killed_after_round']} and gone on with. The adapters are "
        f"{'the same bytes' if resume['identical'] else '**not the same**'}.",
    ]


def _overhead(overhead: dict[str, Any]) -> list[str]:
    ratio = overhead["round_seconds"] / overhead["bare_seconds"]
    return [
        "## What a deployed round costs",
        "",
        f"Ten steps at each of three sites on one machine: the bare training loops one after the other take "
        f"{overhead['bare_seconds']:.1f} s, the deployed round {overhead['round_seconds']:.1f} s, {ratio:.1f} times "
        "as long. "
        f"Of it {overhead['slowest_site_task_seconds']:.1f} s are the slowest site's task by its own clock (loading "
        "base, "
        f"store and adapter, training, all three sites at once on these processors) and "
        f"{overhead['outside_tasks_seconds']:.1f} s are outside: Flower starts a process for each task, whose "
        "imports take "
        f"{overhead['process_start_seconds']:.1f} s when it is alone, and polls every one to three seconds. It is a "
        "price a "
        "round, not a price a step.",
    ]
