"""Lesion-wise detection on drawings: R the reference, P the prediction, # a voxel."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage import measure

from pipelines.metrics.lesions import lesion_detection
from transforms.errors import DataError, UsageError


def draw(*lines: str) -> np.ndarray:
    return np.array([[character == "#" for character in line.replace(" ", "")] for line in lines])


def detect(prediction: np.ndarray, reference: np.ndarray, **options) -> dict:
    return lesion_detection(prediction, reference, (1.0,) * reference.ndim, **options)


def counts(result: dict) -> tuple:
    return tuple(result[key] for key in ("n_reference", "n_predicted", "tp_reference", "tp_predicted"))


def test_one_found_one_missed_one_invented() -> None:
    reference = draw(
        "# # . . . . .",
        "# # . . . # .",
        ". . . . . # .",
        ". . . . . . .",
    )
    prediction = draw(
        ". # # . . . .",
        ". # # . . . .",
        ". . . . . . .",
        "# . . . # # .",  # the pair at the right is one row below the second lesion: no shared voxel
    )
    result = detect(prediction, reference)
    assert counts(result) == (2, 3, 1, 1)
    assert result["sensitivity"] == 1 / 2
    assert result["precision"] == 1 / 3
    assert result["f1"] == pytest.approx(2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2))  # 0.4


def test_one_component_that_merges_two_lesions_detects_both() -> None:
    reference = draw("# # . # #")
    assert counts(detect(draw("# # # # #"), reference)) == (2, 1, 2, 1)


def test_a_lesion_found_in_pieces_counts_once() -> None:
    assert counts(detect(draw("# . # . #"), draw("# # # # #"))) == (1, 3, 1, 3)


# A lesion of ten voxels: one of them is 10 % and counts; of eleven, one is 9.1 % and does not.
@pytest.mark.parametrize(("size", "found"), [(10, 1), (11, 0)])
def test_ten_per_cent_of_the_lesion(size: int, found: int) -> None:
    reference = np.zeros((3, 20), bool)
    reference[1, :size] = True
    prediction = np.zeros_like(reference)
    prediction[1, 0] = True
    result = detect(prediction, reference)
    assert result["tp_reference"] == found
    assert result["tp_predicted"] == 1


# 7 of 100 is 7 %, though 0.07 * 100 is 7.000000000000001 in double precision.
@pytest.mark.parametrize("percent", range(1, 101))
def test_exactly_the_threshold_is_enough(percent: int) -> None:
    prediction = np.arange(100)[None] < percent
    assert detect(prediction, np.ones((1, 100), bool), minimum_overlap=percent / 100)["tp_reference"] == 1


# A component of 24 voxels that touches a lesion with two of them (8 %) is a false positive, though it finds the lesion.
def test_a_large_component_that_grazes_a_lesion() -> None:
    reference, prediction = np.zeros((6, 6), bool), np.zeros((6, 6), bool)
    reference[0, :2] = True
    prediction[:4, :] = True
    assert prediction.sum() == 24
    assert counts(detect(prediction, reference)) == (1, 1, 1, 0)
    assert detect(prediction, reference)["f1"] == 0.0


# With a minimum of 0 one voxel is still needed.
def test_touching_is_not_overlapping() -> None:
    assert counts(detect(draw("# # . ."), draw(". . # #"), minimum_overlap=0.0)) == (1, 1, 0, 0)


def test_diagonal_neighbours_are_one_lesion_unless_only_faces_join() -> None:
    diagonal = draw("# . .", ". # .", ". . #")
    assert detect(diagonal, diagonal)["n_reference"] == 1
    assert detect(diagonal, diagonal, connectivity=1)["n_reference"] == 3
    corner = np.zeros((2, 2, 2), bool)
    corner[0, 0, 0] = corner[1, 1, 1] = True
    assert [detect(corner, corner, connectivity=c)["n_reference"] for c in (None, 3, 2, 1)] == [1, 1, 2, 2]


@pytest.mark.parametrize(
    ("prediction", "reference", "sensitivity", "precision", "f1"),
    [
        (". . .", ". . .", None, None, None),
        (". . .", ". # .", 0.0, None, 0.0),
        (". # .", ". . .", None, 0.0, 0.0),
        (". # .", ". # .", 1.0, 1.0, 1.0),
    ],
    ids=["both empty", "missed", "false alarm", "perfect"],
)
def test_empty_masks(prediction, reference, sensitivity, precision, f1) -> None:
    result = detect(draw(prediction), draw(reference))
    assert (result["sensitivity"], result["precision"], result["f1"]) == (sensitivity, precision, f1)


# Lesions of 1, 2 and 4 voxels of 1 x 2 x 5 = 10 mm^3; the one of 4 is found: the largest missed has 2, 0.02 mL.
def test_largest_missed_lesion() -> None:
    reference = np.zeros((12, 3, 3), bool)
    reference[0, 0, 0] = reference[3:5, 0, 0] = reference[7:11, 0, 0] = True
    prediction = np.zeros_like(reference)
    prediction[7, 0, 0] = True
    spacing = (1.0, 2.0, 5.0)
    assert lesion_detection(prediction, reference, spacing)["largest_missed_ml"] == pytest.approx(0.02)
    assert lesion_detection(reference, reference, spacing)["largest_missed_ml"] == 0.0
    assert lesion_detection(prediction, reference & False, spacing)["largest_missed_ml"] is None
    assert lesion_detection(reference[..., 0], reference[..., 0], (1, 2))["largest_missed_ml"] is None


# An independent count: scikit-image finds the components, sets of coordinates decide.
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), density=st.floats(0.02, 0.3), minimum=st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_equal_to_a_count_with_scikit_image(seed: int, density: float, minimum: float) -> None:
    rng = np.random.default_rng(seed)
    prediction, reference = rng.random((2, 9, 8, 7)) < density

    def matched(mask: np.ndarray, other: np.ndarray) -> list[bool]:
        inside = {tuple(voxel) for voxel in np.argwhere(other)}
        shared = [
            (len(inside & {tuple(voxel) for voxel in region.coords}), region.area)
            for region in measure.regionprops(measure.label(mask, connectivity=3))
        ]
        return [n > 0 and n / size >= minimum for n, size in shared]

    found, confirmed = matched(reference, prediction), matched(prediction, reference)
    expected = (len(found), len(confirmed), sum(found), sum(confirmed))
    assert counts(detect(prediction, reference, minimum_overlap=minimum)) == expected


def test_refusals() -> None:
    mask = draw("# .")
    with pytest.raises(DataError, match="the prediction is not a mask"):
        detect(np.array([[2, 0]]), mask)
    with pytest.raises(DataError, match="shapes differ"):
        detect(draw("# . ."), mask)
    with pytest.raises(UsageError, match="minimum_overlap"):
        detect(mask, mask, minimum_overlap=1.5)
    with pytest.raises(UsageError, match="connectivity"):
        detect(mask, mask, connectivity=3)
