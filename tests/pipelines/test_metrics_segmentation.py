"""Segmentation metrics: cases derived by hand, MONAI on the uncropped arrays, published NSD values, and the policy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import (
    compute_average_surface_distance,
    compute_dice,
    compute_hausdorff_distance,
    compute_iou,
    compute_surface_dice,
)
from scipy import ndimage

from pipelines.metrics import distances, surface
from pipelines.metrics.distances import crop_to_joint_box
from pipelines.metrics.segmentation import DEFINITIONS, segmentation_metrics
from transforms.errors import DataError, UsageError

SPACING = (1.0, 2.0, 3.0)
LESION = {0: "background", 1: "lesion"}


def box(shape: tuple[int, ...], *corners: tuple[int, int], value: int = 1) -> np.ndarray:
    """A label map with one box; a corner is (first, end) along an axis."""
    label_map = np.zeros(shape, np.uint8)
    label_map[tuple(slice(*corner) for corner in corners)] = value
    return label_map


def compare(prediction: np.ndarray, reference: np.ndarray, spacing=SPACING, **options) -> dict:
    (row,) = segmentation_metrics(prediction, reference, spacing, LESION, **options)
    return row


def blobs(seed: int, shape: tuple[int, ...], n_labels: int = 1) -> np.ndarray:
    """Smooth random shapes that also touch the border of the image."""
    field = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 1.5)
    return np.digitize(field, np.quantile(field, np.linspace(0.6, 0.95, n_labels))).astype(np.int16)


# Along one axis, R the reference and P the prediction, four voxels each, the other two axes alike:
#
#     voxel   0 1 2 3 4 5 6 7
#     R       . . # # # # . .
#     P       . . . # # # # .        3 of 4 layers shared: Dice = 2 * 48 / (64 + 64) = 0.75
#
# A box of 4^3 voxels has 4^3 - 2^3 = 56 edge voxels. The 16 of the outer layer of P (voxel 6) lie one voxel beyond R:
# at distance `spacing` along the axis. They are 16/56 = 29 % of the edge, so the 95th percentile is that distance.
@pytest.mark.parametrize(("axis", "hd95_mm"), [(0, 1.0), (1, 2.0), (2, 3.0)])
def test_box_shifted_by_one_voxel(axis: int, hd95_mm: float) -> None:
    reference = box((8, 8, 8), (2, 6), (2, 6), (2, 6))
    row = compare(np.roll(reference, 1, axis), reference)
    assert row["status"] == "both"
    assert row["dice"] == 0.75
    assert row["hd95_mm"] == hd95_mm
    assert compare(np.roll(reference, 1, axis), reference, nsd_tolerance_mm=hd95_mm)["nsd"] == 1.0
    assert compare(np.roll(reference, 1, axis), reference, nsd_tolerance_mm=hd95_mm * 0.99)["nsd"] < 1.0


# Volumes: R has 64 voxels of 1 x 2 x 3 = 6 mm^3, 0.384 mL; P has one layer of 16 voxels more, 0.096 mL.
def test_volumes_are_signed_and_in_millilitres() -> None:
    row = compare(box((8, 8, 8), (2, 7), (2, 6), (2, 6)), box((8, 8, 8), (2, 6), (2, 6), (2, 6)))
    assert row["volume_reference_ml"] == pytest.approx(0.384)
    assert row["volume_prediction_ml"] == pytest.approx(0.480)
    assert row["volume_error_ml"] == pytest.approx(0.096)


def test_perfect_prediction() -> None:
    reference = blobs(3, (14, 12, 10), 2)
    for row in segmentation_metrics(reference.copy(), reference, SPACING, {1: "core", 2: "rim"}, nsd_tolerance_mm=0.0):
        assert (row["dice"], row["hd95_mm"], row["nsd"], row["volume_error_ml"]) == (1.0, 0.0, 1.0, 0.0)
        assert (row["lesion_sensitivity"], row["lesion_precision"], row["lesion_f1"]) == (1.0, 1.0, 1.0)


# In the plane:   R  # # . .      P  . # # .      spacing 2 x 5 mm: one voxel of two shared in each of two rows,
#                    # # . .         . # # .      Dice = 2 * 2 / 8 = 0.5; every voxel is an edge, HD = 5 mm.
def test_two_dimensions() -> None:
    row = compare(box((4, 6), (1, 3), (2, 4)), box((4, 6), (1, 3), (1, 3)), spacing=(2.0, 5.0))
    assert (row["dice"], row["hd95_mm"]) == (0.5, 5.0)
    assert row["volume_reference_ml"] is row["volume_prediction_ml"] is row["volume_error_ml"] is None


# Balls of radius 20 and 22 mm. DeepMind's surface-distance 0.1, by the authors of the NSD, gives these values; counting
# edge voxels instead of area gives 0.394 and 0.682.
@pytest.mark.parametrize(("tolerance_mm", "published"), [(1.9, 0.7214208787803787), (2.1, 0.9093440990725687)])
def test_nsd_is_the_published_definition(tolerance_mm: float, published: float) -> None:
    radius = np.linalg.norm(np.indices((51, 51, 51)) - 25, axis=0)
    row = compare((radius <= 20).astype(int), (radius <= 22).astype(int), (1, 1, 1), nsd_tolerance_mm=tolerance_mm)
    assert row["nsd"] == pytest.approx(published, abs=1e-6)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    shape=st.tuples(*[st.integers(6, 14)] * 3) | st.tuples(*[st.integers(6, 20)] * 2),
    spacing=st.tuples(*[st.sampled_from([0.5, 0.9, 1.0, 2.0, 3.3])] * 3),
    tolerance_mm=st.sampled_from([0.3, 1.0, 2.5]),
)
def test_equal_to_monai_on_the_uncropped_arrays(seed, shape, spacing, tolerance_mm) -> None:
    spacing = spacing[: len(shape)]
    prediction, reference = blobs(seed, shape, 2), blobs(seed + 1, shape, 2)
    rows = segmentation_metrics(prediction, reference, spacing, {1: "a", 2: "b"}, nsd_tolerance_mm=tolerance_mm)
    y_pred, y = (torch.from_numpy(np.stack([m == 1, m == 2]))[None] for m in (prediction, reference))
    options = {"include_background": True, "spacing": spacing}
    assert [row["dice"] for row in rows] == pytest.approx(compute_dice(y_pred, y)[0].tolist(), abs=1e-6)
    hd95_mm = compute_hausdorff_distance(y_pred, y, percentile=95, **options)
    assert [row["hd95_mm"] for row in rows] == pytest.approx(hd95_mm[0].tolist(), abs=1e-6)
    nsd = compute_surface_dice(y_pred, y, [tolerance_mm] * 2, use_subvoxels=True, **options)
    assert [row["nsd"] for row in rows] == pytest.approx(nsd[0].tolist(), abs=1e-6)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_symmetric_and_bounded(seed: int) -> None:
    first, second = blobs(seed, (10, 9, 8)), blobs(seed + 1, (10, 9, 8))
    forth, back = compare(first, second), compare(second, first)
    assert (forth["dice"], forth["hd95_mm"]) == (back["dice"], back["hd95_mm"])
    assert forth["nsd"] == pytest.approx(back["nsd"], abs=1e-6)
    assert forth["volume_error_ml"] == -back["volume_error_ml"]
    assert forth["lesion_sensitivity"] == back["lesion_precision"]
    assert 0 <= forth["dice"] <= 1
    assert 0 <= forth["nsd"] <= 1
    assert 0 <= forth["hd95_mm"] <= math.dist((0, 0, 0), (10, 18, 24))


# The image is 4 x 3 x 4 voxels of 3 x 4 x 4 mm: 12, 12 and 16 mm long, its diagonal sqrt(144 + 144 + 256) mm.
def test_policy_for_empty_masks() -> None:
    shape, spacing, diagonal_mm = (4, 3, 4), (3.0, 4.0, 4.0), math.sqrt(544)
    nothing, something = np.zeros(shape, int), box(shape, (1, 2), (1, 2), (1, 2))
    missed, false_alarm = compare(nothing, something, spacing), compare(something, nothing, spacing)
    empty = compare(nothing, nothing, spacing)
    assert [row["status"] for row in (missed, false_alarm, empty)] == ["missed", "false_alarm", "empty"]
    for row in (missed, false_alarm):
        assert (row["dice"], row["hd95_mm"], row["nsd"]) == (0.0, pytest.approx(diagonal_mm), 0.0)
        assert row["lesion_f1"] == 0.0
    assert missed["volume_error_ml"] == pytest.approx(-0.048)
    assert false_alarm["volume_error_ml"] == pytest.approx(0.048)
    assert [empty[key] for key in ("dice", "hd95_mm", "nsd", "lesion_f1")] == [None] * 4
    assert empty["volume_error_ml"] == 0.0


def test_missing_more_never_improves_a_case() -> None:
    reference = box((8, 8, 8), (1, 3), (1, 3), (1, 3))
    worst_hit = compare(box((8, 8, 8), (7, 8), (7, 8), (7, 8)), reference)
    missed = compare(np.zeros((8, 8, 8), int), reference)
    assert missed["hd95_mm"] > worst_hit["hd95_mm"]
    assert missed["nsd"] <= worst_hit["nsd"]


def test_labels_are_compared_one_by_one_and_in_order() -> None:
    reference = box((8, 8, 8), (1, 4), (1, 4), (1, 4), value=7) + box((8, 8, 8), (5, 7), (5, 7), (5, 7), value=2)
    swapped = np.where(reference == 7, 2, np.where(reference == 2, 7, 0))
    labels = {0: "background", 7: "oedema", 2: "core", 3: "absent"}
    right = segmentation_metrics(reference, reference, SPACING, labels)
    assert [(row["label"], row["status"], row["dice"]) for row in right] == [
        ("oedema", "both", 1.0),
        ("core", "both", 1.0),
        ("absent", "empty", None),
    ]
    assert [row["dice"] for row in segmentation_metrics(swapped, reference, SPACING, labels)] == [0.0, 0.0, None]


def test_whole_numbers_of_any_dtype_are_the_same_and_inputs_stay() -> None:
    prediction, reference = blobs(1, (8, 8, 8)), blobs(2, (8, 8, 8))
    before = prediction.copy(), reference.copy()
    assert compare(prediction.astype(np.float32), reference.astype(bool)) == compare(prediction, reference)
    np.testing.assert_array_equal(prediction, before[0])
    np.testing.assert_array_equal(reference, before[1])


def test_crop_keeps_every_voxel_and_a_margin() -> None:
    first, second = box((9, 9, 9), (3, 5), (4, 5), (0, 2)), box((9, 9, 9), (4, 6), (4, 5), (1, 3))
    cropped = crop_to_joint_box(first, second)
    assert cropped[0].shape == cropped[1].shape == (5, 3, 4)
    assert [c.sum() for c in cropped] == [first.sum(), second.sum()]
    assert [c.shape for c in crop_to_joint_box(first * 0, second * 0)] == [(1, 1, 1)] * 2


@pytest.mark.parametrize(
    ("prediction", "reference", "spacing"),
    [
        (np.zeros((4, 4, 4), int), np.zeros((4, 4, 5), int), SPACING),
        (np.zeros((1, 4, 4, 4), int), np.zeros((1, 4, 4, 4), int), (1, *SPACING)),
        (np.zeros((4, 4, 4), int), np.zeros((4, 4, 4), int), (1.0, 1.0)),
        (np.zeros((4, 4, 4), int), np.zeros((4, 4, 4), int), (1.0, 0.0, 1.0)),
        (np.full((4, 4, 4), 0.5), np.zeros((4, 4, 4), int), SPACING),
        (np.zeros((4, 4, 4), int), np.full((4, 4, 4), np.nan), SPACING),
    ],
    ids=["shapes differ", "channel axis", "spacing short", "spacing zero", "probabilities", "NaN"],
)
def test_refuses_what_cannot_be_compared(prediction, reference, spacing) -> None:
    with pytest.raises(DataError, match="case patient_7"):
        segmentation_metrics(prediction, reference, spacing, LESION, case="patient_7")


def test_refuses_a_table_without_foreground_and_a_negative_tolerance() -> None:
    with pytest.raises(UsageError):
        segmentation_metrics(np.zeros((4, 4)), np.zeros((4, 4)), (1, 1), {0: "background"})
    with pytest.raises(UsageError):
        compare(np.zeros((4, 4)), np.zeros((4, 4)), (1, 1), nsd_tolerance_mm=-1)


@pytest.fixture(params=["compiled", "numpy"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test with the compiled kernels and without."""
    if request.param == "numpy":
        for module in (distances, surface):
            monkeypatch.setattr(module, "HAVE_NUMBA", False)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize(("seed", "shape", "spacing"), [(0, (12, 14, 11), (0.9, 1.0, 2.5)), (3, (24, 31), (0.7, 1.3))])
