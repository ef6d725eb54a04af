"""Peak memory and speed of `ld-client index` on many files, watched from outside."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil

from ld_common.core.errors import DeploymentError
from ld_simulations.benchmarks.scans.plan import ScansConfig
from ld_simulations.benchmarks.scans.speed import SETTLE_SECONDS, Report
from ld_simulations.benchmarks.scans.trees import TreeSize, write_tree

WATCH_SECONDS = 0.1
MEGABYTE = 1_000_000


def watch_index(config: ScansConfig, folder: Path, report: Report = lambda _: None) -> dict[str, Any]:
    """Write a tree of many files, index it by the command, and index it again unchanged.

    Returns:
        files, visits, megabytes of the files, files a second and the peak resident memory, in MB, of the first
        command's process (`peak_mb`) and of its children together; seconds of both commands with the start of Python.

    Raises:
        DeploymentError: a command failed, or did not read every visit.
    """
    size = TreeSize(config.many_patients, slices=config.slices)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    site = write_tree(folder, size, Path(config.project), Path(config.base_model), config.seed)
    report(f"{size.files} files written: {time.perf_counter() - started:.1f} s")
    time.sleep(SETTLE_SECONDS)
    seconds, peak, of_children = _indexed(site, size)
    report(f"first index: {seconds:.1f} s, {peak / MEGABYTE:.0f} MB")
    seconds_again, peak_again, _ = _indexed(site, size)
    report(f"again, unchanged: {seconds_again:.1f} s, {peak_again / MEGABYTE:.0f} MB")
    return {
        "files": size.files,
        "visits": size.patients * size.visits,
        "megabytes": round(sum(path.stat().st_size for path in (folder / "scans").rglob("*.dcm")) / MEGABYTE),
        "seconds": round(seconds, 1),
        "seconds_again": round(seconds_again, 1),
        "files_a_second": round(size.files / seconds, 1),
        "peak_mb": round(peak / MEGABYTE),
        "children_peak_mb": round(of_children / MEGABYTE),
        "peak_again_mb": round(peak_again / MEGABYTE),
    }


def _indexed(site: Path, size: TreeSize) -> tuple[float, int, int]:
    """Seconds of `ld-client index`, and peak bytes of its process and of its children together."""
    command = [sys.executable, "-m", "ld_client.cli", "index", "--config", str(site), "--json"]
    out, err = site.with_name("out.json"), site.with_name("err.txt")
    started = time.perf_counter()
    with out.open("wb") as stream, err.open("wb") as errors:
        process = subprocess.Popen(command, stdout=stream, stderr=errors)
        try:
            peak, of_children = _watched(process)
        finally:
            process.kill()
            process.wait()
    seconds = time.perf_counter() - started
    if process.returncode:
        raise DeploymentError(f"ld-client index ended with {process.returncode}: {err.read_text()[-500:]}")
    visits = json.loads(out.read_text())["visits"]
    if visits != size.patients * size.visits:
        raise DeploymentError(f"ld-client index read {visits} visits, not {size.patients * size.visits}")
    return seconds, peak, of_children


def _watched(process: subprocess.Popen[bytes]) -> tuple[int, int]:
    """Peak resident bytes of a process, and the most that its children had together, until it ends."""
    parent, peak, of_children = psutil.Process(process.pid), 0, 0
    while process.poll() is None:
        try:
            peak = max(peak, _peak([parent]))
            of_children = max(of_children, _peak(parent.children(recursive=True)))
        except psutil.NoSuchProcess:
            continue
        time.sleep(WATCH_SECONDS)
    return peak, of_children


def _peak(processes: Iterable[psutil.Process]) -> int:
    """Sum of the highest resident sizes that these processes had; elsewhere than on Linux, of those that they have."""
    total = 0
    for process in processes:
        status = Path(f"/proc/{process.pid}/status")
        try:
            lines = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
            total += 1024 * int(lines[0].split()[1]) if lines else 0
        except FileNotFoundError:
            total += process.memory_info().rss if not Path("/proc").is_dir() else 0
        except ProcessLookupError:
            continue
    return total
