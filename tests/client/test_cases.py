"""Inputs as hospitals have them, which once came out wrong: each reads as its README says.

They are no part of the project; where they are absent, the tests of each kind remain (`test_scan_forms.py`,
`test_contradictions.py`, `test_table_forms.py`, `test_layouts.py`). `ld-benchmark scans` judges them too.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from ld_simulations.benchmarks.scans.cases import JUDGES, CaseFolder, case_names, problems_of

ROOT = Path(__file__).parents[2]
CASES = ROOT.parent / "shared/cases"

pytestmark = pytest.mark.skipif(not CASES.exists(), reason="no shared/cases beside the project")


@pytest.mark.parametrize("name", JUDGES)
def test_a_case_is_read_as_its_readme_says(name: str, tmp_path: Path) -> None:
    assert problems_of(name, CASES, ROOT, tmp_path) == []


def test_every_case_has_a_judge() -> None:
    assert case_names(CASES) == sorted(JUDGES)


@pytest.mark.parametrize(
    ("judge", "case"),
    [
        ("00_control", "01_multi_echo"),
        ("01_multi_echo", "00_control"),
        ("11_half_transferred", "00_control"),
        ("65a_int_keys", "00_control"),
        ("72_xlsx", "61_semicolon_decimal_comma"),
        ("81_hand_first", "88b_nominal_spacing"),
        ("88b_nominal_spacing", "91_jpg"),
        ("D1_bids", "D2_oasis3"),
    ],
)
def test_a_judge_sees_what_is_wrong(judge: str, case: str, tmp_path: Path) -> None:
    assert list(JUDGES[judge](CaseFolder(CASES / case, ROOT, tmp_path)))
