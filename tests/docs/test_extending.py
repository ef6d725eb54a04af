"""The package that docs/extending.md writes is built from the page and each of its four entries is used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ld_common.adapters.base import inject
from ld_common.adapters.registry import ADAPTERS, read_adapter
from ld_common.core.errors import ConfigError
from ld_common.diffusion.base_model import load_base
from ld_common.diffusion.options import TrainingConfig
from ld_common.diffusion.training import TrainingData, optimize
from ld_common.editing.counterfactuals import Edit, draw_counterfactuals
from ld_common.editing.registry import EDITORS, read_editor
from ld_common.metrics.registry import BIOMARKERS
from ld_common.protocol.study_config import FederationConfig
from ld_server.aggregation import AGGREGATORS, read_aggregator
from tests.support.example_package import write_example_package

PROMPTS = ["axial T1 brain MRI, woman, 70 years, healthy", "axial T1 brain MRI, man, 90 years, healthy"]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The package as an installer would leave it, on `sys.path`."""
    folder = write_example_package(tmp_path_factory.mktemp("site-packages"))
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    yield folder
    sys.path.remove(str(folder))
    for name in [name for name in sys.modules if name.split(".")[0] == "ld_example"]:
        del sys.modules[name]


@pytest.mark.usefixtures("package")
def test_every_entry_belongs_to_the_package() -> None:
    names = {ADAPTERS: "bias_only", EDITORS: "delta_denoising_score", BIOMARKERS: "bright_area"}
    for registry, name in {**names, AGGREGATORS: "geometric_median"}.items():
        assert name in registry
        assert registry.package_of(name) == "ld-example"


@pytest.mark.usefixtures("package")
def test_the_adapter_trains_its_biases_and_nothing_else(tiny_base: Path) -> None:
    base = load_base(str(tiny_base))
    adapted = inject(base, read_adapter({"name": "bias_only", "layers": "conv"}), seed=0)
    assert adapted.trainable
    assert all("conv" in name and name.endswith("bias") for name in adapted.trainable)
    before = adapted.trainable_state()
    data = TrainingData(torch.randn(4, *base.latent_shape), [PROMPTS[0]] * 4)
    options = TrainingConfig(steps=2, batch_size=2)
    generator = torch.Generator().manual_seed(0)
    optimize(adapted.model, adapted.trainable, data, options, lambda step: generator, lambda step: 1e-2)
    assert any(not torch.equal(value, before[name]) for name, value in adapted.trainable_state().items())
    with pytest.raises(ConfigError, match="layers"):
        read_adapter({"name": "bias_only", "layer": "conv"})


@pytest.mark.usefixtures("package")
def test_the_editor_is_exact_and_moves_towards_a_target(tiny_base: Path) -> None:
    base = load_base(str(tiny_base))
    side = base.resolution
    images = torch.rand(1, 1, side, side) * 2 - 1
    options = {"name": "delta_denoising_score", "num_inference_steps": 4}
    for scale, moves in ((0.0, False), (3.0, True)):
        editor = read_editor({**options, "guidance_scale": scale})
        drawn = draw_counterfactuals(base, images, PROMPTS[:1], [Edit(0, PROMPTS[1])], editor)
        assert torch.equal(drawn.reconstructions, drawn.autoencoded)
        assert (not torch.allclose(drawn.images, drawn.reconstructions, atol=1e-5)) == moves


@pytest.mark.usefixtures("package")
def test_the_biomarker_measures_in_square_millimetres() -> None:
    images = -torch.ones(2, 1, 8, 8)
    images[1, 0, :2, :3] = 1
    assert BIOMARKERS.load("bright_area")(images, 2.0).tolist() == [0.0, 24.0]


@pytest.mark.usefixtures("package")
def test_the_aggregator_bears_with_one_lying_site() -> None:
    federation = FederationConfig(
        sites=["a", "b", "c"],
        min_train_nodes=3,
        aggregation={"name": "geometric_median", "iterations": 200},
    )
    aggregator = read_aggregator(federation)
    honest, liar = {"w": torch.ones(2, 3)}, {"w": torch.full((2, 3), 1e6)}
    same = aggregator.aggregate([honest] * 3, [1.0, 2.0, 3.0])
    torch.testing.assert_close(same, honest)
    torch.testing.assert_close(aggregator.aggregate([honest, liar, honest], [1.0] * 3), honest, atol=1e-3, rtol=0)
    with pytest.raises(ConfigError, match="min_train_nodes"):
        read_aggregator(FederationConfig(sites=["a", "b"], aggregation={"name": "geometric_median"}))
