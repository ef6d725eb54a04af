"""Turn a LoRA that diffusers or peft trained into a release."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ld_common.core.offline  # noqa: F401  (before any model library)
from ld_common.adapters.lora import DIFFUSERS_METADATA, DIFFUSERS_WEIGHTS, PEFT_CONFIG, PEFT_PREFIX, PEFT_WEIGHTS
from ld_common.adapters.state_dict import check_state, read_tensors
from ld_common.core.atomic_files import file_digest
from ld_common.core.config import from_mapping
from ld_common.core.errors import AdapterError
from ld_common.core.state import State
from ld_common.core.strict_json import read_json, read_limited
from ld_common.diffusion.base_model import Denoiser, base_digest, load_denoiser
from ld_common.imaging.modality import Modality
from ld_common.imaging.scan_table import load_modality
from ld_common.protocol.study_config import StudyConfig
from ld_common.release.release import ReleaseContent, write_release


@dataclass(frozen=True)
class LoraScaling:
    """The config by which peft and diffusers scale B·A of each layer."""

    rank: int | None
    alpha: float | None
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    rank_stabilized: bool

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LoraScaling:
        """Read peft's config; raises `AdapterError` for variants that are no plain LoRA."""
        for key, reason in (
            ("use_dora", "DoRA"),
            ("lora_bias", "LoRA with biases"),
            ("fan_in_fan_out", "Conv1D layers"),
        ):
            if config.get(key):
                raise AdapterError(f"{key} is set: {reason} cannot be imported, only plain LoRA")
        return cls(
            config.get("r"),
            config.get("lora_alpha"),
            dict(config.get("rank_pattern") or {}),
            dict(config.get("alpha_pattern") or {}),
            bool(config.get("use_rslora")),
        )

    def factor(self, layer: str, rank: int) -> float:
        """alpha/r of a layer whose A has `rank` rows (alpha/√r if rank-stabilized); 1 without a config."""
        alpha = _matching(self.alpha_pattern, layer, self.alpha)
        if alpha is None:
            return 1.0
        return float(alpha) / (rank**0.5 if self.rank_stabilized else rank)


def import_lora(
    source: Path | str, base: str, modality: Modality | Path | str, folder: Path | str, name: str = "imported"
) -> Path:
    """Write a release folder from a LoRA of a base's UNet.

    The factor alpha/r is folded into B. Layers of different ranks are padded with zeros to the largest rank, which
    changes no output. The release claims no differential privacy and has no drift.

    Args:
        source: a folder or `.safetensors` file of diffusers (`save_lora_weights`; older and kohya names work, too), or
            of peft (`save_pretrained`: `adapter_model.safetensors` beside `adapter_config.json`).
        base: path or hub id of the base that the LoRA was trained on.
        modality: the modality whose prompts the LoRA knows, or its YAML file.
        folder: the release folder to write.
        name: the study's name in the release.

    Raises:
        AdapterError: not a LoRA of this base's UNet, parts of a text encoder, or a variant such as DoRA.
        ModelError: the base cannot be loaded.
        CheckpointError: the folder cannot be written.
    """
    file = _weights_file(Path(source))
    model = load_denoiser(base)
    if not model.has_unet:
        raise AdapterError("only LoRAs of a UNet can be imported, this base has a transformer")
    layers, scaling = _read_layers(file, model)
    state, rank = _fold(layers, scaling, file)
    targets = _targets(sorted(layers), [layer for layer, _ in model.unet.named_modules()])
    study = from_mapping(
        StudyConfig, {"name": name, "base_model": base, "adapter": {"name": "lora", "rank": rank, "targets": targets}}
    )
    check_state(state, state)  # refuses NaN and infinite values
    imported = {"file": file.name, "sha256": file_digest(file)}
    content = ReleaseContent(base_digest(base), state, imported=imported)
    return write_release(Path(folder), study, load_modality(modality), content)


def _weights_file(source: Path) -> Path:
    if source.is_file():
        if source.suffix != ".safetensors":
            raise AdapterError(f"'{source}' is not a .safetensors file: save the LoRA as safetensors")
        return source
    for name in (DIFFUSERS_WEIGHTS, PEFT_WEIGHTS):
        if (source / name).is_file():
            return source / name
    raise AdapterError(
        f"'{source}' holds neither {DIFFUSERS_WEIGHTS} nor {PEFT_WEIGHTS}: give the LoRA's folder or file"
    )


def _read_layers(file: Path, model: Denoiser) -> tuple[dict[str, dict[str, Tensor]], LoraScaling]:
    """A and B of each layer of the UNet, by layer, and their scaling."""
    tensors, metadata = read_tensors(file)
    if any(name.startswith(PEFT_PREFIX) for name in tensors):
        config_file = file.parent / PEFT_CONFIG
        try:
            config = read_json(read_limited(config_file))
        except (OSError, ValueError) as error:
            raise AdapterError(f"'{config_file}' cannot be read, and a peft LoRA needs it for its alpha") from error
        named = {name.removeprefix(PEFT_PREFIX): value for name, value in tensors.items()}
        return _by_layer(named, model, file), LoraScaling.from_config(config)
    named, alphas = _diffusers_names(tensors, model, file)
    try:
        config = read_json(metadata.get(DIFFUSERS_METADATA, "{}"))
        config = {key.removeprefix("unet."): value for key, value in config.items() if key.startswith("unet.")}
    except (ValueError, AttributeError) as error:
        raise AdapterError(
            f"'{file}' holds a config of its LoRA ({DIFFUSERS_METADATA}) that is no JSON object"
        ) from error
    scaling = LoraScaling.from_config(config)
    if alphas:
        scaling = LoraScaling(None, None, {}, alphas, False)
    return _by_layer(named, model, file), scaling


