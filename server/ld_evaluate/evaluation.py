"""One release judged through several editors: what `ld-evaluate` runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ld_common.core.errors import RequestError
from ld_common.diffusion.base_model import load_base
from ld_common.editing.registry import EDITORS, change_editor, editor_options
from ld_common.imaging.scan_table import read_scan_table
from ld_common.release.release import Release, find_release_base, load_release_base, read_release, release_editor
from ld_evaluate.axioms import EditorRun
from ld_evaluate.dataset import EvaluationData, read_data
from ld_evaluate.judge import CounterfactualJudge, Judgement
from ld_evaluate.options import JudgeConfig
from ld_evaluate.other_methods import ask_function, load_function, read_answers
from ld_evaluate.patient_tables import Run


@dataclass(frozen=True)
class Evaluation:
    """What is judged on which scans."""

    release: Path
    """Folder of the release, whoever signed it."""
    data: Path
    """Folder of scans, as `read_data` takes it."""
    reference: Path | None = None
    """Table of real scans of other patients; without one neither effectiveness nor realism is measured."""
    editors: Sequence[str] = ()
    """Names of editors; empty for the release's own."""
    seeds: int = 1
    """Number of noise seeds of each editor that draws noise."""
    base: str | None = None
    """The base model, if not where the release says."""
    config: JudgeConfig = field(default_factory=JudgeConfig)
    answers: Mapping[str, Path] = field(default_factory=dict)
    """Folders of finished answers, by the name of their method."""
    functions: Mapping[str, str] = field(default_factory=dict)
    """Python functions that edit pixels (`package.module:function`), by the name of their method."""

    def read_scans(self) -> EvaluationData:
        """The scans as the release's base sees them; raises as `evaluate_release`."""
        release = read_release(self.release)
        resolution = load_base(find_release_base(release, self.base)).resolution
        return read_data(self.data, release.modality, resolution)


def evaluate_release(
    evaluation: Evaluation, scans: EvaluationData, progress: Callable[[], None] = lambda: None
) -> list[Run]:
    """A result for each editor and seed, then one for each other method.

    Args:
        evaluation: what is judged.
        scans: `evaluation.read_scans()`.
        progress: called after each result.

    Raises:
        ReleaseError: the release or its base cannot be used.
        ConfigError: an unknown editor.
        RequestError: the scans or other methods' answers cannot be used, or `reference` has patients of `data`.
    """
    release = read_release(evaluation.release)
    recommended = release_editor(release)
    editors = [change_editor(recommended, name) for name in evaluation.editors or [recommended.name]]
    tasks = [
        (editor, seed)
        for editor in editors
        for seed in range(evaluation.seeds if EDITORS.load(editor.name).draws_noise() else 1)
    ]
    functions = {name: load_function(path) for name, path in evaluation.functions.items()}
    others = {
        name: read_answers(name, folder, scans.modality, scans.asked) for name, folder in evaluation.answers.items()
    }
    others |= {name: ask_function(name, function, scans.asked) for name, function in functions.items()}
    base = load_release_base(release, evaluation.base)
    judge = _judge(evaluation, release, scans)
    runs: list[Run] = []
    for editor, seed in tasks:
        editor_run = EditorRun(base, release, editor, [release.study.seed + seed])
        labels = {"editor": editor.name, "release": release.study.name, "seed": seed, "draws": 1}
        options = {"edit": editor_options(editor)}
        judgement = judge.judge(editor.name, editor_run)
        runs.append(result(labels | options, judgement, judge) | judge.calibrate(judgement, editor_run))
        progress()
    for name, written in others.items():
        labels = {"editor": name, "release": release.study.name, "seed": 0, "draws": 1, "edit": {}}
        judgement = judge.judge_answers(name, written)
        runs.append(result(labels, judgement, judge) | judge.calibrate(judgement))
        progress()
    return runs


def result(labels: Run, judgement: Judgement, judge: CounterfactualJudge) -> Run:
    """A judgement as JSON has it; `labels` are `editor`, `release`, `seed`, `draws` and `edit`."""
    return {
        "modality": judge.data.modality.name,
        "biomarkers": judge.data.modality.biomarkers,
        **labels,
        "metrics": judgement.metrics,
        "by_edit": judgement.compared.by_edit,
        "patients": [answer.row() for answer in judgement.compared.patients],
        "rules": judge.comparison.rule_numbers(),
        "rule_patients": [answer.row() for method in judge.comparison.rules.values() for answer in method.patients],
        "real": judge.references,
        "of_truth": judge.of_truth,
        "counts": judge.counts,
    }


def _judge(evaluation: Evaluation, release: Release, scans: EvaluationData) -> CounterfactualJudge:
    base, reference = load_base(find_release_base(release, evaluation.base)), None
    if evaluation.reference is not None:
        reference = read_scan_table(evaluation.reference, release.modality, base.resolution)
        shared = sorted(set(scans.baselines.patients) & set(reference.patients))
        if shared:
            raise RequestError(
                f"--reference has {len(shared)} patients of --data, for example {shared[0]}: its networks must be "
                "trained on other patients"
            )
    return CounterfactualJudge(base, scans, reference, evaluation.config)
