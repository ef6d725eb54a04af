"""Trains releases and judges ways of asking them, each once: what is there is not done again."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ld_common.core.atomic_files import write_bytes
from ld_common.core.config import load_config
from ld_common.core.errors import RequestError
from ld_common.diffusion.base_model import load_base
from ld_common.editing.base import Editor
from ld_common.editing.counterfactuals import draw_counterfactuals, edit_to
from ld_common.editing.registry import EDITORS, change_editor, editor_options, read_editor
from ld_common.imaging.modality import Modality
from ld_common.imaging.scan_table import read_scan_table
from ld_common.release.release import (
    Release,
    edit_drift,
    find_release_base,
    load_release_base,
    read_release,
    release_editor,
)
from ld_simulations.benchmarks.counterfactuals.data import EvaluationData, read_data
from ld_simulations.benchmarks.counterfactuals.judge import CounterfactualJudge, JudgeConfig, Judged
from ld_simulations.benchmarks.counterfactuals.plan import Asking, CounterfactualsBenchmark, EditorPlan, ReleaseTraining
from ld_simulations.benchmarks.counterfactuals.training import train_release
from ld_simulations.demo import Demo
from ld_simulations.hospitals import SCANS

BATCH, TURNS = 16, 3
HELD_OUT_PATIENTS = "held_out"
Run = dict[str, Any]


def judge_release(
    folder: Path,
    data: Path,
    reference: Path | None,
    editors: Sequence[str],
    seeds: int,
    config: JudgeConfig,
    base_name: str | None = None,
    progress: Callable[[], None] = lambda: None,
) -> list[Run]:
    """Ask one release in each of these ways, as often as there are seeds for editors that draw noise.

    Args:
        folder: of the release, whoever signed it.
        data: of scans and, for rendered patients, their truth (`read_data`).
        reference: table of real scans of other patients, or None.
        editors: names in `ld_common.editing.registry`; none for the release's own.
        seeds: how many.
        config: how much is tried.
        base_name: the base model, if not where the release says.
        progress: called after each.
    """
    release = read_release(folder)
    base = load_release_base(release, base_name)
    plain = load_base(find_release_base(release, base_name))
    scans = read_data(data, release.modality, base.resolution)
    others = None if reference is None else read_scan_table(reference, release.modality, base.resolution)
    if others is not None and (both := sorted(set(scans.baselines.patients) & set(others.patients))):
        raise RequestError(
            f"{len(both)} patients of --data are in --reference too, {both[0]} for one: its networks must not know them"
        )
    judge, runs = CounterfactualJudge(plain, scans, others, config), []
    own = release_editor(release)
    for name in editors or [own.name]:
        editor = change_editor(own, name)
        for number in range(seeds if EDITORS.load(name).draws_noise() else 1):
            judged = judge.judge(base, release, editor, [release.study.seed + number])
            runs.append(_run_of(release.modality.name, release.study.name, name, number, 1, editor, judged, judge))
            progress()
    return runs


def _run_of(
    modality: str,
    release: str,
    label: str,
    seed: int,
    draws: int,
    editor: Editor,
    judged: Judged,
    judge: CounterfactualJudge,
) -> Run:
    return {
        "modality": modality,
        "editor": label,
        "release": release,
        "seed": seed,
        "draws": draws,
        "edit": editor_options(editor),
        "metrics": judged.metrics,
        "by_edit": judged.by_edit,
        "real": judge.references,
        "counts": judge.counts,
    }


class ReleaseWorker:
    """One process's share; it keeps what is known of each modality's scans."""

    def __init__(self, benchmark: CounterfactualsBenchmark) -> None:
        self.benchmark = benchmark
        self._adopted = _adopted(benchmark)
        self._judges: dict[str, CounterfactualJudge] = {}

    def train(self, training: ReleaseTraining) -> Path:
        """The folder of a release, trained now or before."""
        folder = self.benchmark.output / "releases" / training.name
        if not (folder / "manifest.json").exists():
            train_release(self.benchmark.demo(training.modality, training.release, training.seed), folder)
        return folder

    def ask(self, asking: Asking) -> Run:
        """The result of one way of asking, found now or before."""
        if (found := self.found(asking)) is not None:
            return found
        training, (release, edit) = asking.training, self._asked(asking)
        judge = self._judge(training.modality)
        draws = self.benchmark.config.editors[asking.editor].seeds
        seeds = range(training.seed, training.seed + draws)
        judged = judge.judge(load_release_base(release), release, edit, seeds)
        names = training.modality, training.release, asking.editor
        return self._keep(asking.name, _run_of(*names, training.seed, draws, edit, judged, judge))

    def found(self, asking: Asking) -> Run | None:
        """What was found before, or None."""
        return self._kept(asking.name)

    def batch_speedup(self, asking: Asking) -> Run:
        """How many times faster 16 edits are drawn together than one by one, found now or before with any seed."""
        modality, label = asking.training.modality, asking.editor
        if (found := self._kept(name := _speedup_name(modality, label))) is not None:
            return found
        release, edit = self._asked(asking)
        data = self._data(modality, load_base(find_release_base(release)).resolution)
        return self._keep(name, {"modality": modality, "editor": label, **_batch_speedup(release, edit, data)})

    def _asked(self, asking: Asking) -> tuple[Release, Editor]:
        """The release, and how it is asked."""
        release = read_release(self.train(asking.training))
        return release, _edit(release.study.edit, self.benchmark.config.editors[asking.editor])

    def _kept(self, name: str) -> Run | None:
        file = self.benchmark.output / "runs" / f"{name}.json"
        return json.loads(file.read_text()) if file.exists() else self._adopted.get(name)

    def _keep(self, name: str, run: Run) -> Run:
        file = self.benchmark.output / "runs" / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(file, (json.dumps(run, indent=1, sort_keys=True) + "\n").encode())
        return run

    def _data(self, modality: str, side: int) -> EvaluationData:
        demo = self.benchmark.demo(modality)
        return read_data(Path(demo.hospitals.output) / HELD_OUT_PATIENTS, _modality(demo), side)

    def _judge(self, modality: str) -> CounterfactualJudge:
        if modality not in self._judges:
            demo = self.benchmark.demo(modality)
            base = load_base(demo.study.base_model)
            reference = read_scan_table(Path(demo.hospitals.output) / SCANS, _modality(demo), base.resolution)
            data = self._data(modality, base.resolution)
            self._judges[modality] = CounterfactualJudge(base, data, reference, self.benchmark.config.judge)
        return self._judges[modality]


def _edit(section: dict[str, Any], plan: EditorPlan) -> Editor:
    """A study's editor with the options of a plan."""
    own = read_editor(section)
    editor = change_editor(own, str(plan.edit.get("name", own.name)))
    return read_editor(editor_options(editor) | plan.edit)


