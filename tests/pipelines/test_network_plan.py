"""The planner against plans worked out by hand; spacing and feature sizes per stage are drawn in the comments."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.networks import plan_unet
from transforms.errors import BundleError


def test_isotropic_cube_of_128_pools_five_times() -> None:
    # 128 -> 64 -> 32 -> 16 -> 8 -> 4: six feature sizes, the last the smallest allowed
    plan = plan_unet((1, 1, 1), (128, 128, 128))
    assert plan.strides == ((1, 1, 1), *[(2, 2, 2)] * 5)
    assert plan.kernels == ((3, 3, 3),) * 6
    assert plan.filters == (32, 64, 128, 256, 320, 320)
    assert plan.divisor == (32, 32, 32)


def test_thick_slices_are_pooled_last() -> None:
    # spacing  3 .6 .6 | 3 1.2 1.2 | 3 2.4 2.4 | 6 4.8 4.8 | 12 9.6 9.6 | 12 19.2 19.2
    # size   20 320 256 | 20 160 128 | 20 80 64 | 10 40 32 |  5 20 16  |  5 10 8
    # ratio      5      |    2.5    |   1.25    (from here on alike)     5 < 8: axis 0 stays
    plan = plan_unet((3, 0.6, 0.6), (20, 320, 256))
    assert plan.strides == ((1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2))
    assert plan.kernels == ((1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3))
    assert plan.divisor == (4, 32, 32)


def test_exactly_twice_as_thick_becomes_isotropic_after_one_pooling() -> None:
    # 1 1 2 | 2 2 2 | 4 4 4; also when a header in single precision says 0.99999994 instead of 1
    for fine in (1.0, 0.99999994, 1.0000001):
        plan = plan_unet((fine, fine, 2.0), (32, 32, 16))
        assert plan.strides == ((1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 2))[: plan.stages]
        assert plan.kernels[0] == (3, 3, 1)
        assert plan.kernels[1] == (3, 3, 3)


@pytest.mark.parametrize(
    ("size", "stages"),
    [(48, 4), (56, 4), (64, 5), (96, 5), (16, 3), (24, 3)],  # 48-24-12-6, 56-28-14-7, 64-..-4, 96-..-6, 16-8-4, 24-12-6
)
def test_stages_by_patch_size(size: int, stages: int) -> None:
    plan = plan_unet((1, 1, 1), (size, size, size))
    assert plan.stages == stages
    assert plan.divisor == (2 ** (stages - 1),) * 3


def test_two_dimensions() -> None:
    # 64 x 32: 64 32 | 32 16 | 16 8 | 8 4 | 4 4 (axis 1 has reached the smallest size)
    plan = plan_unet((0.5, 0.5), (64, 32))
    assert plan.strides == ((1, 1), (2, 2), (2, 2), (2, 2), (2, 1))
    assert plan.kernels == ((3, 3),) * 5


def test_slabs_too_thick_to_be_pooled_meet_in_the_bottleneck() -> None:
    plan = plan_unet((1, 1, 20), (32, 32, 4))
    assert plan.strides == ((1, 1, 1), (2, 2, 1), (2, 2, 1), (2, 2, 1))
    assert plan.kernels == ((3, 3, 1), (3, 3, 1), (3, 3, 1), (3, 3, 3))


def test_a_fine_axis_too_short_to_pool_does_not_stop_the_others() -> None:
    # spacing .5 2 2 | .5 4 4 | .5 8 8: axis 0 is the finest but has 4 voxels; 32 -> 16 -> 8 -> 4 goes on without it
    plan = plan_unet((0.5, 2, 2), (4, 32, 32))
    assert plan.strides == ((1, 1, 1), (1, 2, 2), (1, 2, 2), (1, 2, 2))
    assert plan.kernels == ((3, 1, 1), (3, 1, 1), (3, 1, 1), (3, 3, 3))


def test_stages_and_filters_are_limited() -> None:
    plan = plan_unet((1, 1, 1), (64, 64, 64), maximum_stages=3, base_filters=8, maximum_filters=20)
    assert plan.strides == ((1, 1, 1), (2, 2, 2), (2, 2, 2))
    assert plan.filters == (8, 16, 20)


def test_indivisible_patch_names_axis_size_and_valid_sizes() -> None:
    # 50 -> 25 -> 12 -> 6 would pool three times, but 50 is not divisible by 8; 48 and 56 are
    with pytest.raises(BundleError) as refusal:
        plan_unet((1, 1, 1), (64, 50, 64), maximum_stages=4)
    assert "patch_size[1] = 50" in str(refusal.value)
    assert "48 or 56" in refusal.value.fix
    for size in (48, 56):
        assert plan_unet((1, 1, 1), (64, size, 64), maximum_stages=4).divisor == (8, 8, 8)


def test_too_small_a_patch_is_refused() -> None:
    with pytest.raises(BundleError, match="allows 2 of 3 stages"):
        plan_unet((1, 1, 1), (8, 8, 8))


@pytest.mark.parametrize(
    ("spacing", "patch"),
    [
        ((1, 1), (32, 32, 32)),
        ((1,), (32,)),
        ((0, 1, 1), (32, 32, 32)),
        ((math.nan, 1, 1), (32, 32, 32)),
        ((1, 1), (32, -32)),
    ],
)
def test_malformed_geometry_is_refused(spacing: tuple[float, ...], patch: tuple[int, ...]) -> None:
    with pytest.raises(BundleError):
        plan_unet(spacing, patch)


def refusal_of(spacing: tuple[float, ...], patch: tuple[int, ...]) -> str:
    try:
        plan_unet(spacing, patch)
    except BundleError as refusal:
        return f"{refusal.what} {refusal.fix}"
    return ""


geometries = st.integers(2, 3).flatmap(
    lambda axes: st.tuples(st.tuples(*[st.floats(0.1, 10)] * axes), st.tuples(*[st.integers(16, 160)] * axes))
)


@settings(max_examples=150, deadline=None)
@given(geometries)
def test_every_plan_divides_its_patch(geometry: tuple[tuple[float, ...], tuple[int, ...]]) -> None:
    spacing, patch = geometry
    patch = tuple(32 * math.ceil(size / 32) for size in patch)
    plan = plan_unet(spacing, patch)
    assert all(size % divisor == 0 for size, divisor in zip(patch, plan.divisor, strict=True))
    assert all(size // divisor >= 4 for size, divisor in zip(patch, plan.divisor, strict=True))
    assert plan.strides[0] == (1,) * len(patch)
    assert 3 <= plan.stages <= 6
    for along_axis in zip(*plan.kernels, strict=True):
        assert list(along_axis) == sorted(along_axis)  # once 3, always 3
    assert plan.kernels[-1] == (3,) * len(patch)


@settings(max_examples=150, deadline=None)
@given(geometries)
def test_following_the_advice_leads_to_a_plan(geometry: tuple[tuple[float, ...], tuple[int, ...]]) -> None:
    spacing, patch = geometry
    for _ in range(8):  # each refusal names one axis; correcting one may ask more of another
        refusal = refusal_of(spacing, patch)
        if not refusal:
            break
        axis, advice = re.fullmatch(r".*patch_size\[(\d)\] = .* to (?:\d+ or )?(\d+)", refusal).groups()
        assert int(advice) > patch[int(axis)]
        patch = (*patch[: int(axis)], int(advice), *patch[int(axis) + 1 :])
    assert refusal_of(spacing, patch) == ""
