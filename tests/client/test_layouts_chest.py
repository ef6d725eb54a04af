"""Importers of chest data sets: CheXpert, which has no dates, and MIMIC-CXR."""

from __future__ import annotations

from pathlib import Path

import pytest

from ld_common.core.errors import ConfigError, LdError, TableError
from ld_simulations.benchmarks.scans.layout_trees import FRONTAL, chexpert_image, chexpert_tree, mimic_cxr_tree, put
from tests.support.layouts import CASES, CHEST, Imported, import_tree

LABELS = ("--label", "No Finding=CN", "--label", "Cardiomegaly=HF")


def chest(layout: str, root: Path, out: Path, *options: str) -> Imported:
    return import_tree(layout, root, out, *options, modality=CHEST)


ROWS: list[tuple[object, ...]] = [
    (1, 1, FRONTAL, "Female", 68, "Frontal", "AP", "1.0", ""),
    (2, 1, FRONTAL, "Male", 80, "Frontal", "PA", "", "1.0"),
    (2, 1, "view2_lateral", "Male", 80, "Lateral", "", "", "1.0"),
    (3, 1, FRONTAL, "Male", 70, "Frontal", "AP", "", "-1.0"),
    (4, 1, FRONTAL, "Unknown", 70, "Frontal", "AP", "1.0", ""),
    (5, 1, FRONTAL, "Male", 0, "Frontal", "AP", "1.0", ""),
    (6, 1, FRONTAL, "Male", 50, "Frontal", "AP", "", "0.0"),
    (7, 1, FRONTAL, "Male", 50, "Frontal", "AP", "1.0", "1.0"),
    (8, 1, FRONTAL, "Male", 50, "Frontal", "LL", "1.0", ""),
    (9, 1, FRONTAL, "Male", 50, "Lateral", "", "1.0", ""),
]


def test_chexpert_takes_frontal_images_with_a_certain_label(tmp_path: Path) -> None:
    root = chexpert_tree(tmp_path / "data", *ROWS)
    put(root, {chexpert_image(10, 1, FRONTAL): ""})
    done = chest("chexpert", root, tmp_path / "out", *LABELS)
    assert [(visit["patient"], visit["day"], visit["sex"], visit["diagnosis"]) for visit in done.visits] == [
        ("patient00001", "0", "F", "CN"),
        ("patient00002", "0", "M", "HF"),
    ]
    assert done.visits[0]["file"] == chexpert_image(1, 1, FRONTAL)
    assert done.reasons() == {
        "another view": (2, 0),
        "uncertain label": (1, 0),
        "value not known": (1, 0),
        "value out of range": (1, 0),
        "no label": (1, 0),
        "tables, rows or labels that disagree": (2, 0),
        "no table row": (1, 0),
    }
    absent = chest("chexpert", root, tmp_path / "absent", *LABELS, "--label", "Cardiomegaly:0=CN")
    assert "patient00006" in [visit["patient"] for visit in absent.visits]


def test_chexpert_finds_its_files_from_its_own_folder_too(tmp_path: Path) -> None:
    root = chexpert_tree(tmp_path / "data", *ROWS[:2])
    done = chest("chexpert", root / "CheXpert-v1.0-small", tmp_path / "out", *LABELS)
    assert [visit["file"] for visit in done.visits] == [
        chexpert_image(patient, 1, FRONTAL).removeprefix("CheXpert-v1.0-small/") for patient in (1, 2)
    ]


def test_chexpert_asks_which_study_counts_because_it_has_no_dates(tmp_path: Path) -> None:
    later = [(2, 10, FRONTAL, "Male", 82, "Frontal", "PA", "", "1.0"), (2, 9, FRONTAL, "Male", 81, *ROWS[1][5:])]
    root = chexpert_tree(tmp_path / "data", *ROWS[:2], *later)
    with pytest.raises(ConfigError, match="1 patients have several"):
        chest("chexpert", root, tmp_path / "out", *LABELS)
    assert not (tmp_path / "out").exists()
    for which, age in (("first", "80"), ("last", "82")):
        done = chest("chexpert", root, tmp_path / which, *LABELS, "--one-visit", which)
        assert [visit["age"] for visit in done.visits] == ["68", age]
        assert done.reasons()["another visit of the patient was taken"] == (2, 0)


