"""The command lines of sites and server: one site or another, JSON, former names, mistakes that cost no time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from ld_client.cli import app as client
from ld_client.cli import main
from ld_client.data.held_out import held_out_patients
from ld_client.data.store import count_split, open_store, split_store
from ld_client.data.store_index import INDEX
from ld_client.site_config import load_site
from ld_common.core.command import grouped, printable, run_cli
from ld_common.core.errors import ConfigError, LdError
from ld_common.protocol.study_config import StudyConfig
from ld_server.cli import app as server
from tests.support.site_homes import index_site, make_home

HEAVY = ("torch", "diffusers", "opacus", "monai", "flwr", "peft", "transformers")


def fails(arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """Run `ld-client` to its end with exit code 2; returns its single line on stderr."""
    monkeypatch.setattr(sys, "argv", ["ld-client", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def run_without(libraries: Sequence[str], arguments: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run `ld-client` in a process in which importing one of the libraries fails."""
    code = f"import sys\nfor name in {libraries}: sys.modules[name] = None\nsys.argv = ['ld-client', *{arguments}]\n"
    code += "from ld_client.cli import main\nmain()"
    return subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=folder)


@pytest.mark.parametrize("app", [client, server])
def test_version_is_printed(app: typer.Typer) -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.stdout.strip()[0].isdigit()


@pytest.mark.parametrize("command", ["index", "exclusions", "drift", "budget"])
def test_a_site_is_named_by_home_or_config_and_not_by_both(command: str, site_yaml: Path, tmp_path: Path) -> None:
    for arguments in ([], ["--home", str(tmp_path), "--config", str(site_yaml)]):
        result = CliRunner().invoke(client, [command, *arguments])
        assert isinstance(result.exception, ConfigError)
        assert "--home" in str(result.exception)
        assert "--config" in str(result.exception)
        help_text = CliRunner().invoke(client, [command, "--help"], env={"COLUMNS": "200"}).output
        assert "--home" in help_text
        assert "--config" in help_text


def test_former_names_are_refused_with_the_present_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "exclusions" in fails(["left-out", "--config", "x"], monkeypatch, capsys)
    assert "--estimator" in fails(["drift", "--choice=grid"], monkeypatch, capsys)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["index", "--config", "SITE", "polcy.max_steps=1"],
        ["drift", "--config", "SITE", "--study", "STUDY", "--estimator", "gird"],
        ["drift", "--config", "SITE", "--study", "STUDY", "trainnig.steps=1"],
        ["budget", "--config", "SITE", "--study", "absent.yaml"],
        ["audit-privacy", "--config", "absent.yaml", "--release", "x", "--out", "y"],
        ["privacy-report", "--config", "absent.yaml", "--release", "x", "--out", "y"],
        ["start", "--home", "nowhere"],
        ["check", "--hme", "nowhere"],
    ],
)
def test_a_mistake_is_refused_before_any_heavy_library_is_imported(
    arguments: list[str], site_yaml: Path, tmp_path: Path
) -> None:
    study = tmp_path / "study.yaml"
    study.write_text("name: demo\nmodality: modality.yaml\n")
    places = {"SITE": str(site_yaml), "STUDY": str(study)}
    words = [places.get(word, word) for word in arguments]
    done = run_without(HEAVY, words, tmp_path)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("place", ["home", "config"])