def test_every_distance_equals_monai(seed: int, shape: tuple[int, ...], spacing: tuple[float, ...]) -> None:
    prediction, reference = blobs(seed, shape, 2), blobs(seed + 1, shape, 2)
    tolerances = (1.0, 0.0, 2.5)
    rows = segmentation_metrics(prediction, reference, spacing, {1: "a", 2: "b"}, tolerances)
    y_pred, y = (torch.from_numpy(np.stack([m == 1, m == 2]))[None] for m in (prediction, reference))
    options = {"include_background": True, "spacing": spacing}
    expected = {
        "iou": compute_iou(y_pred, y),
        "hd_mm": compute_hausdorff_distance(y_pred, y, **options),
        "hd95_mm": compute_hausdorff_distance(y_pred, y, percentile=95, **options),
        "asd_mm": compute_average_surface_distance(y_pred, y, **options),
        "assd_mm": compute_average_surface_distance(y_pred, y, symmetric=True, **options),
    }
    for key, tolerance in zip(("nsd", "nsd_0mm", "nsd_2.5mm"), tolerances, strict=True):
        expected[key] = compute_surface_dice(y_pred, y, [tolerance] * 2, use_subvoxels=True, **options)
    for key, values in expected.items():
        assert [row[key] for row in rows] == pytest.approx(values[0].tolist(), abs=1e-6), key


