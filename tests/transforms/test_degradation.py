"""Degradations of an MRI and a CT: amounts derived by hand or measured, nothing at severity 0, more with more."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813  (the name its own documentation uses)
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from scipy import ndimage
from scipy.spatial.transform import Rotation

from transforms.degradation import (
    KINDS,
    SEVERITIES,
    Severity,
    bias_field,
    ct_noise,
    degrade_pair,
    misregister,
    move_rigidly,
    mri_noise,
    severity_of,
    streaks,
    thick_slice_matrix,
    thick_slices,
)
from transforms.degraded_pairs import DegradePaird, RandDegradePaird
from transforms.errors import BundleError, DataError

SPACING = (1.0, 1.5, 3.0)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def head_pair(shape: tuple[int, int, int] = (40, 36, 12)) -> np.ndarray:
    """An ellipsoid with a shell of bone: MRI of 300 and texture inside, CT of 40 HU in 1000 HU."""
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    radius = np.sqrt(sum(axis**2 for axis in axes))
    texture = ndimage.gaussian_filter(rng(9).standard_normal(shape), 2)
    mri = np.where(radius < 0.8, 300 + 400 * texture, 0)
    ct = np.select([radius < 0.7, radius < 0.85], [40 + 200 * texture, 1000], -1000)
    return np.stack([mri, ct]).astype(np.float32)


def test_a_cube_shifted_by_2_mm_moves_by_the_voxels_that_make_2_mm() -> None:
    # Spacing 1, 2, 0.5 mm: 2 mm are 2 voxels, 1 voxel and 4 voxels.
    volume = np.zeros((12, 12, 12), dtype=np.float32)
    volume[3:6, 3:6, 3:6] = 7
    moved = move_rigidly(volume, (1, 2, 0.5), (2, 2, 2), (0, 0, 0), outside=0)
    np.testing.assert_allclose(moved, np.roll(volume, (2, 1, 4), (0, 1, 2)), atol=1e-5)


def test_a_quarter_turn_about_the_third_axis_brings_the_first_axis_to_the_second_in_mm() -> None:
    #            y (2 mm)                        y
    #  from      .  .  .  .  .          to       *   4 mm = 2 voxels
    #            .  .  c  x  x  x  x (1 mm)      c
    volume = np.zeros((13, 7, 3), dtype=np.float32)
    volume[6:11, 3, 1] = 1  # 4 mm along the first axis from the middle
    moved = move_rigidly(volume, (1, 2, 1), (0, 0, 0), (0, 0, 90), outside=0)
    assert np.argwhere(moved > 0.5).tolist() == [[6, 3, 1], [6, 4, 1], [6, 5, 1]]


def test_rigid_motion_equals_simpleitk() -> None:
    volume = ndimage.gaussian_filter(rng().standard_normal((20, 24, 16)), 1.5).astype(np.float32)
    translation, rotation = np.array([1.3, -0.7, 2.1]), np.array([4.0, -7.0, 3.0])
    image = sitk.GetImageFromArray(volume.T)
    image.SetSpacing(SPACING)
    centre = (np.array(volume.shape) - 1) / 2 * SPACING
    inverse = sitk.VersorRigid3DTransform()
    inverse.SetCenter(centre.tolist())
    inverse.SetMatrix(Rotation.from_rotvec(rotation, degrees=True).as_matrix().ravel().tolist())
    inverse.SetTranslation(translation.tolist())
    expected = sitk.GetArrayFromImage(sitk.Resample(image, inverse.GetInverse(), sitk.sitkLinear, -1.0)).T
    ours = move_rigidly(volume, SPACING, translation, rotation, outside=-1.0)
    np.testing.assert_allclose(ours[4:-4, 4:-4, 4:-4], expected[4:-4, 4:-4, 4:-4], atol=1e-4)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_misregistration_has_exactly_the_length_and_the_angle_that_are_stated(seed: int) -> None:
    # Three ramps hold the coordinates in mm. Moved, they hold R^T (p - c - t) + c: t at the middle, R in the slope.
    shape = (31, 31, 31)
    ramps = np.indices(shape) * np.array(SPACING)[:, None, None, None]
    moved = np.stack([misregister(r, SPACING, 2.0, 3.0, rng(seed), outside=None) for r in ramps.astype(np.float32)])
    middle = moved[:, 15, 15, 15] - ramps[:, 15, 15, 15]
    assert np.linalg.norm(middle) == pytest.approx(2.0, abs=1e-3)
    slopes = [moved[:, 18, 15, 15] - moved[:, 12, 15, 15], moved[:, 15, 18, 15] - moved[:, 15, 12, 15]]
    slopes.append(moved[:, 15, 15, 18] - moved[:, 15, 15, 12])
    back = np.stack(slopes, axis=1) / (6 * np.array(SPACING))
    assert np.rad2deg(Rotation.from_matrix(back).magnitude()) == pytest.approx(3.0, abs=1e-2)


def test_what_moves_in_is_air_or_repeats_the_edge_of_a_crop() -> None:
    ct = np.full((8, 8, 8), 40, dtype=np.float32)
    assert (
        move_rigidly(ct, (1, 1, 1), (3, 0, 0), (0, 0, 0), outside=-1000)[:3].tolist()
        == np.full((3, 8, 8), -1000).tolist()
    )
    assert (misregister(ct, (1, 1, 1), 3, 3, rng(), outside=None) == 40).all()
    assert misregister(ct, (1, 1, 1), 3, 0, rng()).min() == -1000


@pytest.mark.parametrize("sd", [20.0, 80.0])
def test_ct_noise_has_the_stated_deviation_and_is_correlated_within_a_slice_only(sd: float) -> None:
    noise = ct_noise(np.full((64, 64, 40), 30, dtype=np.float32), sd, rng()) - 30
    assert noise.dtype == np.float32
    assert noise.std() == pytest.approx(sd, rel=0.02)
    assert abs(noise.mean()) < 0.02 * sd
    across = np.corrcoef(noise[:-1].ravel(), noise[1:].ravel())[0, 1]
    along = np.corrcoef(noise[..., :-1].ravel(), noise[..., 1:].ravel())[0, 1]
    assert 0.2 < across < 0.7
    assert abs(along) < 0.02


def test_rician_noise_of_air_has_mean_sigma_sqrt_half_pi_and_adds_two_variances_to_the_square() -> None:
    mri = np.zeros((60, 60, 60), dtype=np.float32)
    mri[:30] = 500  # the 99th percentile of the foreground: sigma = 0.1 * 500 = 50
    noisy = mri_noise(mri, 0.1, rng())
    assert noisy[30:].mean() == pytest.approx(50 * np.sqrt(np.pi / 2), rel=0.01)
    assert (noisy[:30] ** 2).mean() == pytest.approx(500**2 + 2 * 50**2, rel=0.01)
    assert noisy.min() >= 0


def test_bias_field_spans_exactly_the_stated_ratio_and_hardly_changes_along_a_thin_axis() -> None:
    field = bias_field((50, 40, 4), (2, 2, 2), 0.4, rng())
    assert field.max() / field.min() == pytest.approx(1.4**2, rel=1e-5)
    assert field.max() == pytest.approx(1.4, rel=1e-5)
    log = np.log(field)
    assert np.ptp(log, axis=2).max() < 0.2 * np.ptp(log)
    assert np.abs(np.diff(log, axis=0)).max() < 0.05
    assert (bias_field((1, 1, 1), (2, 2, 2), 0.4, rng()) == 1).all()


def test_thick_slices_of_a_step_derived_by_hand() -> None:
    # Voxels of 1.5 mm, slices of 6 mm: two boxes of 4 voxels, whose middles stand between voxels 1|2 and 5|6.
    #   profile   0    0    0    1  |  1    1    1    1
    #   boxes         0.25          |       1
    #   weights of the second box: 0 0 1/8 3/8 | 5/8 7/8 1 1
    profile = np.array([0, 0, 0, 1, 1, 1, 1, 1], dtype=np.float32)
    expected = 0.25 + 0.75 * np.array([0, 0, 1, 3, 5, 7, 8, 8]) / 8
    volume = np.broadcast_to(profile, (2, 3, 8))
    np.testing.assert_allclose(thick_slices(volume, (1, 1, 1.5), 6.0)[1, 2], expected, rtol=1e-6)


@given(n=st.integers(1, 30), mm=st.floats(0.5, 3), thickness=st.floats(3.1, 30))
@settings(max_examples=60, deadline=None)
def test_thick_slices_keep_a_constant_and_mirror_with_the_volume(n: int, mm: float, thickness: float) -> None:
    matrix = thick_slice_matrix(n, mm, thickness)
    np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-9)
    assert matrix.min() >= 0
    np.testing.assert_allclose(matrix[::-1, ::-1], matrix, atol=1e-9)


def test_slices_no_thicker_than_the_voxels_change_nothing() -> None:
    mri = head_pair()[0]
    assert thick_slices(mri, (1, 1, 4), 4.0) is mri


def test_streaks_are_bright_and_dark_fade_with_distance_and_stay_in_their_slab() -> None:
    ct = np.full((81, 81, 21), 40, dtype=np.float32)
    ct[40, 40, 4] = 2500  # the only dense voxel
    added = streaks(ct, (1, 1, 4), 200.0, rng()) - ct
    radius = np.hypot(*(np.indices((81, 81)) - 40))
    for distance in (12, 24, 38):
        ring = added[..., 4][np.abs(radius - distance) < 0.8]
        assert np.abs(ring).max() == pytest.approx(200 * np.exp(-distance / 60), rel=0.1)
        assert ring.min() < -20 < 20 < ring.max()
    assert np.abs(added).max() <= 200
    np.testing.assert_allclose(added[..., 6], added[..., 4] * np.exp(-1), rtol=1e-4, atol=1e-3)
    assert np.abs(added[..., 12:]).max() < 0.1


def test_streaks_start_in_the_lower_half_where_there_is_bone_and_need_bone() -> None:
    ct = np.full((9, 9, 10), 40, dtype=np.float32)
    assert streaks(ct, (1, 1, 1), 400.0, rng()) is ct
    ct[2, 2, 8], ct[6, 6, 1] = 900, 900
    for seed in range(5):
        added = np.abs(streaks(ct, (1, 1, 8), 400.0, rng(seed)) - ct).max(axis=(0, 1))
        assert added.argmax() == 1


def test_severity_0_returns_the_pair_bit_for_bit() -> None:
    pair = head_pair()
    np.testing.assert_array_equal(degrade_pair(pair, SPACING, SEVERITIES[0], rng()), pair)
    assert severity_of(0) == SEVERITIES[0] == Severity()


def test_severities_between_the_tabled_ones_are_interpolated() -> None:
    assert [severity_of(level) for level in range(4)] == list(SEVERITIES)
    between = severity_of(2.5)
    assert (between.ct_noise_hu, between.shift_mm, between.slice_mm) == (60, 2.5, 7)
    assert severity_of({"streaks": 0.5}) == Severity(streak_hu=50)


@pytest.mark.parametrize("levels", [3.5, -1, {"blur": 1}])
def test_unknown_kinds_and_severities_are_refused(levels: object) -> None:
    with pytest.raises(BundleError, match="severity is from 0 to 3"):
        severity_of(levels)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_alone_is_more_with_more_severity_and_leaves_the_other_image(kind: str) -> None:
    pair = head_pair()
    results = [degrade_pair(pair, SPACING, severity_of({kind: level}), rng(3)) for level in (0, 1, 2, 3)]
    touched = int(kind in ("misregistration", "streaks", "ct_noise"))
    errors = [np.sqrt(np.mean((result[touched] - pair[touched]) ** 2)) for result in results]
    assert errors[0] == 0
    assert errors == sorted(errors)
    assert errors[3] > 1.3 * errors[1] > 0
    np.testing.assert_array_equal(results[3][1 - touched], pair[1 - touched])


def test_the_noise_does_not_depend_on_which_other_kinds_are_there() -> None:
    pair = head_pair()
    moved = degrade_pair(pair, SPACING, severity_of({"misregistration": 2}), rng(1))
    both = degrade_pair(pair, SPACING, severity_of({"misregistration": 2, "ct_noise": 1}), rng(1))
    noise = degrade_pair(pair, SPACING, severity_of({"ct_noise": 1}), rng(1))
    np.testing.assert_allclose(both[1] - moved[1], noise[1] - pair[1], atol=1e-3)


def meta_pair() -> MetaTensor:
    return MetaTensor(torch.tensor(head_pair()), affine=torch.diag(torch.tensor([*SPACING, 1.0])), meta={"case": "a"})


def test_evaluation_degrades_a_case_always_alike_and_every_case_differently() -> None:
    pair = meta_pair()
    before = pair.clone()
    degrade = DegradePaird("image", severity=2.0, seed=5)
    first, again = (degrade({"image": pair, "case": "head_1"})["image"] for _ in range(2))
    other = degrade({"image": pair, "case": "head_2"})["image"]
    torch.testing.assert_close(first.as_tensor(), again.as_tensor(), rtol=0, atol=0)
    assert (first != other).any()
    assert isinstance(first, MetaTensor)
    assert first.meta["case"] == "a"
    torch.testing.assert_close(first.affine, pair.affine)
    torch.testing.assert_close(pair.as_tensor(), before.as_tensor(), rtol=0, atol=0)


def test_training_draws_are_replayed_by_the_seed_and_follow_the_probabilities() -> None:
    transform = RandDegradePaird("image", prob={"streaks": 1.0, "bias_field": 0.3}, severity=(1.0, 2.0))
    runs = []
    for _ in range(2):
        transform.set_random_state(7)
        runs.append([transform({"image": meta_pair()})["image"] for _ in range(2)])
    for one, two in zip(*runs, strict=True):
        torch.testing.assert_close(one.as_tensor(), two.as_tensor(), rtol=0, atol=0)
    assert (runs[0][0] != runs[0][1]).any()
    drawn = []
    for _ in range(400):
        transform.randomize()
        drawn.append(transform.severity)
    assert all(100 <= s.streak_hu <= 200 and s.ct_noise_hu == 0 for s in drawn)
    assert 0.2 < np.mean([s.bias_amplitude > 0 for s in drawn]) < 0.4


def test_plain_arrays_need_their_spacing() -> None:
    pair = head_pair()
    degraded = DegradePaird("image", 1.0, spacing_mm=SPACING)({"image": pair})["image"]
    assert isinstance(degraded, np.ndarray)
    assert degraded.dtype == np.float32
    with pytest.raises(DataError, match="no voxel size"):
        DegradePaird("image", 1.0)({"image": pair})


@pytest.mark.parametrize("broken", ["one channel", "not finite"])
def test_what_is_no_pair_is_refused_with_its_case(broken: str) -> None:
    pair = head_pair()
    if broken == "one channel":
        pair = pair[:1]
    else:
        pair[1, 0, 0, 0] = np.nan
    with pytest.raises(DataError, match="case head_9"):
        DegradePaird("image", 1.0, spacing_mm=SPACING)({"image": pair, "case": "head_9"})


@pytest.mark.parametrize("arguments", [{"prob": 1.5}, {"prob": {"blur": 0.5}}, {"severity": (2.0, 1.0)}])
def test_training_refuses_what_makes_no_sense(arguments: dict[str, object]) -> None:
    with pytest.raises(BundleError):
        RandDegradePaird("image", **arguments)
