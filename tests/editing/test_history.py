"""Answers of a longitudinal drift follow the patient's earlier visits, as far as these say something."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ld_common.core.errors import ConfigError, RequestError
from ld_common.diffusion.base_model import BaseModel, load_base
from ld_common.diffusion.longitudinal import LongitudinalDrift
from ld_common.editing.counterfactuals import Edit, Past, attribute_change, draw_counterfactuals, edit_to, past_of
from ld_common.editing.drift import DriftEditor
from ld_common.editing.history import EarlierScan, ScanHistory, history_warnings, read_history
from ld_common.editing.moves import Mover
from ld_common.editing.registry import change_editor, read_editor
from ld_common.imaging.geometry import Scan
from ld_common.imaging.modality import ImageConfig, Modality
from tests.support.longitudinal import random_drift

NOW = {"age": 70.0, "sex": "F", "diagnosis": "CN"}
NEVER, AT_ONCE = 1e9, 1e-9


@pytest.fixture(scope="module")
def base(smallest_base: Path) -> BaseModel:
    return load_base(str(smallest_base))


@pytest.fixture(scope="module")
def drift(base: BaseModel, brain_mri: Modality) -> LongitudinalDrift:
    return random_drift(brain_mri, base.latent_shape)


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    """Four visits, the last one now."""
    generator = torch.Generator().manual_seed(0)
    start, way = (torch.rand(1, 16, 16, generator=generator) - 0.5 for _ in range(2))
    return torch.stack([start + 0.1 * visit * way for visit in range(4)])


@pytest.fixture(scope="module")
def history(pictures: Tensor) -> ScanHistory:
    return ScanHistory(pictures[:3], [6.0, 4.0, 2.0])


def brightness(pictures: Tensor) -> Tensor:
    return pictures.mean((1, 2, 3))


@pytest.fixture
def later(brain_mri: Modality) -> Edit:
    return edit_to(brain_mri, 0, NOW, {"age": 80.0})


def mover(
    drift: LongitudinalDrift, base: BaseModel, pictures: Tensor, history: ScanHistory, **options: float
) -> Callable[[Edit], Tensor]:
    biomarker = None if options.get("own_growth_half", NEVER) == NEVER else brightness
    moves = Mover(drift, DriftEditor(**options), base, {0: history}, pictures[3:], biomarker)  # type: ignore[arg-type]
    latents = base.encode(pictures[3:])[0]

    def move(edit: Edit) -> Tensor:
        assert edit.asked is not None
        return moves.move(0, latents, edit.asked)

    return move


def test_slope_and_spread_are_those_of_least_squares(history: ScanHistory) -> None:
    values = torch.tensor([1.0, 2.0, 5.0, 6.0], dtype=torch.float64)
    expected = np.polyfit([-6, -4, -2, 0], values.numpy(), 1)[0]
    assert float(history.slope(values)) == pytest.approx(expected)
    assert history.spread == pytest.approx(20.0)


def test_a_history_that_counts_nothing_gives_the_answer_of_one_scan(
    drift: LongitudinalDrift, base: BaseModel, pictures: Tensor, history: ScanHistory, later: Edit
) -> None:
    assert later.asked is not None
    latents = base.encode(pictures[3:])[0]
    alone = drift.change(latents, later.asked, 1.25, 1.5)
    ignored = mover(drift, base, pictures, history, own_slope_half=NEVER)(later)
    assert torch.allclose(ignored, alone, atol=1e-5)
    followed = mover(drift, base, pictures, history, own_slope_half=4.0)(later)
    assert float((followed - alone).norm() / alone.norm()) > 0.1


def test_a_history_that_counts_fully_continues_the_patients_own_slope_beyond_the_drift(
    drift: LongitudinalDrift,
    base: BaseModel,
    pictures: Tensor,
    history: ScanHistory,
    later: Edit,
    brain_mri: Modality,
) -> None:
    assert later.asked is not None
    latents = base.encode(pictures)
    full = mover(drift, base, pictures, history, own_slope_half=AT_ONCE)(later)
    own = 10.0 * history.slope(latents - latents[3])
    predicted = torch.stack(
        [
            drift.change(latents[3], attribute_change(brain_mri, NOW, NOW | {"age": 70.0 + time}), 1.25, 1.5)
            for time in history.times.tolist()
        ]
    )
    expected = drift.change(latents[3], later.asked, 1.25, 1.5) + own - 10.0 * history.slope(predicted)
    assert torch.allclose(full, expected, atol=1e-4)


def test_the_drawn_growth_is_the_patients_own_line(
    drift: LongitudinalDrift, base: BaseModel, pictures: Tensor, history: ScanHistory, later: Edit
) -> None:
    latents = base.encode(pictures[3:])[0]

    def growth(move: Tensor) -> float:
        before, after = brightness(base.decode(torch.stack([latents, latents + move]))).tolist()
        return float(after - before)

    population = growth(mover(drift, base, pictures, history, own_slope_half=NEVER)(later))
    goal = 1.5 * population
    line = torch.tensor([goal / 10 * time for time in history.times.tolist()])
    told = Mover(
        drift,
        DriftEditor(own_slope_half=NEVER, own_growth_half=AT_ONCE),
        base,
        {0: history},
        pictures[3:],
        lambda shown: line if len(shown) == 4 else brightness(shown),
    )
    assert later.asked is not None
    assert growth(told.move(0, latents, later.asked)) == pytest.approx(goal, rel=0.03)


def test_growth_is_measured_on_what_is_written(
    drift: LongitudinalDrift, base: BaseModel, pictures: Tensor, history: ScanHistory, later: Edit
) -> None:
    assert later.asked is not None
    latents, editor = base.encode(pictures[3:])[0], DriftEditor(own_slope_half=NEVER, own_growth_half=AT_ONCE)

    def moved(write: Callable[[Tensor, Tensor], Tensor], goal: float) -> Tensor:
        line = torch.tensor([goal / 10 * time for time in history.times.tolist()])
        told = replace(history, write=write)

        def measure(shown: Tensor) -> Tensor:
            return line if len(shown) == 4 else brightness(shown)

        assert later.asked is not None
        return Mover(drift, editor, base, {0: told}, pictures[3:], measure).move(0, latents, later.asked)

    def whole(before: Tensor, after: Tensor) -> Tensor:
        return pictures[3] + after - before

    def half(before: Tensor, after: Tensor) -> Tensor:
        return pictures[3] + 0.5 * (after - before)

    def growth(move: Tensor, write: Callable[[Tensor, Tensor], Tensor]) -> float:
        written = write(*base.decode(torch.stack([latents, latents + move])))
        return float(brightness(written[None]) - brightness(pictures[3:]))

    goal = 0.8 * growth(drift.change(latents, later.asked, 1.25, 1.5), whole)
    for write in (whole, half):  # three steps, through an untrained decoder
        assert growth(moved(write, goal), write) == pytest.approx(goal, rel=0.1)


def test_one_factor_scales_the_slices_of_a_volume_until_their_summed_growth_is_the_patients_own(
    drift: LongitudinalDrift, base: BaseModel, pictures: Tensor, history: ScanHistory, later: Edit
) -> None:
    assert later.asked is not None
    asked, slices = later.asked, torch.stack([pictures[3], 0.8 * pictures[3].flip(-1), pictures[3].flip(-2)])
    latents, editor = base.encode(slices), DriftEditor(own_slope_half=NEVER, own_growth_half=AT_ONCE)
    alone = [drift.change(latent, asked, 1.25, 1.5) for latent in latents]

    def growths(moves: list[Tensor]) -> list[float]:
        befores, afters = (brightness(base.decode(shown)) for shown in (latents, latents + torch.stack(moves)))
        return (afters - befores).tolist()

    # the middle slice's visits do not show the structure, the others grow by different amounts
    goals = iter([1.5 * growths(alone)[0], float("nan"), 1.2 * growths(alone)[2]])

    def measure(shown: Tensor) -> Tensor:
        return next(goals) / 10 * history.times if len(shown) == 4 else brightness(shown)

    moves = Mover(drift, editor, base, dict.fromkeys(range(3), history), slices, measure, volume=latents)
    moved = [moves.move(row, latents[row], asked) for row in range(3)]
    factors = [float((move * plain).sum() / plain.square().sum()) for move, plain in zip(moved, alone, strict=True)]
    assert factors == [pytest.approx(factors[0], rel=1e-4)] * 3
    drawn, plain = growths(moved), growths(alone)
    assert drawn[0] + drawn[2] == pytest.approx(1.5 * plain[0] + 1.2 * plain[2], rel=0.05)


def test_a_structure_that_is_not_seen_scales_nothing(
    drift: LongitudinalDrift, base: BaseModel, pictures: Tensor, history: ScanHistory, later: Edit
) -> None:
    assert later.asked is not None
    latents, editor = base.encode(pictures[3:])[0], DriftEditor(own_growth_half=AT_ONCE)
    alone = Mover(drift, editor, base, {0: history}, pictures[3:]).move(0, latents, later.asked)
    for areas in ([1.0, 2.0, torch.nan, 4.0], [torch.nan] * 4):
        unseen = Mover(
            drift,
            editor,
            base,
            {0: history},
            pictures[3:],
            lambda shown, areas=areas: torch.tensor(areas[: len(shown)]),  # type: ignore[misc]
        )
        assert torch.equal(unseen.move(0, latents, later.asked), alone)


def test_categories_alone_take_no_history(
    drift: LongitudinalDrift, base: BaseModel, pictures: Tensor, history: ScanHistory, brain_mri: Modality
) -> None:
    other_sex = edit_to(brain_mri, 0, NOW, {"sex": "M"})
    assert other_sex.asked is not None
    told = mover(drift, base, pictures, history, own_slope_half=AT_ONCE)(other_sex)
    alone = drift.change(base.encode(pictures[3:])[0], other_sex.asked, 1.25, 1.5)
    assert torch.equal(told, alone)


def test_answers_in_a_batch_keep_to_their_own_history(
    drift: LongitudinalDrift, base: BaseModel, pictures: Tensor, history: ScanHistory, brain_mri: Modality
) -> None:
    edits = [edit_to(brain_mri, row, NOW, {"age": 80.0}) for row in (0, 1)]
    scans, prompts = pictures[[3, 3]], [brain_mri.prompt(NOW)] * 2
    told = draw_counterfactuals(base, scans, prompts, edits, DriftEditor(), drift=drift, past=Past({1: history}))
    alone = draw_counterfactuals(base, scans, prompts, edits, DriftEditor(), drift=drift)
    assert torch.equal(told.images[0], alone.images[0])
    assert not torch.allclose(told.images[1], alone.images[1], atol=1e-3)


def test_the_null_edit_is_the_scan(drift: LongitudinalDrift, base: BaseModel, pictures: Tensor, later: Edit) -> None:
    drawn = draw_counterfactuals(base, pictures[3:], ["scan"], [later], DriftEditor(guidance_scale=0.0), drift=drift)
    assert torch.equal(drawn.images, drawn.reconstructions)
    assert torch.equal(drawn.reconstructions, drawn.autoencoded)


def test_an_editor_without_drift_or_history_says_so(
    drift: LongitudinalDrift, base: BaseModel, pictures: Tensor, history: ScanHistory, later: Edit
) -> None:
    with pytest.raises(ConfigError, match=r"drift\.shape longitudinal"):
        draw_counterfactuals(base, pictures[3:], ["scan"], [later], DriftEditor())
    ddim = read_editor({"num_inference_steps": 2})
    with pytest.raises(ConfigError, match="takes no history"):
        draw_counterfactuals(base, pictures[3:], ["scan"], [later], ddim, drift=drift, past=Past({0: history}))
    with pytest.raises(ConfigError, match="no reverse steps"):
        shifted = replace(later, delta=0.1)
        draw_counterfactuals(base, pictures[3:], ["scan"], [shifted], DriftEditor(), drift=drift)


def test_options_that_do_nothing_are_refused_and_not_carried_over() -> None:
    with pytest.raises(ConfigError, match="noise_fraction does nothing with editor drift"):
        read_editor({"name": "drift", "noise_fraction": 0.5})
    ddim = read_editor({"noise_fraction": 0.5, "time_scale": 1.1})
    changed = change_editor(ddim, "drift")
    assert isinstance(changed, DriftEditor)
    assert changed.time_scale == 1.1
    with pytest.raises(ConfigError, match="own_slope_half"):
        read_editor({"name": "drift", "own_slope_half": 0.0})


# Reading


def scan(date: str = "", patient: str = "", age: float | None = None) -> Scan:
    pixels = np.random.default_rng(0).random((20, 20)).astype(np.float32)
    day = datetime.date.fromisoformat(date) if date else None
    return Scan(pixels, (10.0, 10.0), {} if age is None else {"age": age}, patient_id=patient, study_date=day)


def read(now: Scan, *earlier: EarlierScan) -> ScanHistory | None:
    return read_history(now, 70.0, earlier, 16, ImageConfig())


def test_times_come_from_the_dates_the_given_age_or_the_file_in_this_order() -> None:
    now = scan("2020-01-01", "P1", 70.0)
    for earlier, years in (
        (EarlierScan(scan("2018-01-01", "P1", 66.0)), 1.999),
        (EarlierScan(scan("2018-01-01", "", 70.0), 68.2), 1.999),
        (EarlierScan(scan("", "P1", 66.0), 65.5), 4.5),
        (EarlierScan(scan("", "", 66.0)), 4.0),
    ):
        history = read(now, earlier)
        assert history is not None
        assert list(history.years) == [pytest.approx(years, abs=1e-3)]
    assert read(now) is None


def test_visits_are_put_in_order() -> None:
    history = read(scan(), EarlierScan(scan(), 68.0), EarlierScan(scan(), 62.0), EarlierScan(scan(), 65.0))
    assert history is not None
    assert list(history.years) == [8.0, 5.0, 2.0]


@pytest.mark.parametrize(
    ("earlier", "words"),
    [
        (EarlierScan(scan("2018-01-01", "P2")), "another patient"),
        (EarlierScan(scan("2021-01-01", "P1")), "not earlier"),
        (EarlierScan(scan("2020-01-01", "P1")), "not earlier"),
        (EarlierScan(scan("", "P1"), 71.0), "not earlier"),
        (EarlierScan(scan("", "P1")), "SCAN@AGE"),
        (EarlierScan(scan("2018-01-01", "P1"), 60.0), "contradicts the dates"),
    ],
)
def test_what_is_no_earlier_visit_of_the_patient_is_refused(earlier: EarlierScan, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        read(scan("2020-01-01", "P1"), earlier)


def test_a_short_history_is_said_to_be_one() -> None:
    short = read(scan(), EarlierScan(scan(), 69.5))
    long = read(scan(), EarlierScan(scan(), 66.0))
    assert short is not None and long is not None
    assert "0.5 years" in history_warnings(short)[0]
    assert history_warnings(long) == []


def test_no_history_is_no_past(brain_mri: Modality, history: ScanHistory) -> None:
    assert past_of(brain_mri, {}) is None
    past = past_of(brain_mri, {0: history})
    assert past is not None and past.area is not None and past.edge is not None
    assert past.area(torch.rand(2, 1, 32, 32) * 2 - 1).shape == (2,)
