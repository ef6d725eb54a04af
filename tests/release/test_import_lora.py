"""LoRAs of plain diffusers and peft as releases: the same output, or a refusal that says why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ld_common.core.errors import AdapterError
from ld_common.imaging.modality import Modality
from ld_common.release.import_lora import import_lora
from ld_common.release.release import load_release_base, read_release

DEFAULT_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def fresh_unet(base: Path) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(base, subfolder="unet")


def randomize(unet: torch.nn.Module) -> None:
    torch.manual_seed(1)
    for name, parameter in unet.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)


@torch.no_grad()
def output(unet: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents, context = torch.randn(1, 4, 4, 4, generator=generator), torch.randn(1, 32, 32, generator=generator)
    result: torch.Tensor = unet(latents, 10, context).sample
    return result


def diffusers_lora(base: Path, folder: Path, metadata: bool = True, **options: Any) -> torch.Tensor:
    """Write a LoRA with `save_lora_weights`; returns the output of the UNet that has it."""
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig, get_peft_model_state_dict

    unet = fresh_unet(base)
    unet.add_adapter(LoraConfig(target_modules=DEFAULT_TARGETS, **options))
    randomize(unet)
    config = unet.peft_config["default"].to_dict() if metadata else None
    layers = get_peft_model_state_dict(unet)
    StableDiffusionPipeline.save_lora_weights(folder, layers, unet_lora_adapter_metadata=config)
    return output(unet)


def imported(base: Path, source: Path, folder: Path, modality: Modality) -> torch.Tensor:
    release = read_release(import_lora(source, str(base), modality, folder))
    return output(load_release_base(release).unet)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 4},
        {"r": 4, "lora_alpha": 10},
        {"r": 4, "lora_alpha": 3, "use_rslora": True},
        {"r": 2, "lora_alpha": 5, "rank_pattern": {"attn2.to_k": 6}, "alpha_pattern": {"attn2.to_k": 9}},
    ],
)
def test_a_lora_of_diffusers_keeps_its_effect(
    smallest_base: Path, tmp_path: Path, brain_mri: Modality, options: dict[str, Any]
) -> None:
    expected = diffusers_lora(smallest_base, tmp_path / "lora", **options)
    ours = imported(smallest_base, tmp_path / "lora", tmp_path / "release", brain_mri)
    assert torch.allclose(ours, expected, atol=1e-5)
    assert not torch.allclose(ours, output(fresh_unet(smallest_base)), atol=1e-2)


def test_a_lora_of_peft_keeps_its_effect(smallest_base: Path, tmp_path: Path, brain_mri: Modality) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        fresh_unet(smallest_base), LoraConfig(r=3, lora_alpha=12, target_modules=["attn2.to_v", "proj_in"])
    )
    randomize(model)
    model.save_pretrained(tmp_path / "peft")
    ours = imported(smallest_base, tmp_path / "peft", tmp_path / "release", brain_mri)
    assert torch.allclose(ours, output(model), atol=1e-5)
    release = read_release(tmp_path / "release")
    assert release.study.adapter["rank"] == 3
    assert release.study.adapter["targets"] == ["attn2.to_v", "proj_in"]
    assert release.manifest["privacy"] == {"differential_privacy": False}
    assert "adapter_model.safetensors" in (tmp_path / "release" / "README.md").read_text()


def test_a_kohya_file_with_alphas_keeps_its_effect(smallest_base: Path, tmp_path: Path, brain_mri: Modality) -> None:
    expected = diffusers_lora(smallest_base, tmp_path / "lora", r=4, lora_alpha=10)
    tensors = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    kohya = {}
    for name, value in tensors.items():
        layer, _, rest = name.removeprefix("unet.").partition(".lora_")
        key = "lora_unet_" + layer.replace(".", "_")
        kohya[f"{key}.lora_{'down' if rest.startswith('A') else 'up'}.weight"] = value
        kohya[f"{key}.alpha"] = torch.tensor(10.0)
    save_file(kohya, tmp_path / "kohya.safetensors")
    ours = imported(smallest_base, tmp_path / "kohya.safetensors", tmp_path / "release", brain_mri)
    assert torch.allclose(ours, expected, atol=1e-5)


def _with(file: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(file)), file)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: {**t, "text_encoder.x.lora_A.weight": torch.zeros(2, 2)}, "text encoder"),
        (lambda t: {**t, "unet.mid_block.nowhere.lora_A.weight": torch.zeros(4, 2)}, "lacks"),
        (lambda t: {name: value[..., :3].contiguous() for name, value in t.items()}, "pair|does not fit"),
        (lambda t: {name: value for name, value in t.items() if "lora_B" not in name}, "pair"),
        (lambda t: {name: value * float("nan") for name, value in t.items()}, "NaN"),
        (lambda t: {"a": torch.zeros(2)}, "LoRA|lora"),
    ],
)
def test_what_cannot_be_imported_is_refused_with_the_reason(
    smallest_base: Path, tmp_path: Path, brain_mri: Modality, change: Any, words: str
) -> None:
    diffusers_lora(smallest_base, tmp_path / "lora", metadata=False, r=4, lora_alpha=4)
    _with(tmp_path / "lora" / "pytorch_lora_weights.safetensors", change)
    with pytest.raises(AdapterError, match=words):
        import_lora(tmp_path / "lora", str(smallest_base), brain_mri, tmp_path / "release")
    assert not (tmp_path / "release").exists()


def test_dora_pickles_and_empty_folders_are_refused(smallest_base: Path, tmp_path: Path, brain_mri: Modality) -> None:
    diffusers_lora(smallest_base, tmp_path / "lora", r=2, lora_alpha=2, use_dora=True)
    (tmp_path / "lora.bin").write_bytes(b"pickle")
    for source, words in (("lora", "DoRA|lora_magnitude"), ("lora.bin", "safetensors"), ("nowhere", "folder or file")):
        with pytest.raises(AdapterError, match=words):
            import_lora(tmp_path / source, str(smallest_base), brain_mri, tmp_path / "release")