def test_chexpert_rows_without_a_file_or_twice_are_counted(tmp_path: Path) -> None:
    root = chexpert_tree(tmp_path / "data", *ROWS[:2], ROWS[0], (2, 1, FRONTAL, "Male", 44, *ROWS[1][5:]))
    (root / chexpert_image(1, 1, FRONTAL)).unlink()
    with pytest.raises(TableError, match="no scan became a visit"):
        chest("chexpert", root, tmp_path / "out", *LABELS)
    text = (tmp_path / "out/left_out.csv").read_text()
    assert text.count("file not found") == 2
    assert text.count("keep the right one") == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), ["CN", "HF", "--label"]),
        (("--label", "Cardiomegali=HF"), ["Cardiomegali", "Cardiomegaly"]),
        (("--label", "Cardiomegaly=AD"), ["AD", "HF"]),
        (("--label", "Cardiomegaly:2=HF"), ["Cardiomegaly:2"]),
        (("--pattern", "{patient}/"), ["--pattern", "tree"]),
    ],
)
def test_a_label_that_does_not_fit_is_refused(options: tuple[str, ...], words: list[str], tmp_path: Path) -> None:
    root = chexpert_tree(tmp_path / "data", *ROWS[:2])
    with pytest.raises(LdError) as refused:
        chest("chexpert", root, tmp_path / "out", *options)
    assert all(word in str(refused.value) for word in words)


def test_mimic_cxr_joins_three_tables_and_counts_what_it_cannot_use(tmp_path: Path) -> None:
    root = mimic_cxr_tree(
        tmp_path / "data",
        (10000032, 1, "a-pa", "PA", 21800506, 213014.5),
        (10000032, 1, "a-lateral", "LATERAL", 21800506, 213014.5),
        (10000032, 2, "b", "AP", 21820626, 90000.0),
        (10000032, 4, "c", "AP", 21820626, 80000.25),
        (10000032, 6, "d", "", 21830101, 80000.0),
        (10000048, 8, "e", "PA", 21200101, 80000.0),
    )
    done = chest("mimic_cxr", root, tmp_path / "out", *LABELS)
    assert [(visit["patient"], visit["date"], visit["age"], visit["diagnosis"]) for visit in done.visits] == [
        ("10000032", "2180-05-06", "52", "CN"),
        ("10000032", "2182-06-26", "54", "HF"),
    ]
    # the earlier of two images of a day
    assert done.visits[1]["file"] == "files/p10/p10000032/s4/c.jpg"
    assert done.reasons() == {
        "another view": (1, 0),
        "another scan of the visit was taken": (1, 0),
        "view not given": (1, 0),
        "missing value": (1, 0),
        "row without a scan": (0, 2),
    }
    assert done.summary["contradictions"] == {}


def test_mimic_cxr_takes_none_of_two_images_of_one_time_until_a_view_is_preferred(tmp_path: Path) -> None:
    images = [(10000032, 1, name, view, 21800506, 90000.0) for name, view in (("a", "PA"), ("b", "AP"))]
    root = mimic_cxr_tree(tmp_path / "data", *images, (10000032, 3, "c", "AP", 21810506, 90000.0))
    done = chest("mimic_cxr", root, tmp_path / "out", *LABELS)
    assert done.reasons()["several scans of one visit"] == (2, 0)
    done = chest("mimic_cxr", root, tmp_path / "pa", *LABELS, "--series", "PA", "--series", "AP")
    assert [visit["file"].rpartition("/")[2] for visit in done.visits] == ["a.jpg", "c.jpg"]


def test_mimic_cxr_says_which_table_is_missing(tmp_path: Path) -> None:
    root = mimic_cxr_tree(tmp_path / "data", (10000032, 1, "a", "PA", 21800506, 90000.0))
    (root / "patients.csv").unlink()
    with pytest.raises(TableError, match="patients"):
        chest("mimic_cxr", root, tmp_path / "out", *LABELS)


def test_the_shared_chest_case_leaves_out_the_lateral_and_the_uncertain(tmp_path: Path) -> None:
    if not (CASES / "D4_chexpert").is_dir():
        pytest.skip("the shared cases are not here")
    done = chest("chexpert", CASES / "D4_chexpert", tmp_path / "out", *LABELS)
    assert [(visit["patient"], visit["age"], visit["diagnosis"]) for visit in done.visits] == [
        ("patient00001", "68", "CN")
    ]
    assert (done.reasons()["another view"], done.reasons()["uncertain label"]) == ((1, 0), (1, 0))
