"""Heads that look otherwise: each change by numbers derived by hand, nothing at the neutral strength."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transforms.appearance import Appearance, RandAppearanced, bend_contrast, remap_bone, soften, vary_pair
from transforms.errors import BundleError, DataError

SPACING = (1.0, 2.0, 4.0)
SCALE = np.array([100.0, 300.0], np.float32)


def pair(shape: tuple[int, int, int] = (12, 10, 8)) -> np.ndarray:
    draw = np.random.default_rng(3)
    return np.stack([draw.uniform(50, 400, shape), draw.uniform(-1000, 1800, shape)]).astype(np.float32)


def test_bone_is_fainter_from_100_hounsfield_on_and_nowhere_jumps() -> None:
    #   HU   -1000   40   100   300    1100          100 + .5 (HU - 100) above 100
    #   to   -1000   40   100   200     600
    ct = np.array([-1000, 40, 100, 300, 1100], np.float32)
    np.testing.assert_array_equal(remap_bone(ct, 0.5), [-1000, 40, 100, 200, 600])


def test_contrast_bends_between_the_percentiles_and_goes_on_as_a_line() -> None:
    # With u = (x - 100) / 200 and gamma 2:  u  -.5   0   .5     1    1.5
    #                                       to  -.5   0   .25    1    1 + 2 (.5) = 2
    mri = np.array([0, 100, 200, 300, 400], np.float32)
    np.testing.assert_allclose(bend_contrast(mri, SCALE, 2.0), [0, 100, 150, 300, 500])


def test_a_blur_is_as_wide_in_mm_along_every_axis() -> None:
    """The second moment of a blurred point is sigma squared, in mm, whatever the voxel size."""
    point = np.zeros((61, 41, 31), np.float32)
    point[30, 20, 15] = 1
    blurred = soften(point, SPACING, 5.0)
    assert blurred.sum() == pytest.approx(1, abs=1e-4)
    for axis, mm in enumerate(SPACING):
        profile = blurred.sum(axis=tuple(a for a in range(3) if a != axis))
        place = (np.arange(len(profile)) - len(profile) // 2) * mm
        assert np.sqrt((profile * place**2).sum()) == pytest.approx(5.0, rel=0.02)


def test_the_bone_differs_over_the_head_within_the_spread() -> None:
    scan = pair()
    varied = vary_pair(scan, SPACING, SCALE, Appearance(bone_spread=0.25), np.random.default_rng(0))
    bone = scan[1] > 150
    gain = (varied[1][bone] - 100) / (scan[1][bone] - 100)
    assert 0.8 - 1e-4 <= gain.min() < 0.9
    assert 1.1 < gain.max() <= 1.25 + 1e-4
    np.testing.assert_array_equal(varied[1][scan[1] <= 100], scan[1][scan[1] <= 100])
    np.testing.assert_array_equal(varied[0], scan[0])


@settings(max_examples=30, deadline=None)
@given(gamma=st.floats(0.3, 3), values=st.lists(st.floats(-500, 900, width=32), min_size=2, max_size=20))
def test_a_bent_contrast_keeps_the_order_and_the_scale(gamma: float, values: list[float]) -> None:
    ordered = np.sort(np.array(values, np.float32))
    assert np.all(np.diff(bend_contrast(ordered, SCALE, gamma)) >= -1e-3)
    np.testing.assert_allclose(bend_contrast(SCALE, SCALE, gamma), SCALE, rtol=1e-5)


def test_neutral_strengths_and_probability_0_change_nothing_and_the_input_is_not_touched() -> None:
    scan = pair()
    kept = scan.copy()
    same = vary_pair(scan, SPACING, SCALE, Appearance(), np.random.default_rng(0))
    np.testing.assert_allclose(same, scan, rtol=1e-6)
    never = RandAppearanced("image", prob=0.0, spacing_mm=SPACING).set_random_state(1)
    np.testing.assert_allclose(never({"image": scan, "mri_scale": SCALE})["image"], scan, rtol=1e-6)
    RandAppearanced("image", prob=1.0, spacing_mm=SPACING)({"image": scan, "mri_scale": SCALE})
    np.testing.assert_array_equal(scan, kept)


def test_a_seed_gives_the_same_head_again_and_another_seed_another() -> None:
    data = {"image": pair(), "mri_scale": SCALE}
    transform = RandAppearanced("image", prob=1.0, spacing_mm=SPACING)
    first, again, other = (transform.set_random_state(seed)(data)["image"] for seed in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1


def test_each_kind_comes_with_its_probability_and_within_its_range() -> None:
    ranges = {"bone_gain": (0.3, 1.2), "mri_gamma": (0.6, 1.6), "mri_blur_mm": 1.0}
    transform = RandAppearanced("image", prob=0.5, **ranges).set_random_state(0)  # type: ignore[arg-type]
    drawn = []
    for _ in range(400):
        transform.randomize()
        drawn.append(transform.appearance)
    for name, neutral in vars(Appearance()).items():
        share = np.mean([getattr(appearance, name) != neutral for appearance in drawn])
        assert 0.4 < share < 0.6, name
    gains = [appearance.bone_gain for appearance in drawn if appearance.bone_gain != 1]
    assert 0.3 <= min(gains) < 0.35
    assert 1.1 < max(gains) <= 1.2
    assert np.median(gains) == pytest.approx(0.6, abs=0.08)  # uniform in the logarithm: sqrt(.3 * 1.2)


@pytest.mark.parametrize(
    "wrong", [{"bone_gain": (0.0, 1.0)}, {"mri_gamma": (2.0, 1.0)}, {"ct_blur_mm": -1.0}, {"prob": 2}]
)
def test_a_range_that_is_none_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(BundleError, match="RandAppearanced"):
        RandAppearanced("image", **wrong)  # type: ignore[arg-type]


def test_what_is_no_pair_or_has_no_scale_is_refused() -> None:
    transform = RandAppearanced("image", spacing_mm=SPACING)
    with pytest.raises(DataError, match="MRI and CT"):
        transform({"image": pair()[:1], "mri_scale": SCALE})
    with pytest.raises(BundleError, match="MeasurePaird"):
        transform({"image": pair()})
