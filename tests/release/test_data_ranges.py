from __future__ import annotations

import numpy as np
import pytest

from ld_common.imaging.modality import AttributeConfig, Attributes, Modality
from ld_common.release.data_ranges import beyond, site_coverage, trained_on

MODALITY = Modality(
    prompt_template="{age} {sex}",
    attributes={
        "age": AttributeConfig(minimum=40, maximum=100, unit="years"),
        "sex": AttributeConfig(categories={"F": "woman", "M": "man"}),
    },
)


def scans(*ages: float, sex: str = "F") -> list[Attributes]:
    return [{"age": age, "sex": sex} for age in ages]


def rounds(*told: list[float] | None) -> list[dict[str, object]]:
    sites = {str(number): {} if one is None else {"coverage": one} for number, one in enumerate(told)}
    return [{"counted": True, "sites": sites}, {"counted": False, "sites": {}}]


def test_each_end_speaks_for_several_patients_and_is_rounded_outwards() -> None:
    ages = scans(50.5, 55, 61, 68, 72, 80.5)
    patients = ["a", "b", "c", "d", "e", "f"]
    assert site_coverage(MODALITY, patients, ages, 2) == [55, 73, 1, 0]
    assert site_coverage(MODALITY, patients, ages, 1) == [49, 82, 1, 0]


@pytest.mark.parametrize("fewest", [1, 3, 5])
def test_each_end_and_word_is_what_so_many_patients_show(fewest: int) -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        patients = [str(one) for one in generator.integers(0, 12, 30)]
        ages, words = generator.uniform(40, 100, 30), generator.choice(["F", "M"], 30, p=[0.9, 0.1])
        own: list[Attributes] = [{"age": float(age), "sex": str(word)} for age, word in zip(ages, words, strict=True)]
        low, high, women, men = site_coverage(MODALITY, patients, own, fewest)
        part = 3.0
        below = {patient for patient, age in zip(patients, ages, strict=True) if age < low + part}
        above = {patient for patient, age in zip(patients, ages, strict=True) if age > high - part}
        assert min(len(below), len(above)) >= fewest
        for told, word in ((women, "F"), (men, "M")):
            shown = {patient for patient, one in zip(patients, words, strict=True) if one == word}
            assert bool(told) is (len(shown) >= fewest)


def test_too_few_patients_say_nothing() -> None:
    told = site_coverage(MODALITY, ["a", "b"], scans(60, 70), 3)
    assert told == [100, 40, 0, 0]
    known = trained_on(MODALITY, rounds(told))
    assert beyond(MODALITY, known, {"age": 60.0, "sex": "F"}) == [
        "age 60: the sites had scans of too few patients, beyond is extrapolated",
        "sex F: the sites had scans of none",
    ]


def test_sites_are_joined_and_what_lies_beyond_is_said() -> None:
    known = trained_on(MODALITY, rounds([55, 73, 1, 0], [61, 85, 0, 0], None, [1.0]))
    assert known == {"age": (55, 85), "sex": ["F"]}
    assert beyond(MODALITY, known, {"age": 85.0, "sex": "F"}) == []
    assert beyond(MODALITY, known, {"age": 90.0}) == [
        "age 90: the sites had scans of 55 to 85 years, beyond is extrapolated"
    ]
    assert beyond(MODALITY, known, {"sex": "M"}) == ["sex M: the sites had scans of F"]


def test_a_release_that_does_not_say_warns_of_nothing() -> None:
    assert trained_on(MODALITY, rounds(None)) is None
    assert trained_on(MODALITY, []) is None
    assert beyond(MODALITY, None, {"age": 90.0}) == []
