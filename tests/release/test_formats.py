"""A release's weights in the hands of plain diffusers and peft: the same UNet output as ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ld_common.adapters.base import AdaptedModel, inject
from ld_common.adapters.lora import Lora
from ld_common.adapters.registry import ADAPTERS, read_adapter
from ld_common.core.config import from_mapping
from ld_common.core.errors import AdapterError, ConfigError
from ld_common.core.state import State
from ld_common.diffusion.base_model import Denoiser, base_digest, load_denoiser
from ld_common.imaging.modality import Modality
from ld_common.protocol.study_config import StudyConfig
from ld_common.release.release import ReleaseContent, load_release_base, read_release, write_release
from ld_server.aggregation import check_aggregation
from tests.conftest import random_state
from tests.support.adapter_options import OPTIONS

PROMPT = "axial T1 brain MRI, woman, 70 years, healthy"
ALL = {**OPTIONS, "dreambooth": {"rank": 2}}
VARIANTS: dict[str, dict[str, Any]] = {
    "rank pattern": {"rank": 2, "rank_pattern": {"attn2.to_k": 3, "attn2.to_v": 1}},
    "rsLoRA": {"rank": 4, "use_rslora": True},
    "DoRA": {"rank": 2, "use_dora": True},
    "all three": {"rank": 2, "rank_pattern": {"to_q": 3}, "use_rslora": True, "use_dora": True},
}
"""Of LoRA."""


def adapter_of(label: str) -> dict[str, Any]:
    return {"name": "lora", **VARIANTS[label]} if label in VARIANTS else {"name": label, **ALL[label]}


@pytest.fixture
def written(request: pytest.FixtureRequest, smallest_base: Path, tmp_path: Path, brain_mri: Modality) -> Path:
    """A release of the adapter that the test names, with weights far from the base's."""
    name = request.param
    study = from_mapping(StudyConfig, {"base_model": str(smallest_base), "adapter": adapter_of(name)})
    state = trained(smallest_base, name).state()
    return write_release(tmp_path / "release", study, brain_mri, ReleaseContent(base_digest(str(smallest_base)), state))


def trained(base: Path, name: str) -> AdaptedModel[Denoiser]:
    adapted = inject(load_denoiser(str(base)), read_adapter(adapter_of(name)), 0)
    state: State = adapted.state()
    changes = random_state(state, 0.3)
    adapted.load({key: value + changes[key] for key, value in state.items()})
    return adapted


@torch.no_grad()
def output(model: Denoiser) -> torch.Tensor:
    return unet_output(model.unet, model.embed([PROMPT]))


def unet_output(unet: Any, context: torch.Tensor) -> torch.Tensor:
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    result: torch.Tensor = unet(latents, 10, context).sample
    return result


