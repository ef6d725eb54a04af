"""Answers in the pixels of the scan's file: copies, truths through the VAE, and an editor's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ld_common.diffusion.base_model import BaseModel
from ld_common.imaging.modality import Modality
from ld_common.imaging.rendering import render
from ld_evaluate.edits import EvaluationEdit

Answers = Sequence["np.ndarray | None"]
"""One for each edit, `(H,W)` in its scan's grid and real values; None where there is none."""


def copies(edits: Sequence[EvaluationEdit]) -> Answers:
    """The unedited scans."""
    return [edit.scanned.pixels for edit in edits]


def perfect(base: BaseModel, modality: Modality, edits: Sequence[EvaluationEdit]) -> Answers:
    """The true answers after the VAE, written as an editor's are: what no editor on this base can beat."""
    written: list[np.ndarray | None] = [None] * len(edits)
    truths = {row: edit.truth.picture for row, edit in enumerate(edits) if edit.truth is not None}
    scans = {edits[row].scan: edits[row].scanned.picture for row in truths}
    if not truths:
        return written
    before = dict(zip(scans, base.autoencode(torch.stack([*scans.values()])), strict=True))
    after = base.autoencode(torch.stack([*truths.values()]))
    for row, seen in zip(truths, after, strict=True):
        edit = edits[row]
        pixels, frame = edit.scanned.pixels, edit.scanned.frame
        written[row] = render(pixels, frame, before[edit.scan], seen, modality.image.rendering)
    return written


def written_as_files(
    modality: Modality, edits: Sequence[EvaluationEdit], reconstructions: Tensor, samples: Tensor
) -> list[np.ndarray]:
    """An editor's answers as `ld-generate` writes them: the mean over the seeds.

    Args:
        modality: says how an answer becomes pixels of the scan.
        edits: M edits.
        reconstructions: of each baseline, `(N,1,S,S)`.
        samples: each edit's answers under K seeds, `(M,K,1,S,S)`.
    """
    written: list[np.ndarray] = []
    for edit, answers in zip(edits, samples, strict=True):
        scan, before = edit.scanned, reconstructions[edit.scan]
        rendered = [render(scan.pixels, scan.frame, before, answer, modality.image.rendering) for answer in answers]
        written.append(np.mean(rendered, axis=0))
    return written
