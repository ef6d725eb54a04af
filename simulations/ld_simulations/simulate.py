"""What `ld-simulate` runs once its config is checked: every stage with a bar, resumed where an earlier run stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

import ld_common.core.offline  # noqa: F401  (before any model library)
from ld_client.data.store import open_store
from ld_common.core.atomic_files import write_bytes
from ld_common.editing.base import Editor
from ld_common.editing.registry import read_editor
from ld_common.release.release import (
    MANIFEST,
    Release,
    edit_drift,
    load_release_base,
    read_release,
    write_manifest,
)
from ld_evaluate.report import format_number
from ld_server.tracking.tracking import check_trackers
from ld_simulations.aims import aim_met, aims_table
from ld_simulations.demo import Demo
from ld_simulations.evaluation import SimulatedEvaluation, TestPatients, evaluate
from ld_simulations.federation import run_federation
from ld_simulations.first_look import write_first_look
from ld_simulations.hospitals import HELD_OUT
from ld_simulations.phantoms.registry import find_phantom
from ld_simulations.preparation import prepare_sites
from ld_simulations.report.page import write_report
from ld_simulations.report.patients import shown_patients, write_strip
from ld_simulations.resources import ResourceMonitor
from ld_simulations.run_folder import FIRST_LOOK, NUMBERS, REPORT, ROWS, STRIP, SUMMARY
from ld_simulations.summary import AIMS, summarize_run


def run_demo(demo: Demo, console: Console) -> dict[str, Any]:
    """Everything from hospitals to the report, into a folder that was claimed for this demo; returns the summary.

    Raises:
        LdError: the folder cannot be written, or a stage fails.
    """
    check_trackers(demo.study)
    output = demo.output
    with ResourceMonitor() as monitor:
        with _progress(console, "hospitals and index") as advance:
            prepare_sites(demo, advance)
        first_picture = _look(demo, monitor, console)
        release = _federate(demo, console)
        base = load_release_base(release)
        tests = TestPatients(base, release.modality, Path(demo.hospitals.output) / HELD_OUT)
        evaluation = _judge(demo, release, tests, read_editor(demo.study.edit), console)
        network = None
        if demo.config.network:
            network = _judge(demo, release, tests, read_editor(demo.config.network), console)
        write_manifest(demo.release, release.manifest | {"evaluation": evaluation.summary["public"]})
        stores = [open_store(output / "stores" / name) for name in demo.study.federation.sites]
        summary = summarize_run(demo, release, evaluation, stores)
        summary["network"] = None if network is None else network.summary
        phantom = find_phantom(demo.hospitals.phantom)
        patients = shown_patients(release.modality, evaluation.judged, phantom.edit_titles())
        write_strip(output / STRIP, patients, phantom.terms.structure)
        write_report(output / REPORT, demo, release, base, patients, summary)
        summary = {"seconds_total": monitor.seconds, "peak_rss_mb": monitor.peak_rss_mb} | first_picture | summary
    write_bytes(output / ROWS, (json.dumps(evaluation.rows, indent=1) + "\n").encode())
    write_bytes(output / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())
    write_bytes(output / NUMBERS, aims_table(summary, AIMS).encode())
    console.print(_table(summary))
    console.print(f"wrote {output / SUMMARY}\nwrote {output / REPORT}", soft_wrap=True)
    return summary


def _look(demo: Demo, monitor: ResourceMonitor, console: Console) -> dict[str, float]:
    """The first picture, and the seconds that it took; nothing where there is none, or an earlier run made it."""
    if (demo.output / FIRST_LOOK).exists() or (path := write_first_look(demo)) is None:
        return {}
    console.print(f"first look, by the drift alone: {path}", soft_wrap=True)
    return {"first_picture_seconds": monitor.seconds}


def _federate(demo: Demo, console: Console) -> Release:
    """The study's release, trained now, resumed after its last round, or as an earlier run finished it."""
    if (demo.release / MANIFEST).exists():
        console.print(f"release {demo.release} is complete: not trained again", soft_wrap=True)
        return read_release(demo.release)
    rounds = demo.study.federation.rounds
    with _progress(console, "federation") as advance:
        advance("starting Flower", 0, rounds)

        def show(record: dict[str, Any]) -> None:
            console.print(_round_line(record, rounds), markup=False)
            advance("federation", record["round"], rounds)

        return read_release(run_federation(demo, resume=True, on_round=show))


def _round_line(record: dict[str, Any], rounds: int) -> str:
    sites = ", ".join(
        name if site["loss_last"] is None else f"{name} loss {site['loss_first']:.3f} → {site['loss_last']:.3f}"
        for name, site in record["sites"].items()
    )
    notes = "".join(f"; left out {name}: {reason}" for name, reason in record["left_out"].items())
    notes += f"; not counted: {record['failure']}" if record["failure"] else ""
    return f"round {record['round']}/{rounds} in {record['seconds']:.0f} s: {sites}{notes}"


def _judge(demo: Demo, release: Release, tests: TestPatients, editor: Editor, console: Console) -> SimulatedEvaluation:
    """What an editor on the release is worth."""
    count, total = 0, len(tests.first.scans) + len(tests.first.truths)
    with _progress(console, f"counterfactuals by {editor.name}") as advance:

        def add(done: int) -> None:
            nonlocal count
            count += done
            advance(f"counterfactuals by {editor.name}", count, total)

        return evaluate(tests, editor, edit_drift(release), add)


@contextmanager
def _progress(console: Console, title: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar; yields a function of the stage, the number done and the total."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        bar = progress.add_task(title, total=None)
        yield lambda stage, done, total: progress.update(bar, description=stage, completed=done, total=total)


def _table(summary: dict[str, Any]) -> Table:
    table = Table("", "measured", "aim", "")
    for key, aim in AIMS.items():
        verdict = "met" if aim_met(key, summary, AIMS) else "[bold]missed[/bold]"
        table.add_row(key, format_number(summary[key]), aim.text, verdict)
    return table
