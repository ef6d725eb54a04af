"""Cohort surveys at a site: what is counted, what leaves and what is refused; three sites by the command lines."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from ld_client.cli import app as client
from ld_client.data.store_index import SCHEMA_VERSION
from ld_client.deployment.audit_log import log_entries
from ld_client.site_config import load_site
from ld_client.survey.counting import count_patients, read_patients
from ld_common.core.config import load_config
from ld_common.core.errors import ApprovalError, LdError
from ld_common.imaging.modality import Modality
from ld_common.protocol.study_config import StudyConfig
from ld_common.protocol.survey import CohortSurvey, SurveyAxis, SurveyTable, read_roster
from ld_common.protocol.survey_sum import nearest_multiple
from ld_server.cli import app as server
from tests.conftest import BRAIN_MRI
from tests.support.site_homes import index_site, make_home

SITES = ("aster", "birch", "cedar")
Visit = tuple[str, int, dict[str, Any]]


def make_index(store: Path, visits: list[Visit], modality: Path = BRAIN_MRI) -> None:
    """An index of these visits (pseudonym, day, attributes), and nothing that only training needs."""
    store.mkdir(parents=True, exist_ok=True)
    (store / "index.sqlite").unlink(missing_ok=True)
    with sqlite3.connect(store / "index.sqlite") as index:
        index.execute("CREATE TABLE meta (key TEXT, value TEXT)")
        index.execute("CREATE TABLE visits (row INTEGER PRIMARY KEY, pseudonym TEXT, day INTEGER, attributes TEXT)")
        digest = load_config(Modality, modality).digest()
        index.executemany("INSERT INTO meta VALUES (?, ?)", [("schema", SCHEMA_VERSION), ("modality", digest)])
        rows = [(pseudonym, day, json.dumps(attributes)) for pseudonym, day, attributes in visits]
        index.executemany("INSERT INTO visits (pseudonym, day, attributes) VALUES (?, ?, ?)", rows)
    index.close()


def random_visits(patients: int, seed: int) -> list[Visit]:
    """One to five visits of each patient, half a year to three years apart."""
    rng, visits = np.random.default_rng(seed), []
    for number in range(patients):
        age, day = float(rng.uniform(50, 95)), 0
        sex, converts = str(rng.choice(["F", "M"])), bool(rng.random() < 0.2)
        for visit in range(int(rng.integers(1, 6))):
            diagnosis = "AD" if converts and visit else "CN"
            attributes = {"age": round(age + day / 365, 1), "sex": sex, "diagnosis": diagnosis}
            visits.append((f"{seed:04x}{number:028x}", day, attributes))
            day += int(rng.integers(180, 1100))
    return visits


@dataclass(frozen=True)
class Federation:
    """Three sites and an engineer, each with a folder."""

    folder: Path

    @property
    def survey(self) -> Path:
        """The engineer's folder."""
        return self.folder / "survey"

    def config(self, site: str) -> Path:
        return self.folder / site / "site.yaml"

    def index(self, site: str, visits: list[Visit]) -> None:
        make_index(self.folder / site / "store", visits)

    def change(self, site: str, /, **changes: Any) -> None:
        content = yaml.safe_load(self.config(site).read_text())
        content["policy"] |= changes.pop("policy", {})
        self.config(site).write_text(yaml.safe_dump(content | changes))

    def new(self, questions: Mapping[str, Any] | None = None, folder: str = "survey", sites: tuple[str, ...] = SITES):
        path = self.folder / "questions.yaml"
        path.write_text(yaml.safe_dump({"modality": str(BRAIN_MRI), **(questions or {})}))
        named = [word for site in sites for word in ("--site", site)]
        done = run(server, "survey", "new", str(path), *named, "--out", str(self.folder / folder))
        assert done.exit_code == 0, done.output
        return self.folder / folder

    def join(self, site: str, folder: Path | None = None) -> Any:
        to = folder or self.survey
        where = ["--config", str(self.config(site)), "--out", str(to)]
        return run(client, "survey", "join", str(to / "survey.json"), *where)

    def roster(self, folder: Path | None = None) -> str:
        to = folder or self.survey
        done = run(server, "survey", "roster", str(to))
        assert done.exit_code == 0, done.exception
        fingerprint = read_roster(to / "roster.json").fingerprint
        assert fingerprint in done.stdout
        return fingerprint

    def answer(self, site: str, fingerprint: str, *more: str, folder: Path | None = None) -> Any:
        to = folder or self.survey
        words = ["survey", "answer", str(to / "roster.json"), "--config", str(self.config(site)), "--out", str(to)]
        return run(client, *words, "--fingerprint", fingerprint, *more)

    def begin(self, questions: Mapping[str, Any] | None = None, folder: str = "survey") -> str:
        """A survey that all sites have joined; returns the roster's fingerprint."""
        to = self.new(questions, folder)
        for site in SITES:
            done = self.join(site, to)
            assert done.exit_code == 0, done.exception
        return self.roster(to)

    def counts(self) -> dict[str, Any]:
        done = run(server, "survey", "sum", str(self.survey), "--json")
        assert done.exit_code == 0, done.exception
        printed: dict[str, Any] = json.loads(done.stdout)
        assert printed == json.loads((self.survey / "counts.json").read_text())
        return printed


