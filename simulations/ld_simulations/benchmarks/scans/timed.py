"""What is timed, each in a process of its own: `python -m ld_simulations.benchmarks.scans.timed WHAT SITE [KEY=VALUE]`.

The last line that it prints is JSON with the seconds of the work alone, without the start of Python and its imports.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydicom import dcmread

from ld_client.data.exclusions import Exclusion
from ld_client.data.ingest import read_visits, survey
from ld_client.site_config import SiteConfig, load_modality, load_site
from ld_common.core.errors import DeploymentError

BARE, READ, BUILD = "bare", "read", "build"


def run_timed(what: str, site_yaml: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Do one of `WORK` in a process of its own.

    Returns:
        `seconds` of the work, what the work returned, and `process_seconds` from the start of Python to its end.

    Raises:
        DeploymentError: the process failed.
    """
    command = [sys.executable, "-m", "ld_simulations.benchmarks.scans.timed", what, str(site_yaml), *overrides]
    started = time.perf_counter()
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        raise DeploymentError(f"'{what}' could not be timed: {ended.stderr.strip()[-500:]}")
    result: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return result | {"process_seconds": time.perf_counter() - started}


def _bare(site: SiteConfig) -> dict[str, Any]:
    """What a script of ten lines does: header and pixels of every file by pydicom."""
    files = sorted(Path(site.data.root).rglob("*.dcm"))
    pixels = sum(dcmread(file).pixel_array.size for file in files)
    return {"files": len(files), "pixels": pixels}


def _read(site: SiteConfig) -> dict[str, Any]:
    """Headers, joining and pixels, as the index reads them; the process that decodes starts within."""
    entries = list(read_visits(survey(site, load_modality(site), bytes(32), lambda *_: None)))
    return {"visits": sum(not isinstance(entry, Exclusion) for entry in entries)}


def _build(site: SiteConfig) -> dict[str, Any]:
    """The whole index with encoding."""
    from ld_client.data.indexing import build_store

    return {"visits": build_store(site).visits}


WORK: dict[str, Callable[[SiteConfig], dict[str, Any]]] = {BARE: _bare, READ: _read, BUILD: _build}


def main() -> None:
    """Do what the arguments name."""
    what, site_yaml, *overrides = sys.argv[1:]
    site = load_site(Path(site_yaml), overrides)
    if what == BUILD:
        import ld_client.data.indexing  # noqa: F401  (imports are not timed)
    started = time.perf_counter()
    result = WORK[what](site)
    print(json.dumps(result | {"seconds": time.perf_counter() - started}))


if __name__ == "__main__":
    main()
