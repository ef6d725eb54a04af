from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from ld_common.adapters.base import inject
from ld_common.adapters.registry import read_adapter
from ld_common.core.config import from_mapping, load_config
from ld_common.core.errors import ModelError, ReleaseError
from ld_common.diffusion.base_model import base_digest, load_denoiser
from ld_common.diffusion.drift import LatentDrift
from ld_common.imaging.modality import Modality
from ld_common.protocol.study_config import StudyConfig
from ld_common.release.release import ADAPTER, DRIFT, ReleaseContent, load_release_base, read_release, write_release
from tests.conftest import random_state

MODALITY = load_config(Modality, Path(__file__).parents[2] / "configs/modalities/brain_mri.yaml")
ROUND = {"sites": {"p": {"visits": 9, "patients": 4}}, "left_out": {}, "round": 1}


@pytest.fixture
def released(smallest_base: Path, tmp_path: Path) -> Path:
    study = from_mapping(
        StudyConfig,
        {"base_model": str(smallest_base), "adapter": {"name": "lora", "rank": 2}, "federation": {"sites": ["p", "q"]}},
    )
    adapted = inject(load_denoiser(str(smallest_base)), read_adapter(study.adapter), study.seed)
    state = random_state(adapted.state(), 1.0)
    drift = LatentDrift(torch.tensor([0.1, -0.2, 0.3, 0.0])[:, None, None])
    digest = base_digest(str(smallest_base))
    return write_release(
        tmp_path / "release", study, MODALITY, ReleaseContent(digest, state, drift, {"p": drift}, [ROUND])
    )


def test_a_release_comes_back_as_it_was(released: Path) -> None:
    release = read_release(released)
    assert release.modality == MODALITY
    shown = {"age": 90.0, "sex": "M", "diagnosis": "AD"}
    assert release.modality.design_vector(shown) == MODALITY.design_vector(shown)  # whatever the order of its file
    assert release.drift is not None
    assert torch.allclose(release.drift.mean, release.site_drifts["p"].mean)
    for name, value in read_adapter(release.study.adapter).read_files(released).items():
        assert torch.equal(release.state[name], value)
    assert "| p | 4 | 9 |" in (released / "README.md").read_text()


def test_a_lora_is_merged_into_the_base_of_its_release(released: Path, smallest_base: Path) -> None:
    release = read_release(released)
    apart = inject(load_denoiser(str(smallest_base)), read_adapter(release.study.adapter), release.study.seed)
    apart.load(release.state)
    merged, plain = load_release_base(release), load_denoiser(str(smallest_base))
    assert [name for name, _ in merged.unet.named_parameters()] == [name for name, _ in plain.unet.named_parameters()]
    latents = torch.randn(2, *merged.latent_shape, generator=torch.Generator().manual_seed(0))
    context = merged.embed(["scan", ""])
    with torch.no_grad():
        ours, expected, before = (
            model.unet(latents, torch.tensor(500), context).sample for model in (merged, apart.model, plain)
        )
        assert torch.allclose(ours, expected, atol=1e-4)
        assert float((ours - before).abs().max()) > 1e-2


def test_a_lora_is_merged_before_weights_are_rounded(released: Path, smallest_base: Path) -> None:
    release = read_release(released)
    rounded, exact = load_release_base(release, precision="bfloat16"), load_release_base(release)
    assert rounded.dtype == torch.bfloat16
    for (name, ours), wanted in zip(rounded.unet.named_parameters(), exact.unet.parameters(), strict=True):
        assert torch.equal(ours, wanted.to(torch.bfloat16)), name


@pytest.mark.attack
def test_an_altered_file_is_refused(released: Path) -> None:
    with (released / ADAPTER).open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"\x01")
    with pytest.raises(ReleaseError, match="not the file that was released"):
        read_release(released)


@pytest.mark.attack
def test_another_base_is_refused(released: Path, smallest_base: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(smallest_base, other)
    (other / "scheduler" / "note.json").write_text("{}")
    with pytest.raises(ReleaseError, match="--base"):
        load_release_base(read_release(released), str(other))
    with pytest.raises(ModelError, match="neither a folder"):
        load_release_base(read_release(released), str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "manifest.json").write_text("{"),
        lambda folder: (folder / "manifest.json").write_text('{"format": 99}'),
        lambda folder: (folder / "manifest.json").write_text('{"format": 1}'),
        lambda folder: (folder / ADAPTER).unlink(),
        lambda folder: edit(folder, lambda manifest: manifest["modality"].update(surprise=1)),
        lambda folder: edit(folder, lambda manifest: manifest.pop("study")),
        lambda folder: (folder / DRIFT).unlink(),
        lambda folder: edit(folder, lambda manifest: manifest.pop("drift")),
        lambda folder: edit(folder, lambda manifest: manifest["files"].pop(DRIFT)),
    ],
)
@pytest.mark.attack
def test_what_is_no_release_is_one_clear_error(released: Path, spoil: object) -> None:
    spoil(released)  # type: ignore[operator]
    with pytest.raises(ReleaseError) as caught:
        read_release(released)
    assert "\n" not in str(caught.value)


def edit(folder: Path, change: object) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)  # type: ignore[operator]
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_equal_content_gives_equal_bytes(released: Path, smallest_base: Path, tmp_path: Path) -> None:
    first = read_release(released)
    again = tmp_path / "again"
    for _ in range(5):
        study = dataclasses.replace(first.study, base_model=str(smallest_base))
        drift = first.drift
        assert isinstance(drift, LatentDrift)
        write_release(
            again, study, MODALITY, ReleaseContent(first.base_digest, first.state, drift, {"p": drift}, [ROUND])
        )
        assert all((again / file.name).read_bytes() == file.read_bytes() for file in released.iterdir())


@pytest.mark.slow
def test_a_private_card_states_its_epsilon_and_withholds_numbers_and_a_public_one_claims_none(
    released: Path, smallest_base: Path, tmp_path: Path
) -> None:
    assert "ε" not in (released / "README.md").read_text().replace("no ε is claimed", "")
    options = {
        "base_model": str(smallest_base),
        "adapter": {"name": "lora", "rank": 2},
        "training": {"steps": 2, "batch_size": 2},
        "federation": {"rounds": 1, "sites": ["p", "q"], "weighting": "equal"},
        "privacy": {
            "enabled": True,
            "patients": 10,
            "expected_batch_size": 2,
            "target_delta": 1e-5,
            "augmentation_multiplicity": 1,
        },
    }
    public = read_release(released)
    record = {"sites": {"p": {"visits": None, "patients": None}}, "left_out": {}, "round": 1}
    content = ReleaseContent(public.base_digest, public.state, rounds=[record])
    folder = write_release(tmp_path / "private", from_mapping(StudyConfig, options), MODALITY, content)
    assert read_release(folder).manifest["privacy"]["epsilon"] <= 8.0
    card = (folder / "README.md").read_text()
    assert "Differential privacy: ε = " in card
    assert "| p | withheld | withheld |" in card
