"""The benchmark of reading scans, with few files: that it counts what is right and sees what is not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ld_common.core.errors import ConfigError
from ld_simulations.benchmarks.harness import ResultStore
from ld_simulations.benchmarks.scans.cases import read_site
from ld_simulations.benchmarks.scans.formats import WRONG, try_formats
from ld_simulations.benchmarks.scans.formats_page import escaped
from ld_simulations.benchmarks.scans.layouts import TRIALS, try_layout
from ld_simulations.benchmarks.scans.memory import watch_index
from ld_simulations.benchmarks.scans.plan import PARTS, ScansConfig, load_scans_config
from ld_simulations.benchmarks.scans.report import AIMS, PEAK, flat_numbers, write_report
from ld_simulations.benchmarks.scans.run import run
from ld_simulations.benchmarks.scans.speed import median_ratio, time_reading, time_reindex
from ld_simulations.benchmarks.scans.trees import TreeSize, write_tree

ROOT = Path(__file__).parents[2]


def few(base: Path, **counts: Any) -> ScansConfig:
    """A config with one patient of two visits of three slices everywhere, run once."""
    sizes = dict.fromkeys(("read_patients", "searched_patients", "indexed_patients", "many_patients"), 1)
    repeats = dict.fromkeys(("repeats", "search_repeats", "reindex_repeats"), 1)
    return ScansConfig(project=str(ROOT), base_model=str(base), slices=3, **{**sizes, **repeats, **counts})


def test_a_tree_is_read_whole_and_every_image_is_another(smallest_base: Path, tmp_path: Path) -> None:
    site = write_tree(tmp_path, TreeSize(3, 2, 5), ROOT, smallest_base)
    read = read_site(site)
    assert len(read.visits) == 6
    assert [one for one in read.exclusions if one.files] == []
    assert {visit.attributes["sex"] for visit in read.visits} == {"F", "M"}
    assert sorted({visit.days_since_baseline for visit in read.visits}) == [0, 400]
    files = list((tmp_path / "scans").rglob("*.dcm"))
    assert len(files) == len({file.read_bytes() for file in files}) == TreeSize(3, 2, 5).files


@pytest.mark.slow
@pytest.mark.parametrize("trial", [TRIALS[2], TRIALS[3]], ids=lambda trial: trial.name)
def test_a_layout_counts_only_where_every_visit_is_as_planted(trial: Any, smallest_base: Path, tmp_path: Path) -> None:
    (tmp_path / "right").mkdir()
    outcome = try_layout(trial, tmp_path / "right", ROOT, smallest_base)
    assert outcome["problems"] == []
    assert outcome["visits"] == outcome["planted"] == len(trial.planted)
    first, second = trial.planted[:2]
    for number, changes in enumerate(({"age": 20.0}, {"day": 5}, {"sex": "X"})):
        wrong = dataclasses.replace(trial, planted=(dataclasses.replace(first, **changes), second))
        (tmp_path / str(number)).mkdir()
        assert try_layout(wrong, tmp_path / str(number), ROOT, smallest_base)["problems"], changes


def test_a_scan_under_another_patient_is_seen(smallest_base: Path, tmp_path: Path) -> None:
    first, second = TRIALS[3].planted
    swapped = dataclasses.replace(first, scan=second.scan), dataclasses.replace(second, scan=first.scan)
    outcome = try_layout(dataclasses.replace(TRIALS[3], planted=swapped), tmp_path, ROOT, smallest_base)
    assert sum("another scan" in problem for problem in outcome["problems"]) == 2


def test_every_format_is_read_right_or_refused_with_a_sentence() -> None:
    entries = try_formats(ROOT)["entries"]
    assert {entry["group"] for entry in entries} == {"transfer syntaxes", "DICOM", "other formats", "tables"}
    assert not [entry for entry in entries if entry["said"].startswith(WRONG)]
    assert all(entry["said"] for entry in entries if not entry["read"])
    read = {entry["name"] for entry in entries if entry["read"]}
    assert {"Explicit VR Little Endian", "RLE Lossless", "Enhanced MR, all slices in one file", "NIfTI-2"} <= read
    assert "Semicolons and decimal commas" in read


@pytest.mark.slow
def test_times_are_those_of_processes_that_read_everything(smallest_base: Path, tmp_path: Path) -> None:
    reading = time_reading(few(smallest_base), tmp_path / "reading")
    assert reading["files"] == 6
    assert set(map(len, reading["seconds"].values())) == {1}
    assert reading["reading_over_bare"] > 0
    assert median_ratio([3, 8, 5], [1, 2, 5]) == 3


@pytest.mark.slow
def test_an_index_again_and_its_memory_are_measured(smallest_base: Path, tmp_path: Path) -> None:
    config = few(smallest_base)
    reindex = time_reindex(config, tmp_path / "reindex")
    assert reindex["reindex_over_index"] > 0
    assert reindex["reindex_one_new_over_index"] > 0
    memory = watch_index(config, tmp_path / "memory")
    assert (memory["files"], memory["visits"]) == (6, 2)
    assert memory["peak_mb"] > 50


RESULTS: dict[str, Any] = {
    "cases": {"a": [], "b": ["not *right*"]},
    "formats": {
        "decoders": {"pydicom": "3"},
        "entries": [
            {"group": "tables", "name": "Commas", "detail": ".csv", "read": True, "said": ""},
            {"group": "DICOM", "name": "Colour", "detail": "", "read": False, "said": "not a | grey image"},
            {"group": "DICOM", "name": "Film", "detail": "", "read": True, "said": f"{WRONG}: x", "difference": 1.0},
        ],
    },
    "layouts": {
        "bids": {
            "command": "ld-client import",
            "form": "NIfTI",
            "planted": 2,
            "visits": 2,
            "left_out": 0,
            "problems": [],
        },
        "adni": {
            "command": "ld-client import",
            "form": "NIfTI",
            "planted": 2,
            "visits": 1,
            "left_out": 0,
            "problems": [],
        },
    },
    "memory": {
        "files": 20_000,
        "visits": 500,
        "megabytes": 200,
        "seconds": 10.0,
        "seconds_again": 1.0,
        "files_a_second": 2000.0,
        "peak_mb": 1600,
        "children_peak_mb": 90,
        "processor": "x",
        "threads": 2,
    },
    "pacs": {"server": "Orthanc", "fetched": 1, "visits": 1, "sent": 1, "problems": []},
}


def test_the_page_says_what_was_missed_and_what_was_not_measured(tmp_path: Path) -> None:
    store = ResultStore(tmp_path / "out")
    for part, result in RESULTS.items():
        store.write(part, result)
    config = few(ROOT, output=str(tmp_path / "out"), results=str(tmp_path / "docs"), reference=str(tmp_path))
    written = run(config, True, Console(quiet=True))
    assert [path.name for path in written] == ["scans.json", "scans.md", "formats.md"]
    numbers = json.loads(written[0].read_text())
    wanted = {"cases_right": 1, "cases": 2, "layouts_imported": 1, "formats_wrong": 1, PEAK: 1600}
    assert numbers.items() >= wanted.items()
    assert numbers["pacs_roundtrip"] is True
    assert numbers["index_over_bare_pydicom"] is numbers["reindex_over_index"] is None
    page = written[1].read_text()
    assert page.count("**missed**") == 4  # a case, the layouts, a format, the memory
    assert page.count("not measured") == 4  # reading, with search, index again, one visit more
    assert r"not \*right\*" in page
    assert r"not a \| grey image" in written[2].read_text()


def test_a_page_follows_from_its_numbers(tmp_path: Path) -> None:
    store = ResultStore(tmp_path / "out")
    for part, result in RESULTS.items():
        store.write(part, result)
    write_report(store, tmp_path / "first", tmp_path / "first")
    config = few(ROOT, adopt=str(tmp_path / "first/scans.json"), output=str(tmp_path / "none"))
    config.results = config.reference = str(tmp_path / "second")
    for path in run(config, True, Console(quiet=True)):
        assert path.read_bytes() == (tmp_path / "first" / path.name).read_bytes()


def test_without_a_result_every_number_is_null() -> None:
    assert set(flat_numbers({}).values()) == {None}
    assert set(AIMS) <= set(flat_numbers({}))
    assert escaped("a\n<b> *c*") == r"a &lt;b> \*c\*"


def test_a_wrong_plan_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("parts: [cases, words]")
    with pytest.raises(ConfigError, match=r"parts: 'words' is not one of cases"):
        load_scans_config(tmp_path / "a.yaml", [])
    with pytest.raises(ConfigError, match="repeats is 0"):
        load_scans_config(tmp_path / "a.yaml", [f"parts=[{','.join(PARTS)}]", "repeats=0"])
