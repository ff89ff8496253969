"""Fusion rules: by hand, perfect reconstruction on any size, PCA beside an eigendecomposition, shifts, refusals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from transforms import FUSION_RULES, hard_composite
from transforms.errors import DataError
from transforms.fusion_rules import (
    blend_fusion,
    maximum_fusion,
    mean_fusion,
    pca_fusion,
    pca_weights,
    pyramid_fusion,
    wavelet_fusion,
)

SHAPES = st.lists(st.integers(1, 20), min_size=2, max_size=3).map(tuple)


def line(*values: float) -> np.ndarray:
    """A 2D image with one voxel along the second axis: what a rule does to a line."""
    return np.array(values, np.float32)[:, None]


def impulse(length: int, place: int, height: float = 8) -> np.ndarray:
    values = np.zeros(length)
    values[place] = height
    return line(*values)


def triangle(length: int, place: int) -> np.ndarray:
    """(8 - |k|) / 8 around a place: 1 there, 0 from eight voxels on."""
    return line(*np.maximum(8 - np.abs(np.arange(length) - place), 0) / 8)


def pair(shape: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    mri, ct = random.random((2, *shape), np.float32)
    return mri, ct, random.uniform(-1000, 2000, shape).astype(np.float32)


# ---- voxel by voxel ------------------------------------------------------------------------------------------------


# HU    -1000  100  150   200  300  2000
# w         0    0  1/4   1/2    1     1
def test_pointwise_rules_by_hand() -> None:
    hu = line(-1000, 100, 150, 200, 300, 2000)
    mri, ct = line(0.5, 0.5, 0.4, 0.2, 0.7, 0.1), line(0, 0.1, 0.8, 0.6, 0.3, 1)
    assert_allclose(blend_fusion(mri, ct, hu), line(0.5, 0.5, 0.5, 0.4, 0.3, 1), atol=1e-7)
    assert_allclose(mean_fusion(mri, ct, hu), line(0.25, 0.3, 0.6, 0.4, 0.5, 0.55), atol=1e-7)
    assert_allclose(maximum_fusion(mri, ct, hu), line(0.5, 0.5, 0.8, 0.6, 0.7, 1), atol=1e-7)
    assert_array_equal(hard_composite(mri, ct, hu > 120), line(0.5, 0.5, 0.8, 0.6, 0.3, 1))


# ---- PCA -----------------------------------------------------------------------------------------------------------


# CT = 2 MRI: the component lies along (1, 2), weights 1/3 and 2/3; CT = -2 MRI: along (1, -2), the same weights.
# MRI = (1, -1, 0, 0), CT = (0, 0, 1, -1): no direction is the first. A constant CT has no share.
def test_pca_weights_by_hand() -> None:
    mri = np.array([0.0, 0.1, 0.4, 0.2])
    assert pca_weights(mri, 2 * mri) == pytest.approx((1 / 3, 2 / 3))
    assert pca_weights(mri, 5 - 2 * mri) == pytest.approx((1 / 3, 2 / 3))
    assert pca_weights(np.array([1.0, -1, 0, 0]), np.array([0.0, 0, 1, -1])) == (0.5, 0.5)
    assert pca_weights(np.ones(3), np.zeros(3)) == (0.5, 0.5)
    assert pca_weights(mri, np.ones(4)) == pytest.approx((1, 0))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(0.1, 10), mix=st.floats(-2, 2))
def test_pca_weights_are_those_of_the_eigenvector(seed: int, scale: float, mix: float) -> None:
    mri, noise = np.random.default_rng(seed).normal(size=(2, 50))
    ct = mix * mri + scale * noise
    _, vectors = np.linalg.eigh(np.cov(mri, ct))
    expected = np.abs(vectors[:, -1])
    assert pca_weights(mri, ct) == pytest.approx(tuple(expected / expected.sum()), abs=1e-6)


def test_pca_looks_at_the_head_only() -> None:
    mri, ct, hu = pair((6, 7, 5))
    fused = pca_fusion(mri, ct, hu)
    air = hu <= -300
    assert air.any()
    of_mri, of_ct = pca_weights(mri[~air], ct[~air])
    assert_allclose(fused, of_mri * mri + of_ct * ct, atol=1e-6)
    other = pca_fusion(np.where(air, 9, mri), np.where(air, -50, ct), hu)
    assert_array_equal(other[~air], fused[~air])


# ---- Laplacian pyramid ---------------------------------------------------------------------------------------------


# MRI 0 0 16, CT 0, mirrored about the outermost voxels (16 0 | 0 0 16 | 0 0), kernel 1 4 6 4 1:
#   reduced     (16 + 16) / 16 = 2 and 6 * 16 / 16 = 6; expanded again: 3 4 5, detail -3 -4 11
#   reduced     (2 + 24 + 12 + 24 + 2) / 16 = 4;        expanded again: 4 4,   detail -2 2;   then 4 all the way
# The MRI's details are the stronger ones; of the coarsest value 4 half is lost: MRI - 2.
def test_pyramid_by_hand() -> None:
    zero = line(0, 0, 0)
    assert_allclose(pyramid_fusion(line(0, 0, 16), zero, zero), line(-2, -2, 14), atol=1e-6)
    assert_allclose(pyramid_fusion(zero, line(0, 0, 16), zero), line(-2, -2, 14), atol=1e-6)


# Per detail: the MRI's -3 -4 11 and the CT's 3 4 -11 tie and the MRI's are taken; the coarsest values 4 and -4 cancel.
def test_a_tie_takes_the_details_of_the_mri() -> None:
    assert_allclose(pyramid_fusion(line(0, 0, 16), line(0, 0, -16), line(0, 0, 0)), line(-4, -4, 12), atol=1e-6)
    bump = impulse(33, 16)
    assert_allclose(wavelet_fusion(bump, -bump, bump), bump - triangle(33, 16), atol=1e-6)


# ---- stationary Haar wavelet ---------------------------------------------------------------------------------------


# What three levels leave out of details is the image smoothed by 1 2 1, 1 0 2 0 1 and 1 0 0 0 2 0 0 0 1 (each / 4): the
# triangle (8 - |k|) / 64. Of an impulse of 8 that is (8 - |k|) / 8 in a line; half of it is lost beside an image of 0.
def test_wavelet_by_hand() -> None:
    bump = impulse(40, 19)
    zero = np.zeros_like(bump)
    assert_allclose(wavelet_fusion(bump, zero, zero), bump - triangle(40, 19) / 2, atol=1e-6)
    assert_allclose(wavelet_fusion(zero, bump, zero), bump - triangle(40, 19) / 2, atol=1e-6)


def test_wavelet_in_three_dimensions_by_hand() -> None:
    volume = np.zeros((17, 19, 18), np.float32)
    volume[8, 9, 9] = 512
    smooth = 1.0
    for axis, (n, place) in enumerate(zip(volume.shape, (8, 9, 9), strict=True)):
        smooth = smooth * np.moveaxis(triangle(n, place)[..., None], 0, axis)
    assert_allclose(wavelet_fusion(volume, 0 * volume, volume), volume - smooth / 2, atol=1e-4)


# A detail of the MRI (at 15) and one of the CT (at 60), too far apart for any band to hold both.
def test_wavelet_keeps_the_details_of_both() -> None:
    one, other = impulse(80, 15), impulse(80, 60, -8)
    expected = one - triangle(80, 15) / 2 + other + triangle(80, 60) / 2
    assert_allclose(wavelet_fusion(one, other, one), expected, atol=1e-6)


# ---- every rule ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", FUSION_RULES.values(), ids=FUSION_RULES)
@settings(max_examples=15, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 1000))
def test_two_equal_images_give_the_image(rule, shape: tuple[int, ...], seed: int) -> None:
    image = pair(shape, seed)[0]
    fused = rule(image, image, np.full(shape, 250))
    assert fused.dtype == np.float32
    assert_allclose(fused, image, atol=2e-6)


@pytest.mark.parametrize("rule", FUSION_RULES.values(), ids=FUSION_RULES)
def test_two_constants_stay_constant(rule) -> None:
    shape = (9, 6, 11)
    fused = rule(np.full(shape, 0.2), np.full(shape, 0.6), np.full(shape, 200))
    assert_allclose(fused, 0.6 if rule is maximum_fusion else 0.4, atol=1e-6)


@pytest.mark.parametrize("rule", FUSION_RULES.values(), ids=FUSION_RULES)
def test_inputs_of_any_type_stay_as_they_are(rule) -> None:
    volumes = [volume.astype(np.float64) for volume in pair((9, 12, 7))]
    copies = [volume.copy() for volume in volumes]
    for volume in volumes:
        volume.setflags(write=False)
    fused = rule(*volumes)
    assert fused.flags.c_contiguous
    for volume, copy in zip(volumes, copies, strict=True):
        assert_array_equal(volume, copy)
    assert_array_equal(fused, rule(*(np.asfortranarray(volume, np.float32) for volume in volumes)))


def shifted(volumes: list[np.ndarray], shift: tuple[int, int, int]) -> list[np.ndarray]:
    return [np.roll(volume, shift, (0, 1, 2)) for volume in volumes]


def in_air() -> list[np.ndarray]:
    """A head of noise, 5 x 6 x 4 voxels, in the middle of so much air that no rule sees the faces of the image."""
    volumes = []
    for values, air in zip(pair((5, 6, 4)), (0, 0, -1000), strict=True):
        volume = np.full((37, 38, 36), air, np.float32)
        volume[16:21, 16:22, 16:20] = values
        volumes.append(volume)
    return volumes


@pytest.mark.parametrize("rule", [r for name, r in FUSION_RULES.items() if name != "pyramid"])
@settings(max_examples=8, deadline=None)
@given(shift=st.tuples(*[st.integers(-7, 7)] * 3))
def test_a_shifted_head_gives_the_shifted_result(rule, shift: tuple[int, int, int]) -> None:
    volumes = in_air()
    assert_allclose(rule(*shifted(volumes, shift)), np.roll(rule(*volumes), shift, (0, 1, 2)), atol=1e-6)


# The pyramid keeps every second voxel: after a shift of one, other voxels are kept. That is why it is not in the list.
def test_the_pyramid_depends_on_the_place_of_the_head() -> None:
    volumes = in_air()
    there = np.roll(pyramid_fusion(*volumes), 1, 0)
    assert np.abs(pyramid_fusion(*shifted(volumes, (1, 0, 0))) - there).max() > 0.01


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [*FUSION_RULES.values(), hard_composite])
def test_other_grids_and_values_that_are_not_finite_are_refused(rule) -> None:
    mri, ct, hu = pair((4, 5, 6))
    with pytest.raises(DataError, match=r"CT \(4, 5, 5\)"):
        rule(mri, ct[..., :5], hu)
    ct[1, 2, 3] = np.nan
    with pytest.raises(DataError, match="fusion: CT"):
        rule(mri, ct, hu)


def test_pca_without_a_head_is_refused() -> None:
    mri, ct, _ = pair((4, 5, 6))
    with pytest.raises(DataError, match="no head in the CT"):
        pca_fusion(mri, ct, np.full(mri.shape, -1000))
