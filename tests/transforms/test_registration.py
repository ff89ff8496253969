"""Registration figures and registration: motion that was planted is found, and what is wrong is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813  (the name its own documentation uses)
import torch
from monai.data import MetaTensor
from scipy.spatial.transform import Rotation

from pipelines.phantoms import HeadSubject, head_subject
from transforms import registration
from transforms.degradation import move_rigidly
from transforms.errors import BundleError, DataError
from transforms.registration import RigidRegistrationd, register_ct
from transforms.registration_check import RegistrationCheckd, mri_outline, registration_figures

SPACING = (2.5, 2.5, 3.0)


@pytest.fixture(scope="module")
def head() -> HeadSubject:
    return head_subject(21, 0, SPACING, ["ct", "t1", "flair"])


def moved(head: HeadSubject, translation: tuple[float, ...], rotation: tuple[float, ...] = (0, 0, 0)) -> np.ndarray:
    return move_rigidly(head.images["ct"], SPACING, translation, rotation, -1000)


def pair(head: HeadSubject, ct: np.ndarray, mri: str = "t1") -> MetaTensor:
    return MetaTensor(torch.tensor(np.stack([head.images[mri], ct])), affine=torch.tensor(head.affine))


@pytest.mark.parametrize("mri", ["t1", "flair"])
@pytest.mark.parametrize("planted", [(0, 0, 0), (3, -2, 1), (-1, 4.5, -2.5)])
def test_the_peak_of_mutual_information_stands_where_the_ct_was_shifted_to(
    head: HeadSubject, mri: str, planted: tuple[float, float, float]
) -> None:
    figures = registration_figures(head.images[mri], moved(head, planted), SPACING)
    np.testing.assert_allclose(figures.offset_mm, planted, atol=0.5)
    assert figures.offset_length_mm == pytest.approx(np.linalg.norm(figures.offset_mm))


def test_the_outlines_of_one_head_overlap_and_those_of_a_shifted_one_less(head: HeadSubject) -> None:
    together = registration_figures(head.images["t1"], head.images["ct"], SPACING)
    apart = registration_figures(head.images["t1"], moved(head, (40, 0, 0)), SPACING)
    assert together.outline_dice > 0.93
    assert apart.outline_dice < 0.8
    assert apart.mutual_information < together.mutual_information


def test_a_stripped_mri_is_compared_with_the_brain_of_the_ct(head: HeadSubject) -> None:
    stripped = np.where(head.brain > 0, head.images["t1"], 0)
    assert mri_outline(stripped, SPACING).sum() < 1.1 * head.brain.sum()
    figures = registration_figures(stripped, head.images["ct"], SPACING)
    assert figures.outline_dice > 0.9
    np.testing.assert_allclose(figures.offset_mm, 0, atol=1)


def test_the_figures_are_the_same_every_time(head: HeadSubject) -> None:
    first, second = (registration_figures(head.images["t1"], head.images["ct"], SPACING) for _ in range(2))
    assert first == second


def test_the_check_keeps_its_figures_and_passes_an_aligned_pair(head: HeadSubject) -> None:
    sample = {"image": pair(head, head.images["ct"])}
    checked = RegistrationCheckd()(sample)["image"]
    assert checked.meta["registration_check"]["outline_dice"] > 0.85
    assert "registration_check" not in sample["image"].meta
    torch.testing.assert_close(checked.as_tensor(), sample["image"].as_tensor(), rtol=0, atol=0)


def test_the_check_refuses_or_warns_of_a_misregistered_pair_with_the_figures(head: HeadSubject) -> None:
    sample = {"image": pair(head, moved(head, (0, 3, 0))), "case": "head_3"}
    with pytest.raises(DataError, match="misregistered") as refusal:
        RegistrationCheckd()(sample)
    assert "case head_3" in refusal.value.what
    assert "at most 2 mm" in refusal.value.why
    with pytest.warns(UserWarning, match="misregistered"):
        RegistrationCheckd(action="warn")(sample)
    RegistrationCheckd(largest_offset_mm=4)(sample)
    with pytest.raises(DataError, match="head outlines 0"):
        RegistrationCheckd(largest_offset_mm=20)({"image": pair(head, moved(head, (40, 0, 0)))})


def residual_mm(head: HeadSubject, matrix: list[list[float]], to_ct: np.ndarray) -> float:
    """Return the mean distance, over points of the brain, of where the two matrices (mm to mm) take them."""
    points = np.argwhere(head.brain)[::200] @ head.affine[:3, :3].T + head.affine[:3, 3]
    homogeneous = np.c_[points, np.ones(len(points))]
    return float(np.linalg.norm(homogeneous @ (np.array(matrix) - to_ct).T, axis=1).mean())


def motion(translation: tuple[float, ...], rotation: tuple[float, ...]) -> np.ndarray:
    """Return the motion about the origin of the world, (4, 4) in mm."""
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_rotvec(rotation, degrees=True).as_matrix()
    matrix[:3, 3] = translation
    return matrix


AXIS_3_DEG = tuple(3 * np.array([1, -2, 2]) / 3)
SHIFT_3_MM = tuple(3 * np.array([2, -1, 2]) / 3)


@pytest.mark.parametrize("mri", ["t1", "flair"])
def test_a_planted_motion_of_3_mm_and_3_degrees_is_taken_back(head: HeadSubject, mri: str) -> None:
    planted = motion(SHIFT_3_MM, AXIS_3_DEG)  # the CT's header puts it elsewhere: exact, nothing is interpolated
    registered, quality = register_ct(head.images[mri], head.images["ct"], head.affine, planted @ head.affine)
    assert residual_mm(head, quality.matrix, planted) < 0.5
    assert quality.rotation_deg == pytest.approx(3, abs=0.3)
    assert quality.mutual_information_after > quality.mutual_information_before
    inside = head.brain > 0
    assert np.abs(registered - head.images["ct"])[inside].mean() < 10
    assert registered.shape == head.brain.shape


def test_an_aligned_pair_stays_where_it_is(head: HeadSubject) -> None:
    _, quality = register_ct(head.images["t1"], head.images["ct"], head.affine, head.affine)
    assert quality.motion_mm < 0.3
    assert residual_mm(head, quality.matrix, np.eye(4)) < 0.3
    assert quality.rotation_deg < 0.3


def test_headers_that_put_the_heads_far_apart_are_overcome(head: HeadSubject) -> None:
    planted = motion((70, -50, 90), (0, 0, 0))
    _, quality = register_ct(head.images["t1"], head.images["ct"], head.affine, planted @ head.affine)
    assert residual_mm(head, quality.matrix, planted) < 0.5
    assert quality.motion_mm == pytest.approx(np.linalg.norm((70, -50, 90)), abs=1)


def test_an_affine_takes_back_a_wrong_voxel_size(head: HeadSubject) -> None:
    planted = np.diag([1.06, 1.06, 1.06, 1])
    _, quality = register_ct(head.images["flair"], head.images["ct"], head.affine, planted @ head.affine, "affine")
    assert np.linalg.det(quality.matrix) ** (1 / 3) == pytest.approx(1.06, abs=0.01)
    assert residual_mm(head, quality.matrix, planted) < 0.5


def test_the_result_is_the_same_to_the_last_bit_on_any_number_of_threads(head: HeadSubject) -> None:
    ct_affine = motion((2, 0, 1), (0, 0, 2)) @ head.affine
    before = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    results = []
    try:
        for threads in (1, 3):
            sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
            results.append(register_ct(head.images["t1"], head.images["ct"], head.affine, ct_affine))
            assert sitk.ProcessObject.GetGlobalDefaultNumberOfThreads() == threads
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(before)
    np.testing.assert_array_equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_a_registration_that_made_the_pair_worse_is_refused(head: HeadSubject, monkeypatch: pytest.MonkeyPatch) -> None:
    def astray(fixed: sitk.Image, moving: sitk.Image, start: Any) -> Any:
        start.SetTranslation((6.0, 0.0, 0.0))
        return start

    monkeypatch.setattr(registration, "_maximised", astray)
    with pytest.raises(DataError, match="made the pair worse") as refusal:
        register_ct(head.images["t1"], head.images["ct"], head.affine, head.affine)
    assert "before" in refusal.value.why


def test_a_sheared_affine_is_refused(head: HeadSubject) -> None:
    tilted = head.affine.copy()
    tilted[1, 2] = 1.0
    with pytest.raises(DataError, match="shear"):
        register_ct(head.images["t1"], head.images["ct"], head.affine, tilted)


def test_a_pair_in_one_key_is_registered_in_place_and_keeps_the_quality(head: HeadSubject) -> None:
    sample = {"image": pair(head, moved(head, (3, 0, 0)))}
    before = sample["image"].clone()
    result = RigidRegistrationd()(sample)["image"]
    torch.testing.assert_close(result[0].as_tensor(), before[0].as_tensor(), rtol=0, atol=0)
    torch.testing.assert_close(sample["image"].as_tensor(), before.as_tensor(), rtol=0, atol=0)
    assert result.meta["registration"]["kind"] == "rigid"
    assert result.meta["registration"]["motion_mm"] == pytest.approx(3, abs=0.5)
    assert registration_figures(result[0].numpy(), result[1].numpy(), SPACING).offset_length_mm < 0.5
    RegistrationCheckd()({"image": result})


def test_two_images_on_grids_of_their_own_end_on_the_grid_of_the_mri(head: HeadSubject) -> None:
    planted = motion((2, 1, -1), (0, 2, 0))
    flipped = np.ascontiguousarray(head.images["ct"][::-1, :, 4:])  # another origin, another direction
    grid = np.eye(4)
    grid[0, 0], grid[0, 3], grid[2, 3] = -1, head.brain.shape[0] - 1, 4
    ct = MetaTensor(torch.tensor(flipped[None]), affine=torch.tensor(planted @ head.affine @ grid))
    mri = MetaTensor(torch.tensor(head.images["t1"][None]), affine=torch.tensor(head.affine))
    result = RigidRegistrationd(("mri", "ct"))({"mri": mri, "ct": ct})
    assert result["mri"] is mri
    assert result["ct"].shape == mri.shape
    torch.testing.assert_close(result["ct"].affine, mri.affine)
    assert residual_mm(head, result["ct"].meta["registration"]["matrix"], planted) < 0.5


@pytest.mark.parametrize(
    ("make", "match"),
    [(lambda: RigidRegistrationd(kind="elastic"), "elastic"), (lambda: RegistrationCheckd(action="log"), "log")],
)
def test_unknown_choices_are_refused(make: Any, match: str) -> None:
    with pytest.raises(BundleError, match=match):
        make()


def test_what_is_no_pair_on_one_grid_is_refused(head: HeadSubject) -> None:
    mri, ct = head.images["t1"], head.images["ct"]
    with pytest.raises(DataError, match="expected one 3D grid"):
        registration_figures(mri[1:], ct, SPACING)
    with pytest.raises(DataError, match="constant"):
        registration_figures(np.zeros_like(mri), ct, SPACING)
    with pytest.raises(DataError, match="Hounsfield"):
        registration_figures(mri, ct / 4000, SPACING)
    with pytest.raises(DataError, match="no affine"):
        RigidRegistrationd()({"image": np.stack([mri, ct])})
    with pytest.raises(DataError, match="name one pair"):
        RigidRegistrationd()({"image": pair(head, ct)[:1]})