def run(app: Any, *words: str, **options: Any) -> Any:
    return CliRunner().invoke(app, list(words), **options)


def refused(done: Any) -> str:
    """The refusal of a command that ended by an error of ours."""
    assert isinstance(done.exception, LdError), (done.output, done.exception)
    return str(done.exception)


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    made = Federation(tmp_path)
    for number, site in enumerate(SITES):
        (tmp_path / site).mkdir()
        content = {"site": site, "modality": str(BRAIN_MRI), "base_model": "absent", "store": "store", "policy": {}}
        made.config(site).write_text(yaml.safe_dump({**content, "data": DATA}))
        made.index(site, random_visits(40 + 10 * number, number))
    return made


DATA = {
    "root": "scans",
    "table": "visits.csv",
    "columns": {"attributes": {"age": "age", "sex": "sex", "diagnosis": "group"}},
}


@pytest.mark.parametrize("steps", [(1, 1, 1), (5, 5, 5), (1, 10, 4)])
def test_three_sites_learn_the_sum_of_their_rounded_counts(federation: Federation, steps: tuple[int, ...]) -> None:
    for site, step in zip(SITES, steps, strict=True):
        federation.change(site, policy={"count_step": step})
    fingerprint = federation.begin({"tables": [{"by": ["age", "sex"]}, {"by": ["diagnosis"], "visit": "last"}]})
    for site in reversed(SITES):
        done = federation.answer(site, fingerprint, "--yes")
        assert done.exit_code == 0, done.exception
    counts = federation.counts()
    roster, expected = read_roster(federation.survey / "roster.json"), []
    for site, step in zip(SITES, steps, strict=True):
        patients = read_patients(load_site(federation.config(site)))
        expected.append(count_patients(roster.survey, patients).rounded(step).vector())
    step, patients, visits, *cells = (sum(column) for column in zip(*expected, strict=True))
    largest = 0 if set(steps) == {1} else step // 2  # steps of 1 round nothing
    assert (counts["patients"], counts["visits"], counts["largest_error"]) == (patients, visits, largest)
    flat = [count for table in counts["tables"] for row in table["patients"] for count in np.ravel(row)]
    assert flat == cells
    by_age_and_sex, last_diagnosis = counts["tables"]
    assert [axis["name"] for axis in by_age_and_sex["axes"]] == ["age", "sex"]
    assert len(by_age_and_sex["patients"]) == len(by_age_and_sex["axes"][0]["cells"])
    if steps == (1, 1, 1):
        assert sum(map(sum, by_age_and_sex["patients"])) == sum(last_diagnosis["patients"]) == patients == 150


def test_a_site_shows_what_leaves_and_writes_nothing_without_a_yes(federation: Federation) -> None:
    fingerprint = federation.begin()
    federation.index("aster", [(f"{n:032x}", 0, {"age": 64.0, "sex": "F", "diagnosis": "CN"}) for n in range(12)])
    words = ["survey", "answer", str(federation.survey / "roster.json"), "--config", str(federation.config("aster"))]
    words += ["--out", str(federation.survey), "--fingerprint", fingerprint]
    done = run(client, *words, input="n\n")
    assert isinstance(done.exception, ApprovalError)
    assert "12 → 10" in done.stdout
    assert not (federation.survey / "aster.answer.json").exists()
    assert run(client, *words, input="y\n").exit_code == 0
    assert (federation.survey / "aster.answer.json").exists()


@pytest.mark.parametrize("step", [1, 2, 5, 10])
def test_rounding_is_off_by_half_a_step_at_most_and_hides_few_patients(step: int) -> None:
    for count in range(100):
        rounded = nearest_multiple(count, step)
        assert rounded % step == 0
        assert 2 * abs(rounded - count) <= step
        assert (rounded == 0) == (2 * count < step)


