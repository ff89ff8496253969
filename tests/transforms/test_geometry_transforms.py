"""A case goes to the network's grid and back: labels keep their values, images agree with references, affines hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from monai.data import MetaTensor
from monai.transforms import Compose, Invertd, Spacingd
from scipy.ndimage import map_coordinates

from transforms.errors import BundleError, DataError
from transforms.geometry import CropToForegroundd, ResampleToSpacingd, ToRASd

turns = st.floats(-0.5, 0.5)
spacings = st.floats(0.6, 3.0)


def tensor(voxels: Any, affine: np.ndarray) -> MetaTensor:
    return MetaTensor(torch.as_tensor(np.asarray(voxels))[None], affine=torch.as_tensor(affine, dtype=torch.float64))


def affine_of(spacing: tuple[float, ...], angle: float = 0.0, tilt: float = 0.0) -> np.ndarray:
    """An affine turned by ``angle`` about the third axis, then by ``tilt`` about the first."""
    c, s, d, t = np.cos(angle), np.sin(angle), np.cos(tilt), np.sin(tilt)
    affine = np.eye(4)
    about_first = np.array([[1, 0, 0], [0, d, -t], [0, t, d]])
    affine[:3, :3] = about_first @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.diag(spacing)
    affine[:3, 3] = (-7, 3, 11)
    return affine


def smooth(shape: tuple[int, ...]) -> np.ndarray:
    grid = np.meshgrid(*(np.linspace(0, np.pi, size) for size in shape), indexing="ij")
    return np.prod([np.sin(axis) for axis in grid], axis=0).astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(
    arrays(np.uint8, (5, 4, 3), elements=st.sampled_from([0, 1, 3, 7, 255])),
    st.tuples(spacings, spacings, spacings),
    st.tuples(spacings, spacings, spacings),
    turns,
    turns,
)
def test_a_label_never_gets_a_new_value(
    label: np.ndarray, source: tuple[float, ...], target: tuple[float, ...], angle: float, tilt: float
) -> None:
    data = {"label": tensor(label, affine_of(source, angle, tilt)), "mask": tensor(label > 0, affine_of(source))}
    result = ResampleToSpacingd("image", ["label", "mask"], target)(ToRASd(["label", "mask"])(data))
    assert set(np.unique(result["label"])) <= set(np.unique(label))
    assert result["label"].dtype == torch.uint8
    assert result["mask"].dtype == torch.bool


def test_nearest_by_hand_at_an_anisotropic_spacing() -> None:
    # Along x the voxels are 3 mm, wanted is 1 mm: new centres at 0 1 2 3 4 5 6 mm lie at 0, 1/3, 2/3, 1, ... of the old
    # voxels |0|5|2|, so the nearest are 0 0 1 1 1 2 2. Along y 1 mm becomes 2 mm: every second voxel. z is kept.
    label = np.zeros((3, 3, 2), np.uint8)
    label[1], label[2] = 5, 2
    label[:, 1] = 9  # falls between the new rows
    result = ResampleToSpacingd([], "label", (1.0, 2.0, 0.0))({"label": tensor(label, np.diag([3, 1, 4, 1.0]))})[
        "label"
    ]
    assert result.shape == (1, 7, 2, 2)
    for row in range(2):
        assert result[0, :, row, 0].tolist() == [0, 0, 5, 5, 5, 2, 2]
    np.testing.assert_allclose(result.affine, np.diag([1, 2, 4, 1]), atol=1e-6)


def test_linear_by_hand() -> None:
    image = tensor(np.array([0, 30, 60], np.float32).reshape(3, 1, 1), np.diag([3, 1, 1, 1.0]))
    result = ResampleToSpacingd("image", [], (1.0, 0.0, 0.0))({"image": image})["image"]
    np.testing.assert_allclose(result[0, :, 0, 0], [0, 10, 20, 30, 40, 50, 60], atol=1e-4)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.7, 2.0, 1.5)])
def test_linear_equals_monai(spacing: tuple[float, ...], oblique: np.ndarray) -> None:
    image = tensor(np.random.default_rng(0).normal(size=(9, 8, 5)).astype(np.float32), oblique)
    ours = ResampleToSpacingd("image", "label", spacing)({"image": image})["image"]
    monai = Spacingd("image", spacing, mode="bilinear", padding_mode="border", align_corners=True, dtype=torch.float64)
    theirs = monai({"image": image})["image"]
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.as_tensor(), theirs.as_tensor(), rtol=0, atol=0)
    torch.testing.assert_close(ours.affine, theirs.affine)


@pytest.mark.parametrize("order", [0, 3])
def test_splines_equal_scipy_and_stay_with_the_label(order: int) -> None:
    # 2 mm to 0.8 mm: new voxel k lies at 0.4 k of the old grid (no position is a tie for the nearest voxel)
    voxels = np.random.default_rng(1).normal(size=(9, 8, 7)).astype(np.float32)
    data = {"image": tensor(voxels, np.diag([2, 2, 2, 1.0])), "label": tensor(voxels, np.diag([2, 2, 2, 1.0]))}
    result = ResampleToSpacingd("image", "label", (0.8, 0.8, 0.8), order)(data)
    grid = np.stack(np.meshgrid(*(0.4 * np.arange(size) for size in result["image"].shape[1:]), indexing="ij"))
    expected = map_coordinates(voxels.astype(np.float64), grid, order=order, mode="nearest")
    np.testing.assert_allclose(result["image"][0], expected, atol=1e-5)
    if order == 0:
        torch.testing.assert_close(result["image"].as_tensor(), result["label"].as_tensor())


def test_spacing_zero_keeps_the_axis() -> None:
    image = tensor(np.random.default_rng(0).normal(size=(6, 5, 4)).astype(np.float32), np.diag([0.5, 1.0, 3.0, 1.0]))
    result = ResampleToSpacingd("image", [], (0, 0, 0))({"image": image})["image"]
    torch.testing.assert_close(result.as_tensor(), image.as_tensor())
    halved = ResampleToSpacingd("image", [], (1.0, 0, 0))({"image": image})["image"]
    np.testing.assert_allclose(halved.pixdim, [1.0, 1.0, 3.0], atol=1e-6)


def test_ras_from_lps_by_hand() -> None:
    # Voxel (i, j, k) lies at (10 - i, 20 - 2 j, 3 k) mm: x runs to the left, y to the back. Flipped, the first voxel is
    # the old last one: x = 10 - 2 = 8, y = 20 - 2 * 1 = 18.
    voxels = np.arange(6, dtype=np.float32).reshape(3, 2, 1)
    affine = np.array([[-1, 0, 0, 10], [0, -2, 0, 20], [0, 0, 3, 0], [0, 0, 0, 1.0]])
    result = ToRASd("image")({"image": tensor(voxels, affine)})["image"]
    np.testing.assert_allclose(result.affine, [[1, 0, 0, 8], [0, 2, 0, 18], [0, 0, 3, 0], [0, 0, 0, 1]])
    np.testing.assert_array_equal(result[0], voxels[::-1, ::-1])


def test_ras_from_a_sagittal_oblique_by_hand() -> None:
    # The first axis runs up (S), the second back (P), the third right (R), turned by 0.2 rad about R: RAS
    # is (third, second flipped, first), and every voxel keeps its place in the world.
    c, s = np.cos(0.2), np.sin(0.2)
    affine = np.eye(4)
    affine[:3, :3] = np.array([[0, 0, 1], [s, -c, 0], [c, s, 0]]) @ np.diag([1.0, 2.0, 3.0])
    voxels = np.arange(24, dtype=np.float32).reshape(4, 3, 2)
    result = ToRASd("image")({"image": tensor(voxels, affine)})["image"]
    np.testing.assert_array_equal(result[0], np.transpose(voxels, (2, 1, 0))[:, ::-1])
    new, old = result.affine.numpy() @ [1, 0, 2, 1], affine @ [2, 2, 1, 1]  # the same voxel before and after
    np.testing.assert_allclose(new, old, atol=1e-9)


@settings(max_examples=15, deadline=None)
@given(
    st.tuples(st.floats(0.8, 2.5), st.floats(0.8, 2.5), st.floats(0.8, 2.5)), turns, turns, st.permutations([0, 1, 2])
)
def test_the_way_back_returns_shape_affine_and_values(
    spacing: tuple[float, ...], angle: float, tilt: float, axes: list[int]
) -> None:
    shape = (18, 20, 16)
    affine = affine_of(spacing, angle, tilt)
    affine[:3, :3] = affine[:3, axes] * [1, -1, 1]
    foreground = np.zeros(shape, np.uint8)
    foreground[3:15, 4:16, 2:13] = 1
    there = Compose(
        [
            ToRASd(["image", "foreground"]),
            ResampleToSpacingd("image", "foreground", (1.2, 1.2, 1.2)),
            CropToForegroundd(["image", "foreground"], margin=2),
        ]
    )
    image = smooth(shape)
    data = there({"image": tensor(image, affine), "foreground": tensor(foreground, affine)})
    data["pred"] = data["image"].clone()
    back = Invertd("pred", there, orig_keys="image", nearest_interp=False)(data)["pred"]
    assert back.shape == (1, *shape)
    np.testing.assert_allclose(back.affine, affine, atol=1e-3)
    inside = np.zeros(shape, bool)
    inside[4:14, 5:15, 3:12] = True
    assert np.abs(back[0].numpy() - image)[inside].max() < 0.08  # two linear interpolations of a function from 0 to 1


def test_crop_by_hand_moves_the_origin() -> None:
    # Foreground in 4..6 along x, margin 2: 2..8; origin moves by 2 voxels of 0.5 mm. In y it ends at the edge.
    foreground = np.zeros((12, 5, 3), np.uint8)
    foreground[4:7, 0:2] = 1
    image = np.arange(180, dtype=np.float32).reshape(12, 5, 3)
    affine = np.diag([0.5, 1.0, 3.0, 1.0])
    data = {"image": tensor(image, affine), "foreground": tensor(foreground, affine)}
    result = CropToForegroundd(["image", "foreground", "absent"], margin=2)(data)
    np.testing.assert_array_equal(result["image"][0], image[2:9, 0:4])
    np.testing.assert_allclose(result["image"].affine[:3, 3], [1.0, 0, 0])


def test_inputs_are_not_changed(oblique: np.ndarray) -> None:
    label = np.random.default_rng(0).integers(0, 3, size=(8, 7, 6)).astype(np.uint8)
    data = {"image": tensor(smooth((8, 7, 6)), oblique), "label": tensor(label, oblique)}
    before = {key: (value.clone(), value.affine.clone()) for key, value in data.items()}
    for transform in (
        ToRASd(["image", "label"]),
        ResampleToSpacingd("image", "label", (1, 1, 1)),
        CropToForegroundd(["image", "label"], source_key="label"),
    ):
        transform(data)
        for key, (values, affine) in before.items():
            torch.testing.assert_close(data[key].as_tensor(), values.as_tensor(), rtol=0, atol=0)
            torch.testing.assert_close(data[key].affine, affine, rtol=0, atol=0)


def test_an_empty_mask_is_refused_by_case_and_key() -> None:
    empty = tensor(np.zeros((4, 4, 4), np.uint8), np.eye(4))
    with pytest.raises(DataError, match=r"case p07: key foreground is empty"):
        CropToForegroundd("foreground")({"case": "p07", "foreground": empty})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("image", "image", (1, 1, 1)), "key image is image and label"),
        (("image", "label", (1, -1, 1)), "spacing"),
        (("image", "label", (1, 1, 1), 6), "order 6"),
    ],
)
def test_contradictions_are_refused(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(BundleError, match=words):
        ResampleToSpacingd(*arguments)
