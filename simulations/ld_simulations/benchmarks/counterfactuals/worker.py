"""One process of the counterfactuals benchmark: trains releases and judges editors."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ld_common.diffusion.base_model import load_base
from ld_common.editing.base import Editor
from ld_common.editing.counterfactuals import draw_counterfactuals, edit_to
from ld_common.editing.registry import change_editor, editor_options, read_editor
from ld_common.imaging.scan_table import read_scan_table
from ld_common.release.release import MANIFEST, Release, edit_drift, find_release_base, load_release_base, read_release
from ld_evaluate.axioms import EditorRun
from ld_evaluate.dataset import EvaluationData, read_data
from ld_evaluate.evaluation import result
from ld_evaluate.files import SCANS
from ld_evaluate.judge import CounterfactualJudge
from ld_evaluate.patient_tables import Run
from ld_simulations.benchmarks.counterfactuals.plan import (
    CounterfactualsBenchmark,
    EditorPlan,
    EditorTask,
    ReleaseTraining,
)
from ld_simulations.benchmarks.counterfactuals.training import train_release
from ld_simulations.benchmarks.harness import read_table
from ld_simulations.hospitals import HELD_OUT

BATCH, TURNS = 16, 3


class ReleaseWorker:
    """Trains and judges; the predictors and features of a modality's scans are made once."""

    def __init__(self, benchmark: CounterfactualsBenchmark) -> None:
        self.benchmark = benchmark
        self._judges: dict[str, CounterfactualJudge] = {}

    def folder(self, training: ReleaseTraining) -> Path:
        """Folder of a release."""
        return self.benchmark.output / "releases" / training.name

    def is_trained(self, training: ReleaseTraining) -> bool:
        """Whether the release is complete."""
        return (self.folder(training) / MANIFEST).exists()

    def train(self, training: ReleaseTraining) -> str:
        """Train a release, unless it is complete; returns its folder."""
        folder = self.folder(training)
        if not self.is_trained(training):
            train_release(self.benchmark.demo(training.modality, training.release, training.seed), folder)
        return str(folder)

    def judge(self, task: EditorTask) -> Run:
        """Judge one editor on its release."""
        training, (release, editor) = task.training, self._release_and_editor(task)
        draws = self.benchmark.config.editors[task.editor].seeds
        seeds = range(training.seed, training.seed + draws)
        editor_run = EditorRun(load_release_base(release), release, editor, seeds)
        judge = self._judge(training.modality)
        labels = {"editor": task.editor, "release": training.release, "seed": training.seed, "draws": draws}
        labels |= {"modality": training.modality, "edit": editor_options(editor)}
        return result(labels, judge.judge(task.editor, editor_run), judge)

    def batch_speedup(self, task: EditorTask) -> Run:
        """How many times faster 16 edits are drawn together than one by one: the median of paired turns."""
        release, editor = self._release_and_editor(task)
        data = self._data(task.training.modality, load_base(find_release_base(release)).resolution)
        labels = {"modality": task.training.modality, "editor": task.editor}
        return {**labels, **_batch_speedup(release, editor, data)}

    def _release_and_editor(self, task: EditorTask) -> tuple[Release, Editor]:
        release = read_release(Path(self.train(task.training)))
        return release, planned_editor(release.study.edit, self.benchmark.config.editors[task.editor])

    def _data(self, modality: str, resolution: int) -> EvaluationData:
        demo = self.benchmark.demo(modality)
        return read_data(Path(demo.hospitals.output) / HELD_OUT, demo.modality, resolution)

    def _judge(self, modality: str) -> CounterfactualJudge:
        if modality not in self._judges:
            demo = self.benchmark.demo(modality)
            base = load_base(demo.study.base_model)
            reference = read_scan_table(Path(demo.hospitals.output) / SCANS, demo.modality, base.resolution)
            data = self._data(modality, base.resolution)
            self._judges[modality] = CounterfactualJudge(base, data, reference, self.benchmark.config.judge)
        return self._judges[modality]


def planned_editor(section: dict[str, Any], plan: EditorPlan) -> Editor:
    """The editor of a study's `edit` section with the options of a plan."""
    recommended = read_editor(section)
    editor = change_editor(recommended, str(plan.edit.get("name", recommended.name)))
    return read_editor(editor_options(editor) | plan.edit)


def speedup_name(modality: str, editor: str) -> str:
    """Name of the result of `batch_speedup`, whichever seed's release is timed."""
    return f"{modality}-{editor}, batch speedup"


def adopted_results(benchmark: CounterfactualsBenchmark) -> dict[str, Run]:
    """Results of the table that the config adopts, by task name; those of editors with other options are left out.

    So are results of tables that were written before answers were compared with rules in raw pixels.

    Raises:
        ConfigError: the table cannot be read or is of another kind.
    """
    if not benchmark.config.adopt:
        return {}
    table = read_table(benchmark.config.adopt, "counterfactuals", ("runs", "batch"))
    runs, batch = table["runs"], table["batch"]
    releases = {(training.modality, training.release) for training in benchmark.trainings}
    sections = {names: benchmark.demo(*names).study.edit for names in releases}  # the same for every seed
    results: dict[str, Run] = {}
    for task in benchmark.tasks:
        training, plan = task.training, benchmark.config.editors[task.editor]
        wanted = training.modality, training.seed, task.editor, training.release, plan.seeds
        editor = planned_editor(sections[training.modality, training.release], plan)
        for run in runs:
            labels = run["modality"], run["seed"], run["editor"], run["release"], run.get("draws", 1)
            if labels == wanted and "rules" in run and read_editor(run["edit"]) == editor:
                results[task.name] = run
                if (batch.get("modality"), batch.get("editor")) == (training.modality, task.editor):
                    results[speedup_name(training.modality, task.editor)] = batch
    return results


def _batch_speedup(release: Release, editor: Editor, data: EvaluationData) -> Run:
    base, modality = load_release_base(release), data.modality
    requests = [data.edits[number % len(data.edits)] for number in range(BATCH)]
    images = data.baselines.images[[request.scan for request in requests]]
    attributes = [data.baselines.attributes[request.scan] for request in requests]
    edits = [
        edit_to(modality, row, values, request.target)
        for row, (values, request) in enumerate(zip(attributes, requests, strict=True))
    ]
    prompts = [modality.prompt(values) for values in attributes]
    turns: list[dict[str, float]] = []
    for _ in range(TURNS + 1):
        turns.append({})
        for size in (1, BATCH):
            config = replace(editor, batch_size=size)
            started = time.perf_counter()
            draw_counterfactuals(base, images, prompts, edits, config, drift=edit_drift(release))
            turns[-1][str(size)] = time.perf_counter() - started
    turns = turns[1:]  # the first one allocates
    median = statistics.median(turn["1"] / turn[str(BATCH)] for turn in turns)
    return {"speedup": median, "batch": BATCH, "turns": turns, "threads": torch.get_num_threads()}
