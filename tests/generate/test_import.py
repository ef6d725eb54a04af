"""`ld-generate import`: a LoRA of plain peft becomes a release that draws."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model

from ld_common.core.command import run_cli
from ld_generate.cli import cli
from tests.conftest import BRAIN_MRI
from tests.support.releases import SOURCE, GenerateRunner


@pytest.fixture
def lora(tiny_base: Path, tmp_path: Path) -> Path:
    unet = UNet2DConditionModel.from_pretrained(tiny_base, subfolder="unet")
    get_peft_model(unet, LoraConfig(r=2, lora_alpha=5, target_modules=["to_q", "to_v"])).save_pretrained(
        tmp_path / "lora"
    )
    return tmp_path / "lora"


def test_an_imported_lora_is_a_release_that_draws(
    lora: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "release"
    arguments = ["import", lora, "--base", tiny_base, "--modality", BRAIN_MRI, "--out", folder, "--name", "mine"]
    with pytest.raises(SystemExit) as ended:
        run_cli(cli, list(map(str, arguments)))
    captured = capsys.readouterr()
    assert (ended.value.code or 0, str(folder) in captured.out) == (0, True), captured.err
    options = ["--samples", 1, "--num-inference-steps", 2, "--out", tmp_path / "drawn"]
    code, printed = GenerateRunner(folder, capsys)("sample", "--source", SOURCE, *options)
    assert code == 0, printed
    with pytest.raises(SystemExit) as again:  # a release is not overwritten
        run_cli(cli, list(map(str, arguments)))
    assert (again.value.code, "--out" in capsys.readouterr().err) == (2, True)