# 64 voxels each, 48 shared: IoU 48 / 80; the union of the two bands of edge voxels is all but the 4 (2 x 2 x 2 each, at
# positions 3, 4 and 4, 5 along the axis) inner voxels of either, which the other band covers half of.
def test_overlap_of_a_shifted_box() -> None:
    reference = box((8, 8, 8), (2, 6), (2, 6), (2, 6))
    row = compare(np.roll(reference, 1, 0), reference, boundary_width_mm=0.0)
    assert row["iou"] == 48 / 80
    assert row["precision"] == row["recall"] == 0.75
    assert row["volume_similarity"] == 1.0
    # Layers of 16: 2 (R), 3 (edge of R 12, of P 16), 4 (12 and 12), 5 (16 and 12), 6 (P).
    assert row["boundary_iou"] == pytest.approx((12 + 12 + 12) / (16 + 16 + 12 + 16 + 16))


@pytest.mark.usefixtures("path")
def test_precision_recall_and_volume_similarity_of_a_part() -> None:
    row = compare(box((8, 8, 8), (2, 4), (2, 6), (2, 6)), box((8, 8, 8), (2, 6), (2, 6), (2, 6)))
    assert (row["precision"], row["recall"], row["volume_similarity"]) == (1.0, 0.5, pytest.approx(1 - 32 / 96))


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("definition", DEFINITIONS)
def test_policies_for_empty_masks(definition: str) -> None:
    shape, spacing, diagonal_mm = (4, 3, 4), (3.0, 4.0, 4.0), math.sqrt(544)
    nothing, something = np.zeros(shape, int), box(shape, (1, 2), (1, 2), (1, 2))
    worst = dict.fromkeys(("dice", "iou", "precision", "recall", "volume_similarity", "nsd", "boundary_iou"), 0.0)
    worst |= dict.fromkeys(("hd_mm", "hd95_mm", "asd_mm", "assd_mm"), pytest.approx(diagonal_mm))
    best = {key: 1.0 if value == 0.0 else 0.0 for key, value in worst.items()}
    best |= dict.fromkeys(("hd_mm", "hd95_mm", "asd_mm", "assd_mm"), 0.0)
    none = dict.fromkeys(worst)
    expected = {"worst": (worst, none), "perfect": (worst, best), "exclude": (none, none)}
    for policy, (one_sided, both_empty) in expected.items():
        options = {"empty_policy": policy, "definition": definition}
        for prediction, reference, status, values in (
            (nothing, something, "missed", one_sided),
            (something, nothing, "false_alarm", one_sided),
            (nothing, nothing, "empty", both_empty),
        ):
            row = compare(prediction, reference, spacing, **options)
            assert row["status"] == status
            assert {key: row[key] for key in values} == values


