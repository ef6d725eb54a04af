"""The page of the benchmark of reading scans, and its flat numbers."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from ld_common.core.atomic_files import write_bytes
from ld_evaluate.report import format_number
from ld_simulations.aims import Aim, aim_met
from ld_simulations.benchmarks.harness import PART_RESULTS, ResultStore, json_bytes
from ld_simulations.benchmarks.scans.formats import WRONG
from ld_simulations.benchmarks.scans.formats_page import PAGE as FORMATS
from ld_simulations.benchmarks.scans.formats_page import escaped, formats_page
from ld_simulations.benchmarks.scans.plan import PARTS

NUMBERS, PAGE = "scans.json", "scans.md"
MANY = 20_000
NO_AIM = "none"
PEAK = f"peak_rss_mb_{MANY}"
AGAIN = f"reindex_over_index_{MANY}"
SEARCHED = "index_with_text_search_over_bare_pydicom"
AIMS = {
    "cases_right": Aim("all"),
    "layouts_imported": Aim(">= 5", at_least=5),
    "formats_wrong": Aim("0", at_most=0),
    "index_over_bare_pydicom": Aim("<= 1.5", at_most=1.5),
    SEARCHED: Aim(NO_AIM),
    "reindex_over_index": Aim("<= 0.05", at_most=0.05),
    "reindex_one_new_over_index": Aim(NO_AIM),
    PEAK: Aim("<= 1,500", at_most=1500),
    f"{PEAK}_of_children": Aim(NO_AIM),
    "files_a_second": Aim(NO_AIM),
    AGAIN: Aim(NO_AIM),
    "pacs_roundtrip": Aim("yes", at_least=1),
}
MEANING = {
    "cases_right": "inputs that once came out wrong and are read right",
    "layouts_imported": "layouts of which every planted visit arrives",
    "formats_wrong": "formats that are read with wrong pixels, or neither read nor refused",
    "index_over_bare_pydicom": "time to read and join a tree, over a loop of pydicom",
    SEARCHED: "the same with the search for text burned into pixels",
    "reindex_over_index": "index of an unchanged tree, over the first one",
    "reindex_one_new_over_index": "index after one visit was added, over the first one",
    PEAK: f"peak memory of `ld-client index` on {MANY:,} files, MB",
    f"{PEAK}_of_children": "that of its child processes together, MB",
    "files_a_second": "files a second of the same command",
    AGAIN: "the same command again, nothing changed, over the first time",
    "pacs_roundtrip": "fetched from a PACS, indexed, and an answer sent back",
}


def write_report(store: ResultStore, folder: Path, reference: Path) -> list[Path]:
    """Write the pages of the parts that have a result; returns the files."""
    parts = store.collect(PARTS)
    numbers = flat_numbers(parts)
    files = {
        folder / NUMBERS: json_bytes(numbers | {PART_RESULTS: parts}),
        folder / PAGE: ("\n".join(_page(numbers, parts)) + "\n").encode(),
    }
    if "formats" in parts and "layouts" in parts:
        files[reference / FORMATS] = ("\n".join(formats_page(parts["formats"], parts["layouts"])) + "\n").encode()
    for file, content in files.items():
        write_bytes(file, content)
    return list(files)


def flat_numbers(parts: dict[str, Any]) -> dict[str, Any]:
    """Every number by its key; None for a part without a result."""
    cases, formats, layouts = parts.get("cases"), parts.get("formats"), parts.get("layouts")
    entries = None if formats is None else formats["entries"]
    reading, reindex = parts.get("reading", {}), parts.get("reindex", {})
    memory, pacs = parts.get("memory", {}), parts.get("pacs")
    many = memory if memory.get("files") == MANY else {}
    timed = reading or reindex or memory
    return {
        "cases_right": None if cases is None else sum(not problems for problems in cases.values()),
        "cases": None if cases is None else len(cases),
        "layouts_imported": None if layouts is None else sum(_arrived(trial) for trial in layouts.values()),
        "layouts": None if layouts is None else len(layouts),
        "formats_read": None if entries is None else sum(entry["read"] is True for entry in entries),
        "formats_refused": None if entries is None else sum(entry["read"] is False for entry in entries),
        "formats_wrong": None if entries is None else sum(entry["said"].startswith(WRONG) for entry in entries),
        "index_over_bare_pydicom": reading.get("reading_over_bare"),
        SEARCHED: reading.get("with_search_over_bare"),
        "reindex_over_index": reindex.get("reindex_over_index"),
        "reindex_one_new_over_index": reindex.get("reindex_one_new_over_index"),
        PEAK: many.get("peak_mb"),
        f"{PEAK}_of_children": many.get("children_peak_mb"),
        "files_a_second": memory.get("files_a_second"),
        AGAIN: round(many["seconds_again"] / many["seconds"], 4) if many else None,
        "pacs_roundtrip": None if pacs is None else not pacs["problems"],
        "repeats": reading.get("repeats"),
        "processor": timed.get("processor"),
        "threads": timed.get("threads"),
    }


def _arrived(trial: dict[str, Any]) -> bool:
    return not trial["problems"] and trial["visits"] == trial["planted"]


def _page(numbers: dict[str, Any], parts: dict[str, Any]) -> list[str]:
    lines = [
        "# Reading scans",
        "",
        "Written by `make benchmark-scans` (`ld-benchmark scans`). [Formats](../reference/formats.md), which the same "
        "command writes, lists what is read and the sentence for what is not.",
        "",
        *_aims(numbers),
        "",
    ]
    sections = (("cases", _cases), ("reading", _reading), ("reindex", _reindex), ("memory", _memory), ("pacs", _pacs))
    for part, section in sections:
        if part in parts:
            lines += [*section(parts[part]), ""]
    return lines[:-1]


def _aims(numbers: dict[str, Any]) -> list[str]:
    lines = ["| number | measured | aim | |", "|---|---|---|---|"]
    for key, aim in AIMS.items():
        value, bounds = numbers[key], {key: aim}
        if key == "cases_right" and value is not None:
            bounds = {key: Aim(f"{numbers['cases']}", at_least=numbers["cases"])}
        verdict = ""
        if value is not None and aim.text != NO_AIM:
            verdict = "met" if aim_met(key, numbers, bounds) else "**missed**"
        lines.append(f"| {MEANING[key]}<br>`{key}` | {_shown(value)} | {bounds[key].text} | {verdict} |")
    return lines


def _shown(value: float | bool | None) -> str:
    if value is None:
        return "not measured"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return format_number(value)


def _cases(cases: dict[str, list[str]]) -> list[str]:
    wrong = {name: problems for name, problems in cases.items() if problems}
    lines = [
        "## Inputs that once came out wrong",
        "",
        f"{len(cases)} small inputs as hospitals have them, made after public reports of faults. They are no part of "
        "the project. Each has one right behaviour: it is read, or refused for the true reason.",
    ]
    if wrong:
        lines += ["", *(f"- `{name}`: {escaped('; '.join(problems))}" for name, problems in wrong.items())]
    return lines


def _reading(reading: dict[str, Any]) -> list[str]:
    seconds = reading["seconds"]
    rows = (
        ("pydicom: `dcmread` and `pixel_array` of every file", "bare", "files"),
        ("headers, joining, pixels", "reading", "files"),
        ("pydicom, fewer files", "bare_of_part", "files_of_part"),
        ("headers, joining, pixels, search for text", "with_search", "files_of_part"),
    )
    return [
        "## Reading over a bare loop",
        "",
        f"{reading['files']:,} DICOM files of 64 × 64 pixels ({reading['visits']} visits) with the header of a real "
        "scanner, just written, so in the file cache. Each run is a process of its own and its imports are not timed; "
        "the start of the process that decodes is. Runs follow one another in turn, and the ratio is the median of "
        f"neighbours ({reading['repeats']} repeats, with search {reading['search_repeats']}). {_machine(reading)} The "
        "loop reads every image; the index reads every header and one slice of a visit, and searches it for text. "
        "The loop is one process; the index decodes in as many as there are processors.",
        "",
        "| | files | seconds, median | least | most |",
        "|---|---|---|---|---|",
        *(
            f"| {name} | {reading[files]:,} | {median(seconds[key]):.2f} | {min(seconds[key]):.2f} | "
            f"{max(seconds[key]):.2f} |"
            for name, key, files in rows
        ),
    ]


def _reindex(reindex: dict[str, Any]) -> list[str]:
    return [
        "## Index after index",
        "",
        f"{reindex['files']:,} files ({reindex['visits']} visits), with the search for text and encoding by the small "
        f"base, each index in a new process; the second one {reindex['repeats']} times, median. {_machine(reindex)}",
        "",
        "| | seconds | with the start of Python |",
        "|---|---|---|",
        f"| first index | {reindex['index_seconds']:.2f} | {reindex['index_command_seconds']:.2f} |",
        f"| again, nothing changed | {reindex['reindex_seconds']:.2f} | {reindex['reindex_command_seconds']:.2f} |",
        f"| again, one visit more | {reindex['reindex_one_new_seconds']:.2f} | |",
    ]


def _memory(memory: dict[str, Any]) -> list[str]:
    text = (
        f"`ld-client index` on {memory['files']:,} files of {memory['megabytes']:,} MB ({memory['visits']} visits), "
        f"with everything that it does by default, took {memory['seconds']:,.0f} s, and "
        f"{memory['seconds_again']:,.0f} s when it ran again and nothing had changed. {_machine(memory)} Its process "
        f"had at most {memory['peak_mb']:,} MB in memory, and its children {memory['children_peak_mb']:,} MB together."
    )
    return ["## Many files", "", text]


def _pacs(pacs: dict[str, Any]) -> list[str]:
    text = (
        f"{pacs['server']} on loopback: {pacs['fetched']} images are fetched by `ld-client fetch` and compared with "
        f"those of the PACS, `ld-client index` makes {pacs['visits']} visits of them, and `ld-generate send` stores "
        f"{pacs['sent']} synthetic images there, which come back unchanged."
    )
    lines = ["## A real PACS", "", text]
    return lines + (["", *(f"- {escaped(problem)}" for problem in pacs["problems"])] if pacs["problems"] else [])


def _machine(result: dict[str, Any]) -> str:
    return f"{result['processor']}, {result['threads']} threads."
