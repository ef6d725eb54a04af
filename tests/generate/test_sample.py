"""`ld-generate sample`: pictures from one noise under each drift."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.releases import SOURCE, GenerateRunner


def test_pictures_are_drawn_from_one_noise_under_each_drift(run: GenerateRunner, tmp_path: Path) -> None:
    drifts = [word for name in ("release", "aster", "-0.1", "0") for word in ("--drift", name)]
    out = tmp_path / "drawn"
    code, printed = run("sample", "--source", SOURCE, *drifts, "--samples", 2, "--out", out)
    assert code == 0, printed
    names = {f"sample-{number}_drift-{name}.png" for number in (1, 2) for name in ("release", "aster", "-0.1", "0")}
    assert {path.name for path in out.iterdir()} == names | {"strip.png", "record.json"}
    first, *others = (np.asarray(Image.open(out / f"sample-1_drift-{name}.png")) for name in ("release", "aster", "0"))
    assert not any((first == other).all() for other in others)
    record = json.loads((out / "record.json").read_text())
    assert record["drifts"] == ["release", "aster", "-0.1", "0"]
    assert record["sampler"] == {"name": "ddim", "num_inference_steps": 3}


@pytest.mark.parametrize("drift", ["aste", "nan", "inf"])
def test_a_drift_that_the_release_does_not_have_is_named(run: GenerateRunner, tmp_path: Path, drift: str) -> None:
    code, printed = run("sample", "--source", SOURCE, "--drift", drift, "--out", tmp_path / "out")
    assert (code, f"'{drift}'" in printed, "aster" in printed, printed.count("\n")) == (2, True, True, 2), printed
    assert not (tmp_path / "out").exists()


def test_json_lists_the_pictures(run: GenerateRunner, tmp_path: Path) -> None:
    options = ["--samples", 1, "--num-inference-steps", 2, "--sampler", "euler", "--out", tmp_path / "out", "--json"]
    code, out, _ = run.streams("sample", "--source", SOURCE, *options)
    (result,) = json.loads(out)["results"]
    assert (code, result["files"]) == (0, ["record.json", "sample-1_drift-release.png", "strip.png"])
