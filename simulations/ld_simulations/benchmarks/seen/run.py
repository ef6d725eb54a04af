"""`ld-benchmark seen`: what a finished demo's report and page show in a browser, at a desk and on a phone."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page
from rich.console import Console

from ld_common.core.atomic_files import write_bytes
from ld_common.core.config import load_config
from ld_common.core.errors import ConfigError
from ld_simulations.aims import Aim, aims_table
from ld_simulations.benchmarks.harness import json_bytes
from ld_simulations.benchmarks.seen.browser import DESK, PHONE, chromium, cut_text, opened, violations, width
from ld_simulations.hospitals import HELD_OUT
from ld_simulations.run_folder import REPORT

NUMBERS, PAGE = "seen.json", "seen.md"
YEARS_OLDER = 10
WAIT_MS = 60_000
AIMS = {
    "report_width_at_390": Aim("at most 390 px", at_most=390),
    "page_width_at_390": Aim("at most 390 px", at_most=390),
    "accessibility_violations": Aim("0", at_most=0),
    "texts_cut_off": Aim("0", at_most=0),
    "seconds_to_first_answer_on_page": Aim("at most 5", at_most=5),
    "real_followups_tested": Aim("at least 100", at_least=100),
    "strip_min_grey_difference": Aim("at least 6, monotone", at_least=6),
}


@dataclass
class SeenConfig:
    """Which finished demo is looked at."""

    output: str = "runs/seen"
    results: str = "docs/benchmarks"
    demo: str = "runs/demo"
    """Folder of a finished `ld-simulate`."""
    real_scans: str = "docs/benchmarks/real_scans.json"
    """Numbers of `ld-benchmark real`; its count of follow-ups is among the aims."""
    strip: str = "docs/benchmarks/latent_drift_strip.json"
    """Numbers of the README's strip, by `ld-benchmark latent-drift`; 0 counts where its grey is not monotone in δ."""


def load_seen_config(path: Path, overrides: list[str]) -> SeenConfig:
    """Read the config; raises `ConfigError`."""
    return load_config(SeenConfig, path, overrides)


def run(config: SeenConfig, only_report: bool, console: Console) -> list[Path]:
    """Look at the report and the page, and write what was seen; returns the files."""
    demo, folder, file = Path(config.demo), Path(config.results), Path(config.output) / NUMBERS
    if not only_report:
        if not (demo / REPORT).exists():
            raise ConfigError(f"'{demo}' holds no {REPORT}: run ld-simulate first, or set demo")
        with chromium() as browser:
            report = _look_at_report(browser, demo / REPORT, Path(config.output))
            with _served(demo) as address:
                page = _look_at_page(browser, address, Path(config.output))
        write_bytes(file, json_bytes(_numbers(report, page)))
    try:
        numbers = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"'{file}' cannot be read: leave --only-report out") from error
    numbers |= _of_other_studies(config)
    write_bytes(folder / NUMBERS, json_bytes(numbers))
    write_bytes(folder / PAGE, _page(numbers).encode())
    return [folder / NUMBERS, folder / PAGE]


def _look_at_report(browser: Browser, report: Path, out: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"violations": [], "cut": []}
    for name, size in (("desk", DESK), ("phone", PHONE)):
        with opened(browser, report, size) as page:
            found["violations"] += violations(page)
            found["cut"] += cut_text(page)
            found[f"{name}_width"] = width(page)
            page.screenshot(path=out / f"report_{name}.png", full_page=True)
    return found


def _look_at_page(browser: Browser, address: str, out: Path) -> dict[str, Any]:
    """Before and after the first answer, which is timed from the click on Draw."""
    found: dict[str, Any] = {"violations": [], "cut": []}
    for name, size in (("desk", DESK), ("phone", PHONE)):
        with opened(browser, address, size) as page:
            _pick_example(page)
            found["violations"] += violations(page)
            age = page.locator("#target-age input[type=number]")
            age.fill(str(float(age.input_value()) + YEARS_OLDER))
            age.blur()
            started = time.perf_counter()
            page.locator("#draw").click()
            page.locator("#answer .caption").wait_for(timeout=WAIT_MS)
            found.setdefault("seconds", time.perf_counter() - started)
            page.locator("#card-pdf:not([disabled])").wait_for(timeout=WAIT_MS)
            found["violations"] += violations(page)
            found["cut"] += cut_text(page)
            found[f"{name}_width"] = width(page)
            page.screenshot(path=out / f"page_{name}.png", full_page=True)
    return found


def _pick_example(page: Page) -> None:
    page.locator("#example input").click()
    page.get_by_role("option").first.click()
    page.locator("#example input").blur()
    page.locator(".preview img").wait_for(timeout=WAIT_MS)


@contextmanager
def _served(demo: Path) -> Iterator[str]:
    """The page of the demo's release with its test patients as examples, in a process of its own."""
    program = "from ld_generate.cli import main; main()"
    arguments = ["serve", str(demo / "study/release"), "--allow-unsigned", "--port", "7917"]
    arguments += ["--examples", str(demo / "hospitals" / HELD_OUT)]
    with subprocess.Popen(
        [sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            lines = iter(process.stdout.readline, "") if process.stdout is not None else iter(())
            address = next((found[0] for line in lines if (found := re.search(r"http\S+", line))), None)
            if address is None:
                raise ConfigError(f"the page did not start: {process.stderr.read() if process.stderr else ''}")
            yield address
        finally:
            process.terminate()


def _numbers(report: dict[str, Any], page: dict[str, Any]) -> dict[str, Any]:
    return {
        "report_width_at_390": report["phone_width"],
        "page_width_at_390": page["phone_width"],
        "accessibility_violations": len(report["violations"]) + len(page["violations"]),
        "texts_cut_off": len(report["cut"]) + len(page["cut"]),
        "seconds_to_first_answer_on_page": round(page["seconds"], 2),
        "found": report["violations"] + page["violations"] + report["cut"] + page["cut"],
    }


def _of_other_studies(config: SeenConfig) -> dict[str, Any]:
    real, strip = (
        json.loads(Path(file).read_text(encoding="utf-8")) if Path(file).exists() else {}
        for file in (config.real_scans, config.strip)
    )
    visible = strip.get("strip_min_grey_difference", 0.0) if strip.get("strip_monotone") else 0.0
    return {"real_followups_tested": real.get("real_followups_tested", 0), "strip_min_grey_difference": visible}


def _page(numbers: dict[str, Any]) -> str:
    lines = [
        "# What people see",
        "",
        "Written by `make benchmark-seen` of a finished demo. Its report and its page are opened in Chromium at 1280 "
        "and at 390 px. *Violations* are those of axe-core, before and after the first answer; *cut off* is text wider "
        "than its box. The first answer is timed from the click on Draw, the page being up and the scan picked. "
        "The strip is the README's.",
        "",
        aims_table(numbers, AIMS),
    ]
    if numbers["found"]:
        lines += ["Found:", "", *(f"- `{line}`" for line in numbers["found"]), ""]
    return "\n".join(lines)