@pytest.mark.usefixtures("path")
def test_keys_do_not_depend_on_status_policy_or_definition() -> None:
    nothing, something = np.zeros((6, 6, 6), int), box((6, 6, 6), (1, 4), (1, 4), (1, 4))
    keys = list(compare(something, something, nsd_tolerance_mm=(1, 2)))
    for definition in DEFINITIONS:
        for prediction in (nothing, something):
            options = {"definition": definition, "empty_policy": "exclude", "nsd_tolerance_mm": (1, 2)}
            assert list(compare(prediction, something, **options)) == keys


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("definition", DEFINITIONS)
def test_a_stack_of_overlapping_masks_is_one_comparison_per_channel(definition: str) -> None:
    predictions, references = (np.stack([blobs(seed + k, (9, 8, 10)) for k in range(3)]) for seed in (0, 10))
    labels = {0: "whole", 2: "core"}
    rows = segmentation_metrics(
        predictions, references, SPACING, labels, multilabel=True, definition=definition, threads=2
    )
    assert [row["label"] for row in rows] == ["whole", "core"]
    for channel, row in zip(labels, rows, strict=True):
        alone = compare(predictions[channel], references[channel], definition=definition)
        assert list(row.values())[2:] == pytest.approx(list(alone.values())[2:], rel=1e-12)