def _diffusers_names(tensors: State, model: Denoiser, file: Path) -> tuple[State, dict[str, float]]:
    """Tensors under peft's names without prefix, and the alphas of kohya's format by layer."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_unet_state_dict_to_peft

    try:
        state, alphas = StableDiffusionPipeline.lora_state_dict(dict(tensors), unet_config=model.unet.config)
    except (ValueError, KeyError, RuntimeError) as error:
        raise AdapterError(f"'{file}' is not a LoRA that diffusers reads: {' '.join(str(error).split())}") from error
    text = sorted(name for name in state if name.startswith("text_encoder"))
    if text:
        raise AdapterError(
            f"'{file}' also changes the text encoder ({len(text)} tensors, the first is '{text[0]}'): "
            "releases hold UNet layers only, train the LoRA with --train_text_encoder off"
        )
    unet = {name.removeprefix("unet."): value for name, value in state.items() if name.startswith("unet.")}
    # diffusers names an alpha after the tensor that it scales
    scales = {name.removeprefix("unet.").removesuffix(".alpha"): alpha for name, alpha in (alphas or {}).items()}
    if unet and not any("lora_A" in name for name in unet):
        unet, scales = convert_unet_state_dict_to_peft(unet), convert_unet_state_dict_to_peft(scales)
    return unet, {name.partition(".lora_")[0]: float(alpha) for name, alpha in scales.items()}


def _by_layer(named: State, model: Denoiser, file: Path) -> dict[str, dict[str, Tensor]]:
    layers: dict[str, dict[str, Tensor]] = defaultdict(dict)
    modules = dict(model.unet.named_modules())
    for name, value in named.items():
        match = re.fullmatch(r"(.+)\.lora_(A|B)\.weight", name)
        if match is None:
            raise AdapterError(f"'{file}' holds '{name}': only lora_A and lora_B weights can be imported")
        layers[match[1]][match[2]] = value.float()
    if not layers:
        raise AdapterError(f"'{file}' holds no LoRA of a UNet")
    for layer, pair in layers.items():
        weight = getattr(modules.get(layer), "weight", None)
        if weight is None:
            raise AdapterError(f"'{file}' changes the layer '{layer}', which this base lacks: name the LoRA's own base")
        if set(pair) != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
            raise AdapterError(f"'{file}': lora_A and lora_B of '{layer}' are not a pair")
        if pair["A"].shape[1] != weight.shape[1] or pair["B"].shape[0] != weight.shape[0]:
            shapes = f"{tuple(pair['B'].shape)} · {tuple(pair['A'].shape)}, the layer {tuple(weight.shape)}"
            raise AdapterError(f"'{file}' does not fit '{layer}' of this base: the LoRA is {shapes}")
    return layers


def _fold(layers: dict[str, dict[str, Tensor]], scaling: LoraScaling, file: Path) -> tuple[State, int]:
    """The state with all factors in B and all ranks padded to the largest, and that rank."""
    rank = max(pair["A"].shape[0] for pair in layers.values())
    state = {}
    for layer, pair in layers.items():
        stated, present = _matching(scaling.rank_pattern, layer, scaling.rank), pair["A"].shape[0]
        if stated is not None and stated != present:
            raise AdapterError(f"'{file}': '{layer}' has rank {present}, its config says {stated}")
        a, b = pair["A"], pair["B"] * scaling.factor(layer, present)
        state[f"unet.{layer}.lora_A.weight"] = torch.cat([a, a.new_zeros(rank - present, *a.shape[1:])])
        padding = b.new_zeros(b.shape[0], rank - present, *b.shape[2:])
        state[f"unet.{layer}.lora_B.weight"] = torch.cat([b, padding], 1).contiguous()
    return dict(sorted(state.items())), rank


def _targets(layers: list[str], modules: list[str]) -> list[str]:
    """The shortest endings that match these layers of the UNet and no other module."""
    targets = []
    for layer in layers:
        parts = layer.split(".")
        endings = [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]
        fits = [ending for ending in endings if set(_ending_in(ending, modules)) <= set(layers)]
        targets.append(fits[0] if fits else layer)
    return sorted(set(targets))


def _ending_in(ending: str, modules: list[str]) -> list[str]:
    return [module for module in modules if module == ending or module.endswith(f".{ending}")]


def _matching(patterns: dict[str, Any], layer: str, default: Any) -> Any:
    """The value of the first pattern that matches a layer, as peft matches them."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", layer)), default)
