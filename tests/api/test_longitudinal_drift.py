"""A longitudinal drift fitted in Python to visits at hand, and the pipeline that answers by it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ld_common import BaseModel, CounterfactualPipeline, LongitudinalDrift, fit_longitudinal_drift, load_base
from ld_common.core.errors import RequestError
from ld_common.imaging.modality import Modality


@dataclass
class Visits:
    """Scans of 24 patients of two sites with three visits each, whose latents move along one direction a year."""

    latents: Tensor
    attributes: list[dict[str, Any]]
    patients: list[str]
    days: list[float]
    sites: list[str]


@pytest.fixture(scope="module")
def base(smallest_base: Path) -> BaseModel:
    return load_base(str(smallest_base))


@pytest.fixture(scope="module")
def brain_mri(brain_mri: Modality) -> Modality:
    """Without mirror images: the latents here are random, so that their mirror images follow no law."""
    return replace(brain_mri, image=replace(brain_mri.image, symmetric=False))


@pytest.fixture(scope="module")
def way(base: BaseModel) -> Tensor:
    return torch.randn(base.latent_shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def visits(base: BaseModel, way: Tensor) -> Visits:
    generator = torch.Generator().manual_seed(0)
    table = Visits(torch.empty(0, *base.latent_shape), [], [], [], [])
    rows = []
    for patient in range(24):
        start, site = torch.randn(base.latent_shape, generator=generator), ("aster", "birch")[patient % 2]
        for visit in range(3):
            age = 55.0 + patient + 2 * visit
            rows.append(0.3 * start + 0.1 * (age - 60) * way + (site == "birch"))
            table.attributes.append({"age": age, "sex": "FM"[patient // 2 % 2], "diagnosis": "CN", "note": "ignored"})
            table.patients.append(f"patient {patient}")
            table.days.append(6000 + visit * 730.5)
            table.sites.append(site)
    table.latents = torch.stack(rows)
    return table


@pytest.fixture(scope="module")
def drift(visits: Visits, base: BaseModel, brain_mri: Modality) -> LongitudinalDrift:
    return fit_longitudinal_drift(
        visits.latents,
        visits.attributes,
        visits.patients,
        visits.days,
        modality=brain_mri,
        base=base,
        sites=visits.sites,
    )


def test_the_change_of_the_visits_is_found_and_drawn(
    drift: LongitudinalDrift, base: BaseModel, brain_mri: Modality, way: Tensor
) -> None:
    pipe = CounterfactualPipeline(base, brain_mri, drift=drift)
    picture = 2 * torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(2)) - 1
    source = {"age": 65, "sex": "F", "diagnosis": "CN"}
    older = pipe(picture, source, target={"age": 75})
    assert older.record["edit"]["name"] == "drift"
    assert older.unfamiliarity is not None
    same = pipe(picture, source, target={"age": 65})
    assert torch.equal(torch.from_numpy(same.image), torch.from_numpy(same.scan))
    from ld_common.editing.counterfactuals import attribute_change

    asked = attribute_change(brain_mri, {**source, "age": 65.0}, {**source, "age": 66.0})
    change = drift.change(0.5 * way, asked)
    assert float((change - 0.1 * way).norm() / (0.1 * way).norm()) < 0.1


@pytest.mark.slow
def test_days_may_start_anywhere_and_follow_from_ages(
    drift: LongitudinalDrift, visits: Visits, base: BaseModel, brain_mri: Modality
) -> None:
    common: dict[str, Any] = {"modality": brain_mri, "base": base, "sites": visits.sites}
    texts = [{name: str(value) for name, value in row.items()} for row in visits.attributes]
    by_age = fit_longitudinal_drift(visits.latents, texts, visits.patients, **common)
    later = [day + 365 * len(patient) for day, patient in zip(visits.days, visits.patients, strict=True)]
    shifted = fit_longitudinal_drift(visits.latents, visits.attributes, visits.patients, later, **common)
    for name, value in drift.state().items():
        torch.testing.assert_close(by_age.state()[name], value, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(shifted.state()[name], value, rtol=1e-3, atol=1e-4)
    restored = LongitudinalDrift.from_state(drift.state())
    assert torch.equal(restored.yearly, drift.yearly)


def test_what_is_no_table_of_visits_is_refused(visits: Visits, base: BaseModel, brain_mri: Modality) -> None:
    latents, attributes, patients, days = visits.latents, visits.attributes, visits.patients, visits.days
    one_visit = [f"patient {row}" for row in range(len(patients))]
    mixed = ["aster", *["birch"] * (len(patients) - 1)]
    for values, sites, words in (
        ((latents, attributes[1:], patients, days), (), "72 latents and 71 attributes"),
        ((latents, attributes, patients, days[1:]), (), "71 days"),
        ((latents[:, :2], attributes, patients, days), (), "this base has"),
        ((latents / 0, attributes, patients, days), (), "not finite"),
        ((latents, [{"age": 70, "sex": "F"}, *attributes[1:]], patients, days), (), "scan 0 lacks diagnosis"),
        ((latents, [{**attributes[0], "age": 7}, *attributes[1:]], patients, days), (), "within 18 to 100"),
        ((latents, attributes, one_visit, days), (), "no patient has two scans"),
        ((latents, attributes, patients, [0.0] * len(days)), (), "no patient has two scans"),
        ((latents, attributes, patients, days), mixed, "patient 0 is of the sites aster and birch"),
        ((latents[:0], [], [], []), (), "no patient has two scans"),
    ):
        with pytest.raises(RequestError, match=words):
            fit_longitudinal_drift(*values, modality=brain_mri, base=base, sites=sites)
