"""Foreground masks: hand-drawn cases, the choice of the automatic method, and refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from monai.data import MetaTensor
from scipy import ndimage

from transforms.errors import BundleError, DataError
from transforms.masks import (
    ForegroundMask,
    ForegroundMaskd,
    constant_background,
    fill_holes,
    is_plausible,
    largest_component,
    otsu_mask,
)

# A ring of tissue (7, 9) around a hole of background, and a background of 0 that reaches all four corners:
#     0 0 0 0 0          . . . . .
#     0 7 9 7 0          . # # # .
#     0 9 0 9 0    ->    . # # # .      the hole belongs to the foreground
#     0 7 9 7 0          . # # # .
#     0 0 0 0 0          . . . . .
RING = np.array([[0, 0, 0, 0, 0], [0, 7, 9, 7, 0], [0, 9, 0, 9, 0], [0, 7, 9, 7, 0], [0, 0, 0, 0, 0]], dtype=np.float32)
SQUARE = np.pad(np.ones((3, 3), dtype=np.uint8), 1)[None]


def ball(shape: tuple[int, ...] = (24, 28, 20), radius: float = 0.7) -> np.ndarray:
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    return sum(axis**2 for axis in axes) < radius**2


def noisy_ball() -> tuple[np.ndarray, np.ndarray]:
    """Tissue of 100 in noise: no constant background."""
    inside = ball()
    noise = np.random.default_rng(0).normal(0, 5, inside.shape)
    return (100 * inside + noise).astype(np.float32)[None], inside


@pytest.mark.parametrize("background", [0.0, -3.16, -1024.0, 255.0])
def test_constant_background_of_any_value_is_recognised_and_holes_are_filled(background: float) -> None:
    image = np.where(RING == 0, background, RING)[None].astype(np.float32)
    for method in ("constant", "auto"):
        np.testing.assert_array_equal(ForegroundMask(method)(image), SQUARE)


def test_nothing_is_eroded_where_tissue_holds_the_background_value_at_its_rim() -> None:
    image = RING.copy()
    image[1, 1] = 0  # this corner of the ring is indistinguishable from background
    expected = SQUARE.copy()
    expected[0, 1, 1] = 0
    np.testing.assert_array_equal(ForegroundMask("constant")(image[None]), expected)


def test_foreground_is_the_union_over_channels_and_an_empty_channel_adds_nothing() -> None:
    left, right, missing = np.zeros((3, 6, 6), dtype=np.float32)
    left[2, 1] = 5
    right = right - 1
    right[3, 4] = 5
    mask = ForegroundMask("constant")(np.stack([left, right, missing]))
    assert np.argwhere(mask[0]).tolist() == [[2, 1], [3, 4]]


@pytest.mark.parametrize(
    ("corners", "expected"),
    [((0, 0, 0, 5), 0.0), ((0, 0, 5, 5), None), ((0, 0, 3, 5), None), ((4, 4, 4, 0), None)],
    ids=["three of four", "half", "half and two others", "a majority that fills too little"],
)
def test_majority_of_the_corners_decides_and_must_fill_the_volume(
    corners: tuple[int, ...], expected: float | None
) -> None:
    channel = np.zeros((10, 10))
    channel[0, 0], channel[0, -1], channel[-1, 0], channel[-1, -1] = corners
    assert constant_background(channel) == expected


def test_rounding_in_the_background_is_background() -> None:
    """The MNI152 template, resampled, has 1e-45 to 1e-18 around a brain of values near 1."""
    image = RING / 9
    rounding = np.random.default_rng(0).uniform(0, 1e-18, RING.shape) * (RING == 0)
    np.testing.assert_array_equal(ForegroundMask()((image + rounding)[None].astype(np.float32)), SQUARE)
    faint = np.where(RING == 7, 1e-4, RING)  # faint tissue is tissue
    np.testing.assert_array_equal(ForegroundMask()(faint[None].astype(np.float32)), SQUARE)


def test_eight_corners_in_3d() -> None:
    channel = np.zeros((4, 4, 4))
    channel[0, 0, 0] = channel[0, 0, -1] = channel[0, -1, 0] = 1
    assert constant_background(channel) == 0.0  # 5 of 8
    channel[0, -1, -1] = 1
    assert constant_background(channel) is None  # 4 of 8


def test_auto_takes_otsu_where_the_background_is_noise() -> None:
    image, inside = noisy_ball()
    with pytest.raises(DataError, match="no constant background"):
        ForegroundMask("constant")(image)
    np.testing.assert_array_equal(ForegroundMask("otsu")(image)[0], inside)
    np.testing.assert_array_equal(ForegroundMask("auto")(image)[0], inside)


def test_auto_takes_everything_where_otsu_finds_no_object_in_a_field_of_view() -> None:
    generator = np.random.default_rng(1)
    noise = generator.normal(size=(1, 20, 20, 20)).astype(np.float32)
    assert ForegroundMask("auto")(noise).all()
    assert not ForegroundMask("otsu")(noise).all()
    dark_object = (200 - 100 * ball() + generator.normal(0, 3, ball().shape))[None].astype(np.float32)
    assert ForegroundMask("auto")(dark_object).all()
    assert ForegroundMask("all")(noisy_ball()[0]).all()


def test_a_slab_cut_through_the_head_is_still_plausible() -> None:
    slab = np.repeat(ball((30, 30))[:, :, None], 5, axis=2)
    assert is_plausible(slab)
    assert not is_plausible(np.repeat(slab[:15].any(axis=0)[None], 30, axis=0))
    assert not is_plausible(np.zeros((5, 5), dtype=bool))
    assert not is_plausible(np.ones((5, 5), dtype=bool))


def test_otsu_survives_one_hot_voxel_and_a_bright_speck_outside() -> None:
    image, inside = noisy_ball()
    image[0, 12, 14, 10] = 1e6
    image[0, 0, 0, :2] = 110
    np.testing.assert_array_equal(otsu_mask(image), inside)


def test_otsu_sees_channels_on_their_own_scale() -> None:
    image, _ = noisy_ball()
    small = np.zeros_like(image[0])
    small[2:5, 12:16, 8:12] = 0.001
    assert otsu_mask(np.stack([image[0], small]))[3, 14, 10]


@settings(max_examples=60, deadline=None)
@given(arrays(bool, st.sampled_from([(6, 7), (4, 5, 6), (5, 1, 6)])))
def test_fill_holes_equals_scipy(mask: np.ndarray) -> None:
    np.testing.assert_array_equal(fill_holes(mask), ndimage.binary_fill_holes(mask))


def test_largest_component_touches_by_faces_only() -> None:
    mask = np.array([[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0], [0, 0, 1, 0]], dtype=bool)
    expected = np.zeros_like(mask)
    expected[1:, 2] = True
    np.testing.assert_array_equal(largest_component(mask), expected)
    assert not largest_component(np.zeros((3, 3), dtype=bool)).any()


@settings(max_examples=40, deadline=None)
@given(scale=st.sampled_from([0.25, 1.0, 8.0, -2.0]), shift=st.integers(-50, 50))
def test_constant_mask_does_not_change_under_a_linear_change_of_intensity(scale: float, shift: int) -> None:
    np.testing.assert_array_equal(ForegroundMask()((scale * RING + shift)[None]), SQUARE)


def test_metadata_and_container_are_kept_and_the_input_is_not_touched() -> None:
    affine = torch.diag(torch.tensor([0.5, 0.5, 3.0, 1.0], dtype=torch.float64))
    image = MetaTensor(torch.from_numpy(RING[None].copy()), affine=affine, meta={"note": "kept"})
    before = image.clone()
    mask = ForegroundMask()(image)
    assert isinstance(mask, MetaTensor)
    assert mask.dtype == torch.uint8
    assert mask.meta["note"] == "kept"
    assert mask.meta is not image.meta
    torch.testing.assert_close(mask.affine, affine)
    torch.testing.assert_close(image, before, rtol=0, atol=0)
    plain = ForegroundMask()(torch.from_numpy(RING[None].copy()))
    assert type(plain) is torch.Tensor
    assert isinstance(ForegroundMask()(RING[None]), np.ndarray)
    np.testing.assert_array_equal(plain.numpy(), mask.numpy())


def test_dictionary_form_equals_array_form_over_all_keys() -> None:
    other = np.roll(RING, 1, axis=0)[None]
    data = {"t1": RING[None], "t2": other}
    output = ForegroundMaskd(["t1", "t2"])(data)
    np.testing.assert_array_equal(output["foreground"], ForegroundMask()(np.concatenate([RING[None], other])))
    assert set(data) == {"t1", "t2"}
    only = ForegroundMaskd(["t1", "t2"], allow_missing_keys=True)({"t1": RING[None]})
    np.testing.assert_array_equal(only["foreground"], SQUARE)
    assert ForegroundMaskd("t1", allow_missing_keys=True)({}) == {}


def test_a_mask_file_goes_first_and_is_thresholded_at_one_half() -> None:
    brain = np.zeros((1, 5, 5), dtype=np.float32)
    brain[0, 2, 2:4] = (0.99999997, 0.4)
    output = ForegroundMaskd("image")({"image": RING[None], "mask": brain})
    assert np.argwhere(output["foreground"][0]).tolist() == [[2, 2]]
    ignored = ForegroundMaskd("image", source_mask_key=None)({"image": RING[None], "mask": brain})
    np.testing.assert_array_equal(ignored["foreground"], SQUARE)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"image": np.full((1, 4, 4), 7.0)}, "0 of 16 voxels"),
        ({"image": RING[None], "mask": np.zeros((1, 5, 5))}, "0 of 25 voxels"),
        ({"image": RING[None], "mask": np.ones((1, 5, 6))}, r"\(1, 5, 6\)"),
        ({"image": np.where(RING == 9, np.nan, RING)[None]}, "4 of 25 voxels are NaN"),
    ],
    ids=["constant image", "empty mask file", "mask of another grid", "NaN"],
)
def test_refusals_name_the_case(data: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        ForegroundMaskd("image")({**data, "case": "sub-07"})
    assert "sub-07" in caught.value.what


def test_refusals_without_a_case_name_the_file() -> None:
    image = MetaTensor(torch.zeros(1, 4, 4), meta={"filename_or_obj": "dwi.nii.gz"})
    with pytest.raises(DataError, match=r"dwi\.nii\.gz"):
        ForegroundMaskd("image")({"image": image})


def test_images_on_different_grids_and_unknown_methods_are_refused() -> None:
    with pytest.raises(DataError, match="different grids"):
        ForegroundMaskd(["a", "b"])({"a": RING[None], "b": RING[None, :4]})
    with pytest.raises(BundleError, match="quantile"):
        ForegroundMask("quantile")
