"""The ten lines that a researcher needs, from a release or from a table of scans to arrays and files."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from ld_common import (
    AdaptedModel,
    BaseModel,
    CounterfactualPipeline,
    LatentDrift,
    TrainingData,
    adapters,
    editing,
    load_base,
    read_scan,
    train,
)
from ld_common.core.config import from_mapping
from ld_common.core.errors import ConfigError, ReleaseError, RequestError, ScanError, SignatureError
from ld_common.imaging.modality import Modality
from ld_common.protocol.keys import new_signing_key, public_line
from ld_common.protocol.study_config import StudyConfig
from ld_common.release.release import ReleaseContent, write_release
from ld_common.release.signature import sign_release
from tests.conftest import BRAIN_MRI, random_state, write_mr_slice

STEPS = {"num_inference_steps": 4}
ATTRIBUTES = {"age": 74, "sex": "F", "diagnosis": "CN"}


@pytest.fixture(scope="module")
def base(smallest_base: Path) -> BaseModel:
    return load_base(str(smallest_base))


@pytest.fixture(scope="module")
def release(
    smallest_base: Path, base: BaseModel, brain_mri: Modality, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An unsigned release whose base lies where it says."""
    study = from_mapping(StudyConfig, {"base_model": str(smallest_base), "adapter": {"name": "lora", "rank": 2}})
    adapted = train(base, adapters.Lora(rank=2), TrainingData(torch.randn(2, 4, 4, 4), ["", ""]), steps=1)
    content = ReleaseContent(base.digest, random_state(adapted.state(), 0.1), LatentDrift(torch.ones(4, 1, 1)))
    return write_release(tmp_path_factory.mktemp("api") / "release", study, brain_mri, content)


