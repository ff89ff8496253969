"""Masks from a CT: voxels drawn by hand, a brute-force ray caster, generated heads whose masks are known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor

from pipelines.phantoms import HeadSubject, head_subject
from transforms.degradation import ct_noise
from transforms.errors import DataError
from transforms.rois import (
    BoneMaskd,
    BrainMaskd,
    HeadMaskd,
    bone_mask,
    brain_mask,
    cormack_to_hu,
    enclosed_share,
    head_mask,
)


def dice(one: np.ndarray, two: np.ndarray) -> float:
    return 2 * (one & (two > 0)).sum() / (one.sum() + (two > 0).sum())


@pytest.fixture(scope="module")
def head() -> HeadSubject:
    return head_subject(11, 0, (2, 2, 2), ["ct"], source="ellipsoid")


@pytest.fixture(scope="module")
def real_brain() -> HeadSubject:
    return head_subject(11, 1, (2, 2, 4), ["ct"])


def test_cormack_scale_comes_back_as_hounsfield_units() -> None:
    hounsfield = np.linspace(-1000, 2000, 301)
    t = hounsfield + 1000
    stretched = t + 10 * np.clip(t - 900, 0, 200)
    np.testing.assert_allclose(cormack_to_hu(stretched), hounsfield, atol=1e-3)
    # Air, the two bends, water by hand: t = 1000 -> 1000 + 10 * 100 = 2000.
    assert cormack_to_hu(np.array([0, 900, 2000, 3100])).tolist() == [-1000, -100, 0, 100]


def soft_volume(shape: tuple[int, int, int] = (24, 24, 24)) -> np.ndarray:
    volume = np.full(shape, -1000, dtype=np.float32)
    volume[2:-2, 2:-2, 2:-2] = 40
    return volume


def test_the_head_is_the_largest_component_with_its_air_filled() -> None:
    ct = soft_volume()
    ct[10:13, 10:13, 10:13] = -1000  # a sinus
    ct[0, 0, 0] = 500  # a screw of the table
    expected = np.zeros(ct.shape, dtype=bool)
    expected[2:-2, 2:-2, 2:-2] = True
    np.testing.assert_array_equal(head_mask(ct), expected)


@pytest.mark.parametrize(("share", "is_bone"), [(0.3, False), (0.45, False), (0.6, True), (1.0, True)])
def test_a_voxel_at_the_border_is_bone_when_half_of_it_is(share: float, is_bone: bool) -> None:
    # A plate of 1100 HU in 40 HU. Beside it a layer with a share of bone: 30 % give 358 HU, which a threshold of 300 HU
    # takes for bone. Along the axis, 4 mm voxels, so that the smoothing of 0.5 mm stays out of it:
    #     40  40  [40 + share (1100 - 40)]  1100  1100  1100  40
    ct = soft_volume()
    ct[10:13, 4:-4, 4:-4] = 1100
    ct[9, 4:-4, 4:-4] = 40 + share * (1100 - 40)
    mask = bone_mask(ct, (4, 4, 4))
    assert mask[10:13, 6:-6, 6:-6].all()
    assert mask[9, 6:-6, 6:-6].all() == is_bone
    assert not mask[[8, 13], 6:-6, 6:-6].any()


def test_a_filling_does_not_delete_the_bone_around_it() -> None:
    ct = soft_volume()
    ct[8:14, 8:14, 8:14] = 900
    ct[11, 11, 14] = 3000
    assert bone_mask(ct, (3, 3, 3))[8:14, 8:14, 8:14].all()


def test_bone_keeps_the_mandible_and_drops_the_table_and_specks() -> None:
    ct = np.full((60, 30, 30), -1000, dtype=np.float32)
    ct[5:50, 5:25, 5:25] = 40
    expected = np.zeros(ct.shape, dtype=bool)
    expected[8:20, 8:20, 8:20] = True  # the skull
    expected[24:30, 8:20, 8:20] = True  # a bone 8 mm away
    ct[expected] = 1000
    ct[22, 15, 15] = 1000  # 8 uL between them
    ct[52:55, 5:25, 5:25] = 1000  # the table, 44 mm away
    np.testing.assert_array_equal(bone_mask(ct, (2, 2, 2)), expected)


def test_enclosed_share_counts_walls_among_the_rays_that_end() -> None:
    # 3 x 3 x 3: every ray from the middle ends in one of the 26 neighbours. 10 are wall, 6 are air, and behind the 10
    # that are tissue the image ends: 10 of 16.
    wall, head = np.zeros((2, 27), dtype=bool)
    neighbours = [index for index in range(27) if index != 13]
    wall[neighbours[:10]] = True
    head[[13, *neighbours[:10], *neighbours[16:]]] = True
    share = enclosed_share(wall.reshape(3, 3, 3), head.reshape(3, 3, 3))
    assert share[1, 1, 1] == pytest.approx(10 / 16)
    head[neighbours[10:]] = True
    wall[neighbours[5:]] = False  # 5 of the 26 rays end: too few to tell
    assert enclosed_share(wall.reshape(3, 3, 3), head.reshape(3, 3, 3))[1, 1, 1] == 0


def cast(wall: np.ndarray, head: np.ndarray, start: tuple[int, ...]) -> float:
    ends = []
    for direction in itertools.product((-1, 0, 1), repeat=3):
        if direction == (0, 0, 0):
            continue
        point = np.array(start)
        while ((point >= 0) & (point < wall.shape)).all():
            if wall[tuple(point)] or not head[tuple(point)]:
                ends.append(bool(wall[tuple(point)]))
                break
            point += direction
    return float(np.mean(ends)) if len(ends) >= 6 else 0.0


@given(seed=st.integers(0, 1000), shape=st.tuples(*[st.integers(1, 6)] * 3), density=st.floats(0.05, 0.5))
@settings(max_examples=25, deadline=None)
def test_enclosed_share_equals_rays_cast_one_by_one(seed: int, shape: tuple[int, int, int], density: float) -> None:
    rng = np.random.default_rng(seed)
    wall, head = rng.random(shape) < density / 2, rng.random(shape) < 1 - density / 2
    share = enclosed_share(wall, head)
    for start in np.ndindex(shape):
        assert share[start] == pytest.approx(cast(wall, head, start), abs=1e-6)


@pytest.mark.parametrize("noise_hu", [0.0, 40.0])
@pytest.mark.parametrize("subject", ["head", "real_brain"])
def test_masks_of_generated_heads_agree_with_the_truth(
    subject: str, noise_hu: float, request: pytest.FixtureRequest
) -> None:
    truth: HeadSubject = request.getfixturevalue(subject)
    spacing = np.diag(truth.affine)[:3]
    ct = ct_noise(truth.images["ct"], noise_hu, np.random.default_rng(0))
    assert dice(brain_mask(ct, spacing), truth.brain) >= 0.95
    assert dice(bone_mask(ct, spacing), truth.bone) >= 0.95
    # The planted failure: the threshold alone takes the shared voxels around the bone for bone.
    assert dice(ct > 300, truth.bone) < 0.95


def test_the_brain_does_not_leak_through_a_hole_or_where_the_scan_ends(head: HeadSubject) -> None:
    ct = head.images["ct"].copy()
    middle = np.array(ct.shape) // 2
    hole = (slice(middle[0] - 6, middle[0] + 6), slice(middle[1] - 6, middle[1] + 6), slice(None, middle[2]))
    ct[hole][(ct[hole] > 100)] = 40  # a foramen of 24 mm, soft tissue in it
    assert dice(brain_mask(ct, (2, 2, 2)), head.brain) >= 0.95
    low = int(np.argwhere(head.brain)[:, 2].min()) + 8
    cut = brain_mask(np.ascontiguousarray(head.images["ct"][..., low:]), (2, 2, 2))
    assert dice(cut, head.brain[..., low:]) >= 0.95


def test_finer_grids_than_2_mm_give_the_same_brain_on_their_own_grid() -> None:
    fine = head_subject(11, 0, (1.2, 1.2, 2.5), ["ct"], source="ellipsoid")
    small = np.zeros_like(fine.brain)
    mask = brain_mask(fine.images["ct"], (1.2, 1.2, 2.5))
    assert mask.shape == small.shape
    assert dice(mask, fine.brain) >= 0.95


def pair_of(ct: np.ndarray) -> MetaTensor:
    return MetaTensor(torch.tensor(np.stack([ct, ct])), affine=torch.diag(torch.tensor([2.0, 2, 2, 1])))


def test_masks_are_made_where_they_are_missing_and_say_so(head: HeadSubject) -> None:
    sample = {"image": pair_of(head.images["ct"]), "bone": None}
    made = BrainMaskd()(BoneMaskd()(HeadMaskd()(sample)))
    for key, name in (("foreground", "HeadMaskd"), ("bone", "BoneMaskd"), ("mask", "BrainMaskd")):
        assert made[key].shape == (1, *head.brain.shape)
        assert made[key].dtype == torch.uint8
        assert made[key].meta["made_by"] == name
        torch.testing.assert_close(made[key].affine, sample["image"].affine)
    assert sample["bone"] is None
    assert "made_by" not in sample["image"].meta
    assert dice(made["foreground"].numpy()[0] > 0, head.brain | head.bone) > 0.8


def test_a_mask_that_the_case_brings_is_kept() -> None:
    given_mask = MetaTensor(torch.ones(1, 4, 4, 4))
    sample = {"image": pair_of(np.zeros((4, 4, 4), dtype=np.float32)), "mask": given_mask}
    assert BrainMaskd()(sample)["mask"] is given_mask


@pytest.mark.parametrize("make", [HeadMaskd, BoneMaskd, BrainMaskd])
def test_a_ct_that_is_not_in_hounsfield_units_is_named(make: type) -> None:
    ct = np.random.default_rng(0).random((12, 12, 12)).astype(np.float32)
    with pytest.raises(DataError, match="not in Hounsfield units") as refusal:
        make()({"image": pair_of(ct), "case": "head_7"})
    assert "case head_7" in refusal.value.what


def test_a_ct_without_bone_or_brain_is_refused_in_three_lines() -> None:
    with pytest.raises(DataError, match="no bone in this CT") as refusal:
        bone_mask(soft_volume(), (2, 2, 2))
    assert "-1000" in refusal.value.why
    assert "Hounsfield" in refusal.value.fix
    with pytest.raises(DataError, match="no brain in this CT"):
        brain_mask(soft_volume(), (2, 2, 2))
    with pytest.raises(DataError, match="no head in this CT"):
        head_mask(np.linspace(-1000, -900, 64, dtype=np.float32).reshape(4, 4, 4))
    with pytest.raises(DataError, match="no voxel size"):
        BoneMaskd()({"image": np.stack([soft_volume()] * 2)})
