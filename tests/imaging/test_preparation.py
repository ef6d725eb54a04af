"""What the steps of `preprocessing` do to a volume: where voxels lie, how bright they are, and that it repeats."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import nibabel
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from scipy import ndimage
from scipy.spatial.transform import Rotation

from ld_common.core.config import from_mapping, load_config
from ld_common.core.errors import ConfigError
from ld_common.imaging.modality import ImageConfig, Modality
from ld_common.imaging.modality_steps import StepConfig
from ld_common.imaging.preparation.prepare import prepare
from ld_common.imaging.readers import read_scan, read_volume
from ld_common.imaging.rejection import ScanRejected
from ld_common.imaging.volume import Volume
from tests.conftest import write_mr_slice
from tests.support.prepared_heads import SPACING_MM, brain, digest, write_volume

WEIGHTS = Path(__file__).parents[3] / "shared/data/weights/meshnet18_model.json"
REAL_HEAD = Path(__file__).parents[3] / "shared/data/open_ms/patient01/study1_T1W.nii.gz"
MODALITY = Modality(prompt_template="MRI", image=ImageConfig(part_mm=0, field_of_view_mm=0))


def volume(voxels: np.ndarray, affine: np.ndarray) -> Volume:
    return Volume(np.asfortranarray(voxels, np.float32), affine, {}, None)


def prepared(source: Volume, *steps: StepConfig) -> Volume:
    return prepare(Path("head.nii"), source, steps)


def with_steps(*steps: StepConfig) -> Modality:
    return dataclasses.replace(MODALITY, preprocessing=list(steps))


def turned(voxels: np.ndarray, affine: np.ndarray, axes: str) -> tuple[np.ndarray, np.ndarray]:
    """The same volume with its voxels in another order."""
    turn = ornt_transform(io_orientation(affine), axcodes2ornt(axes))
    return nibabel.orientations.apply_orientation(voxels, turn), affine @ inv_ornt_aff(turn, voxels.shape)


@pytest.mark.parametrize("axes", ["LPS", "PIR", "ALS"])
def test_a_turned_volume_gives_the_same_slice(axes: str, tmp_path: Path) -> None:
    voxels, affine = brain()
    modality = with_steps(StepConfig("orient"), StepConfig("resample", spacing_mm=5.0))
    scans = [
        read_scan(write_volume(tmp_path / f"{name}.nii.gz", *turned(voxels, affine, name)), modality, released=True)
        for name in ("RAS", axes)
    ]
    assert scans[0].affine is not None and scans[1].affine is not None
    np.testing.assert_allclose(scans[1].affine, scans[0].affine, atol=1e-4)
    np.testing.assert_allclose(scans[1].pixels, scans[0].pixels, atol=1e-2)


@pytest.mark.parametrize("spacing_mm", [1.5, 3.0, 4.5])
def test_resampling_keeps_the_size_and_the_place_of_a_sphere(spacing_mm: float) -> None:
    affine = np.diag([2.0, 3.0, 2.5, 1.0])
    affine[:3, 3] = (-50, -70, 10)
    places = np.stack(np.meshgrid(*map(np.arange, (50, 40, 44)), indexing="ij"), -1) @ affine[:3, :3].T + affine[:3, 3]
    middle, radius = np.array([-3.0, -12.0, 63.0]), 30.0
    source = volume(np.clip(radius - np.linalg.norm(places - middle, axis=-1) + 0.5, 0, 1), affine)
    result = prepared(source, StepConfig("resample", spacing_mm=spacing_mm))
    np.testing.assert_allclose(nibabel.affines.voxel_sizes(result.affine), spacing_mm, rtol=0.02)
    size = result.voxels.sum() * np.prod(nibabel.affines.voxel_sizes(result.affine))
    assert size == pytest.approx(4 / 3 * np.pi * radius**3, rel=0.02)
    centre = nibabel.affines.apply_affine(result.affine, ndimage.center_of_mass(result.voxels))
    assert np.linalg.norm(centre - middle) < 0.1


def test_a_coarser_grid_averages_a_fine_pattern() -> None:
    pattern = volume(np.indices((48, 48, 48)).sum(0) % 2 * 100.0, np.eye(4))
    inner = prepared(pattern, StepConfig("resample", spacing_mm=3.0)).voxels[4:-4, 4:-4, 4:-4]
    assert inner.min() > 40 and inner.max() < 60


@pytest.mark.slow
def test_the_bias_field_is_removed_and_an_image_without_one_stays() -> None:
    voxels, affine = brain()
    tissue = voxels > 300
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, length) for length in voxels.shape), indexing="ij"))
    field = np.exp(0.7 * grid[0] - 0.6 * grid[1] + 0.4 * grid[2] * grid[0])
    field /= np.exp(np.log(field[tissue]).mean())

    def unevenness(image: np.ndarray) -> float:
        """Standard deviation of the logarithm of what remains of the field."""
        return float(np.log(image[tissue] / voxels[tissue]).std())

    step = StepConfig("bias_field")
    corrected = prepared(volume(voxels * field, affine), step).voxels
    assert unevenness(voxels * field) > 0.2
    assert unevenness(corrected) < 0.3 * unevenness(voxels * field)
    alone = prepared(volume(voxels, affine), step).voxels
    assert unevenness(alone) < 0.03
    assert np.median(alone[tissue] / voxels[tissue]) == pytest.approx(1, abs=0.03)


@pytest.mark.slow
@pytest.mark.parametrize(("degrees", "shift"), [((8, -5, 12), (6, -9, 4)), ((-4, 15, -10), (-12, 20, 25))])
def test_registration_recovers_a_rigid_motion(
    degrees: tuple[float, ...], shift: tuple[float, ...], tmp_path: Path
) -> None:
    voxels, affine = brain()
    template = write_volume(tmp_path / "template.nii.gz", voxels, affine)
    motion = np.eye(4)
    motion[:3, :3] = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()
    motion[:3, 3] = shift
    step = StepConfig("register", template=str(template), sha256=digest(template))
    result = prepared(volume(voxels * 1.3 + 5, motion @ affine), step)
    assert result.voxels.shape == voxels.shape
    error = np.linalg.inv(motion) @ result.affine @ np.linalg.inv(affine)  # in the template's millimetres
    assert np.degrees(Rotation.from_matrix(error[:3, :3]).magnitude()) < 1
    centre = affine @ (*(length / 2 for length in voxels.shape), 1)
    assert np.linalg.norm((error @ centre - centre)[:3]) < 1


@pytest.mark.slow
def test_registration_refuses_what_is_unlike_the_template(tmp_path: Path) -> None:
    voxels, affine = brain(thinned=2)
    template = write_volume(tmp_path / "template.nii.gz", voxels, affine)
    step = StepConfig("register", template=str(template), sha256=digest(template))
    rods = np.zeros_like(voxels)
    rods[:, 4::8, 4::8] = 500
    with pytest.raises(ScanRejected, match="correlation"):
        prepared(volume(rods, affine), step)


def test_a_whole_head_is_not_registered_to_a_template_without_skull(tmp_path: Path) -> None:
    template = write_volume(tmp_path / "template.nii.gz", *brain())
    step = StepConfig("register", template=str(template), sha256=digest(template))
    with pytest.raises(ScanRejected, match="strip_skull"):
        prepared(volume(*brain(scalp=True)), step)


@pytest.mark.slow
def test_the_same_input_and_list_give_the_same_bits(tmp_path: Path) -> None:
    voxels, affine = brain(thinned=2)
    template = write_volume(tmp_path / "template.nii.gz", voxels, affine)
    steps = [
        StepConfig("orient"),
        StepConfig("bias_field"),
        StepConfig("register", template=str(template), sha256=digest(template)),
    ]
    source = volume(np.roll(voxels, 2, 0), affine)
    first, second = prepared(source, *steps), prepared(source, *steps)
    np.testing.assert_array_equal(first.voxels, second.voxels)
    np.testing.assert_array_equal(first.affine, second.affine)


def test_scan_and_volume_are_prepared_alike(tmp_path: Path) -> None:
    voxels, affine = brain()
    path = write_volume(tmp_path / "head.nii.gz", *turned(voxels, affine, "PSR"))
    modality = with_steps(StepConfig("orient"), StepConfig("resample", spacing_mm=4.0), StepConfig("bias_field"))
    whole = read_volume(path, modality, released=True)
    middle = int(np.floor(0.5 * (len(whole.upright) - 1) + 0.5))
    for scan in (read_scan(path, modality, released=True), read_scan(path, modality, middle, released=True)):
        np.testing.assert_array_equal(scan.pixels, whole.scan(middle).pixels)
    np.testing.assert_allclose(read_scan(path, modality, middle, released=True).affine, whole.scan(middle).affine)


@pytest.mark.parametrize("plane", ["coronal", "sagittal"])
def test_other_planes_are_cut_from_the_prepared_volume(plane: str, tmp_path: Path) -> None:
    path = write_volume(tmp_path / "head.nii.gz", *brain())
    image = dataclasses.replace(MODALITY.image, plane=plane)
    modality = dataclasses.replace(with_steps(StepConfig("resample", spacing_mm=5.0)), image=image)
    scan = read_scan(path, modality, released=True)
    assert scan.spacing_mm == pytest.approx((5, 5), rel=0.05)


def test_a_dicom_series_is_prepared_from_its_files(tmp_path: Path) -> None:
    voxels, affine = brain()
    slices = turned(voxels, affine, "LPS")[0].T.astype(np.uint16)
    for number, pixels in enumerate(slices):
        place = {"ImagePositionPatient": [0, 0, SPACING_MM * number], "PixelSpacing": [SPACING_MM] * 2}
        write_mr_slice(tmp_path / f"{number:03}.dcm", pixels, **place)
    modality = with_steps(StepConfig("resample", spacing_mm=6.0))
    files = sorted(tmp_path.iterdir())
    scan, again = (read_scan(source, modality, released=True) for source in (tmp_path, files))
    np.testing.assert_array_equal(scan.pixels, again.pixels)
    assert scan.frame_of_reference == again.frame_of_reference
    for single in (files[0], [files[0]]):
        with pytest.raises(ScanRejected, match="volume"):
            read_scan(single, modality, released=True)


def test_a_thin_volume_is_refused(tmp_path: Path) -> None:
    voxels, affine = brain()
    path = write_volume(tmp_path / "slab.nii.gz", voxels[:, :, 20:23], affine)
    with pytest.raises(ScanRejected, match="whole series"):
        read_scan(path, with_steps(StepConfig("orient")), released=True)


@pytest.mark.slow
@pytest.mark.skipif(not WEIGHTS.exists(), reason="the shared weights and heads are not here")
def test_a_meshnet_strips_a_real_head() -> None:
    step = StepConfig("strip_skull", weights=str(WEIGHTS), sha256=digest(WEIGHTS, WEIGHTS.with_suffix(".bin")))
    _brain_of_a_real_head(step)


def test_the_network_of_deepbet_strips_a_real_head() -> None:
    pytest.importorskip("deepbet")
    if not REAL_HEAD.exists():
        pytest.skip("the shared heads are not here")
    _brain_of_a_real_head(StepConfig("strip_skull"))


def _brain_of_a_real_head(step: StepConfig) -> None:
    image = nibabel.load(REAL_HEAD)
    head = volume(image.get_fdata(dtype=np.float32), image.affine)
    result = prepared(head, step)
    inside = result.voxels > result.voxels.min()
    size_ml = inside.sum() * abs(np.linalg.det(result.affine)) / 1000
    assert 1000 < size_ml < 1700
    np.testing.assert_array_equal(result.voxels[inside], head.voxels[inside])
    bright = head.voxels > np.percentile(head.voxels, 99)  # subcutaneous fat
    assert (bright & inside).sum() < 0.3 * bright.sum()


def test_a_missing_or_another_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    voxels, affine = brain()
    path = write_volume(tmp_path / "head.nii.gz", voxels, affine)
    step = StepConfig("register", template=str(tmp_path / "template.nii.gz"), sha256=digest(path))
    with pytest.raises(ConfigError, match=r"template\.nii\.gz"):
        read_scan(path, with_steps(step), released=True)
    write_volume(tmp_path / "template.nii.gz", voxels + 1, affine)
    with pytest.raises(ConfigError, match="another version"):
        read_scan(path, with_steps(step), released=True)


WRONG = [
    ({"step": "orientation"}, "did you mean 'orient'"),
    ({}, "has no name"),
    ({"step": "orient", "spacing_mm": 1.0}, "spacing_mm is no option of step 'orient'"),
    ({"step": "resample"}, "spacing_mm 0"),
    ({"step": "resample", "spacing_mm": 40}, "spacing_mm 40"),
    ({"step": "register"}, "needs template"),
    ({"step": "register", "template": "mni.nii.gz"}, "sha256sum mni.nii.gz"),
    ({"step": "register", "template": "mni.mgz", "sha256": "0" * 64}, "nii.gz"),
    ({"step": "strip_skull", "weights": "net.json"}, r"cat net.json net.bin \| sha256sum"),
    ({"step": "strip_skull", "sha256": "0" * 64}, "without the file"),
]


@pytest.mark.parametrize(("step", "message"), WRONG)
def test_a_wrong_step_is_named(step: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_mapping(Modality, {"prompt_template": "MRI", "preprocessing": [step]})


LISTS = [
    ([{"step": "orient"}, {"step": "orient"}], {}, "2 times"),
    (
        [{"step": "register", "template": "m.nii", "sha256": "0" * 64}, {"step": "resample", "spacing_mm": 1.0}],
        {},
        "after 'register'",
    ),
    ([{"step": "orient"}], {"plane": "none"}, "for volumes"),
    ([{"step": "resample", "spacing_mm": 2.0}, {"step": "strip_skull"}], {}, "finer"),
    ([{"step": "strip_skull"}], {"head": "stripped"}, "image.head is stripped"),
]


@pytest.mark.parametrize(("steps", "image", "message"), LISTS)
def test_steps_that_do_not_go_together_are_refused(
    steps: list[dict[str, object]], image: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        from_mapping(Modality, {"prompt_template": "MRI", "image": image, "preprocessing": steps})


def test_an_unknown_option_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text("prompt_template: MRI\npreprocessing: [{step: resample, spacing: 1.0}]\n")
    with pytest.raises(ConfigError, match="spacing_mm"):
        load_config(Modality, tmp_path / "m.yaml")


def test_the_hash_of_a_modality_without_preparation_is_the_old_one_and_of_another_list_another() -> None:
    brain_mri = Path(__file__).parents[2] / "configs/modalities/brain_mri.yaml"
    assert load_config(Modality, brain_mri).digest() == (
        "d9bfd7c2793b867bf6a62124fbcc8868479fff08631458b794275c7e437b4cc1"
    )
    hashes = {
        with_steps(*steps).digest()
        for steps in (
            [],
            [StepConfig("orient")],
            [StepConfig("resample", spacing_mm=1.0)],
            [StepConfig("resample", spacing_mm=2.0)],
            [StepConfig("orient"), StepConfig("bias_field")],
            [StepConfig("bias_field"), StepConfig("orient")],
            [StepConfig("strip_skull")],
            [StepConfig("strip_skull", weights="a.json", sha256="0" * 64)],
            [StepConfig("strip_skull", weights="a.json", sha256="1" * 64)],
            [StepConfig("register", template="a.nii", sha256="0" * 64)],
        )
    }
    assert len(hashes) == 10
    image = dataclasses.replace(MODALITY.image, head="whole")
    assert dataclasses.replace(MODALITY, image=image).digest() not in hashes


def test_names_and_folders_of_files_do_not_count_for_the_hash(tmp_path: Path) -> None:
    steps = [StepConfig("register", template=name, sha256="0" * 64) for name in ("a.nii", "b.nii", "/c/d.nii.gz")]
    assert len({with_steps(step).digest() for step in steps}) == 1
    located = with_steps(steps[0]).located(tmp_path)
    assert located.preprocessing[0].template == str(tmp_path / "a.nii")
    assert located.shared()["preprocessing"] == [{"step": "register", "template": "a.nii", "sha256": "0" * 64}]
