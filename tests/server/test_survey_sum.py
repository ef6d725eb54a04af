"""Cohort surveys at the engineer's side: questions, masks that cancel, answers that are missing or damaged."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from typer.testing import CliRunner

from ld_common.core.config import checked
from ld_common.core.errors import ConfigError, FederationError, LdError
from ld_common.imaging.modality import Modality
from ld_common.protocol.survey import (
    MOST_COUNT,
    CohortSurvey,
    JoinedSite,
    SurveyAnswer,
    SurveyAxis,
    SurveyRoster,
    SurveyTable,
    file_bytes,
    read_answer,
    read_joined,
    read_roster,
    read_survey,
)
from ld_common.protocol.survey_sum import CHECK_WORDS, SurveyNumbers, mask_numbers, sum_answers, vector_length
from ld_server.cli import app
from ld_server.survey.questions import SurveyQuestions, load_questions, make_survey
from ld_server.survey.survey_folder import SurveyFolder
from tests.conftest import BRAIN_MRI

NAMES = ["aster", "birch", "cedar", "dahlia", "elder"]
READERS = (read_survey, read_joined, read_roster, read_answer)


class SurveySites:
    """Sites with keys and consistent random counts."""

    def __init__(self, count: int, folder: Path | None = None, ages: int = 101) -> None:
        cuts = tuple(map(float, range(1, ages)))
        axes = (SurveyAxis("age", "years", cuts=cuts), SurveyAxis("sex", categories=("F", "M")))
        tables = (SurveyTable(("age", "sex")), SurveyTable(("sex",)))
        self.survey = CohortSurvey("ab" * 16, "brain_mri", tuple(NAMES[:count]), axes, tables)
        self.keys = {site: X25519PrivateKey.generate() for site in self.survey.sites}
        public = {site: key.public_key().public_bytes_raw().hex() for site, key in self.keys.items()}
        self.roster = SurveyRoster(self.survey, public)
        self.numbers = {site: self._numbers(seed) for seed, site in enumerate(self.survey.sites)}
        self.answers = {
            site: mask_numbers(self.roster, site, self.keys[site], self.numbers[site]) for site in self.survey.sites
        }
        self.folder = None if folder is None else SurveyFolder(folder)
        if self.folder is not None:
            self.folder.write_survey(self.survey)
            for site, key in public.items():
                joined = JoinedSite(self.survey.digest(), site, key)
                self.folder.joined_file(site).write_bytes(file_bytes(joined.content()))

    def _numbers(self, seed: int) -> SurveyNumbers:
        cells = np.random.default_rng(seed).integers(0, 40, self.survey.shape(self.survey.tables[0]))
        joint, sex = tuple(map(int, cells.ravel())), tuple(map(int, cells.sum(axis=0)))
        return SurveyNumbers(1, sum(sex), 2 * sum(sex), (joint, sex)).rounded(1 + 2 * seed)

    def write_answers(self) -> SurveyFolder:
        assert self.folder is not None
        self.folder.make_roster()
        for site, answer in self.answers.items():
            self.folder.answer_file(site).write_bytes(file_bytes(answer.content()))
        return self.folder

    def total(self) -> list[int]:
        return [sum(column) for column in zip(*(entry.vector() for entry in self.numbers.values()), strict=True)]


@pytest.mark.parametrize("count", [3, 4, 5])
def test_the_masked_answers_sum_to_the_sum_of_the_rounded_counts_in_any_order(count: int) -> None:
    sites = SurveySites(count)
    answers = list(sites.answers.values())
    for order in itertools.permutations(answers):
        assert sum_answers(sites.roster, order).vector() == sites.total()


def _uniform(numbers: np.ndarray) -> None:
    """Refuse numbers whose mean or bits are not those of uniform ones, by five standard deviations."""
    count = len(numbers)
    assert abs(numbers.mean() / 2**32 - 0.5) < 5 / np.sqrt(12 * count)
    bits = (numbers[:, None] >> np.arange(32, dtype=np.uint32)) & 1
    assert (abs(bits.mean(axis=0) - 0.5) < 5 * 0.5 / np.sqrt(count)).all()


def test_any_set_of_answers_but_the_whole_looks_uniform() -> None:
    sites = SurveySites(4)
    for size in (1, 2, 3):
        for chosen in itertools.combinations(sites.answers.values(), size):
            with np.errstate(over="ignore"):
                total = sum((np.array(answer.masked, np.uint32) for answer in chosen), np.uint32(0))
            _uniform(np.asarray(total))
            with pytest.raises(FederationError, match="each site"):
                sum_answers(sites.roster, chosen)


def test_an_answer_fits_any_other_counts_of_its_site() -> None:
    """Whatever one answer holds, other masks give it to other counts: it alone says nothing."""
    first, second = SurveySites(3), SurveySites(3)
    assert first.numbers == second.numbers
    difference = np.array(first.answers["aster"].masked, np.uint32) - np.array(
        second.answers["aster"].masked, np.uint32
    )
    _uniform(difference)


def test_masks_are_bound_to_the_roster() -> None:
    sites = SurveySites(3)
    other = replace(sites.roster, survey=replace(sites.survey, id="cd" * 16))
    again = mask_numbers(other, "aster", sites.keys["aster"], sites.numbers["aster"])
    _uniform(np.array(again.masked, np.uint32) - np.array(sites.answers["aster"].masked, np.uint32))
    with pytest.raises(FederationError, match="another roster"):
        sum_answers(sites.roster, [again, sites.answers["birch"], sites.answers["cedar"]])


def test_a_replaced_key_changes_the_fingerprint_and_leaves_no_sum() -> None:
    sites = SurveySites(3)
    forged = X25519PrivateKey.generate()
    keys = {**sites.roster.keys, "birch": forged.public_key().public_bytes_raw().hex()}
    other = SurveyRoster(sites.survey, keys)
    assert other.fingerprint != sites.roster.fingerprint
    answer = mask_numbers(other, "aster", sites.keys["aster"], sites.numbers["aster"])
    disguised = replace(answer, roster=sites.roster.session.hex())
    with pytest.raises(FederationError, match="do not cancel"):
        sum_answers(sites.roster, [disguised, sites.answers["birch"], sites.answers["cedar"]])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda numbers: replace(numbers, patients=MOST_COUNT), "visits"),
        (lambda numbers: replace(numbers, patients=MOST_COUNT, visits=MOST_COUNT), "in all"),
        (lambda numbers: replace(numbers, tables=(numbers.tables[0], (5000, 5000))), "patients by sex"),
    ],
)
def test_counts_that_do_not_fit_each_other_are_refused(
    change: Callable[[SurveyNumbers], SurveyNumbers], words: str
) -> None:
    sites = SurveySites(3)
    false = mask_numbers(sites.roster, "aster", sites.keys["aster"], change(sites.numbers["aster"]))
    with pytest.raises(FederationError, match=words):
        sum_answers(sites.roster, [false, sites.answers["birch"], sites.answers["cedar"]])


def test_a_count_beyond_the_bound_neither_leaves_nor_is_believed() -> None:
    sites = SurveySites(3)
    with pytest.raises(FederationError, match="counts up to"):
        mask_numbers(sites.roster, "aster", sites.keys["aster"], replace(sites.numbers["aster"], visits=MOST_COUNT + 1))
    masked = list(sites.answers["aster"].masked)
    masked[CHECK_WORDS + 2] = (masked[CHECK_WORDS + 2] + 2**31) % 2**32
    with pytest.raises(FederationError, match="over 3 sites"):
        answer = replace(sites.answers["aster"], masked=tuple(masked))
        sum_answers(sites.roster, [answer, sites.answers["birch"], sites.answers["cedar"]])


def refusal(*words: str) -> str:
    done = CliRunner().invoke(app, ["survey", *words])
    assert isinstance(done.exception, LdError), (done.output, done.exception)
    return str(done.exception)


def test_missing_damaged_and_misplaced_answers_are_named_at_once(tmp_path: Path) -> None:
    sites = SurveySites(5, tmp_path / "survey")
    folder = sites.write_answers()
    assert CliRunner().invoke(app, ["survey", "sum", str(folder.path)]).exit_code == 0
    folder.counts_file.unlink()
    folder.answer_file("aster").unlink()
    damaged = json.loads(folder.answer_file("birch").read_text())
    damaged["masked"][9] ^= 1
    folder.answer_file("birch").write_text(json.dumps(damaged))
    folder.answer_file("cedar").write_bytes(folder.answer_file("dahlia").read_bytes())
    message = refusal("sum", str(folder.path))
    assert "answer of aster is missing" in message
    assert "birch.answer.json': it was damaged" in message
    assert "file of cedar is of site 'dahlia'" in message
    assert not folder.counts_file.exists()


def test_an_answer_of_another_length_or_kind_is_named(tmp_path: Path) -> None:
    sites = SurveySites(3, tmp_path / "survey")
    folder = sites.write_answers()
    short = replace(sites.answers["aster"], masked=sites.answers["aster"].masked[:-1])
    folder.answer_file("aster").write_bytes(file_bytes(short.content()))
    folder.answer_file("birch").write_bytes(folder.joined_file("birch").read_bytes())
    message = refusal("sum", str(folder.path))
    length = vector_length(sites.survey)
    assert f"aster has {length - 1} numbers, not {length}" in message
    assert "it is a joined site, not a survey answer" in message


def test_a_roster_needs_a_usable_key_of_each_site(tmp_path: Path) -> None:
    sites = SurveySites(5, tmp_path / "survey")
    folder = sites.folder
    assert folder is not None
    folder.joined_file("aster").unlink()
    digest = sites.survey.digest()
    folder.joined_file("birch").write_bytes(file_bytes(JoinedSite(digest, "birch", "00" * 32).content()))
    other = JoinedSite("ef" * 32, "cedar", sites.roster.keys["cedar"])
    folder.joined_file("cedar").write_bytes(file_bytes(other.content()))
    twice = JoinedSite(digest, "dahlia", sites.roster.keys["elder"])
    folder.joined_file("dahlia").write_bytes(file_bytes(twice.content()))
    message = refusal("roster", str(folder.path))
    for words in ("key of aster is missing", "key of birch cannot be used", "cedar is for another survey", "dahlia"):
        assert words in message
    assert not folder.roster_file.exists()


def test_a_roster_that_sites_may_have_answered_is_not_replaced(tmp_path: Path) -> None:
    sites = SurveySites(3, tmp_path / "survey")
    folder = sites.write_answers()
    before = folder.roster_file.read_bytes()
    folder.make_roster()
    key = X25519PrivateKey.generate().public_key().public_bytes_raw().hex()
    joined = JoinedSite(sites.survey.digest(), "aster", key)
    folder.joined_file("aster").write_bytes(file_bytes(joined.content()))
    assert "make a new survey" in refusal("roster", str(folder.path))
    assert folder.roster_file.read_bytes() == before


HOSTILE: list[Any] = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'"text"',
    b"\xff\xfe",
    b'{"kind": "cohort survey", "kind": "survey roster"}',
    b'{"kind": ["cohort survey"], "version": 1}',
    b'{"kind": "cohort survey", "version": true}',
    b"[" * 100_000,
    b'{"kind": "survey answer", "version": 1, "masked": [' + b"9" * 5000 + b"]}",
    b" " * (9 * 2**20),
]


@pytest.mark.parametrize("content", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.attack
def test_a_hostile_file_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(content)
    for read in READERS:
        with pytest.raises(FederationError, match=r"file\.json"):
            read(path)


@pytest.mark.attack
def test_every_altered_field_is_refused_or_is_valid(tmp_path: Path) -> None:
    """Wrong types and values in each place of each file, one at a time, raise nothing but our own error."""
    sites = SurveySites(3, ages=4)
    joined = JoinedSite(sites.survey.digest(), "aster", sites.roster.keys["aster"])
    contents = [sites.survey.content(), joined.content(), sites.roster.content(), sites.answers["aster"].content()]
    values = [
        None,
        True,
        -1,
        1e999,
        float("nan"),
        10**400,
        "",
        "\ud800",
        "x" * 300,
        "../a",
        [],
        {},
        [[]],
        [{}],
        [1, "1"],
    ]
    path = tmp_path / "file.json"
    for read, content in zip(READERS, contents, strict=True):
        path.write_bytes(file_bytes(content))
        read(path)
        for place in _places(content):
            for value in values:
                path.write_text(json.dumps(_with(content, place, value)))
                try:
                    read(path)
                except FederationError:
                    continue
                assert HARMLESS & {*place} or _with(content, place, value) == content, (place, value)


HARMLESS = {"unit", "modality", "name", "tables", "categories", "cuts"}
"""Fields in which another text or list makes another survey that is as valid."""


def _places(content: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    entries: list[Any] = []
    if isinstance(content, dict):
        entries = list(content.items())
    if isinstance(content, list):
        entries = list(enumerate(content))[:2]
    below = [found for name, value in entries for found in _places(value, (*place, name))]
    return ([place] if place else []) + below


def _with(content: Any, place: tuple[Any, ...], value: Any) -> Any:
    copy = json.loads(json.dumps(content))
    at = copy
    for name in place[:-1]:
        at = at[name]
    at[place[-1]] = value
    return copy


def test_too_many_cells_sites_or_odd_names_are_refused(tmp_path: Path) -> None:
    survey = SurveySites(3).survey
    age = SurveyAxis("age", cuts=tuple(map(float, range(100))))
    wide = tuple(replace(age, name=name) for name in ("a", "b"))
    for change in (
        {"sites": ("aster", "birch")},
        {"sites": ("aster", "birch", "aster")},
        {"sites": ("Aster", "aster", "birch")},
        {"sites": ("../aster", "birch", "cedar")},
        {"id": "../../x"},
        {"axes": wide, "tables": (SurveyTable(("a", "b")),)},
        {"tables": ()},
        {"tables": (SurveyTable(("weight",)),)},
        {"modality": "two\nlines"},
    ):
        with pytest.raises(ConfigError):
            replace(survey, **change)


def test_default_tables_have_round_bins_of_the_modality(brain_mri: Modality) -> None:
    survey = make_survey(SurveyQuestions(modality="x"), brain_mri, ["cedar", "aster", "birch"])
    assert survey.sites == ("aster", "birch", "cedar")
    titles = [table.axes for table in survey.tables]
    assert titles == [("age",), ("diagnosis",), ("sex",), ("age", "diagnosis", "sex"), ("visits",), ("years_followed",)]
    assert survey.by_name["age"].labels == [
        "below 20",
        *(f"{age} to <{age + 10}" for age in range(20, 90, 10)),
        "90 or more",
    ]
    assert survey.by_name["visits"].labels == ["1", "2", "3", "4 or more"]


@pytest.mark.parametrize(("low", "high"), [(0, 400), (-100, 100), (0.1, 0.35), (0, 1), (17, 18), (-3, 1e6), (0, 1e-7)])
def test_default_bins_are_few_and_within_the_bounds(low: float, high: float) -> None:
    content = {"name": "m", "prompt_template": "{x}", "attributes": {"x": {"minimum": low, "maximum": high}}}
    axis = make_survey(SurveyQuestions(modality="x"), checked(Modality, content), NAMES[:3]).by_name["x"]
    assert all(low < cut < high for cut in axis.cuts)
    assert 2 <= len(axis.labels) <= 10
    assert len(set(axis.labels)) == len(axis.labels)


@pytest.mark.parametrize(
    ("questions", "words"),
    [
        ({"bins": {"agee": [60]}}, "did you mean 'age'"),
        ({"bins": {"sex": [1]}}, "categories"),
        ({"bins": {"age": [60, 50]}}, "ascending"),
        ({"bins": {"age": [600]}}, "18 to 100 years"),
        ({"bins": {"visits": [1.5]}}, "whole numbers"),
        ({"tables": [{"by": ["diagnose"]}]}, "did you mean 'diagnosis'"),
        ({"tables": [{"by": []}]}, "needs axes"),
        ({"tables": [{"by": ["age", "age"]}]}, "each once"),
        ({"tables": [{"by": ["age"], "visit": "second"}]}, "first or last"),
        ({"table": []}, "unknown config key"),
        ({"modality": "absent.yaml"}, "absent.yaml"),
    ],
)
def test_questions_that_make_no_survey_are_refused(tmp_path: Path, questions: dict[str, Any], words: str) -> None:
    path = tmp_path / "questions.yaml"
    path.write_text(yaml.safe_dump({"modality": str(BRAIN_MRI), **questions}))
    with pytest.raises(ConfigError, match=words):
        make_survey(*load_questions(path), NAMES[:3])
    message = refusal("new", str(path), *(f"--site={name}" for name in NAMES[:3]), "--out", str(tmp_path / "survey"))
    assert words in message
    assert not (tmp_path / "survey").exists()


def test_a_folder_holds_one_survey(tmp_path: Path) -> None:
    path = tmp_path / "questions.yaml"
    path.write_text(yaml.safe_dump({"modality": str(BRAIN_MRI)}))
    words = ["new", str(path), *(f"--site={name}" for name in NAMES[:3]), "--out", str(tmp_path / "survey")]
    assert CliRunner().invoke(app, ["survey", *words]).exit_code == 0
    assert "choose another folder" in refusal(*words)
    assert "no survey.json" in refusal("sum", str(tmp_path))
    assert "no roster.json" in refusal("sum", str(tmp_path / "survey"))


def test_files_are_read_as_they_were_written(tmp_path: Path) -> None:
    sites = SurveySites(3)
    joined = JoinedSite(sites.survey.digest(), "aster", sites.roster.keys["aster"])
    made: list[Any] = [sites.survey, joined, sites.roster, sites.answers["aster"]]
    for read, entry in zip(READERS, made, strict=True):
        (tmp_path / "file.json").write_bytes(file_bytes(entry.content()))
        assert read(tmp_path / "file.json") == entry
    assert isinstance(sites.answers["aster"], SurveyAnswer)
