"""A whole federation of demo hospitals on this machine, with bars: what `ld-simulate` runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

import ld_common.core.offline  # noqa: F401  (before any model library)
from ld_client.data.store import open_store
from ld_common.core.errors import ConfigError
from ld_common.diffusion.base_model import BaseModel
from ld_common.editing.registry import read_editor
from ld_common.release.release import Release, edit_drift, load_release_base, read_release
from ld_simulations.demo import Demo, load_demo, prepare_sites
from ld_simulations.evaluation import Evaluation, evaluate
from ld_simulations.federation import run_federation
from ld_simulations.hospitals import held_out_population
from ld_simulations.phantoms.growth_ceiling import growth_ceiling
from ld_simulations.phantoms.registry import find_phantom
from ld_simulations.report import write_report, write_strip
from ld_simulations.resources import ResourceMonitor
from ld_simulations.summary import AIMS, aim_met, as_markdown, shown, summarize_run

SUMMARY, NUMBERS, REPORT = "summary.json", "numbers.md", "report.html"
ROWS, STRIP = "counterfactuals.json", "counterfactuals.png"
MARKER = ".ld-simulate"
PARTS = ("hospitals", "stores", "sites", "study")
"""What a demo writes below its output folder, and removes before it starts afresh."""

console = Console()


def run_demo(config: Path, overrides: list[str]) -> None:
    """Everything from hospitals to the report, into the output of the demo that `config` and `overrides` describe."""
    demo = load_demo(config, overrides)
    with ResourceMonitor() as monitor:
        _clear(demo)
        with _progress("hospitals and index") as advance:
            prepare_sites(demo, advance)
        release = _federate(demo, config)
        base = load_release_base(release)
        judged = _judge(demo, release, base)
        summary = summarize_run(demo, release, judged, monitor, [open_store(path) for path in _stores(demo)])
        write_strip(demo.output / STRIP, judged)
        write_report(demo.output / REPORT, demo, release, base, judged, summary)
    (demo.output / ROWS).write_text(json.dumps(judged.rows, indent=1) + "\n")
    (demo.output / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")
    (demo.output / NUMBERS).write_text(as_markdown(summary))
    console.print(_table(summary))
    console.print(f"wrote {demo.output / SUMMARY}\nwrote {demo.output / REPORT}")


def _clear(demo: Demo) -> None:
    """Make the output folder, and empty one that an earlier run made; raises `ConfigError` for anyone else's."""
    marker, found = demo.output / MARKER, [part for part in PARTS if (demo.output / part).exists()]
    if found and not marker.exists():
        raise ConfigError(f"'{demo.output}' holds '{found[0]}', which no ld-simulate made: choose another output")
    if not demo.config.reuse:
        for part in PARTS:
            shutil.rmtree(demo.output / part, ignore_errors=True)
    demo.output.mkdir(parents=True, exist_ok=True)
    marker.write_text("ld-simulate made this folder and removes its parts when it starts afresh\n")


def _federate(demo: Demo, config: Path) -> Release:
    folder = Path(demo.study.output) / "release"
    if demo.config.reuse and (folder / "manifest.json").exists():
        return read_release(folder)
    rounds = demo.study.federation.rounds
    with _progress("federation") as advance:
        advance("starting Flower", 0, rounds)

        def show(record: dict[str, Any]) -> None:
            console.print(_round_line(record, rounds), markup=False)
            advance("federation", record["round"], rounds)

        study_file = config.parent / demo.config.study
        return read_release(
            run_federation(
                demo.study, study_file, demo.config.overrides, demo.sites, demo.config.cpus_per_site, on_round=show
            )
        )


def _round_line(record: dict[str, Any], rounds: int) -> str:
    sites = ", ".join(
        name if site["loss_last"] is None else f"{name} loss {site['loss_first']:.3f} → {site['loss_last']:.3f}"
        for name, site in record["sites"].items()
    )
    left_out = "".join(f"; left out {name}: {reason}" for name, reason in record["left_out"].items())
    left_out += f"; not counted: {record['failure']}" if record["failure"] else ""
    return f"round {record['round']}/{rounds} in {record['seconds']:.0f} s: {sites}{left_out}"


def _judge(demo: Demo, release: Release, base: BaseModel) -> Evaluation:
    populations = [held_out_population(hospital.population) for hospital in demo.hospitals.hospitals]
    ceiling = growth_ceiling(populations, phantom=find_phantom(demo.hospitals.phantom)).overall
    held_out = Path(demo.hospitals.output) / "held_out"
    patients = json.loads((held_out / "held_out.json").read_text())["patients"]
    total, done = sum(1 + len(patient["edits"]) for patient in patients), 0
    with _progress("counterfactuals") as advance:

        def count(more: int) -> None:
            nonlocal done
            done += more
            advance("counterfactuals", done, total)

        return evaluate(
            base, release.modality, held_out, read_editor(demo.study.edit), ceiling, count, edit_drift(release)
        )


def _stores(demo: Demo) -> list[Path]:
    return [demo.output / "stores" / name for name in demo.study.federation.sites]


@contextmanager
def _progress(title: str) -> Iterator[Any]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        bar = progress.add_task(title, total=None)
        yield lambda stage, done, total: progress.update(bar, description=stage, completed=done, total=total)


def _table(summary: dict[str, Any]) -> Table:
    table = Table("", "measured", "aim", "")
    for key, aim in AIMS.items():
        table.add_row(key, shown(summary[key]), aim.words, "met" if aim_met(key, summary) else "[bold]missed[/bold]")
    return table