@pytest.fixture(scope="module")
def pipe(release: Path) -> CounterfactualPipeline:
    with pytest.warns(UserWarning, match="not signed"):
        return CounterfactualPipeline.from_release(release)


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DICOM series of three slices of 24 x 20 pixels of a woman of 74 years."""
    folder, random = tmp_path_factory.mktemp("series"), np.random.default_rng(0)
    for number in range(3):
        pixels = random.integers(0, 900, (24, 20)).astype(np.uint16)
        place = {"ImagePositionPatient": [0, 0, 5 * number], "PatientAge": "074Y", "PatientSex": "F"}
        write_mr_slice(folder / f"{number}.dcm", pixels, PixelSpacing=[9.0, 9.0], **place)
    return folder


# Drawing


def test_a_series_becomes_a_counterfactual_in_its_own_grid_and_values(
    pipe: CounterfactualPipeline, series: Path, tmp_path: Path
) -> None:
    result = pipe(series, source={"diagnosis": "CN"}, target={"age": 84}, **STEPS)
    scan = read_scan(series, pipe.modality)
    assert result.source == {"age": 74.0, "sex": "F", "diagnosis": "CN"}
    assert result.attributes == {"age": 84.0, "sex": "F", "diagnosis": "CN"}
    assert np.array_equal(result.scan, scan.pixels)
    for image in (result.image, result.reconstruction, result.difference, result.samples[0]):
        assert (image.shape, image.dtype) == (scan.pixels.shape, np.float32)
    assert np.array_equal(result.difference, result.image - result.scan)
    assert result.record["rendering"] == "deformation"
    assert np.abs(result.difference).max() > 0
    assert result.image.min() >= 0 and result.image.max() <= scan.pixels.max()
    assert set(result.biomarkers) == {"ventricles"}
    assert set(result.biomarkers["ventricles"]) == {"scan", "reconstruction", "image"}
    files = result.save(tmp_path / "out")
    assert all(file.exists() for file in files)
    record = json.loads((tmp_path / "out" / "result.json").read_text())
    assert record["biomarkers_mm2"] == result.biomarkers
    assert record["edit"]["num_inference_steps"] == 4
    with Image.open(tmp_path / "out" / "image.png") as image:
        assert (image.size, image.info["SyntheticData"]) == ((20, 24), "YES")


def test_a_scan_and_a_tensor_are_taken_as_well(pipe: CounterfactualPipeline, series: Path) -> None:
    source = {"diagnosis": "CN"}
    by_path = pipe(series, source, target={"age": 84}, **STEPS)
    by_scan = pipe(read_scan(series, pipe.modality), source, target={"age": 84}, **STEPS)
    assert np.array_equal(by_path.image, by_scan.image)
    tensor = 2 * torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(0)) - 1
    result = pipe(tensor, ATTRIBUTES, target={"diagnosis": "AD"}, **STEPS)
    assert np.array_equal(result.scan, tensor[0].numpy())
    assert result.image.shape == (16, 16)
    assert np.abs(result.image).max() <= 1
    assert result.biomarkers == {}  # no spacing, no area


@pytest.mark.slow
def test_another_slice_another_seed_and_several_seeds(pipe: CounterfactualPipeline, series: Path) -> None:
    options = {"source": {"diagnosis": "CN"}, "target": {"age": 84}, "editor": "ddpm", **STEPS}
    first, again, other = (pipe(series, seed=seed, **options) for seed in (0, 0, 1))
    assert np.array_equal(first.image, again.image)
    assert not np.array_equal(first.image, other.image)
    both = pipe(series, num_seeds=2, **options)
    assert np.allclose(both.samples, np.stack([first.image, other.image]), atol=1e-3)
    assert np.allclose(both.image, both.samples.mean(0), atol=1e-2)
    assert both.record["seeds"] == [0, 1]
    assert not np.array_equal(pipe(series, slice_index=0, **options).scan, first.scan)


@pytest.mark.slow
def test_the_editor_is_a_name_an_instance_or_the_releases(pipe: CounterfactualPipeline, series: Path) -> None:
    ask = {"source": {"diagnosis": "CN"}, "target": {"age": 84}}
    by_name = pipe(series, editor="ddim", guidance_scale=1.0, fixed_point_iterations=0, **ask, **STEPS)
    instance = editing.DdimInversion(num_inference_steps=4, guidance_scale=1.0, fixed_point_iterations=0)
    assert np.array_equal(by_name.image, pipe(series, editor=instance, **ask).image)
    assert by_name.record["edit"] == pipe(series, editor=instance, **ask).record["edit"]
    unchanged = pipe(series, guidance_scale=0.0, **ask, **STEPS)
    assert np.allclose(unchanged.image, unchanged.scan, atol=1e-3)  # nothing moves
    unchanged = pipe(series, guidance_scale=0.0, rendering="decoded", **ask, **STEPS)
    assert np.array_equal(unchanged.image, unchanged.reconstruction)
    with pytest.raises(RequestError, match="rendering is 'warped'"):
        pipe(series, rendering="warped", **ask)


def test_what_cannot_be_drawn_is_one_clear_error(pipe: CounterfactualPipeline, series: Path, tmp_path: Path) -> None:
    source = {"diagnosis": "CN"}
    for arguments, error, words in (
        ({"source": None, "target": {"age": 84}}, RequestError, "diagnosis"),
        ({"source": source, "target": {}}, RequestError, "target is empty"),
        ({"source": source, "target": {"aeg": 84}}, RequestError, "did you mean 'age'"),
        ({"source": source, "target": {"age": 400}}, RequestError, "400"),
        ({"source": {**source, "sex": "M"}, "target": {"age": 84}}, RequestError, "sex is F"),
        ({"source": source, "target": {"age": 84}, "editor": "dimm"}, ConfigError, "did you mean 'ddim'"),
        ({"source": source, "target": {"age": 84}, "guidance": 1}, ConfigError, "guidance_scale"),
        ({"source": source, "target": {"age": 84}, "strength": 1}, ConfigError, "guidance_scale"),
        ({"source": source, "target": {"age": 84}, "num_seeds": 0}, RequestError, "num_seeds is 0"),
    ):
        with pytest.raises(error, match=words):
            pipe(series, **arguments)
    with pytest.raises(ScanError):
        pipe(tmp_path / "nowhere.dcm", source, target={"age": 84})
    for tensor, words in ((torch.zeros(1, 8, 8), "shape"), (torch.full((1, 16, 16), 2.0), r"\[-1, 1\]")):
        with pytest.raises(RequestError, match=words):
            pipe(tensor, ATTRIBUTES, target={"age": 84})
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="cannot make the folder"):
        pipe(series, source, target={"age": 84}, **STEPS).save(tmp_path / "file" / "out")


# Releases


@pytest.mark.slow
def test_a_release_is_found_from_any_folder_and_names_its_base(
    release: Path, smallest_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="not signed"):
        CounterfactualPipeline.from_release(str(release))
        (tmp_path / "link").symlink_to(release)
        CounterfactualPipeline.from_release(tmp_path / "link")
    copy = tmp_path / "deeper" / "copy"
    shutil.copytree(release, copy)
    with pytest.warns(UserWarning), pytest.raises(ReleaseError, match="--base"):
        CounterfactualPipeline.from_release(copy)
    with pytest.warns(UserWarning):
        CounterfactualPipeline.from_release(copy, base=str(smallest_base))


def test_signatures_are_asked_for_and_checked(
    release: Path, smallest_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    with pytest.raises(SignatureError, match="not signed"):
        CounterfactualPipeline.from_release(release, allow_unsigned=False)
    signed, key = tmp_path / "signed", new_signing_key()
    shutil.copytree(release, signed)
    sign_release(signed, key)
    with pytest.raises(SignatureError, match="not trusted"):
        CounterfactualPipeline.from_release(signed, base=str(smallest_base))
    with pytest.warns(UserWarning, match="trusted"):
        trusted = CounterfactualPipeline.from_release(
            signed, base=str(smallest_base), trust=public_line(key.public_key())
        )
    assert trusted.release is not None
    assert trusted.release.signed_by is not None


# Training


@pytest.fixture(scope="module")
def data(base: BaseModel, series: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    table = tmp_path_factory.mktemp("table") / "scans.csv"
    with table.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["patient", "input", "age", "sex", "diagnosis"])
        writer.writerow(["a", str(series), 74.2, "F", "CN"])
        writer.writerow(["b", str(series / "0.dcm"), 74.9, "F", "AD"])
    return TrainingData.from_table(table, modality=BRAIN_MRI, base=base)


def test_training_returns_an_adapted_copy_and_leaves_the_base_alone(
    base: BaseModel, data: TrainingData, tmp_path: Path
) -> None:
    drift = LatentDrift.estimate(data.latents, base, shape="channel")
    before = {name: value.clone() for name, value in base.unet.state_dict().items()}
    losses: list[float] = []
    options = {"steps": 3, "batch_size": 2, "learning_rate": 0.05}
    model = train(
        base, adapters.Lora(rank=8), data, drift=drift, on_step=lambda _, loss: losses.append(loss), **options
    )
    assert isinstance(model, AdaptedModel)
    assert model.drift is drift
    assert len(losses) == 3
    assert any(bool(value.abs().sum()) for name, value in model.state().items() if "lora_B" in name)
    assert base.unet.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in base.unet.state_dict().items())
    assert base.transform_prompt("a scan") == "a scan"
    assert not hasattr(base.unet, "peft_config")
    again = train(base, adapters.Lora(rank=8), data, drift=drift, **options)
    assert all(torch.equal(value, again.state()[name]) for name, value in model.state().items())
    model.save_pretrained(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "pytorch_lora_weights.safetensors",
        "adapter_model.safetensors",
        "adapter_config.json",
        "drift.safetensors",
    }
    with safe_open(tmp_path / "out" / "drift.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("mean"), drift.mean)
        assert file.metadata()["formulation"] == "prior"


def test_a_trained_model_draws_without_a_release(base: BaseModel, data: TrainingData, series: Path) -> None:
    model = train(base, adapters.TextualInversion(vectors=1), data, steps=1, batch_size=1)
    assert len(model.model.tokenizer) == len(base.tokenizer) + 1
    pipe = CounterfactualPipeline(model.model, BRAIN_MRI)
    result = pipe(series, {"diagnosis": "CN"}, target={"age": 84}, **STEPS)
    assert result.record["release"] is None
    assert np.isfinite(result.image).all()


def test_prior_preservation_and_wrong_options(base: BaseModel, data: TrainingData) -> None:
    adapter = adapters.DreamBooth(rank=2, num_class_images=2, class_inference_steps=2)
    model = train(base, adapter, data, steps=1, batch_size=1)
    assert model.model.transform_prompt("scan") == "sks scan"
    with pytest.raises(ConfigError, match="learning_rate"):
        train(base, adapters.Lora(rank=2), data, learning_rat=1.0)
    with pytest.raises(ConfigError, match="noise_offset"):
        train(base, adapters.Lora(rank=2), data, offset_noise=1.0)
