"""The command line of `ld-generate`: help, versions, old options, and refusals before a model library is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from ld_common.core.version import installed_version
from ld_common.editing.registry import EDITORS
from ld_generate.cli import RENAMED, cli, main
from tests.support.releases import SOURCE

COMMANDS = typer.main.get_command(cli).commands  # type: ignore[attr-defined]


def run_without_torch(lines: list[list[str]]) -> list[str]:
    """The errors of several command lines, in one process that cannot import torch."""
    code = f"""
import contextlib, io, sys
sys.modules["torch"] = None  # importing it now fails
from ld_common.core.command import run_cli
from ld_generate.cli import cli
for line in {lines}:
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        try:
            run_cli(cli, line)
        except SystemExit as ended:
            code = ended.code
    print(code, " ".join(errors.getvalue().split()))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


def test_the_version_is_printed() -> None:
    result = CliRunner().invoke(cli, ["--version"])
    assert (result.exit_code, installed_version() in result.output) == (0, True)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_help_with_an_example(command: str) -> None:
    result = CliRunner().invoke(cli, [command, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert f"ld-generate {command} " in result.output


def test_help_names_every_editor() -> None:
    output = CliRunner().invoke(cli, ["edit", "--help"], env={"COLUMNS": "300"}).output
    assert set(EDITORS) <= set(output.replace(",", " ").replace(".", " ").split())


@pytest.mark.parametrize("option", sorted(RENAMED))
@pytest.mark.parametrize("command", [[], ["edit"]])
def test_an_old_option_is_refused_with_the_new_one(
    command: list[str], option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["ld-generate", *command, option, "value"])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr().err
    assert (ended.value.code, printed.count("\n")) == (2, 1)
    assert f"'{option}'" in printed
    assert f"'{RENAMED[option]}'" in printed


def test_a_typo_is_refused_before_a_model_library_is_imported(release: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    edit = ["edit", str(release), "--input", "a.png", "--source", SOURCE]
    cases = [
        (["edit", "nowhere", "--input", "a.png", "--target", "age=80"], "'nowhere' holds no release"),
        ([*edit, "--target", "age=eighty"], "age=eighty"),
        ([*edit, "--target", "age=180"], "18 to 100 years"),
        ([*edit, "--target", "diagnose=AD"], "did you mean 'diagnosis'"),
        ([*edit, "--target", "diagnosis=ADD"], "did you mean 'AD'"),
        ([*edit, "--target", ""], "--target '' changes nothing"),
        (edit, "--target"),
        (["edit", str(release), "--target", "age=80"], "--input"),
        ([*edit, "--target", "age=80", "--source", "agee=70"], "did you mean 'age'"),
        ([*edit, "--target", "age=80", "--editor", "sdedt"], "did you mean 'sdedit'"),
        ([*edit, "--target", "age=80", "--editor", "invert"], "now called 'ddim'"),
        ([*edit, "--target", "age=80", "--noise-fraction", "1.5"], "--noise-fraction is 1.5"),
        ([*edit, "--target", "age=80", "--guidance-scale", "nan"], "--guidance-scale is nan"),
        ([*edit, "--target", "age=80", "--guidance-scale", "-1"], "--guidance-scale is -1.0"),
        ([*edit, "--target", "age=80", "--num-seeds", "0"], "--num-seeds"),
        ([*edit, "--target", "age=80", "--drift", "aster"], "--drift 'aster'"),
        ([*edit, "--target", "age=80", "--drift", "nan"], "--drift 'nan'"),
        ([*edit, "--target", "age=80", "--device", "tpu"], "--device is 'tpu'"),
        ([*edit, "--target", "age=80", "--precision", "int8"], "--precision is 'int8'"),
        ([*edit, "--target", "age=80", "--out", str(tmp_path / "file" / "out")], "choose another --out"),
        ([*edit, "--target", "age=80", "nonsense"], "'nonsense' is not of the form key=value"),
        (["sweep", str(release), "age=90:60:5", "--input", "a.png"], "0 values"),
        (["volume", str(release), "--input", "a.nii", "--target", "age=80", "--slices", "5:3"], "--slices '5:3'"),
        (["sweep", str(release), "age=60:80:20", "--input", "a.png", "--drift", "0", "--drift", "0.1"], "--drift"),
        (
            ["volume", str(release), "--input", "a.nii", "--target", "age=80", "--drift", "0", "--drift", "0.1"],
            "--drift",
        ),
        (["batch", str(release), "absent.csv"], "absent.csv"),
        (["sample", str(release), "--source", SOURCE, "--sampler", "eular"], "--sampler is 'eular'"),
        (["sample", str(release), "--source", SOURCE, "--drift", "auto"], "ld-generate edit"),
        (["serve", str(release), "--examples", "absent"], "--examples 'absent'"),
        (["import", "absent", "--base", "b", "--modality", "m.yaml", "--out", "o"], "absent"),
        (["eidt", str(release)], "edit"),
    ]
    printed = run_without_torch([line for line, _ in cases])
    assert len(printed) == len(cases)
    for (line, words), result in zip(cases, printed, strict=True):
        assert result.startswith("2 "), (line, result)
        assert words in result, (line, result)
        assert "Traceback" not in result