def _adopted(benchmark: CounterfactualsBenchmark) -> dict[str, Run]:
    """Results of an earlier table by their names; those asked otherwise than the plan says are left out."""
    if not benchmark.config.adopt:
        return {}
    try:
        table = json.loads(Path(benchmark.config.adopt).read_text())
        runs, batch = table["runs"], table["batch"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RequestError(f"adopt: '{benchmark.config.adopt}' is no table of counterfactuals: {error!r}") from error
    releases = {(one.modality, one.release) for one in benchmark.trainings}
    edits = {one: benchmark.demo(*one).study.edit for one in releases}  # the same for every seed
    found: dict[str, Run] = {}
    for asking in benchmark.askings:
        training, plan = asking.training, benchmark.config.editors[asking.editor]
        sought = training.modality, training.seed, asking.editor, training.release, plan.seeds
        asked = _edit(edits[training.modality, training.release], plan)
        for run in runs:
            said = run["modality"], run["seed"], run["editor"], run["release"], run.get("draws", 1)
            if said == sought and read_editor(run["edit"]) == asked:
                found[asking.name] = run
                if (batch.get("modality"), batch.get("editor")) == (training.modality, asking.editor):
                    found[_speedup_name(training.modality, asking.editor)] = batch
    return found


def _speedup_name(modality: str, editor: str) -> str:
    return f"{modality}-{editor}, batch speedup"


def _modality(demo: Demo) -> Modality:
    return load_config(Modality, demo.modality_file)


def _batch_speedup(release: Release, edit: Editor, data: EvaluationData) -> Run:
    """The median of paired turns."""
    base, describe = load_release_base(release), data.modality.prompt
    asked = [data.asked[number % len(data.asked)] for number in range(BATCH)]
    images = data.baselines.images[[one.scan for one in asked]]
    own = [data.baselines.attributes[one.scan] for one in asked]
    questions = enumerate(zip(own, asked, strict=True))
    edits = [edit_to(data.modality, row, shown, one.target) for row, (shown, one) in questions]
    turns: list[dict[str, float]] = []
    for _ in range(TURNS + 1):
        turns.append({})
        for size in (1, BATCH):
            config = replace(edit, batch_size=size)
            started = time.perf_counter()
            draw_counterfactuals(base, images, [describe(one) for one in own], edits, config, drift=edit_drift(release))
            turns[-1][str(size)] = time.perf_counter() - started
    turns = turns[1:]  # the first one allocates
    median = statistics.median(turn["1"] / turn[str(BATCH)] for turn in turns)
    return {"speedup": median, "batch": BATCH, "turns": turns, "threads": torch.get_num_threads()}
