"""What is measured of one way of editing one release: whether its answers are true, and at what cost to the patient.

composition    an edit that asks for nothing returns the scan, once and ten times over
reversibility  there and back again is the scan
effectiveness  a predictor that learned from real pictures reads off what was asked for
minimality     how much changes, and how much of it outside the region that truly does
realism        distance of the answers' features from real pictures', beside as many real pictures'
prediction     a baseline edited to its follow-up's attributes against the follow-up itself, and against copying
truth          of rendered patients, the true counterfactual

The first four are the axioms of arXiv 2303.01274 and measures of their failure. Every picture that is compared went
through the VAE, truth and follow-up included: what it loses is no editor's doing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from monai.metrics.regression import MultiScaleSSIMMetric, SSIMMetric
from torch import Tensor

from ld_common.core.config import require
from ld_common.core.seeding import numpy_generator, torch_generator
from ld_common.diffusion.base_model import BaseModel
from ld_common.editing.base import Editor
from ld_common.editing.counterfactuals import Counterfactuals, draw_counterfactuals, draw_several, edit_to
from ld_common.imaging.scan_table import ScanTable
from ld_common.metrics.features import extract_features, load_extractor
from ld_common.metrics.frechet import frechet_distance, kernel_distance
from ld_common.metrics.image import psnr
from ld_common.metrics.registry import BIOMARKERS
from ld_common.release.release import Release, edit_drift
from ld_evaluate.predictors import Predictors, train_predictors
from ld_simulations.benchmarks.counterfactuals.data import EvaluationData
from ld_simulations.benchmarks.latent_drift.pictures import decode
from ld_simulations.evaluation import measure, summarize

FEATURES = "efficientnet_lite0"
SCALES = (0.071, 0.453, 0.476)
"""The first three weights of MS-SSIM (Wang 2003) over their sum: a picture of 64 pixels has room for three scales."""
SSIM_WINDOW = 7
DRAWS = 2000
"""Of other patients, for an interval."""
Metrics = dict[str, float]


@dataclass
class JudgeConfig:
    """How much is tried of what costs most."""

    cycles: int = 10
    """How often an edit that asks for nothing is repeated."""
    cycled: int = 4
    """On so many baselines, as are edits there and back."""
    predictor_steps: int = 300

    def __post_init__(self) -> None:
        for name in ("cycles", "cycled", "predictor_steps"):
            require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}: it must be above 0")


@dataclass(frozen=True, eq=False)
class Judged:
    """The numbers of one way of editing, and what it drew."""

    metrics: Metrics
    by_edit: dict[str, dict[str, float]]
    drawn: Counterfactuals
    """Answers to the questions of the data, then follow-ups predicted."""


class CounterfactualJudge:
    """What is known of one set of scans, whatever is judged on it."""

    def __init__(
        self, base: BaseModel, data: EvaluationData, reference: ScanTable | None, config: JudgeConfig, seed: int = 0
    ) -> None:
        """Train the predictors and take the features of real pictures.

        Args:
            base: the plain base, for its VAE.
            data: the scans and questions.
            reference: real scans of other patients, whom the release may have been trained on; without them neither
                effectiveness nor realism is measured.
            config: how much is tried.
            seed: of the predictors, and of which real pictures are compared with each other.
        """
        self.data, self.config = data, config
        side, view = base.resolution, data.modality.image
        self.pixel_mm = view.field_of_view_mm / side if view.field_of_view_mm else None
        self.counts = {
            "patients": len(data.baselines.patients),
            "follow_ups": len(data.owners),
            "questions": len(data.asked),
            "reference_scans": 0 if reference is None else len(reference.images),
            "reference_patients": 0 if reference is None else len(set(reference.patients)),
        }
        self.predictors, self.real = Predictors({}, {}), torch.empty(0)
        if reference is not None:
            real = decode(base, reference.images)
            self.predictors = train_predictors(data.modality, real, reference.attributes, seed, config.predictor_steps)
            self.extractor = load_extractor(FEATURES)
            self.real = extract_features(self.extractor, real)
        self.later = decode(base, data.follow_ups.images) if data.owners else data.follow_ups.images
        self.baselines = decode(base, data.baselines.images)
        self.references = self._references(seed)

    def judge(
        self,
        base: BaseModel,
        release: Release,
        edit: Editor,
        seeds: Sequence[int] = (0,),
        progress: Callable[[int], None] = lambda done: None,
    ) -> Judged:
        """Draw every answer and measure it.

        Args:
            base: the base with the release's adapter.
            release: the release.
            edit: how edits are drawn.
            seeds: of the noise of editors that draw any; of several, the mean of their answers is judged.
            progress: as in `draw_counterfactuals`.
        """
        data, describe = self.data, self.data.modality.prompt
        own = data.baselines.attributes
        edits = [edit_to(data.modality, one.scan, own[one.scan], one.target, edit.delta) for one in data.asked]
        predicted = zip(data.owners, data.follow_ups.attributes, strict=True)
        edits += [edit_to(data.modality, owner, own[owner], later, edit.delta) for owner, later in predicted]
        prompts, drift = [describe(one) for one in own], edit_drift(release)
        drawn, _ = draw_several(base, data.baselines.images, prompts, edits, edit, seeds, progress, drift)
        asked = len(data.asked)
        answers, later = drawn.images[:asked], drawn.images[asked:]
        metrics = self._composition(base, drawn, prompts, edit, release, seeds[0])
        metrics |= self._reversibility(base, drawn, edit, release, seeds)
        metrics |= self._effectiveness(answers)
        owners = torch.tensor([one.scan for one in data.asked])
        metrics["change"] = float((answers - drawn.reconstructions[owners]).abs().mean() / 2)
        if len(self.real):
            features = extract_features(self.extractor, answers)
            metrics["frechet"] = frechet_distance(features, self.real)
            metrics["kernel"] = kernel_distance(features, self.real)
        metrics |= self._prediction(later)
        by_edit: dict[str, dict[str, float]] = {}
        if data.phantom is not None:
            rows = measure(
                base,
                data.phantom,
                data.modality,
                data.baselines.images,
                data.truths,
                Counterfactuals(drawn.autoencoded, drawn.reconstructions, answers),
            )
            found = summarize(rows, growth_ceiling=1.0)
            kept = ("edit_direction_rate", "growth_ratio", "growth_correlation", "copy_gain_db", "identity_ratio")
            metrics |= {key: float(found[key]) for key in kept if np.isfinite(found[key])}
            groups = np.array([f"{case.hospital}/{case.patient}" for case in data.truths])
            metrics |= interval("copy_gain_db", groups, np.array([row["copy_gain_db"] for row in rows]))
            by_edit = found["by_edit"]
        return Judged(metrics, by_edit, drawn)

    def _composition(
        self,
        base: BaseModel,
        drawn: Counterfactuals,
        prompts: Sequence[str],
        edit: Editor,
        release: Release,
        seed: int,
    ) -> Metrics:
        scans, count = self.data.baselines.images, self.config.cycled
        gap = psnr(drawn.autoencoded, scans).mean() - psnr(drawn.reconstructions, scans).mean()
        plain = edited = scans[:count]
        for _ in range(self.config.cycles):
            plain = decode(base, plain)
            edited = draw_counterfactuals(
                base, edited, prompts[:count], [], edit, drift=edit_drift(release), seed=seed
            ).reconstructions
        many = psnr(plain, scans[:count]).mean() - psnr(edited, scans[:count]).mean()
        return {
            "null_edit_psnr_gap_db": float(gap),
            "null_edits_psnr_gap_db": float(many),
            "vae_psnr_db": float(psnr(drawn.autoencoded, scans).mean()),
        }

    def _reversibility(
        self, base: BaseModel, drawn: Counterfactuals, edit: Editor, release: Release, seeds: Sequence[int]
    ) -> Metrics:
        data = self.data
        rows = [row for row, one in enumerate(data.asked) if one.scan < self.config.cycled]
        before = drawn.autoencoded[[data.asked[row].scan for row in rows]]
        own = [data.baselines.attributes[data.asked[row].scan] for row in rows]
        there = [one | data.asked[row].target for one, row in zip(own, rows, strict=True)]
        edits = [
            edit_to(data.modality, number, now, then) for number, (now, then) in enumerate(zip(there, own, strict=True))
        ]
        shown = [data.modality.prompt(one) for one in there]
        back, _ = draw_several(base, drawn.images[rows], shown, edits, edit, seeds, drift=edit_drift(release))
        return {"reversal_psnr_db": float(psnr(back.images, before).mean())}

    def _effectiveness(self, answers: Tensor) -> Metrics:
        """How far edits of numbers went, as a share of what was asked, and how often a word was reached."""
        data, found = self.data, {}
        for name in self.predictors.numbers:
            rows = [row for row, one in enumerate(data.asked) if set(one.target) == {name}]
            if not rows:
                continue
            scans = [data.asked[row].scan for row in rows]
            asked = torch.tensor(
                [float(data.asked[row].target[name]) - float(data.baselines.attributes[scan][name])
                 for row, scan in zip(rows, scans, strict=True)]
            )  # fmt: skip
            moved = self.predictors.number(name, answers[rows]) - self.predictors.number(name, self.baselines[scans])
            found[f"{name}_moved"] = float((moved * asked).sum() / asked.square().sum())
        for name in self.predictors.words:
            rows = [row for row, one in enumerate(data.asked) if set(one.target) == {name}]
            if rows:
                said = self.predictors.word(name, list(data.modality.attributes[name].categories), answers[rows])
                wanted = [data.asked[row].target[name] for row in rows]
                right = [one == other for one, other in zip(said, wanted, strict=True)]
                found[f"{name}_reached"] = float(np.mean(right))
        return found

    def _prediction(self, predicted: Tensor) -> Metrics:
        if not len(predicted):
            return {}
        copied = self.baselines[self.data.owners]
        found: Metrics = {}
        for name, pictures in (("followup", predicted), ("copy", copied)):
            found |= {
                f"{name}_psnr_db": float(psnr(pictures, self.later).mean()),
                f"{name}_ssim": float(_ssim(pictures, self.later)),
                f"{name}_ms_ssim": float(_ms_ssim(pictures, self.later)),
            }
        errors: dict[str, np.ndarray] = {}
        for name, pictures in (("followup", predicted), ("copy", copied)):
            for structure in self.data.modality.biomarkers:
                if self.pixel_mm is not None:
                    seen, true = (BIOMARKERS.load(structure)(own, self.pixel_mm) for own in (pictures, self.later))
                    errors[f"{name}_{structure}_error_mm2"] = (seen - true).abs().double().numpy()
        for structure in self.data.modality.biomarkers if errors else []:
            own, copy = (errors[f"{name}_{structure}_error_mm2"] for name in ("followup", "copy"))
            if copy.sum() > 0:
                key = f"followup_{structure}_error_cut"
                found[key] = float(1 - own.sum() / copy.sum())
                found |= interval(key, np.arange(len(own)), copy - own, copy)
        return found | {key: float(values.mean()) for key, values in errors.items()}

    def _references(self, seed: int) -> Metrics:
        """What real pictures score on the same measures."""
        data = self.data
        found: Metrics = {}
        if not len(self.real):
            return found
        order = torch.randperm(len(self.real), generator=torch_generator(seed, "real against real"))
        few = order[: min(len(data.asked), len(order) // 2)]
        rest = order[len(few) :]
        found["frechet"] = frechet_distance(self.real[few], self.real[rest])
        found["kernel"] = kernel_distance(self.real[few], self.real[rest])
        for name in self.predictors.numbers:
            said = self.predictors.number(name, self.baselines)
            true = torch.tensor([float(own[name]) for own in data.baselines.attributes])
            found[f"{name}_error"] = float((said - true).abs().mean())
            found[f"{name}_error_by_chance"] = float((true - self.predictors.numbers[name][1]).abs().mean())
        for name in self.predictors.words:
            words = self.predictors.word(name, list(data.modality.attributes[name].categories), self.baselines)
            right = [word == own[name] for word, own in zip(words, data.baselines.attributes, strict=True)]
            found[f"{name}_right"] = float(np.mean(right))
            shares = Counter(own[name] for own in data.baselines.attributes)
            found[f"{name}_right_by_chance"] = max(shares.values()) / len(right)
        return found


def interval(key: str, groups: np.ndarray, values: np.ndarray, weights: np.ndarray | None = None) -> Metrics:
    """`<key>_low` and `<key>_high`: where 95 % of the means lie when other patients of these are drawn (bootstrap).

    Args:
        key: what is meant.
        groups: whose each value is, `(N,)`.
        values: `(N,)`.
        weights: what the sum of values is divided by, `(N,)`; None for their number.
    """
    own = np.unique(groups, return_inverse=True)[1]
    above = np.bincount(own, values)
    below = np.bincount(own, weights)
    drawn = numpy_generator(0, "interval").integers(0, len(above), (DRAWS, len(above)))
    with np.errstate(invalid="ignore", divide="ignore"):
        means = above[drawn].sum(1) / below[drawn].sum(1)
    low, high = np.quantile(means[np.isfinite(means)], (0.025, 0.975))
    return {f"{key}_low": float(low), f"{key}_high": float(high)}


def _ssim(first: Tensor, second: Tensor) -> Tensor:
    metric = SSIMMetric(spatial_dims=2, data_range=2.0, win_size=SSIM_WINDOW)
    return torch.as_tensor(metric(first, second)).mean()


def _ms_ssim(first: Tensor, second: Tensor) -> Tensor:
    metric = MultiScaleSSIMMetric(spatial_dims=2, data_range=2.0, kernel_size=SSIM_WINDOW, weights=SCALES)
    return torch.as_tensor(metric(first, second)).mean()
