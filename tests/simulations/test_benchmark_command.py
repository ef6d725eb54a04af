"""`ld-benchmark`: every study has a valid default config, a light command line, and a page that its JSON reproduces."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ld_common.core.command import run_cli
from ld_simulations.benchmarks.cli import STUDIES, _import, cli

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "docs/benchmarks"
TABLES = {
    "counterfactuals": "counterfactuals",
    "latent-drift": "latent_drift",
    "privacy": "privacy",
    "deployment": "deployment",
    "federation": "federation",
}


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        run_cli(cli, arguments)
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_default_configs_are_valid_and_a_typo_is_refused(
    study: object, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    (found,) = [known for known in STUDIES if known is study]
    _import(found.load)(found.config, [])
    code, _, err = run(capsys, found.name, "reslts=x")
    assert code == 2
    assert "reslts" in err
    assert "results" in err


@pytest.mark.slow
@pytest.mark.parametrize("study", TABLES)
def test_a_published_page_follows_from_its_numbers(
    study: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    numbers = PUBLISHED / f"{TABLES[study]}.json"
    options = [f"adopt={numbers}", f"results={tmp_path / 'results'}", f"output={tmp_path / 'output'}"]
    code, _, err = run(capsys, study, "--only-report", *options)
    assert code == 0, err
    written = tmp_path / "results" / f"{TABLES[study]}.md"
    assert written.read_text() == (PUBLISHED / written.name).read_text()
    again = json.loads((tmp_path / "results" / numbers.name).read_text())
    published = json.loads(numbers.read_text())
    if study == "counterfactuals":  # the ceiling is computed anew, to the last bit of this machine's arithmetic
        ceilings = again.pop("ceilings"), published.pop("ceilings")
        assert ceilings[0].keys() == ceilings[1].keys()
        for modality, values in ceilings[0].items():
            assert values == pytest.approx(ceilings[1][modality])
        assert again.pop("summary") == pytest.approx(published.pop("summary"))
    assert again == published
