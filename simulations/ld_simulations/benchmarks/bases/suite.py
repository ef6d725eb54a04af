"""What is measured of one base: a folder of its real classes, of small width, with random weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from opacus import GradSampleModule
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor

from ld_common.adapters.base import AdaptedModel, inject
from ld_common.adapters.lora import Lora
from ld_common.adapters.registry import ADAPTERS, read_adapter
from ld_common.adapters.train import train
from ld_common.core.errors import AdapterError, ConfigError
from ld_common.diffusion.base_model import BaseModel, Denoiser, load_base, load_denoiser
from ld_common.diffusion.conditioning import Condition
from ld_common.diffusion.drift import LatentDrift, is_inert
from ld_common.diffusion.loss import denoising_pair
from ld_common.diffusion.sampling import make_sampler, sample
from ld_common.diffusion.training import TrainingData
from ld_common.editing.counterfactuals import Edit, LatentEditor
from ld_common.editing.registry import EDITORS
from ld_simulations.benchmarks.bases.flow_folders import write_flux2, write_sd3
from ld_simulations.benchmarks.bases.gaussian import DATA_MEAN, NO_CONTEXT, gaussian_model, unit_noise
from ld_simulations.benchmarks.bases.pipelines import draw_by_pipeline
from ld_simulations.benchmarks.bases.unet_folders import write_sdxl, write_stable_diffusion

SOURCE, TARGET = "axial T1 brain MRI, woman, 70 years, healthy", "axial T1 brain MRI, man, 80 years"
ADAPTER_OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2},
    "dreambooth": {"num_class_images": 3, "class_inference_steps": 2},
    "instruct_pix2pix": {"rank": 2},
}
EDIT_STEPS, PIPELINE_STEPS, SCANS = 8, 6, 2


@dataclass(frozen=True)
class BaseKind:
    """A base of the table."""

    title: str
    write: Callable[[Path], Path]
    """Writes its folder."""


KINDS = (
    BaseKind("Stable Diffusion 1 (ε)", lambda folder: write_stable_diffusion(folder, "epsilon")),
    BaseKind("Stable Diffusion 2 (v)", lambda folder: write_stable_diffusion(folder, "v_prediction")),
    BaseKind(
        "Stable Diffusion 2, zero terminal SNR",
        lambda folder: write_stable_diffusion(folder, "v_prediction", zero_terminal_snr=True),
    ),
    BaseKind("Stable Diffusion XL", write_sdxl),
    BaseKind("Stable Diffusion 3.5", write_sd3),
    BaseKind("FLUX.2 klein", write_flux2),
)


def measure_base(folder: Path, steps: list[int], samples: int) -> dict[str, Any]:
    """Everything of one base but its speed.

    Args:
        folder: the base's.
        steps: numbers of sampler steps at which a drift is measured.
        samples: of a mean.
    """
    base = load_base(str(folder))
    adapters = {name: _trains(base, folder, name) for name in ADAPTERS}
    editors = {name: _edits(base, name) for name in EDITORS if not EDITORS.load(name).needs_longitudinal}
    return {
        "latent_shape": list(base.latent_shape),
        "adapters": [name for name, refused in adapters.items() if not refused],
        "editors": [name for name, refused in editors.items() if not refused],
        "refused": {name: refused for name, refused in (adapters | editors).items() if refused},
        "null_edit_max_error": max(null_edit_error(base, name) for name in EDITORS if EDITORS.load(name).exact),
        "per_sample_gradient_error": gradient_error(folder),
        "pipeline_max_difference": _pipeline_difference(base, folder),
        "drift": drift_errors(base, steps, samples),
    }


def null_edit_error(base: BaseModel, name: str) -> float:
    """Largest difference of latents between scans and what an exact editor returns of them unchanged.

    From noise fractions .6 and 1. The editor `drift` returns its input and asks no network.
    """
    if EDITORS.load(name).needs_longitudinal:
        return 0.0
    errors = []
    for fraction in (0.6, 1.0):
        editor = _editor(base, name, noise_fraction=fraction)
        latents = _noise(base, SCANS)
        errors.append(float((editor.redraw(editor.invert(latents, [SOURCE] * SCANS)) - latents).abs().max()))
    return max(errors)


def gradient_error(folder: Path) -> float:
    """‖gradients of single examples by opacus - by autograd‖ / ‖by autograd‖, of a LoRA, over four examples."""
    adapted = inject(load_denoiser(str(folder)), Lora(rank=2), 0)
    generator = torch.Generator().manual_seed(3)
    for parameter in adapted.trainable.values():  # B starts at zero, where A has no gradient
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    for layer in adapted.model.unet.modules():
        if isinstance(layer, LoraLayer):
            layer.lora_variant.clear()  # peft's own arithmetic in both
    learned = list(adapted.trainable.values())
    plain = [torch.autograd.grad(loss, learned, retain_graph=True) for loss in _losses(adapted)]
    with _hooked(adapted):
        _losses(adapted).sum().backward()
        single = [parameter.grad_sample for parameter in learned]  # type: ignore[attr-defined]
    difference = total = 0.0
    for row, gradients in enumerate(plain):
        for found, expected in zip(single, gradients, strict=True):
            difference += float((found[row] - expected).double().square().sum())
            total += float(expected.double().square().sum())
    return (difference / total) ** 0.5


def drift_errors(base: BaseModel, steps: list[int], samples: int) -> dict[str, Any]:
    """How far the mean of samples is from the data's, as a share of it, with a drift and without.

    The network is exactly right for Gaussian data of that mean, so only the base's schedule decides. The drift is of
    formulation `prior`; where that is inert, `centred` with a network that is right for data of mean 0.
    """
    plain = gaussian_model(base.scheduler)
    inert = is_inert("prior", plain)
    drift = LatentDrift(torch.full((1, 1, 1), DATA_MEAN), "centred" if inert else "prior")
    drifted = gaussian_model(base.scheduler, mean=0.0) if inert else plain
    rows = {
        str(count): {
            "error": _mean_error(drifted, base, count, drift, samples),
            "error_without": _mean_error(plain, base, count, None, samples),
        }
        for count in steps
    }
    return {"formulation": drift.formulation, "prior_is_inert": inert, "by_steps": rows}


def _mean_error(model: Denoiser, base: BaseModel, steps: int, drift: LatentDrift | None, samples: int) -> float:
    sampler = make_sampler(base.scheduler, "ddim", steps)
    drawn = sample(model, NO_CONTEXT.expand(samples, -1, -1), unit_noise(samples), sampler, drift, samples)
    return abs(float(drawn.mean()) / DATA_MEAN - 1)


def _trains(base: BaseModel, folder: Path, name: str) -> str:
    """Train and save an adapter and read it again; empty, or why the base has none."""
    adapter = read_adapter({"name": name, **ADAPTER_OPTIONS.get(name, {})})
    rows = 4
    data = TrainingData(
        _noise(base, rows),
        [SOURCE, TARGET] * (rows // 2),
        patients=["a", "a", "b", "b"],
        condition_vectors=torch.zeros(rows, 3),
    )
    try:
        adapted = train(base, adapter, data, steps=2, batch_size=2)
    except AdapterError as error:
        return str(error)
    saved = adapted.save_pretrained(folder.parent / f"{folder.name}-{name}")
    read, state = adapter.read_files(saved), adapted.state()
    if set(read) != set(state) or not all(torch.equal(read[key], state[key]) for key in state):
        raise AdapterError(f"adapter {name} changed on its way through files")
    return ""


def _edits(base: BaseModel, name: str) -> str:
    """Ask an editor for another prompt; empty, or why it does not answer with this base."""
    try:
        model: Any = base
        if name == "instruct_pix2pix":
            adapter = read_adapter({"name": name, "rank": 2})
            model = inject(copy.deepcopy(base), adapter, 0).model
        editor = _editor(model, name, noise_fraction=0.8, guidance_scale=3.0)
        answer = editor.edit(editor.invert(_noise(base, 1), [SOURCE]), [Edit(0, TARGET)])
    except (AdapterError, ConfigError) as error:
        return str(error)
    if not bool(torch.isfinite(answer).all()):
        raise AdapterError(f"editor {name} answers with numbers that are not finite")
    return ""


def _editor(model: BaseModel, name: str, **options: Any) -> LatentEditor:
    schema = EDITORS.load(name)
    return LatentEditor(model, [SOURCE, TARGET], schema(num_inference_steps=EDIT_STEPS, **options), None, 0)


def _pipeline_difference(base: BaseModel, folder: Path) -> float:
    """Largest difference between samples of ours and those of diffusers' own pipeline from the same noise."""
    noise = _noise(base, SCANS)
    with torch.no_grad():
        context = base.embed([SOURCE, TARGET])
    ours = sample(base, context, noise, make_sampler(base.scheduler, "ddim", PIPELINE_STEPS))
    theirs = draw_by_pipeline(base, folder, [SOURCE, TARGET], noise, PIPELINE_STEPS)
    return float((base.scaling.unscaled(ours) - theirs).abs().max())


def _losses(adapted: AdaptedModel[Any]) -> Tensor:
    """The loss of four examples, each by itself, `(4,)`."""
    model, generator = adapted.model, torch.Generator().manual_seed(1)
    latents, noise = (torch.randn(4, *model.latent_shape, generator=generator) for _ in range(2))
    timesteps = torch.tensor([10, 300, 600, 900])
    with torch.no_grad():
        condition = Condition(model.embed([SOURCE, TARGET, SOURCE, TARGET]))
    levels, kind = model.scheduler.alphas_cumprod, model.scheduler.config["prediction_type"]
    predicted, target = denoising_pair(model.unet, levels, kind, latents, condition, timesteps, noise)
    return (predicted - target).square().flatten(1).mean(1)


@contextmanager
def _hooked(adapted: AdaptedModel[Any]) -> Iterator[None]:
    hooks = GradSampleModule(adapted.model.unet, loss_reduction="sum")
    try:
        yield
    finally:
        hooks.to_standard_module()


def _noise(base: Denoiser, count: int) -> Tensor:
    return torch.randn(count, *base.latent_shape, generator=torch.Generator().manual_seed(0))
