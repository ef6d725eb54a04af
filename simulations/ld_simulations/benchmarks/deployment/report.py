"""The page of the deployment benchmark, and its flat numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ld_common.core.atomic_files import write_bytes
from ld_simulations.benchmarks.deployment.plan import PART_RESULTS, PARTS
from ld_simulations.benchmarks.harness import ResultStore, json_bytes

NUMBERS, PAGE = "deployment.json", "deployment.md"
ROWS = (
    ("kills", "processes killed (SIGKILL)", ">= 30", lambda value: value >= 30),
    ("rounds_lost", "completed rounds that were lost or counted twice", "0", lambda value: value == 0),
    ("ledger_under_counts", "counted updates that are in no ledger", "0", lambda value: value == 0),
    ("recovered_after_last_kill", "a further round completed after the last kill", "yes", bool),
    ("resumed_identical", "resumed and unbroken adapter have the same bytes", "yes", bool),
    ("unauthorised_attempts", "unauthorised attempts", "all kinds", bool),
    ("unauthorised_accepted", "unauthorised attempts that were accepted", "0", lambda value: value == 0),
)


def write_report(store: ResultStore, folder: Path) -> list[Path]:
    """Write the page of the parts that have a result; returns the files."""
    parts = store.collect(PARTS)
    numbers = _numbers(parts)
    write_bytes(folder / NUMBERS, json_bytes(numbers | {PART_RESULTS: parts}))
    write_bytes(folder / PAGE, ("\n".join(_page(parts, numbers)) + "\n").encode())
    return [folder / NUMBERS, folder / PAGE]


def _numbers(parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    numbers: dict[str, Any] = {}
    if soak := parts.get("soak"):
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
    if intruders := parts.get("intruders"):
        attempts = intruders["attempts"]
        numbers |= {
            "unauthorised_attempts": len(attempts),
            "unauthorised_accepted": sum(not refused for refused in attempts.values()),
        }
    if resume := parts.get("resume"):
        numbers["resumed_identical"] = resume["identical"]
    return numbers | parts.get("overhead", {})


def _page(parts: dict[str, dict[str, Any]], numbers: dict[str, Any]) -> list[str]:
    lines = [
        "# A deployed study under kills, intruders and a resume",
        "",
        "Written by `make benchmark-deployment` (`ld-benchmark deployment`). One server and three hospitals run as "
        "real processes on one machine, with TLS and keys as in a deployment and loopback in place of a network. "
        "Each row is a measurement beside the value that it must have.",
        "",
        "| | measured | aim | |",
        "|---|---|---|---|",
    ]
    for key, text, aim, held in ROWS:
        if key in numbers:
            verdict = "held" if held(numbers[key]) else "**missed**"
            lines.append(f"| {text} | {_format(numbers[key])} | {aim} | {verdict} |")
    for part, section in (("soak", _soak), ("intruders", _intruders), ("resume", _resume), ("overhead", _overhead)):
        if part in parts:
            lines += ["", *section(parts[part])]
    return lines


def _format(value: object) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _soak(soak: dict[str, Any]) -> list[str]:
    kills = ", ".join(f"{count} x {process}" for process, count in soak["kills"].items())
    return [
        "## Soak",
        "",
        f"A study under differential privacy ran for {soak['seconds'] / 60:.1f} minutes at {soak['sites']} sites, "
        f"with three steps in each round. Every few seconds a process was killed: {kills} (`sites` are two at once). "
        "A killed server, site or run leaves its children as orphans; the next start ends them. Ended processes were "
        f"started again, as systemd would, and the study was resumed {soak['resumed']} times by `ld-server run "
        f"--resume`. {soak['rounds']} rounds completed with {soak['used_updates']} counted updates. The ledgers hold "
        f"{soak['charges']} rounds: rounds killed after their charge were paid for and produced nothing.",
    ]


def _intruders(intruders: dict[str, Any]) -> list[str]:
    rows = [
        f"| {name} | {'refused' if refused else '**accepted**'} |" for name, refused in intruders["attempts"].items()
    ]
    return ["## Intrusion attempts", "", "Every attempt must be refused.", "", "| attempt | |", "|---|---|", *rows]


def _resume(resume: dict[str, Any]) -> list[str]:
    identical = "have the same bytes" if resume["identical"] else "**differ**"
    return [
        "## Resumed against unbroken",
        "",
        f"{resume['rounds']} rounds without differential privacy (its noise comes from the operating system, so no "
        "two private runs are equal) ran twice: once unbroken, and once with SuperLink, ServerApp and `ld-server "
        f"run` killed after round {resume['killed_after_round']} and resumed. The adapters {identical}.",
    ]


def _overhead(overhead: dict[str, Any]) -> list[str]:
    ratio = overhead["round_seconds"] / overhead["bare_seconds"]
    return [
        "## Cost of a deployed round",
        "",
        "Ten steps at each of three sites on one machine: the bare training loops one after the other take "
        f"{overhead['bare_seconds']:.1f} s, the deployed round {overhead['round_seconds']:.1f} s, {ratio:.1f} times "
        f"as long. Of that, {overhead['slowest_site_task_seconds']:.1f} s are the slowest site's task by its own "
        "clock (loading base, store and adapter, and training, all three sites at once on these processors), and "
        f"{overhead['outside_tasks_seconds']:.1f} s are outside: Flower polls every one to three seconds, and each "
        "task is a process. Its imports, which take "
        f"{overhead['process_start_seconds']:.1f} s, are done once, in the process that tasks are forked from. This "
        "cost is per round, not per step.",
    ]
