"""The security benchmark: some of its files on every run of the tests, and that it counts what it should."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from ld_common.core.errors import ConfigError
from ld_simulations.benchmarks.harness import ResultStore, json_bytes
from ld_simulations.benchmarks.security.attempts import count_attempts
from ld_simulations.benchmarks.security.fuzz import FileBatch, Fuzzer, batches, read_case, totals, write_case
from ld_simulations.benchmarks.security.plan import FILES, SecurityConfig, load_security_config
from ld_simulations.benchmarks.security.report import write_report
from ld_simulations.benchmarks.security.run import run

FEW = 40
REPORT = b"""<testsuites><testsuite>
<testcase classname="tests.a.test_b" name="test_one"/>
<testcase classname="tests.a.test_b" name="test_two[x]"><failure message="accepted"/></testcase>
<testcase classname="tests.c.test_d" name="test_three"><skipped message="no chip"/></testcase>
</testsuite></testsuites>"""


@pytest.mark.attack
@pytest.mark.parametrize("kind", FILES)
def test_damaged_files_are_read_or_refused(kind: str, tmp_path: Path) -> None:
    """The first files of the benchmark, with its seed."""
    outcomes = set()
    for number in range(FEW):
        folder = tmp_path / str(number)
        folder.mkdir()
        outcomes.add(read_case(write_case(kind, number, 0, folder)).outcome)
        shutil.rmtree(folder)
    assert outcomes <= {"read", "refused"}
    assert "refused" in outcomes


def test_a_file_follows_from_its_seed_and_number(tmp_path: Path) -> None:
    for kind in FILES:
        written = []
        for name, number, seed in (("a", 1, 0), ("b", 1, 0), ("c", 1, 1)):
            folder = tmp_path / kind / name
            folder.mkdir(parents=True)
            written.append(write_case(kind, number, seed, folder).read_bytes())
        assert written[0] == written[1] != written[2]


def test_batches_hold_every_file_once() -> None:
    wanted = SecurityConfig()
    assert sum(batch.last - batch.first for batch in batches(wanted) if batch.kind in FILES) == sum(FILES.values())
    assert sum(FILES.values()) >= 20_000
    assert len({batch.name for batch in batches(wanted)}) == len(batches(wanted))


@pytest.mark.slow
def test_what_fails_is_counted_kept_and_survived(tmp_path: Path) -> None:
    strict = Fuzzer(SecurityConfig(output=str(tmp_path), memory_mib=-1, hang_seconds=-1))
    result = strict.run(FileBatch("table", 0, 3))
    strict.close()
    numbers = totals([result])
    assert [numbers[key] for key in ("files_fuzzed", "crashes", "memory_over_1gib")] == [3, 0, 3]
    assert {path.name for path in (tmp_path / "failures").iterdir()} == {"table-0", "table-1", "table-2"}
    stopped = Fuzzer(SecurityConfig(output=str(tmp_path), hang_seconds=0))
    assert totals([stopped.run(FileBatch("dicom", 0, 2))])["hangs_over_10s"] == 2
    stopped.close()


def test_an_attempt_that_is_accepted_is_a_failed_test() -> None:
    counted = count_attempts(REPORT)
    assert counted == {
        "by_module": {"a.test_b": 2},
        "accepted": ["a.test_b: test_two[x]"],
        "skipped": ["c.test_d: test_three"],
    }


def test_the_page_says_what_was_missed(tmp_path: Path) -> None:
    config = SecurityConfig(output=str(tmp_path / "out"), results=str(tmp_path), files={"dicom": 1})
    (batch, *_) = batches(config)
    failure = {"kind": "dicom", "number": 0, "problems": ["crash"], "file": "scan.dcm", "outcome": "KeyError"}
    result = {"files": 1, "outcomes": {"failed": 1}, "slowest_seconds": 1, "largest_mib": 2, "failures": [failure]}
    store = ResultStore(tmp_path / "out")
    store.write(batch.name, result)
    store.write("attempts", count_attempts(REPORT))
    (tmp_path / "privacy.json").write_bytes(json_bytes({"best_reconstruction_gap_db": 0.5}))
    write_report(store, config)
    numbers = json.loads((tmp_path / "security.json").read_text())
    wanted = {"attempts": 2, "accepted": 1, "files_fuzzed": 1, "crashes": 1, "best_reconstruction_gap_db": 0.5}
    assert numbers.items() >= wanted.items()
    page = (tmp_path / "security.md").read_text()
    assert page.count("**missed**") == 4
    assert "test_two[x]" in page
    assert run(config, True, Console(quiet=True)) == [tmp_path / "security.json", tmp_path / "security.md"]


def test_a_wrong_plan_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("files: {word: 3}")
    with pytest.raises(ConfigError, match=r"files: 'word' is not one of dicom"):
        load_security_config(tmp_path / "a.yaml", [])
    with pytest.raises(ConfigError, match="parts: 'x'"):
        load_security_config(tmp_path / "a.yaml", ["files={}", "parts=[x]"])
