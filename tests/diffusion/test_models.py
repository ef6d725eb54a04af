from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ld_common.core.errors import ModelError, RequestError
from ld_common.diffusion.base_model import base_digest, load_base
from ld_common.imaging.modality import Modality


@pytest.fixture
def copied(tiny_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


def test_a_prompt_that_is_too_long_is_refused_beside_a_short_one(tiny_base: Path) -> None:
    with pytest.raises(ModelError, match="shorten"):
        load_base(str(tiny_base)).embed(["", "zebra " * 60])


def test_the_digest_is_of_what_is_loaded(copied: Path, tiny_base: Path) -> None:
    digest = base_digest(str(tiny_base))
    (copied / "unet" / ".DS_Store").write_text("x")
    (copied / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"another precision")
    (copied / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"another format")
    assert base_digest(str(copied)) == digest
    weights = copied / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert base_digest(str(copied)) != digest


def test_where_the_bases_own_latents_lie_is_part_of_its_digest(copied: Path, tiny_base: Path) -> None:
    (copied / "latent_statistics.json").unlink()
    assert base_digest(str(copied)) != base_digest(str(tiny_base))
    assert load_base(str(copied)).latent_mean.tolist() == [0.0] * 4


def test_weights_in_half_precision_alone_are_found(copied: Path) -> None:
    for part, name in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        (copied / part / f"{name}.safetensors").rename(copied / part / f"{name}.fp16.safetensors")
    assert load_base(str(copied)).channels == 1


@pytest.mark.parametrize(
    "spoil",
    [
        lambda base: shutil.rmtree(base / "vae"),
        lambda base: (base / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights"),
        lambda base: (base / "unet" / "config.json").write_text("{"),
        lambda base: (base / "latent_statistics.json").write_text("{"),
    ],
)
def test_a_broken_base_is_one_clear_error(copied: Path, spoil: object) -> None:
    spoil(copied)  # type: ignore[operator]
    with pytest.raises(ModelError) as caught:
        load_base(str(copied))
    assert "\n" not in str(caught.value)


def test_attributes_become_words_and_back(brain_mri: Modality) -> None:
    attributes = brain_mri.parse_all("age=73.6, sex=F, diagnosis=AD")
    assert brain_mri.prompt(attributes) == "axial T1 brain MRI, woman, 74 years, Alzheimer's disease"
    with pytest.raises(RequestError, match="sex"):
        brain_mri.prompt({"age": 70.0, "diagnosis": "CN"})
    with pytest.raises(RequestError, match="attribute=value"):
        brain_mri.parse_all("age")
    for wrong in ("age=nan", "age=inf", "age=-3", "sex=f"):
        with pytest.raises(RequestError):
            brain_mri.parse_all(wrong)