def test_patients_are_counted_once_by_their_first_or_last_visit(federation: Federation) -> None:
    visits: list[Visit] = [("a", 0, {"age": 69.9, "sex": "F", "diagnosis": "CN"})]
    visits += [("a", 731, {"age": 71.9, "sex": "F", "diagnosis": "AD"})]
    visits += [(f"b{number}", 0, {"age": 80.0, "sex": "M", "diagnosis": "CN"}) for number in range(10)]
    federation.index("aster", visits)
    axes = (
        SurveyAxis("age", "years", cuts=(70, 80)),
        SurveyAxis("diagnosis", categories=("AD", "CN")),
        SurveyAxis("visits", cuts=(2, 3)),
        SurveyAxis("years_followed", cuts=(1, 2)),
    )
    tables = [SurveyTable(("age",)), SurveyTable(("age",), "last"), SurveyTable(("diagnosis", "visits"), "last")]
    tables += [SurveyTable(("years_followed",))]
    survey = CohortSurvey("0" * 32, "brain_mri", SITES, axes, tuple(tables))
    numbers = count_patients(survey, read_patients(load_site(federation.config("aster"), ["held_out=0.5"])))
    assert (numbers.patients, numbers.visits) == (11, 12)
    assert numbers.tables == ((1, 0, 10), (0, 1, 10), (0, 1, 0, 10, 0, 0), (10, 0, 1))
    assert axes[0].labels == ["below 70", "70 to <80", "80 or more"]
    assert axes[2].labels == ["1", "2", "3 or more"]


def test_an_answer_is_one_and_is_repeated_without_its_key(federation: Federation) -> None:
    fingerprint = federation.begin()
    file, record = federation.survey / "aster.answer.json", federation.folder / "aster" / "store" / "surveys"
    (kept,) = record.glob("*.json")
    assert json.loads(kept.read_text())["private_key"]
    assert kept.stat().st_mode & 0o777 == 0o600
    assert federation.answer("aster", fingerprint, "--yes").exit_code == 0
    first = file.read_bytes()
    file.unlink()
    assert json.loads(kept.read_text())["private_key"] == ""
    assert federation.answer("aster", fingerprint).exit_code == 0, "the same answer needs no question"
    assert file.read_bytes() == first
    federation.change("aster", policy={"count_step": 1})
    assert "count_step" in refused(federation.answer("aster", fingerprint, "--yes"))
    federation.change("aster", policy={"count_step": 5})
    federation.index("aster", random_visits(60, 77))
    assert "difference would show patients" in refused(federation.answer("aster", fingerprint, "--yes"))


def test_a_second_roster_of_a_survey_is_refused(federation: Federation) -> None:
    fingerprint = federation.begin()
    assert federation.answer("aster", fingerprint, "--yes").exit_code == 0
    content = json.loads((federation.survey / "roster.json").read_text())
    content["keys"]["birch"] = "11" * 32
    (federation.survey / "roster.json").write_text(json.dumps(content))
    other = read_roster(federation.survey / "roster.json").fingerprint
    assert "other keys" in refused(federation.answer("aster", other, "--yes"))


def test_another_survey_needs_a_decision(federation: Federation) -> None:
    assert federation.answer("aster", federation.begin(), "--yes").exit_code == 0
    fingerprint = federation.begin({"bins": {"age": [60, 61]}}, "second")
    folder = federation.folder / "second"
    assert "--another" in refused(federation.answer("aster", fingerprint, "--yes", folder=folder))
    assert federation.answer("aster", fingerprint, "--yes", "--another", folder=folder).exit_code == 0
    assert federation.answer("birch", fingerprint, "--yes", folder=folder).exit_code == 0, "it has answered no other"


def test_who_has_not_compared_the_fingerprint_is_told_whom_to_call(federation: Federation) -> None:
    fingerprint = federation.begin()
    message = refused(federation.answer("aster", "", "--yes"))
    assert fingerprint in message
    assert "birch and cedar" in message
    assert "different rosters" in refused(federation.answer("aster", fingerprint[:-1] + "x", "--yes"))
    assert not (federation.survey / "aster.answer.json").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"policy": {"min_summed_sites": 4}}, "min_summed_sites is 4"),
        ({"policy": {"min_patients": 1000}}, "min_patients 1000"),
        ({"policy": {"private_only": True}}, "private_only"),
        ({"site": "dahlia"}, "dahlia"),
        ({"store": "elsewhere"}, "key of aster is not this site's"),
        ({"modality": "other.yaml"}, "categories AD, CN"),
    ],
)
def test_what_the_policy_or_the_modality_does_not_allow_is_refused(
    federation: Federation, changes: dict[str, Any], words: str
) -> None:
    fingerprint = federation.begin()
    modality = yaml.safe_load(BRAIN_MRI.read_text())
    modality["attributes"]["diagnosis"]["categories"]["MCI"] = "mildly impaired"
    (federation.folder / "aster" / "other.yaml").write_text(yaml.safe_dump(modality))
    federation.change("aster", **changes)
    assert words in refused(federation.answer("aster", fingerprint, "--yes"))
    assert not (federation.survey / "aster.answer.json").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda axis: axis.update(name="handedness"), "'handedness', which this site's modality lacks"),
        (lambda axis: axis.update(unit="days"), "in days"),
        (lambda axis: axis.update(cuts=[], categories=["old", "young"]), "as categories"),
    ],
)
def test_a_question_that_the_modality_cannot_answer_is_refused_at_once(
    federation: Federation, change: Callable[[dict[str, Any]], None], words: str
) -> None:
    folder = federation.new({"tables": [{"by": ["age"]}]})
    content = json.loads((folder / "survey.json").read_text())
    change(content["axes"][0])
    content["tables"][0]["axes"] = [content["axes"][0]["name"]]
    (folder / "survey.json").write_text(json.dumps(content))
    assert words in refused(federation.join("aster"))
    assert not (federation.folder / "aster" / "store" / "surveys").exists()


