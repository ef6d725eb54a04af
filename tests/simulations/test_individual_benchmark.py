"""The benchmark of individual answers: disjoint patients, rules that are what they say, numbers that cannot flatter."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

from ld_common.core.config import load_config
from ld_common.core.errors import ConfigError
from ld_common.diffusion.base_model import load_base
from ld_common.imaging.geometry import Frame, Scan
from ld_common.imaging.modality import AttributeConfig, Modality
from ld_common.imaging.scan_table import load_modality
from ld_common.protocol.dp_accounting import Charge, epsilon
from ld_simulations.benchmarks.harness import ResultStore
from ld_simulations.benchmarks.individual.answers import (
    ATTRIBUTES,
    COPY,
    CROSS,
    DRIFT,
    DRIFT_HISTORY,
    LINE,
    LONG,
    OWN,
    RELEASE,
    SAME,
    choose,
)
from ld_simulations.benchmarks.individual.attributes_rule import predict_by_attributes, with_attributes_rule
from ld_simulations.benchmarks.individual.people import People, Person, ScannedVisit
from ld_simulations.benchmarks.individual.plan import AnatomyConfig, IndividualConfig, PatientsConfig
from ld_simulations.benchmarks.individual.private_plan import (
    PrivateDriftConfig,
    PrivateSetting,
    PublicPatientsConfig,
    noise_multiplier,
    settings,
)
from ld_simulations.benchmarks.individual.private_report import PrivateResults, private_lines
from ld_simulations.benchmarks.individual.private_tables import read_tables
from ld_simulations.benchmarks.individual.report import flat_numbers, summarize, with_same_change
from ld_simulations.benchmarks.individual.ridge import (
    Components,
    RidgeRules,
    area_slope,
    cross_sectional_sums,
    features,
    longitudinal_sums,
    own_slope,
)
from ld_simulations.benchmarks.individual.run import run
from ld_simulations.benchmarks.individual.trajectories import band_numbers
from ld_simulations.hospitals_config import HospitalsConfig

MODALITY = Modality(
    prompt_template="brain, {sex}, {age}, {diagnosis}",
    attributes={
        "age": AttributeConfig(minimum=20, maximum=100),
        "sex": AttributeConfig(categories={"F": "woman", "M": "man"}),
        "diagnosis": AttributeConfig(categories={"CN": "healthy", "AD": "ill"}),
    },
)
LATENT = (2, 3, 3)


def visit(age: float, latent: torch.Tensor, diagnosis: str = "CN", sex: str = "F", area: float = 0.0) -> ScannedVisit:
    attributes = {"age": age, "sex": sex, "diagnosis": diagnosis}
    frame = Frame(0, 1, (4, 4), (1.0, 1.0), 4.0, None)
    return ScannedVisit(attributes, Scan(np.zeros((4, 4), np.float32), (1.0, 1.0), {}), frame, latent, area, area)


def people(count: int = 60, noise: float = 0.0) -> list[Person]:
    """Latents that move by a known vector a year, twice as fast with the disease, from three sites of other levels."""
    rng = np.random.default_rng(0)
    yearly, ill, male = (torch.tensor(rng.standard_normal(LATENT)).float() for _ in range(3))
    made = []
    for number in range(count):
        site, sex = number % 3, "FM"[rng.integers(2)]
        diagnosis = ("CN", "AD")[rng.integers(2)]
        own = torch.tensor(rng.standard_normal(LATENT)).float() * 0.1
        visits = []
        for age in (60 + rng.uniform(0, 20) + np.cumsum([0, 1, 2])).round(1):
            rate = 2.0 if diagnosis == "AD" else 1.0
            latent = own + site + 0.02 * rate * (age - 60) * yearly + (sex == "M") * male + (diagnosis == "AD") * ill
            latent = latent + noise * torch.tensor(rng.standard_normal(LATENT)).float()
            visits.append(visit(float(age), latent.float(), diagnosis, sex, float(100 + 3 * age)))
        made.append(Person(f"site{site}", str(number), visits, []))
    return made


def test_nobody_is_in_two_of_training_tuning_and_test() -> None:
    for name in ("tuning", "test"):
        with pytest.raises(ConfigError, match="nobody may be in two of them"):
            IndividualConfig(**{name: PatientsConfig(seed=0)})
    with pytest.raises(ConfigError, match="saw the hospitals of seed 202"):
        IndividualConfig(anatomies={"brain": AnatomyConfig(release="r", release_seed=202)})


def test_sums_of_sites_give_the_regression_of_pooled_rows() -> None:
    drawn = people(noise=0.05)
    sites = [[person for person in drawn if person.hospital == f"site{number}"] for number in range(3)]
    basis = Components.of([seen for person in drawn for seen in person.visits], 2)
    pooled = longitudinal_sums(drawn, MODALITY, basis)
    parts = [longitudinal_sums(site, MODALITY, basis) for site in sites]
    together = parts[0] + parts[1] + parts[2]
    penalty = np.full(len(pooled.gram), 1e-3)
    np.testing.assert_allclose(together.solve(penalty), pooled.solve(penalty), rtol=1e-6, atol=1e-9)
    # cross-sectional: the sums of centred sites are a regression with an intercept a site
    visits = [(index, seen) for index, site in enumerate(sites) for person in site for seen in person.visits]
    x = np.stack([[*features(MODALITY, seen.attributes), *np.eye(3)[index]] for index, seen in visits])
    y = np.stack([seen.latent.double().numpy().ravel() for _, seen in visits])
    width = x.shape[1] - 3
    weight = np.diag([1e-3 * len(x)] * width + [0.0] * 3)
    wanted = np.linalg.solve(x.T @ x + weight, x.T @ y)[:width]
    across = [cross_sectional_sums(site, MODALITY) for site in sites]
    found = (across[0] + across[1] + across[2]).solve(np.full(width, 1e-3))
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-9)


def test_the_rules_find_a_known_change() -> None:
    drawn = people()
    rules = RidgeRules.fit(drawn, MODALITY, 2)
    for person in drawn[:5]:
        first, last = person.visits[0], person.visits[-1]
        true = (last.latent - first.latent).double().numpy().ravel()
        found = rules.longitudinal(first, last.attributes)
        assert np.linalg.norm(found - true) < 0.2 * np.linalg.norm(true)
        np.testing.assert_allclose(own_slope(person.visits) * 3, true, rtol=0.05, atol=1e-6)
        assert area_slope(person.visits) == pytest.approx(3)
        assert np.abs(rules.longitudinal(first, first.attributes)).max() == 0
        other = first.attributes | {"sex": "M" if first.attributes["sex"] == "F" else "F"}
        np.testing.assert_allclose(
            rules.longitudinal(first, other), rules.cross_sectional(first.attributes, other), atol=1e-9
        )


def test_the_rules_learn_from_mirror_images_too() -> None:
    drawn = people(noise=0.05)
    both = [
        replace(person, visits=[replace(seen, mirrored=seen.latent.flip(-1)) for seen in person.visits])
        for person in drawn
    ]
    plain, rules = (RidgeRules.fit(learned, MODALITY, 18) for learned in (drawn, both))
    first = both[0].visits[0]
    target = first.attributes | {"age": float(first.attributes["age"]) + 10, "sex": "M"}
    for found, alike in ((plain, False), (rules, True)):
        answer = found.longitudinal(first, target).reshape(LATENT)
        mirrored = found.longitudinal(replace(first, latent=first.latent.flip(-1)), target).reshape(LATENT)
        apart = np.linalg.norm(mirrored[..., ::-1] - answer) / np.linalg.norm(answer)
        assert apart < 1e-6 if alike else apart > 0.1


def record(patient: int, row: str, growth: float, true: float, gain: float | None = 0.0) -> dict[str, object]:
    return {
        "patient": str(patient),
        "question": "age_plus_10",
        "years": 10.0,
        "row": row,
        "gain_db": gain,
        "growth_mm2": growth,
        "true_growth_mm2": true,
    }


def test_a_number_is_of_single_patients_and_beside_the_same_change_for_all() -> None:
    true = [10.0, 20.0, 30.0, 40.0]
    records = [record(number, LONG, 0.5 * growth, growth, 2.0) for number, growth in enumerate(true)]
    records += [record(number, COPY, 0.0, growth) for number, growth in enumerate(true)]
    judged = with_same_change(records, {"age_plus_10": 25.0})
    numbers = summarize(judged, LONG, "age_plus_10")
    assert numbers is not None
    assert (numbers["growth_ratio"], numbers["error_mm2"], numbers["raw_gain_db"]) == (0.5, 12.5, 2.0)
    assert numbers["r"] == pytest.approx(1.0)
    assert numbers["error_over_same_for_all"] == pytest.approx(12.5 / 10)
    same = summarize(judged, SAME, "age_plus_10")
    assert same is not None
    assert same["error_over_same_for_all"] == 1
    assert "raw_gain_db" not in same
    assert "r" not in same
    assert summarize(judged, RELEASE, "age_plus_10") is None
    numbers = flat_numbers([*judged, *(replaced | {"row": DRIFT, "gain_db": 1.0} for replaced in records[:4])])
    assert numbers["raw_gain_over_best_rule_db"] == -1.0


def test_options_are_chosen_by_the_tuning_patients_gain() -> None:
    tried = [
        {"row": "ridge", "question": name, "options": [components, "difference", scale, share], "gain_db": gain}
        for name, components, scale, share, gain in [
            ("age_plus_10", 8, 1.0, 0.0, 1.0),
            ("age_plus_10", 8, 1.5, 0.0, 2.0),
            ("age_plus_10", 16, 1.0, 0.0, 3.0),
            ("other_sex", 8, 1.0, 0.0, 5.0),
            ("other_sex", 16, 1.0, 0.0, 2.0),
            ("history_5", 8, 1.25, 0.0, 2.0),
            ("history_5", 8, 1.5, 0.0, 1.0),
            ("history_5", 8, 1.5, 0.5, 4.0),
            ("history_5", 16, 1.0, 0.0, 1.0),
        ]
    ] + [
        {"row": DRIFT, "question": name, "options": [rendering, options], "gain_db": gain, "error_mm2": error}
        for name, rendering, options, gain, error in [
            ("age_plus_10", "deformation", {"time_scale": 1.1}, 3.0, 1.0),
            ("age_plus_10", "deformation", {"time_scale": 1.0}, 4.0, 9.0),
            ("age_plus_10", "difference", {"time_scale": 1.1}, 5.0, 1.0),
            ("other_sex", "deformation", {"effect_scale": 1.5}, 9.0, 1.0),
            ("other_sex", "difference", {"effect_scale": 1.5}, 1.0, 1.0),
            ("history_5", "deformation", {"time_scale": 1.1, "own_slope_half": 8.0}, 1.05, 9.0),
            ("history_5", "deformation", {"time_scale": 1.1, "own_slope_half": 2.0}, 1.0, 5.0),
            ("history_5", "deformation", {"time_scale": 1.1, "own_slope_half": 1.0}, 0.5, 1.0),
            ("history_5", "difference", {"time_scale": 1.1, "own_slope_half": 8.0}, 1.0, 1.0),
        ]
    ]
    choice = choose(tried)
    assert choice.components == 8
    assert choice.scales == {"age": 1.5, "other": 1.0, "history": 1.25}
    assert choice.own == (1.5, 0.5)
    assert choice.drift_rendering == "deformation"
    assert choice.drift == {"time_scale": 1.0, "effect_scale": 1.5, "own_slope_half": 2.0}


def test_curves_are_judged_over_all_their_times() -> None:
    def curve(patient: int, drawn: list[float], true: list[float]) -> list[dict[str, object]]:
        names = ("age_plus_5", "age_plus_10", "age_plus_15", "age_plus_20")
        return [
            record(patient, DRIFT, *values) | {"question": name}
            for name, *values in zip(names, drawn, true, strict=True)
        ]

    records = curve(0, [5, 10, 15, 20], [5, 10, 15, 20]) + curve(1, [15, 10, 30, 40], [15, 30, 45, 60])
    numbers = flat_numbers(records)
    assert numbers["trajectory_monotone_share"] == 0.5
    # the line grows by 2 a year: off by 5, 10, 15, 20 for both patients
    assert numbers["trajectory_error_over_straight_line"] == pytest.approx((0 + 20 + 15 + 20) / 100)


@pytest.mark.slow
def test_the_rule_of_attributes_finds_how_fast_they_grow_and_sees_no_picture() -> None:
    """Brains whose areas are replaced: 30 mm2 a year, and 20 more with the disease."""
    hospitals = load_config(HospitalsConfig, Path("configs/hospitals.yaml"), ["patients=4", "test_patients=4"])
    people = People(hospitals, load_modality("configs/modalities/brain_mri.yaml"), load_base("simulations/tiny_base"))
    grown = []
    for person in people.draw(0, 4, 0, 4, questions=False):
        rate = 50.0 if person.visits[0].attributes["diagnosis"] == "AD" else 30.0
        visits = [replace(visit, measured_mm2=rate * float(visit.attributes["age"])) for visit in person.visits]
        grown.append(replace(person, visits=visits))
    predicted = predict_by_attributes(grown, people, 303, 4)
    tested = {f"{each.hospital}/{each.identity}": each for each in people.draw(303, 4, 0, 4, questions=True)}
    assert set(predicted) == set(tested)
    for name, person in tested.items():
        rate = 50.0 if person.visits[0].attributes["diagnosis"] == "AD" else 30.0
        years = {question.name: question.target["age"] for question in person.questions}
        start = float(person.visits[0].attributes["age"])
        assert predicted[name]["age_plus_20"] == pytest.approx(rate * (float(years["age_plus_20"]) - start), rel=1e-6)
        assert "other_sex" not in predicted[name]
    rows = with_attributes_rule([record(0, DRIFT, 1.0, 2.0)], {"0": {"age_plus_10": 7.0}})
    assert [(row["row"], row["growth_mm2"], row["true_growth_mm2"]) for row in rows[1:]] == [(ATTRIBUTES, 7.0, 2.0)]


def test_a_band_is_calibrated_on_other_patients_than_it_is_checked_on() -> None:
    rng = np.random.default_rng(0)
    records = []
    for patient in range(80):
        own = rng.normal()
        for years in (5, 10, 15, 20):
            drawn = 45.0 * years + 8 * years * own + rng.normal() * 5
            answer = record(patient, DRIFT, drawn, 45.0 * years) | {"question": f"age_plus_{years}", "years": years}
            records.append(answer | {"patient": f"p{patient:02d}"})
    numbers = band_numbers(records)
    assert 0.8 <= numbers["band_coverage_90"] <= 0.97
    assert 100 <= numbers["band_half_width_10_years_mm2"] <= 190  # 1.64 deviations of 80 mm2 are 131
    assert band_numbers(records[:40]) == {}  # ten patients
    sure = [
        each | {"growth_mm2": each["true_growth_mm2"] + (5000 if each["patient"] == "p01" else 0)} for each in records
    ]
    assert band_numbers(sure)["band_coverage_90"] == pytest.approx(1 - 1 / 80)


def test_private_patients_are_in_no_other_group() -> None:
    with pytest.raises(ConfigError, match="must all differ"):
        IndividualConfig(private=PrivateDriftConfig(patients=[10], test_seed=101))
    with pytest.raises(ConfigError, match="drawn_patients"):
        PrivateDriftConfig(patients=[100], drawn_patients=50)


@pytest.mark.slow
def test_one_vector_costs_no_more_than_its_epsilon() -> None:
    for target, patients in ((8.0, 100), (1.0, 300)):
        noise = noise_multiplier(target, patients)
        delta = 1 / (10 * patients)
        assert epsilon([Charge(noise, 1.0, 1)], delta) <= target < epsilon([Charge(noise - 0.002, 1.0, 1)], delta)


def private_config() -> PrivateDriftConfig:
    starts = {"near": PublicPatientsConfig(seed=1), "far": PublicPatientsConfig(seed=2)}
    return PrivateDriftConfig(patients=[300, 1000], draws=2, starts=starts)


def test_every_private_setting_has_a_result_of_its_own() -> None:
    asked = settings(private_config())
    names = [setting.name for setting in asked]
    assert len(set(names)) == len(names)
    assert [(setting.start, setting.patients) for setting in asked[:4]] == [
        ("near", 0),
        ("", 300),
        ("", 1000),
        ("far", 0),
    ]
    assert sum(setting.start == "near" and setting.epsilon > 0 for setting in asked) == 2 * 3 * 2
    assert {(setting.patients, setting.epsilon) for setting in asked if setting.start == "far" and setting.epsilon} == {
        (300, 8.0),
        (1000, 3.0),
        (1000, 1.0),
    }


def test_private_gains_are_beside_the_public_start_alone(tmp_path: Path) -> None:
    config, store = private_config(), ResultStore(tmp_path)

    def keep(gains: dict[str, float], *setting: Any) -> None:
        records = [
            {"patient": patient, "question": question, "gain_db": gain}
            for patient, gain in gains.items()
            for question in ("age_plus_10", "disease_added" if patient == "a" else "disease_removed")
        ]
        store.write(PrivateSetting(*setting).name, records)

    keep({"a": 4.0, "b": 8.0}, "", 300)
    keep({"a": 4.0, "b": 8.0}, "", 1000)
    keep({"a": 3.8, "b": 7.6}, "near", 0)
    for draw, shift in enumerate((-1.0, 1.0)):
        keep({"a": 4.0 + shift, "b": 8.0 + shift}, "near", 300, 8.0, draw)
    results = PrivateResults(config, store)
    numbers = results.numbers("near", 300, 8.0)
    assert numbers is not None
    assert numbers["raw_gain_db"] == pytest.approx(6.0)
    assert (numbers["raw_gain_db_least_draw"], numbers["raw_gain_db_largest_draw"]) == pytest.approx((5.0, 7.0))
    assert numbers["over_start_db"] == pytest.approx(6.0 - 5.7)
    assert numbers["share"] == pytest.approx(1.0)
    flat = results.flat()
    assert flat["dp_public_start_gain_share"] == pytest.approx(0.95)
    assert "dp_drift_gain_share_eps3_1000" not in flat
    page = "\n".join(private_lines(results))
    assert "held, by the public start alone as well" in page
    assert ") | >= 0.9 | held, by" in page
    assert "not run" in page
    assert "Most of what the shares above show is therefore the start's" in page
    assert "†" not in page
    table = tmp_path / "individual.json"
    table.write_text(json.dumps({"private_drift": results.rows()}))
    adopting = PrivateResults(replace(config, adopt=str(table)), ResultStore(tmp_path / "empty"))
    assert adopting.flat() == flat
    assert "6.00 (5.00 to 7.00) † |" in "\n".join(private_lines(adopting))
    unrun = [setting for setting in settings(config) if not adopting.adopts(setting)]
    assert {(setting.start, setting.patients) for setting in unrun} == {
        ("near", 300),
        ("near", 1000),
        ("far", 0),
        ("far", 300),
        ("far", 1000),
    }
    assert all(setting.epsilon != 8.0 for setting in unrun if (setting.start, setting.patients) == ("near", 300))


def two_of(hospitals: str, folder: Path) -> str:
    """A config with the last two hospitals of another."""
    content = yaml.safe_load(Path(hospitals).read_text())
    file = folder / Path(hospitals).name
    file.write_text(yaml.safe_dump(content | {"hospitals": content["hospitals"][-2:]}))
    return str(file)


@pytest.mark.slow
def test_a_small_benchmark_writes_its_page(tmp_path: Path) -> None:
    hospitals, public = (two_of(f"configs/{name}", tmp_path) for name in ("hospitals.yaml", "public_hospitals.yaml"))
    config = IndividualConfig(
        output=str(tmp_path / "out"),
        results=str(tmp_path),
        training=PatientsConfig(0, 6),
        tuning=PatientsConfig(101, 1),
        test=PatientsConfig(202, 2),
        components=[4],
        scales=[1.0],
        own_shares=[0.5],
        anatomies={"brain": AnatomyConfig(hospitals=hospitals, renderings=["deformation"])},
        time_scales=[1.0],
        effect_scales=[1.5],
        own_slope_halves=[4.0],
        own_growth_halves=[0.5],
        workers=1,
        private=PrivateDriftConfig(
            patients=[4, 6],
            epsilons=[8.0],
            draws=1,
            drawn_patients=6,
            test_patients=1,
            first_settings=[[6, 8]],
            starts={"other hospitals": PublicPatientsConfig(hospitals=public, patients=5)},
        ),
    )
    files = run(config, False, Console(quiet=True))
    assert {file.name for file in files} == {"individual.json", "individual.md", "individual_brain.png"}
    numbers = json.loads((tmp_path / "individual.json").read_text())
    assert numbers["raw_gain_db_perfect_answer"] > numbers["raw_gain_db_longitudinal_ridge"]
    page = (tmp_path / "individual.md").read_text()
    assert numbers["federated_drift_equals_pooled"] < 1e-4
    for row in (COPY, SAME, CROSS, LONG, OWN, LINE, DRIFT, DRIFT_HISTORY):
        assert f"| {row} |" in page
    assert set(numbers["private_drift"]["other hospitals"]) == {"alone", "4", "4-eps8", "6", "6-eps8"}
    whole, part = (read_tables(tmp_path / "out/private", "training", ["birch"], count)[0] for count in (6, 4))
    assert len(set(part.patients)) == 4
    kept = [row for row, name in enumerate(whole.patients) if name in set(part.patients)]
    assert part.patients == [whole.patients[row] for row in kept]
    assert torch.equal(part.latents, whole.latents[kept])
    assert list(part.mirrored) == [whole.mirrored[row] for row in kept]
    assert sum(part.mirrored) == len(part.mirrored) / 2
    assert run(replace(config, workers=2), True, Console(quiet=True)) == files
