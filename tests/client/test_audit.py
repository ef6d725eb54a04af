"""Audits of a model that learned by heart: what leaks is found, what does not leak is not."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
import torch

from ld_client.audit.canaries import CanaryTest, Rehearsal, audit_canaries, cast_rehearsal
from ld_client.audit.membership import (
    LOSS_THRESHOLD,
    PROXIMAL_INITIALISATION,
    AttackOptions,
    Scans,
    audit_membership,
    grid_losses,
    mean_by_patient,
    patient_scores,
)
from ld_client.audit.statistics import AuditError
from ld_common.diffusion.base_model import Denoiser, load_denoiser
from ld_common.diffusion.conditioning import Condition
from ld_common.diffusion.drift import FORMULATIONS, LatentDrift
from ld_common.diffusion.loss import denoising_loss
from ld_common.imaging.modality import Modality

CANARIES = 32
OPTIONS = AttackOptions(points=8, seed=3)


@dataclass(frozen=True, eq=False)
class Overfitted:
    """A base, what training by heart made of it, and the patients of whom coins chose those who were learned."""

    base: Denoiser
    tuned: Denoiser
    cast: Rehearsal

    def side(self, included: bool) -> Scans:
        return self.cast.canaries.take((self.cast.included == included).nonzero().flatten().tolist())


def patients(modality: Modality, seed: int) -> Scans:
    """White noise with prompts, one scan a patient."""
    latents = torch.randn((CANARIES, 4, 8, 8), generator=torch.Generator().manual_seed(seed))
    ages = torch.randint(50, 90, (CANARIES,), generator=torch.Generator().manual_seed(seed)).tolist()
    prompts = [modality.prompt({"age": age, "sex": "F", "diagnosis": "CN"}) for age in ages]
    return Scans(latents, prompts, [f"patient-{number:02d}" for number in range(CANARIES)])


@pytest.fixture(scope="module")
def overfitted(tiny_base: Path, brain_mri: Modality) -> Overfitted:
    base = load_denoiser(str(tiny_base))
    cast = cast_rehearsal(patients(brain_mri, 1), CANARIES, seed=1)
    tuned = replace(base, unet=copy.deepcopy(base.unet))
    learn_by_heart(tuned, cast.training, steps=100)
    return Overfitted(base, tuned, cast)


def learn_by_heart(model: Denoiser, scans: Scans, steps: int) -> None:
    generator, levels = torch.Generator().manual_seed(0), model.scheduler.alphas_cumprod
    optimizer = torch.optim.AdamW(model.unet.requires_grad_(True).parameters(), lr=4e-3)
    with torch.no_grad():
        contexts = model.embed(scans.prompts)
    for _ in range(steps):
        rows = torch.randint(len(scans), (16,), generator=generator)
        timesteps = torch.randint(len(levels), (16,), generator=generator)
        noise = torch.randn((16, *scans.latents.shape[1:]), generator=generator)
        told = Condition(contexts[rows])
        loss = denoising_loss(model.unet, levels, "epsilon", scans.latents[rows], told, timesteps, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.unet.requires_grad_(False)


@pytest.mark.slow
def test_members_of_an_overfitted_model_are_found(overfitted: Overfitted) -> None:
    seen: list[tuple[int, int]] = []
    reports = audit_membership(
        overfitted.base,
        overfitted.tuned,
        overfitted.side(True),
        overfitted.side(False),
        OPTIONS,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert [report.attack for report in reports] == [LOSS_THRESHOLD, PROXIMAL_INITIALISATION]
    for report in reports:
        assert report.members + report.held_out == CANARIES
        assert report.area.value > 0.9
        assert report.area.low > 0.6
    assert seen == sorted(seen)
    assert seen[-1] == (2 * CANARIES, 2 * CANARIES)
    assert json.loads(json.dumps(asdict(reports[0])))["area"]["value"] == reports[0].area.value


@pytest.mark.slow
def test_a_model_that_learned_of_neither_side_tells_nothing(overfitted: Overfitted, brain_mri: Modality) -> None:
    unknown = replace(overfitted, cast=cast_rehearsal(patients(brain_mri, 2), CANARIES, seed=2))
    reports = audit_membership(unknown.base, unknown.tuned, unknown.side(True), unknown.side(False), OPTIONS, 0.999)
    assert all(report.area.low < 0.5 < report.area.high for report in reports)
    few = [Scans(side.latents[:3], side.prompts[:3], side.pseudonyms[:3]) for side in map(unknown.side, (True, False))]
    same = audit_membership(unknown.base, unknown.base, *few, OPTIONS)
    assert all(report.area.value == 0.5 for report in same)


@pytest.mark.parametrize("attack", [LOSS_THRESHOLD, PROXIMAL_INITIALISATION])
@pytest.mark.slow
def test_scores_depend_on_scan_and_options_alone(overfitted: Overfitted, attack: str) -> None:
    scans = overfitted.side(True)
    few = Scans(scans.latents[:5], scans.prompts[:5], scans.pseudonyms[:5])
    back = Scans(few.latents.flip(0), few.prompts[::-1], few.pseudonyms[::-1])
    models = overfitted.base, overfitted.tuned
    first = patient_scores(attack, *models, few, OPTIONS)
    assert patient_scores(attack, *models, few, OPTIONS) == first
    for other in (patient_scores(attack, *models, back, OPTIONS), patient_scores(attack, *models, few, batch_of(3))):
        assert other == pytest.approx(first, rel=1e-3, abs=1e-5)


def batch_of(size: int) -> AttackOptions:
    return replace(OPTIONS, batch_size=size)


@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize("attack", [LOSS_THRESHOLD, PROXIMAL_INITIALISATION])
@pytest.mark.slow
def test_drift_enters_scores_as_it_entered_training(overfitted: Overfitted, attack: str, formulation: str) -> None:
    scans = overfitted.side(True)
    plain = Scans(scans.latents[:2], scans.prompts[:2], scans.pseudonyms[:2])
    models, options = (overfitted.base, overfitted.tuned), replace(OPTIONS, points=4)
    expected = patient_scores(attack, *models, plain, options)
    shifted = replace(plain, drift=LatentDrift(torch.full((1, 1, 1), 3.0), formulation))
    found = patient_scores(attack, *models, shifted, options)
    assert (found == expected) is (formulation == "prior")
    each = replace(plain, drift=LatentDrift(torch.full((2, 4, 8, 8), 3.0), formulation))
    assert patient_scores(attack, *models, each, options) == pytest.approx(found, rel=1e-3, abs=1e-5)
    if formulation == "centred":
        moved = replace(shifted, latents=plain.latents + 3.0)
        assert patient_scores(attack, *models, moved, options) == pytest.approx(expected, rel=1e-2, abs=1e-4)


def test_a_patients_score_is_the_mean_over_visits() -> None:
    assert mean_by_patient([1.0, 5.0, 3.0], ["b", "a", "b"]) == {"a": 5.0, "b": 2.0}


@pytest.mark.slow
def test_the_grid_is_the_training_loss(overfitted: Overfitted) -> None:
    scans = overfitted.side(True)
    many = replace(OPTIONS, points=200, batch_size=50)
    with torch.no_grad():
        measured = grid_losses(overfitted.tuned, scans.latents[:1], scans.prompts[:1], None, many)
        generator, levels = torch.Generator().manual_seed(9), overfitted.tuned.scheduler.alphas_cumprod
        context = overfitted.tuned.embed([scans.prompts[0]]).expand(200, -1, -1)
        drawn = torch.randint(1000, (200,), generator=generator), torch.randn((200, 4, 8, 8), generator=generator)
        latents = scans.latents[:1].expand(200, -1, -1, -1)
        trained = denoising_loss(overfitted.tuned.unet, levels, "epsilon", latents, Condition(context), *drawn)
    assert float(measured[0]) == pytest.approx(float(trained), rel=0.15)


@pytest.mark.slow
def test_patients_on_both_sides_are_refused(overfitted: Overfitted) -> None:
    scans = overfitted.side(True)
    with pytest.raises(AuditError, match="split by patient"):
        audit_membership(overfitted.base, overfitted.tuned, scans, scans)
    with pytest.raises(AuditError, match="give one each"):
        Scans(scans.latents, scans.prompts[1:], scans.pseudonyms)


def test_coins_decide_whose_visits_take_part(brain_mri: Modality) -> None:
    one = patients(brain_mri, 5)
    visits = one.take([row for row in range(CANARIES) for _ in range(3)])
    cast, again = (cast_rehearsal(visits, 20, seed=5) for _ in range(2))
    assert torch.equal(cast.included, again.included)
    assert cast.canaries.pseudonyms == again.canaries.pseudonyms
    names = sorted(set(cast.canaries.pseudonyms))
    assert len(names) == 20 == len(cast.included)
    assert len(cast.canaries) == 60
    out = {name for name, coin in zip(names, cast.included.tolist(), strict=True) if not coin}
    assert 2 < len(out) < 18
    assert set(cast.training.pseudonyms) == set(visits.pseudonyms) - out
    assert len(cast.training) == 3 * (CANARIES - len(out))
    assert len(cast_rehearsal(visits, 1000, seed=5).included) == CANARIES
    with pytest.raises(AuditError, match="use 1 or more"):
        cast_rehearsal(visits, 0, seed=5)
    sizes = [int(cast_rehearsal(visits, CANARIES, seed=seed).included.sum()) for seed in range(40)]
    assert 14.5 < sum(sizes) / len(sizes) < 17.5


def test_a_take_keeps_each_scans_own_drift(brain_mri: Modality) -> None:
    one = patients(brain_mri, 5)
    shared, own = LatentDrift(torch.ones(4, 1, 1)), LatentDrift(torch.arange(CANARIES * 4.0).view(CANARIES, 4, 1, 1))
    assert replace(one, drift=shared).take([3, 1]).drift is shared
    taken = replace(one, drift=own).take([3, 1]).drift
    assert taken is not None
    assert torch.equal(taken.mean, own.mean[[3, 1]])


@pytest.mark.slow
def test_canaries_of_an_overfitted_model_show_a_leak_and_no_others_do(
    overfitted: Overfitted, brain_mri: Modality
) -> None:
    cast, models = overfitted.cast, (overfitted.base, overfitted.tuned)
    found = audit_canaries(*models, cast.canaries, cast.included, options=OPTIONS)
    assert 1.0 < found.epsilon <= found.ceiling
    assert found.canaries == CANARIES
    other = cast_rehearsal(patients(brain_mri, 6), CANARIES, seed=6)
    assert audit_canaries(*models, other.canaries, other.included, CanaryTest(confidence=0.999), OPTIONS).epsilon == 0
    assert json.loads(json.dumps(asdict(found)))["canaries"] == CANARIES