def plain_pipeline(base: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def plain_unet(folder: Path) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(folder, subfolder="unet")


def test_a_rank_pattern_that_names_no_layer_is_an_error(smallest_base: Path) -> None:
    """A misspelt key would leave its layers at the common rank unnoticed."""
    with pytest.raises(ConfigError, match=r"'to_\[kv\]' is no end of a layer's name"):
        Lora(rank_pattern={"to_[kv]": 4})
    with pytest.raises(ConfigError, match=r"'to_q' is also the end of 'attn\.to_q': keep one"):
        Lora(rank_pattern={"to_q": 4, "attn.to_q": 8})
    for aggregator in ("ffa", "rolora", "fedsa"):  # they average each tensor by itself
        study = {"adapter": {"name": "lora", "rank_pattern": {"to_q": 4}}}
        check_aggregation(from_mapping(StudyConfig, study | {"federation": {"aggregation": {"name": aggregator}}}))
    for aggregator in ("fedex", "flora", "flexlora"):  # they give all layers one rank
        study = {"adapter": {"name": "lora", "rank_pattern": {"to_q": 4}}}
        with pytest.raises(ConfigError, match=r"leave out adapter\.rank_pattern"):
            check_aggregation(from_mapping(StudyConfig, study | {"federation": {"aggregation": {"name": aggregator}}}))
    with pytest.raises(AdapterError, match="no layer that trains has a name that ends in 'o_k'"):
        inject(load_denoiser(str(smallest_base)), Lora(rank_pattern={"o_k": 4}), 0)
    ranks = {
        name: len(value) for name, value in trained(smallest_base, "rank pattern").state().items() if "_A." in name
    }
    assert {rank for name, rank in ranks.items() if "attn2.to_k" in name} == {3}
    assert {rank for name, rank in ranks.items() if "attn2.to_v" in name} == {1}
    assert {rank for name, rank in ranks.items() if "attn2.to_q" in name or "attn1." in name} == {2}


@pytest.mark.parametrize("option", ["use_dora", "use_rslora"])
@pytest.mark.parametrize("aggregator", ["fedex", "flora", "ffa", "rolora", "fedsa"])
def test_aggregators_of_plain_factors_take_no_other_form(option: str, aggregator: str) -> None:
    study = {"adapter": {"name": "lora", option: True}, "federation": {"aggregation": {"name": aggregator}}}
    with pytest.raises(ConfigError, match=f"works with B A alone: set adapter.{option} to false"):
        check_aggregation(from_mapping(StudyConfig, study))


def test_a_private_study_takes_neither_dora_nor_an_average_of_its_own() -> None:
    private = {"privacy": {"enabled": True, "patients": 900}, "federation": {"weighting": "equal"}}
    with pytest.raises(ConfigError, match=r"set adapter\.use_dora to false"):
        from_mapping(StudyConfig, private | {"adapter": {"name": "lora", "use_dora": True}})
    with pytest.raises(ConfigError, match=r"set training\.ema to 0, and privacy\.ema"):
        from_mapping(StudyConfig, private | {"training": {"ema": 0.5}})
    with pytest.raises(ConfigError, match=r"leave out adapter\.rank_pattern"):
        cut = {"sites": ["a", "b"], "ranks": {"a": 2}, "aggregation": {"name": "flexlora"}}
        from_mapping(StudyConfig, {"adapter": {"name": "lora", "rank_pattern": {"to_q": 3}}, "federation": cut})


def test_every_adapter_is_tried_here() -> None:
    assert set(ALL) == set(ADAPTERS)


@pytest.mark.slow
@pytest.mark.parametrize("written", [*ALL, *VARIANTS], indirect=True)
def test_a_release_of_each_adapter_comes_back_and_changes_the_base(
    written: Path, smallest_base: Path, request: pytest.FixtureRequest
) -> None:
    release = read_release(written)
    expected = trained(smallest_base, request.node.callspec.params["written"])
    assert all(torch.equal(release.state[key], value) for key, value in expected.state().items())
    ours = output(load_release_base(release))
    assert torch.allclose(ours, output(expected.model), atol=1e-5)  # a merged LoRA rounds differently
    loaded = load_release_base(release)
    assert not [
        parameter
        for part in (loaded.unet, loaded.text_encoder)
        for parameter in part.parameters()
        if parameter.requires_grad
    ]
    assert not torch.allclose(ours, output(load_denoiser(str(smallest_base))), atol=1e-3)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("written", ["lora", "dreambooth", "instruct_pix2pix", *VARIANTS], indirect=True)
def test_diffusers_and_peft_load_a_lora_release(written: Path, smallest_base: Path) -> None:
    from peft import PeftModel

    release = read_release(written)
    ours = load_release_base(release)
    context = ours.embed([PROMPT])
    expected = unet_output(ours.unet, context)
    pipe = plain_pipeline(smallest_base)
    plain = unet_output(pipe.unet, context)
    pipe.load_lora_weights(written)
    assert torch.allclose(unet_output(pipe.unet, context), expected, atol=1e-6)
    assert not torch.allclose(plain, expected, atol=1e-3)
    unet = plain_unet(smallest_base)
    adapted = PeftModel.from_pretrained(unet, written)
    assert torch.allclose(unet_output(adapted, context), expected, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("written", ["full"], indirect=True)
def test_diffusers_loads_a_full_unet(written: Path) -> None:
    ours = load_release_base(read_release(written))
    unet = plain_unet(written)
    context = ours.embed([PROMPT])
    assert torch.equal(unet_output(unet, context), unet_output(ours.unet, context))


@torch.no_grad()
@pytest.mark.parametrize("written", ["textual_inversion"], indirect=True)
def test_diffusers_loads_learned_tokens_and_reads_the_same_prompts(written: Path, smallest_base: Path) -> None:
    ours = load_release_base(read_release(written))
    pipe = plain_pipeline(smallest_base)
    for file in sorted(written.glob("learned_embeds*.safetensors")):
        pipe.load_textual_inversion(written, weight_name=file.name)
    prompt = "<scan> " + PROMPT.replace("woman", "<woman>")  # diffusers adds the further tokens itself
    theirs, _ = pipe.encode_prompt(prompt, "cpu", 1, False)
    assert torch.allclose(theirs, ours.embed([PROMPT]), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("written", ["custom_diffusion"], indirect=True)
def test_diffusers_loads_custom_diffusion(written: Path, smallest_base: Path) -> None:
    ours = load_release_base(read_release(written))
    pipe = plain_pipeline(smallest_base)
    name = "pytorch_custom_diffusion_weights.safetensors"
    pipe.unet.load_attn_procs(written, weight_name=name, _pipeline=pipe)
    context = ours.embed([PROMPT])
    assert torch.allclose(unet_output(pipe.unet, context), unet_output(ours.unet, context), atol=1e-5)


@pytest.mark.parametrize("written", ALL, indirect=True)
def test_no_file_holds_a_path_of_the_machine_that_wrote_it(written: Path, smallest_base: Path) -> None:
    for file in filter(Path.is_file, written.rglob("*")):
        content = file.read_bytes()
        assert not any(str(path).encode() in content for path in (smallest_base, written.parent, Path.home()))


@pytest.mark.parametrize("written", ["lora"], indirect=True)
def test_the_card_has_front_matter_for_the_hub(written: Path, smallest_base: Path) -> None:
    _, front_matter, text = (written / "README.md").read_text().split("---\n", 2)
    fields = yaml.safe_load(front_matter)
    assert (fields["library_name"], fields["base_model"]) == ("diffusers", smallest_base.name)
    assert {"lora", "diffusers", "medical"} <= set(fields["tags"])
    assert fields["license"]
    assert text.startswith("\n# study")
    config = json.loads((written / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("LORA", 2)