def test_a_store_with_a_patient_who_withdrew_is_not_counted(federation: Federation) -> None:
    fingerprint, store = federation.begin(), federation.folder / "aster" / "store"
    gone = {"pseudonym": random_visits(1, 0)[0][0], "time": "2026-01-01T00:00:00+00:00", "was_in_store": True}
    (store / "withdrawals.json").write_text(json.dumps({"withdrawals": [gone]}))
    assert "withdrew consent" in refused(federation.answer("aster", fingerprint, "--yes"))


def test_a_damaged_or_foreign_store_is_one_sentence(federation: Federation) -> None:
    fingerprint = federation.begin()
    federation.index("aster", [(f"{n:032x}", 0, {"age": None, "sex": "F", "diagnosis": "CN"}) for n in range(20)])
    assert "no usable 'age'" in refused(federation.answer("aster", fingerprint, "--yes"))
    (federation.folder / "aster" / "store" / "index.sqlite").write_bytes(b"no index" * 100)
    assert "damaged" in refused(federation.answer("aster", fingerprint, "--yes"))


def test_a_record_that_others_may_read_or_that_is_damaged_is_refused(federation: Federation) -> None:
    fingerprint = federation.begin()
    (record,) = (federation.folder / "aster" / "store" / "surveys").glob("*.json")
    record.chmod(0o644)
    assert "chmod 600" in refused(federation.answer("aster", fingerprint, "--yes"))
    record.chmod(0o600)
    for content in (b"{", b'{"survey": 1}', b"[]", b'{"survey": 1, "public_key": 2, "private_key": 3}'):
        record.write_bytes(content)
        assert "restore it" in refused(federation.answer("aster", fingerprint, "--yes"))


def test_no_model_library_is_needed(federation: Federation) -> None:
    fingerprint = federation.begin()
    heavy = ("torch", "diffusers", "transformers", "monai", "opacus", "flwr", "scipy", "matplotlib")
    words = ["survey", "answer", str(federation.survey / "roster.json"), "--config", str(federation.config("aster"))]
    words += ["--fingerprint", fingerprint, "--yes"]
    code = f"import sys\nfor name in {heavy}: sys.modules[name] = None\nsys.argv = ['ld-client', *{words}]\n"
    code += "from ld_client.cli import main\nmain()"
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=federation.folder
    )
    assert done.returncode == 0, done.stderr
    assert (federation.folder / "aster.answer.json").exists()


def test_a_real_index_is_counted_and_a_home_logs_the_answer(site_yaml: Path, tmp_path: Path) -> None:
    home = make_home(tmp_path / "home", site_yaml, StudyConfig(name="demo"))
    site = home.site()
    index_site(site)
    other = Federation(tmp_path / "others")
    for name in SITES[1:]:
        (other.folder / name).mkdir(parents=True)
        content = {"site": name, "modality": str(BRAIN_MRI), "base_model": "absent", "store": "store", "data": DATA}
        other.config(name).write_text(yaml.safe_dump(content))
    folder = other.new({"tables": [{"by": ["diagnosis"], "visit": "last"}]})
    where = ["--home", str(home.path), "--out", str(folder)]
    assert run(client, "survey", "join", str(folder / "survey.json"), *where).exit_code == 0
    for name in SITES[1:]:
        assert other.join(name).exit_code == 0
    words = ["survey", "answer", str(folder / "roster.json"), *where, "--fingerprint", other.roster(), "--yes"]
    done = run(client, *words)
    assert done.exit_code == 0, done.exception
    assert "patients 3 → 3, visits 6 → 6" in done.stdout
    (entry,) = [entry for entry in log_entries(home.audit_log) if entry.event == "survey"]
    assert entry.details["sites"] == list(SITES)
    assert run(client, "audit", "verify", "--home", str(home.path)).exit_code == 0
