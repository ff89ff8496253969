"""Removal of small components on drawings, with voxels that are not cubes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from skimage import measure

from pipelines.inference.components import RemoveSmallComponents, RemoveSmallComponentsd, remove_small_components
from transforms.errors import DataError, UsageError

SPACING = (1.0, 1.0, 3.0)


# Slice 1 of 3, voxels of 1 x 1 x 3 = 3 mm^3: a square of 4 voxels, 12 mm^3, and a single one, 3 mm^3.
#
#     . . . . . .
#     . # # . . .
#     . # # . . .
#     . . . . . .
#     . . . . . #
def square_and_dot() -> np.ndarray:
    label_map = np.zeros((5, 6, 3), np.uint8)
    label_map[1:3, 1:3, 1] = 1
    label_map[4, 5, 1] = 1
    return label_map


@pytest.mark.parametrize(
    ("minimum_volume_mm3", "voxels_left"), [(0.0, 5), (3.0, 5), (3.1, 4), (12.0, 4), (12.1, 0), (1000.0, 0)]
)
def test_threshold_in_cubic_millimetres(minimum_volume_mm3: float, voxels_left: int) -> None:
    label_map = square_and_dot()
    cleaned = remove_small_components(label_map, SPACING, minimum_volume_mm3)
    assert cleaned.sum() == voxels_left
    assert cleaned.dtype == np.uint8
    np.testing.assert_array_equal(label_map, square_and_dot())


# 100 voxels of 0.7 x 0.7 x 1 mm are 49 mm^3, though 100 * 0.7 * 0.7 is 48.999... in double precision, and 0.7 from a
# float32 header is 0.699999988.
@pytest.mark.parametrize("spacing", [0.7, float(np.float32(0.7))])
def test_rounding_of_the_spacing_does_not_decide(spacing: float) -> None:
    label_map = np.ones((10, 10, 1), np.uint8)
    assert remove_small_components(label_map, (spacing, spacing, 1.0), 49.0).all()
    assert not remove_small_components(label_map, (spacing, spacing, 1.0), 49.01).any()


# Two voxels that touch at a corner only are one component of 6 mm^3.
def test_corners_join() -> None:
    label_map = np.zeros((3, 3, 3), int)
    label_map[0, 0, 0] = label_map[1, 1, 1] = 1
    assert remove_small_components(label_map, SPACING, 6.0).sum() == 2
    label_map[1, 1, 1] = 0
    label_map[2, 2, 2] = 1
    assert remove_small_components(label_map, SPACING, 6.0).sum() == 0


# In 2D, pixels of 2 x 3 mm:  1 1 2 .    1: 12 mm^2     2: 6 mm^2, though it touches the 1s
#                             . . . 3    3: 6 mm^2
def test_each_label_by_itself_and_areas_in_2d() -> None:
    label_map = np.array([[1, 1, 2, 0], [0, 0, 0, 3]], np.int16)
    np.testing.assert_array_equal(remove_small_components(label_map, (2.0, 3.0), 6.0), label_map)
    np.testing.assert_array_equal(
        remove_small_components(label_map, (2.0, 3.0), 7.0), np.array([[1, 1, 0, 0], [0, 0, 0, 0]])
    )


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), minimum=st.integers(0, 12))
def test_what_is_left_according_to_scikit_image(seed: int, minimum: int) -> None:
    rng = np.random.default_rng(seed)
    label_map = (rng.random((8, 7, 6)) < 0.2) * rng.integers(1, 4, (8, 7, 6))
    cleaned = remove_small_components(label_map, (1, 1, 1), minimum)
    for value in (1, 2, 3):
        before = measure.regionprops(measure.label(label_map == value, connectivity=3))
        expected = {tuple(voxel) for region in before if region.area >= minimum for voxel in region.coords}
        assert {tuple(voxel) for voxel in np.argwhere(cleaned == value)} == expected
    np.testing.assert_array_equal(remove_small_components(cleaned, (1, 1, 1), minimum), cleaned)


# An oblique affine: the spacing is the length of its columns, 1, 1 and 3 mm.
@pytest.mark.parametrize("angle", [0.0, 0.3])
def test_dictionary_transform_takes_the_spacing_from_the_affine(angle: float) -> None:
    cos, sin = np.cos(angle), np.sin(angle)
    rotation = np.array([[cos, -sin, 0, 5], [sin, cos, 0, -7], [0, 0, 1, 2], [0, 0, 0, 1.0]])
    affine = torch.tensor(rotation @ np.diag([*SPACING, 1.0]))
    label_map = MetaTensor(torch.from_numpy(square_and_dot())[None].float(), affine=affine, meta={"note": "kept"})
    data = {"pred": label_map, "image": "untouched"}
    kept, emptied = (RemoveSmallComponentsd("pred", minimum)(data) for minimum in (12.0, 12.1))
    assert (int(kept["pred"].sum()), int(emptied["pred"].sum()), int(label_map.sum())) == (4, 0, 5)
    assert isinstance(kept["pred"], MetaTensor)
    assert kept["pred"].dtype == torch.float32
    assert kept["pred"].meta["note"] == "kept"
    assert torch.equal(kept["pred"].affine, label_map.affine)
    assert data["pred"] is label_map
    assert kept["image"] == "untouched"


def test_flat_metatensor_with_a_three_dimensional_affine() -> None:
    affine = torch.diag(torch.tensor([2.0, 3.0, 9.0, 1.0]))
    label_map = MetaTensor(torch.tensor([[[1, 1, 0, 1]]]), affine=affine)
    assert RemoveSmallComponents(7.0)(label_map).tolist() == [[[1, 1, 0, 0]]]


def test_missing_key() -> None:
    assert RemoveSmallComponentsd("pred", 1.0, allow_missing_keys=True)({"image": 1}) == {"image": 1}
    with pytest.raises(KeyError):
        RemoveSmallComponentsd("pred", 1.0)({"image": 1})


def test_refusals() -> None:
    with pytest.raises(DataError, match="one positive spacing per axis"):
        remove_small_components(np.zeros((4, 4, 4), int), (1.0, 1.0), 5.0)
    with pytest.raises(DataError, match="one positive spacing per axis"):
        remove_small_components(np.zeros((4, 4, 4), int), (1.0, 1.0, -1.0), 5.0)
    with pytest.raises(UsageError):
        remove_small_components(np.zeros((4, 4, 4), int), SPACING, -1.0)
    with pytest.raises(UsageError):
        RemoveSmallComponents(-1.0)
    with pytest.raises(DataError, match="without an affine"):
        RemoveSmallComponents(5.0)(torch.zeros(1, 4, 4, 4))
    with pytest.raises(DataError, match="without an affine"):
        RemoveSmallComponents(5.0)(MetaTensor(torch.zeros(2, 4, 4, 4)))