@pytest.mark.usefixtures("path")
def test_outside_of_the_evaluation_mask_is_background() -> None:
    prediction, reference = blobs(1, (10, 9, 8), 2), blobs(2, (10, 9, 8), 2)
    mask = np.random.default_rng(0).random(reference.shape) < 0.7
    labels = {1: "a", 2: "b"}
    cut = segmentation_metrics(prediction * mask, reference * mask, SPACING, labels)
    assert segmentation_metrics(prediction, reference, SPACING, labels, evaluation_mask=mask) == cut
    unknown = np.where(mask, reference, 255).astype(np.uint8)
    assert segmentation_metrics(prediction, unknown, SPACING, labels, ignore_label=255) == cut
    half = np.indices(mask.shape)[0] < 5
    both = segmentation_metrics(prediction, unknown, SPACING, labels, ignore_label=255, evaluation_mask=half)
    assert both == segmentation_metrics(prediction, reference, SPACING, labels, evaluation_mask=mask & half)


def test_memory_order_and_threads_change_nothing() -> None:
    prediction, reference = blobs(1, (10, 9, 80), 2), blobs(2, (10, 9, 80), 2)
    labels = {1: "a", 2: "b"}
    expected = segmentation_metrics(prediction, reference, SPACING, labels, threads=1)
    assert segmentation_metrics(prediction, reference, SPACING, labels, threads=3) == expected
    for first in (np.asfortranarray(prediction), prediction):
        rows = segmentation_metrics(first, np.asfortranarray(reference), SPACING, labels)
        for row, other in zip(rows, expected, strict=True):
            assert list(row.values())[2:] == pytest.approx(list(other.values())[2:], rel=1e-12)


def test_only_what_is_asked_for() -> None:
    reference = box((6, 6, 6), (1, 4), (1, 4), (1, 4))
    row = compare(reference, reference, groups=("nsd",))
    assert {"nsd", "dice", "volume_error_ml"} <= set(row)
    assert not {"hd95_mm", "boundary_iou", "lesion_f1"} & set(row)


def test_refusals_name_what_is_wrong() -> None:
    mask, stack = np.zeros((4, 4, 4), int), np.zeros((2, 4, 4, 4), int)
    for options, match in (
        ({"definition": "mesh"}, "definition 'mesh'"),
        ({"empty_policy": "nan"}, "empty_policy 'nan'"),
        ({"groups": ("hd95",)}, "group 'hd95'"),
        ({"nsd_tolerance_mm": ()}, "tolerance"),
        ({"boundary_width_mm": -1.0}, "boundary width"),
        ({"ignore_label": 1}, "ignore_label 1"),
        ({"threads": 0}, "threads = 0"),
    ):
        with pytest.raises(UsageError, match=match):
            compare(mask, mask, **options)
    with pytest.raises(UsageError, match="channels 0 to 1"):
        segmentation_metrics(stack, stack, SPACING, {2: "c"}, multilabel=True)
    with pytest.raises(UsageError, match="ignore_label"):
        segmentation_metrics(stack, stack, SPACING, {1: "b"}, multilabel=True, ignore_label=3)
    with pytest.raises(DataError, match="as many channels"):
        segmentation_metrics(stack, stack[:1], SPACING, {0: "a"}, multilabel=True)
    with pytest.raises(DataError, match="channel 0, is not a mask"):
        segmentation_metrics(stack + 2, stack, SPACING, {0: "a"}, multilabel=True)
    with pytest.raises(DataError, match=r"(?s)channel 0, is not a mask.*threshold probabilities"):
        segmentation_metrics(stack + 0.5, stack, SPACING, {0: "a"}, multilabel=True)
    with pytest.raises(DataError, match="evaluation mask does not fit"):
        compare(mask, mask, evaluation_mask=np.ones((4, 4), int))
