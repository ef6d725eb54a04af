"""One release judged through several editors: what `ld-evaluate` runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ld_common.core.errors import RequestError
from ld_common.diffusion.base_model import load_base
from ld_common.editing.registry import EDITORS, change_editor, editor_options
from ld_common.imaging.scan_table import read_scan_table
from ld_common.release.release import Release, find_release_base, load_release_base, read_release, release_editor
from ld_evaluate.axioms import EditorRun
from ld_evaluate.dataset import read_data
from ld_evaluate.judge import CounterfactualJudge, Judgement
from ld_evaluate.options import JudgeConfig
from ld_evaluate.report import Run


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


def evaluate_release(evaluation: Evaluation, progress: Callable[[], None] = lambda: None) -> list[Run]:
    """A result for each editor and seed.

    Args:
        evaluation: what is judged.
        progress: called after each result.

    Raises:
        ReleaseError: the release or its base cannot be used.
        ConfigError: an unknown editor.
        RequestError: the scans cannot be used, or `reference` has patients of `data`.
    """
    release = read_release(evaluation.release)
    recommended = release_editor(release)
    editors = [change_editor(recommended, name) for name in evaluation.editors or [recommended.name]]
    tasks = [
        (editor, seed)
        for editor in editors
        for seed in range(evaluation.seeds if EDITORS.load(editor.name).draws_noise() else 1)
    ]
    base = load_release_base(release, evaluation.base)
    judge = _judge(evaluation, release, base.resolution)
    runs: list[Run] = []
    for editor, seed in tasks:
        editor_run = EditorRun(base, release, editor, [release.study.seed + seed])
        judgement = judge.judge(editor_run)
        labels = {"editor": editor.name, "release": release.study.name, "seed": seed, "draws": 1}
        runs.append(result(labels, editor_run, judgement, judge))
        progress()
    return runs


def result(labels: Run, editor_run: EditorRun, judgement: Judgement, judge: CounterfactualJudge) -> Run:
    """A judgement as JSON has it; `labels` are `editor`, `release`, `seed` and `draws`."""
    return {
        "modality": editor_run.release.modality.name,
        **labels,
        "edit": editor_options(editor_run.editor),
        "metrics": judgement.metrics,
        "by_edit": judgement.by_edit,
        "real": judge.references,
        "counts": judge.counts,
    }


def _judge(evaluation: Evaluation, release: Release, resolution: int) -> CounterfactualJudge:
    scans = read_data(evaluation.data, release.modality, resolution)
    reference = None
    if evaluation.reference is not None:
        reference = read_scan_table(evaluation.reference, release.modality, resolution)
        shared = sorted(set(scans.baselines.patients) & set(reference.patients))
        if shared:
            raise RequestError(
                f"--reference has {len(shared)} patients of --data, for example {shared[0]}: its networks must be "
                "trained on other patients"
            )
    return CounterfactualJudge(
        load_base(find_release_base(release, evaluation.base)), scans, reference, evaluation.config
    )