@pytest.mark.parametrize("command", [("exclusions",), ("exclusions", "--json"), ("cohort",)])
def test_a_command_that_prints_a_list_imports_no_heavy_library(
    command: tuple[str, ...], place: str, site_yaml: Path, tmp_path: Path
) -> None:
    home = make_home(tmp_path / "home", site_yaml, StudyConfig(name="demo"))
    where = {"home": str(home.path), "config": str(home.config_file)}[place]
    done = run_without(HEAVY, [*command, f"--{place}", where], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout or command == ("cohort",)


@pytest.mark.slow
@pytest.mark.parametrize("command", [("audit", "verify"), ("enroll",)])
def test_a_command_of_a_home_imports_no_heavy_library(
    command: tuple[str, ...], site_yaml: Path, tmp_path: Path
) -> None:
    home = make_home(tmp_path / "home", site_yaml, StudyConfig(name="demo"))
    done = run_without(HEAVY, [*command, "--home", str(home.path)], tmp_path)
    assert "Traceback" not in done.stderr
    assert done.returncode == 0, done.stderr


def test_a_mistake_costs_less_than_two_seconds_of_the_processor(site_yaml: Path) -> None:
    before = getrusage(RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "ld_client.cli", "index", "--config", str(site_yaml), "polcy.max_steps=1"]
    assert subprocess.run(command, check=False, capture_output=True).returncode == 2
    after = getrusage(RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


def test_a_folder_that_cannot_be_written_is_one_line(
    site_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    line = fails(["index", "--config", str(site_yaml), f"store={tmp_path}/file/store"], monkeypatch, capsys)
    assert "file/store" in line
    app = typer.Typer()

    @app.command()
    def write() -> None:
        (tmp_path / "file" / "inside").write_text("")

    with pytest.raises(SystemExit):
        run_cli(app, [])
    assert "file/inside" in capsys.readouterr().err


def test_exclusions_are_listed_as_text_and_as_json(site_yaml: Path) -> None:
    runner, arguments = CliRunner(), ["exclusions", "--config", str(site_yaml)]
    indexed = runner.invoke(client, ["index", "--config", str(site_yaml), "--json", "held_out=0.4"])
    assert indexed.exit_code == 0, indexed.output
    summary = json.loads(indexed.stdout)
    assert (summary["patients"], summary["split"], summary["exclusions"]) == (3, {"trained": 2, "held_out": 1}, 0)
    assert runner.invoke(client, arguments).stdout == "nothing was excluded\n"
    assert json.loads(runner.invoke(client, [*arguments, "--json"]).stdout) == []
    strange = site_yaml.parent / "scans" / "a\x1b[2K\tb\nc.dcm"
    strange.write_bytes(b"no scan")
    index_site(load_site(site_yaml))
    (line,) = runner.invoke(client, arguments).stdout.splitlines()
    assert line.split("\t")[1] == "1"
    assert line.replace("\t", "").isprintable()
    (entry,) = json.loads(runner.invoke(client, [*arguments, "--json"]).stdout)
    assert entry["name"] == strange.name


def test_json_is_all_that_a_command_prints_to_stdout(site_yaml: Path, tmp_path: Path) -> None:
    site = load_site(site_yaml)
    index_site(site)
    study = tmp_path / "study.yaml"
    study.write_text(f"name: demo\nmodality: {site.modality}\ndrift: {{shape: channel}}\n")
    common = ["--config", str(site_yaml), "--study", str(study), "--json"]
    drift = json.loads(CliRunner().invoke(client, ["drift", *common]).stdout)
    assert (drift["estimator"], len(drift["drift"]), drift["trials"]) == ("moments", 4, [])
    budget = json.loads(CliRunner().invoke(client, ["budget", *common]).stdout)
    assert (budget["spent"], budget["cost"]["differential_privacy"]) == (0.0, False)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9])
def test_the_held_out_share_is_met_to_a_patient(share: float) -> None:
    names = [f"{number:032x}" for number in range(48)]
    hidden = held_out_patients([name for name in names for _ in range(3)], share)
    assert len(hidden) == round(share * 48)
    for number in range(48, 96):  # patients come, and the split moves as little as it can
        names.append(f"{number:032x}")
        moved = hidden ^ held_out_patients(names, share)
        hidden ^= moved
        assert len(moved - {names[-1]}) <= 1


def test_in_a_private_study_a_patient_moves_nobody_else_across_the_split() -> None:
    names = [f"{number:032x}" for number in range(400)]
    hidden = held_out_patients(names, 0.2, independent=True)
    assert len(hidden) == pytest.approx(80, abs=4 * (400 * 0.2 * 0.8) ** 0.5)
    for gone in names[:50]:
        rest = [name for name in names if name != gone]
        assert held_out_patients(rest, 0.2, independent=True) == hidden - {gone}


def test_the_split_keeps_a_patients_visits_together(site_yaml: Path) -> None:
    site = load_site(site_yaml, ["held_out=0.34"])
    index_site(site)
    store = open_store(site.store_path)
    trained, hidden = split_store(store, site.held_out)
    assert not set(trained.pseudonyms) & set(hidden.pseudonyms)
    assert (trained.patients, hidden.patients) == (2, 1)
    assert str(count_split(store, site.held_out)) == "2 patients to train on, 1 held out"
    assert (site.store_path / INDEX).stat().st_mode & 0o077 == 0


@dataclass(frozen=True)
class Group:
    number: Annotated[int, typer.Option("--number", min=1)]
    word: Annotated[str, typer.Option("--word")] = "default"


def test_option_groups_are_flattened_and_defaults_hold() -> None:
    seen: list[object] = []
    app = typer.Typer()

    @app.command()
    @grouped
    def command(group: Group, other: bool = typer.Option(False, "--other")) -> None:
        """Run it."""
        seen.append((group.number, group.word, other))

    assert CliRunner().invoke(app, ["--number", "3"]).exit_code == 0
    assert CliRunner().invoke(app, ["--number", "3", "--word", "x", "--other"]).exit_code == 0
    assert seen == [(3, "default", False), (3, "x", True)]
    assert CliRunner().invoke(app, []).exit_code == 2
    assert CliRunner().invoke(app, ["--number", "0"]).exit_code == 2


def test_text_of_others_cannot_move_the_cursor() -> None:
    assert printable("a\x1b[2Kb\tc") == "a\\x1b[2Kb\tc"


def test_an_error_of_ours_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    app = typer.Typer()

    @app.command()
    def fail() -> None:
        raise LdError("two\nlines")

    with pytest.raises(SystemExit) as end:
        run_cli(app, [])
    assert end.value.code == 2
    assert capsys.readouterr().err == f"error: two lines{os.linesep}"
