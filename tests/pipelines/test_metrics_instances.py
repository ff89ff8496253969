"""Instance metrics on drawings (a digit is an instance, . background), beside MONAI and loops over dense masks."""

from __future__ import annotations

import dataclasses
import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import PanopticQualityMetric
from scipy import ndimage
from skimage.metrics import contingency_table

from pipelines.metrics.contingency import Contingency, contingency, majority_classes
from pipelines.metrics.instance_counts import COCO_THRESHOLDS, instance_figures, pool_cases, pool_counts
from pipelines.metrics.instances import count_instances, instance_metrics
from pipelines.metrics.jit import HAVE_NUMBA
from pipelines.metrics.matching import average_precision, best_assignment
from pipelines.metrics.summary import summarise
from transforms.errors import DataError, UsageError

needs_numba = pytest.mark.skipif(not HAVE_NUMBA, reason="the compiled path is switched off")

CLASSES = {0: "background", 1: "red", 2: "white"}


def draw(*lines: str) -> np.ndarray:
    return np.array([[0 if c == "." else int(c) for c in line.replace(" ", "")] for line in lines])


def one(prediction: np.ndarray, reference: np.ndarray, **options) -> dict:
    return instance_metrics(prediction, reference, **options)[0]


def blobs(seed: int, shape: tuple[int, ...], cells: int) -> np.ndarray:
    """Voronoi cells of random points, one voxel in four removed cell-wise: touching, uneven, some of one voxel."""
    rng = np.random.default_rng(seed)
    points = rng.uniform(0, 1, (cells, len(shape))) * shape
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    nearest = ((grid[..., None, :] - points) ** 2).sum(axis=-1).argmin(axis=-1) + 1
    return np.where(rng.random(cells + 1)[nearest] < 0.75, nearest, 0)


def pair(seed: int, shape: tuple[int, ...], cells: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """A reference and the same map shifted by a voxel, with some cells merged and some noise."""
    rng = np.random.default_rng(seed)
    reference = blobs(seed, shape, cells)
    prediction = np.roll(reference, 1, axis=int(rng.integers(len(shape))))
    prediction = np.where(prediction == 3, 4, prediction)
    return np.where(rng.random(shape) < 0.1, rng.integers(0, cells + 1, shape), prediction), reference


# ---- the table ------------------------------------------------------------------------------------------------------


def test_table_by_hand() -> None:
    table = contingency(draw("7 7 7 . 2"), draw("5 5 . . 9"))
    assert table.predicted_ids.tolist() == [2, 7]
    assert table.predicted_sizes.tolist() == [1, 3]
    assert table.reference_ids.tolist() == [5, 9]
    assert table.reference_sizes.tolist() == [2, 1]
    assert table.predicted_index.tolist() == [0, 1]
    assert table.reference_index.tolist() == [1, 0]
    assert table.intersection.tolist() == [1, 2]
    assert table.iou.tolist() == [1.0, 2 / 3]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), shape=st.sampled_from([(9, 13), (5, 6, 7), (1, 17)]))
def test_table_equals_scikit_image(seed: int, shape: tuple[int, ...]) -> None:
    prediction, reference = pair(seed, shape)
    expected = contingency_table(prediction, reference, normalize=False).toarray()
    table = contingency(prediction, reference)
    dense = np.zeros((table.predicted_ids.size, table.reference_ids.size), int)
    dense[table.predicted_index, table.reference_index] = table.intersection
    full = expected[np.ix_(table.predicted_ids, table.reference_ids)]
    np.testing.assert_array_equal(dense, full)
    np.testing.assert_array_equal(table.predicted_sizes, expected.sum(axis=1)[table.predicted_ids])
    np.testing.assert_array_equal(table.reference_sizes, expected.sum(axis=0)[table.reference_ids])


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64, np.uint64, np.float32])
def test_dtype_order_and_blocks_do_not_matter(dtype, monkeypatch) -> None:
    prediction, reference = pair(3, (8, 9, 10))
    expected = one(prediction, reference)
    assert one(prediction.astype(dtype), reference.astype(dtype)) == expected
    assert one(np.asfortranarray(prediction), np.asfortranarray(reference)) == expected
    assert one(prediction[::-1], reference[::-1]) == expected
    monkeypatch.setattr("pipelines.metrics.contingency.HAVE_NUMBA", False)
    monkeypatch.setattr("pipelines.metrics.contingency._BLOCK_VOXELS", 7)
    assert one(prediction, reference) == expected


def tables_of_both_paths(prediction, reference, mask=None) -> tuple[Contingency, Contingency]:
    compiled = contingency(prediction, reference, mask)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.metrics.contingency.HAVE_NUMBA", False)
        return compiled, contingency(prediction, reference, mask)


def same_table(first: Contingency, second: Contingency) -> None:
    for field in dataclasses.fields(Contingency):
        mine, yours = getattr(first, field.name), getattr(second, field.name)
        assert mine.dtype == yours.dtype, field.name
        np.testing.assert_array_equal(mine, yours, err_msg=field.name)


# Every array of the table, with its type: maps of one or two types, ids that are close or hashes, noise (each voxel a
# pair of its own, so that the hash table grows), rows and columns first, with gaps in memory, cut by a mask; words of
# 64 voxels and pieces of 8,192 that end a voxel before, with and a voxel after the map.
@needs_numba
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    shape=st.sampled_from(
        [(1, 1), (1, 63), (8, 8), (5, 13), (130, 70), (3, 5, 7), (9, 31, 40), (0, 4), (1, 8191), (128, 64), (1, 8193)]
    ),
    types=st.tuples(
        *[st.sampled_from([bool, np.uint8, np.int8, np.int16, np.uint16, np.int32, np.int64, np.uint64])] * 2
    ),
    kind=st.sampled_from(["cells", "noise", "empty", "hashes"]),
    columns_first=st.booleans(),
    gaps=st.booleans(),
    masked=st.booleans(),
)
def test_compiled_table_equals_numpy(seed, shape, types, kind, columns_first, gaps, masked) -> None:
    rng = np.random.default_rng(seed)
    maps = []
    for dtype in types:
        high = 1 if dtype is bool else int(np.iinfo(dtype).max)
        if kind == "hashes":
            ids = rng.integers(0, high, 5, dtype=np.uint64, endpoint=True)[rng.integers(0, 5, shape)]
        elif kind == "noise":
            ids = rng.integers(0, high, shape, dtype=np.uint64, endpoint=True)
        else:
            ids = (ndimage.gaussian_filter(rng.normal(size=shape), 2.0, mode="nearest") * 30).round().clip(0, high)
        maps.append((0 * ids if kind == "empty" else ids).astype(dtype, order="F" if columns_first else "C"))
    mask = rng.random(shape) < 0.7 if masked else None
    if gaps:
        # The same values, every other voxel of a wider array: flattened, a view with a stride.
        maps = [np.repeat(ids, 2, axis=-1)[..., ::2] for ids in maps]
        mask = None if mask is None else np.repeat(mask, 2, axis=-1)[..., ::2]
    same_table(*tables_of_both_paths(*maps, mask))


@needs_numba
def test_the_kernel_refuses_what_it_would_misread() -> None:
    from numba.core.errors import TypingError

    from pipelines.metrics.kernels_instances import count_pairs

    ids, keep = np.zeros(200, np.uint32), np.empty(0, np.uint8)
    with pytest.raises(TypingError, match="contiguous"):
        count_pairs(ids[::2], ids[:100], keep)


# More than 4,096 pairs fill the first hash table, and ids of 64 bits are sorted by six digits. Ids that differ in their
# highest bits only must not share one slot.
@needs_numba
@pytest.mark.parametrize("scale", [1, 2**20, 2**48])
def test_many_pairs_far_apart(scale: int) -> None:
    ids = np.arange(200 * 200, dtype=np.uint64).reshape(200, 200) % np.uint64(30_011)
    compiled, slow = tables_of_both_paths(ids * np.uint64(scale), ids[::-1].copy())
    same_table(compiled, slow)
    assert compiled.intersection.sum() == np.count_nonzero(ids * ids[::-1])


def test_types_of_the_other_byte_order_and_views() -> None:
    prediction, reference = pair(6, (12, 14))
    expected = one(prediction, reference)
    assert one(prediction.astype(">i2"), reference.astype(">i4")) == expected
    assert one(np.repeat(prediction, 2, 0)[::2], np.repeat(reference, 2, 1)[:, ::2]) == expected


# Any injective renaming leaves every figure as it is; ids may be hashes of 64 bits.
@pytest.mark.parametrize("scale", [1000, 2**59])
def test_ids_need_not_be_contiguous(scale: int) -> None:
    prediction, reference = pair(5, (20, 20))
    renamed = prediction.astype(np.uint64) * np.uint64(scale), reference.astype(np.uint64) * np.uint64(scale)
    assert one(*renamed) == one(prediction, reference)


def test_mask_equals_cropping() -> None:
    prediction, reference = pair(4, (12, 15))
    mask = np.zeros((12, 15), bool)
    mask[2:9, 3:14] = True
    assert one(prediction, reference, mask=mask) == one(prediction[2:9, 3:14], reference[2:9, 3:14])


# ---- PQ ------------------------------------------------------------------------------------------------------------


# reference 1: 4 voxels, prediction 3 shares 3 of them: IoU 3/4. reference 2: 2 voxels, prediction 5 shares 1 of 2 + 1
# in all: IoU 1/2, which is not above 1/2. prediction 7 is invented.
#   TP 1, FP 2 (5 and 7), FN 1 (2): PQ = .75 / (1 + 2/2 + 1/2) = .3, SQ = .75, RQ = 1 / 2.5 = .4
HAND_REFERENCE = draw(
    "1 1 . . 2",
    "1 1 . . 2",
    ". . . . .",
)
HAND_PREDICTION = draw(
    "3 3 . . 5",
    "3 . . . .",
    ". . 7 . .",
)


def test_pq_by_hand() -> None:
    row = one(HAND_PREDICTION, HAND_REFERENCE)
    assert (row["n_reference"], row["n_predicted"], row["tp"]) == (2, 3, 1)
    assert (row["pq"], row["sq"], row["rq"]) == (pytest.approx(0.3), 0.75, 0.4)
    assert (row["precision"], row["sensitivity"]) == (1 / 3, 1 / 2)
    assert (row["count_error"], row["absolute_count_error"]) == (1, 1)
    assert (row["f1_50"], row["f1_75"]) == (0.4, 0.0)  # IoU 3/4 is not above 0.75
    assert row["ap_count_50"] == 1 / 4  # TP / (TP + FP + FN)
    assert row["map_count_50_95"] == pytest.approx(5 / 4 / 10)  # .50 to .70


# AJI by hand, the same drawing: reference 1 takes 3 (3 of 4 voxels), 2 takes 5 (1 of 2), 7 is added to the union:
# (3 + 1) / (4 + 2 + 1) = 4/7, and every prediction is taken once: AJI+ is the same.
def test_aji_by_hand() -> None:
    row = one(HAND_PREDICTION, HAND_REFERENCE)
    assert row["aji"] == row["aji_plus"] == 4 / 7


# One prediction over two cells: both take it in AJI, (2 + 3) / (5 + 5) = .5, while AJI+ gives it to the better half
# and leaves the other alone, 3 / (5 + 2) = 3/7.
def test_aji_counts_a_merger_twice_and_aji_plus_once() -> None:
    row = one(draw("4 4 4 4 4"), draw("1 1 2 2 2"))
    assert (row["aji"], row["aji_plus"]) == (0.5, 3 / 7)


@pytest.mark.parametrize(("shape", "cells"), [((40, 50), 30), ((12, 14, 16), 20)])
@pytest.mark.parametrize("seed", [0, 1])
def test_pq_equals_monai_per_class(shape, cells, seed) -> None:
    prediction, reference = pair(seed, shape, cells)
    of_id = {i: 1 + i % 2 for i in range(cells + 1)}
    class_of = np.array([0, *(of_id[i] for i in range(1, cells + 1))])
    rows = instance_metrics(prediction, reference, CLASSES, of_id, of_id)
    assert sum(row["tp"] for row in rows) >= 4
    stacked = [torch.from_numpy(np.stack([ids, class_of[ids]])[None]) for ids in (prediction, reference)]
    for name in ("pq", "sq", "rq"):
        metric = PanopticQualityMetric(num_classes=2, metric_name=name, reduction="none")
        metric(*stacked)
        assert [row[name] for row in rows] == pytest.approx(metric.aggregate()[0].tolist(), abs=1e-6)


# Below an IoU of 1/2 pairs compete:
#   reference   1 1 1 1 2 2 2 2 2
#   prediction  3 4 4 4 4 4 4 4 .
# IoU of 3 with 1: 1/4, of 4 with 1: 3/8, of 4 with 2: 4/8. The largest sum, 3/4, is 3 with 1 and 4 with 2.
def test_assignment_below_one_half_by_hand() -> None:
    reference, prediction = draw("1 1 1 1 2 2 2 2 2"), draw("3 4 4 4 4 4 4 4 .")
    row = one(prediction, reference, match_iou=0.2)
    assert (row["tp"], row["sq"], row["pq"]) == (2, pytest.approx((1 / 4 + 4 / 8) / 2), pytest.approx(0.375))
    # With 0.25 the pair 3-1 may no longer be taken: 4-2 is the best that is left.
    assert one(prediction, reference, match_iou=0.25)["pq"] == pytest.approx((4 / 8) / 2)
    assert one(prediction, reference)["pq"] == 0.0


def iou_matrix(prediction: np.ndarray, reference: np.ndarray) -> np.ndarray:
    rows = [reference == i for i in np.unique(reference) if i]
    columns = [prediction == j for j in np.unique(prediction) if j]
    return np.array([[(r & c).sum() / (r | c).sum() for c in columns] for r in rows]).reshape(len(rows), len(columns))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), threshold=st.sampled_from([0.0, 0.1, 0.3]))
def test_assignment_is_the_best_of_all(seed: int, threshold: float) -> None:
    rng = np.random.default_rng(seed)
    prediction, reference = rng.integers(0, 6, (4, 5)), rng.integers(0, 5, (4, 5))
    iou = iou_matrix(prediction, reference)
    iou = np.where(iou > threshold, iou, 0)
    if iou.shape[0] > iou.shape[1]:
        iou = iou.T
    best = max(
        sum(iou[i, j] for i, j in enumerate(columns))
        for columns in itertools.permutations(range(iou.shape[1]), iou.shape[0])
    )
    table = contingency(prediction, reference)
    chosen = best_assignment(table, threshold)
    assert table.iou[chosen].sum() == pytest.approx(best)
    assert (table.iou[chosen] > threshold).all()
    assert len(set(table.predicted_index[chosen])) == len(set(table.reference_index[chosen])) == len(chosen)


def test_a_chain_of_touching_cells_is_one_problem_and_is_solved() -> None:
    prediction, reference = np.repeat(np.arange(1, 401), 10)[None], np.roll(np.repeat(np.arange(1, 401), 10), 4)[None]
    reference[0, :4] = 0
    assert one(prediction, reference, match_iou=0.1)["tp"] == 400


# ---- AJI -----------------------------------------------------------------------------------------------------------


def dense_aji(prediction: np.ndarray, reference: np.ndarray) -> float:
    """Kumar et al. 2017, algorithm 1, with whole masks."""
    predicted = {j: prediction == j for j in np.unique(prediction) if j}
    used, numerator, denominator = set(), 0, 0
    for i in np.unique(reference):
        if i == 0:
            continue
        truth = reference == i
        overlaps = [
            (float(Fraction(int((truth & mask).sum()), int((truth | mask).sum()))), int((truth & mask).sum()), -j)
            for j, mask in predicted.items()
        ]
        _, shared, minus_j = max(overlaps, default=(0, 0, 0))
        numerator += shared
        denominator += int((truth | predicted[-minus_j]).sum()) if shared else int(truth.sum())
        used |= {-minus_j} if shared else set()
    return numerator / (denominator + sum(int(mask.sum()) for j, mask in predicted.items() if j not in used))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), shape=st.sampled_from([(12, 14), (5, 6, 7)]))
def test_aji_equals_a_loop_over_masks(seed: int, shape: tuple[int, ...]) -> None:
    prediction, reference = pair(seed, shape)
    row = one(prediction, reference)
    assert row["aji"] == pytest.approx(dense_aji(prediction, reference), abs=1e-12)
    assert row["pq"] <= row["rq"]
    assert 0 <= row["aji_plus"] <= 1


# ---- AP ------------------------------------------------------------------------------------------------------------


# Ranked: hit, miss, hit, of 4 to find. Recall 1/4 at precision 1, 2/4 at 2/3: recalls 0 to .25 (26 of them) count 1,
# .26 to .50 (25) count 2/3, the other 50 count 0.
def test_ap_by_hand() -> None:
    scores, hits = np.array([0.3, 0.9, 0.6]), np.array([True, True, False])
    assert average_precision(scores, hits, 4) == pytest.approx((26 + 25 * 2 / 3) / 101)
    assert average_precision(np.full(3, 0.5), hits, 4) == pytest.approx(
        51 * 2 / 3 / 101
    )  # a tie: precision 2/3 at once
    assert average_precision(np.ones(2), np.ones(2, bool), 2) == 1
    assert average_precision(np.zeros(0), np.zeros(0, bool), 2) == 0
    assert average_precision(np.ones(1), np.zeros(1, bool), 0) == 0
    assert average_precision(np.zeros(0), np.zeros(0, bool), 0) is None


def ap_by_loops(scores: list[float], hits: list[bool], n_reference: int) -> Fraction:
    points = []
    for threshold in set(scores):
        taken = [hit for score, hit in zip(scores, hits, strict=True) if score >= threshold]
        points.append((Fraction(sum(taken), n_reference), Fraction(sum(taken), len(taken))))
    return sum(
        (max((p for r, p in points if r >= Fraction(k, 100)), default=Fraction(0)) for k in range(101)), Fraction(0)
    ) / Fraction(101)


@settings(max_examples=40, deadline=None)
@given(
    ranked=st.lists(st.tuples(st.sampled_from([0.1, 0.2, 0.5, 0.7, 0.9]), st.booleans()), min_size=1, max_size=15),
    missed=st.integers(0, 8),
)
def test_ap_equals_a_loop_over_thresholds_and_recalls(ranked, missed) -> None:
    scores, hits = [score for score, _ in ranked], [hit for _, hit in ranked]
    n_reference = sum(hits) + missed
    if n_reference:
        expected = float(ap_by_loops(scores, hits, n_reference))
        assert average_precision(np.array(scores), np.array(hits), n_reference) == pytest.approx(expected, abs=1e-12)


def test_ap_ranks_by_score_and_pools_over_images() -> None:
    good, bad = {3: 0.9, 5: 0.2, 7: 0.1}, {3: 0.1, 5: 0.8, 7: 0.9}
    # The only hit is prediction 3, one of two references: ranked first, recalls up to 1/2 at precision 1; last, 1/3.
    assert one(HAND_PREDICTION, HAND_REFERENCE, scores=good)["ap_50"] == pytest.approx(51 / 101)
    assert one(HAND_PREDICTION, HAND_REFERENCE, scores=bad)["ap_50"] == pytest.approx(51 / 101 / 3)
    assert one(HAND_PREDICTION, HAND_REFERENCE, scores=good)["map_50_95"] == pytest.approx(51 / 101 / 2)
    assert "ap_50" not in one(HAND_PREDICTION, HAND_REFERENCE)
    first, second = (count_instances(HAND_PREDICTION, HAND_REFERENCE, scores=s)["instance"] for s in (good, bad))
    # Both images: hit at .9 beside a miss at .9 (a tie), and the second hit last, after 6: 1/2 to 1/4, 1/3 to 1/2.
    pooled = instance_figures(pool_counts([first, second]))
    assert pooled["ap_50"] == pytest.approx((26 / 2 + 25 / 3) / 101)


# ---- classes, absence, pooling -------------------------------------------------------------------------------------


def test_instances_of_different_classes_never_match() -> None:
    image = draw("1 1 . 2 2")
    rows = instance_metrics(image, image, CLASSES, {1: 1, 2: 1}, {1: 1, 2: 2})
    assert [(row["label"], row["tp"], row["n_predicted"], row["n_reference"]) for row in rows] == [
        ("red", 1, 2, 1),
        ("white", 0, 0, 1),
    ]
    assert rows[1]["status"] == "missed"


def test_class_maps_equal_mappings_and_mixed_instances_are_refused() -> None:
    prediction, reference = pair(2, (15, 15), 10)
    of_id = {i: 1 + i % 2 for i in range(1, 11)}
    class_of = np.array([2, *of_id.values()])  # a class where there is no instance is of no instance
    by_map = instance_metrics(prediction, reference, CLASSES, class_of[prediction], class_of[reference])
    assert by_map == instance_metrics(prediction, reference, CLASSES, of_id, of_id)
    mixed = class_of[prediction].copy()
    first = np.argwhere(prediction == 4)[0]
    mixed[tuple(first)] = 2
    with pytest.raises(DataError, match="case scan_3: instance 4 has voxels of more than one class"):
        instance_metrics(prediction, reference, CLASSES, mixed + (mixed == 0), class_of[reference], case="scan_3")
    assert majority_classes(prediction, class_of[prediction]) == {i: of_id[i] for i in np.unique(prediction) if i}


# instance 1: classes 1 1 2, wins 1; instance 2: 2 and 1, a tie, the smaller; instance 3: background only.
def test_majority_by_hand() -> None:
    assert majority_classes(draw("1 1 1 2 2 3"), draw("1 1 2 2 1 .")) == {1: 1, 2: 1, 3: 0}
    assert majority_classes(draw("1 1 1"), draw(". . 2")) == {1: 2}


def test_absent_missed_and_invented() -> None:
    cell, nothing = draw("1 1 ."), draw(". . .")
    empty, missed, invented = one(nothing, nothing), one(nothing, cell), one(cell, nothing)
    assert [row["status"] for row in (empty, missed, invented)] == ["empty", "missed", "false_alarm"]
    ratios = [
        "pq",
        "sq",
        "rq",
        "precision",
        "sensitivity",
        "aji",
        "aji_plus",
        "f1_50",
        "ap_count_50",
        "map_count_50_95",
    ]
    assert [empty[key] for key in ratios] == [None] * len(ratios)
    assert [missed[key] for key in ratios] == [invented[key] for key in ratios] == [0.0] * len(ratios)
    assert [row["count_error"] for row in (empty, missed, invented)] == [0, -1, 1]
    with_scores = [one(*maps, scores={1: 0.5}) for maps in ((nothing, nothing), (nothing, cell), (cell, nothing))]
    assert [row["map_50_95"] for row in with_scores] == [None, 0.0, 0.0]


# MONAI scores a class that is in neither map as 0; here it is counted and left out.
def test_absent_classes_are_counted_by_the_summary() -> None:
    rows = [
        {"case": f"c{i}", "subject": f"c{i}", **row}
        for i in range(3)
        for row in instance_metrics(draw("1 1 ."), draw("1 1 ."), CLASSES, {1: 1}, {1: 1})
    ]
    summary = summarise(rows, n_resamples=50)
    assert (summary["labels"]["white"]["pq"]["n"], summary["labels"]["white"]["pq"]["n_empty"]) == (0, 3)
    assert summary["mean_over_labels"]["pq"]["mean"] == 1.0


# Image 1: red 1 of 1 found with IoU 1; image 2: red 0 of 3 found. Per image the mean PQ is 1/2; pooled it is
# 1 / (1 + 3/2) = .4, as every cell counts the same.
def test_pooling_over_images_and_classes() -> None:
    first = count_instances(draw("1 . . . ."), draw("1 . . . ."), CLASSES, {1: 1}, {1: 1})
    second = count_instances(draw(". . . . ."), draw("1 . 2 . 3"), CLASSES, {}, {1: 1, 2: 1, 3: 1})
    cohort = pool_cases([first, second])
    assert cohort["labels"]["red"]["pq"] == cohort["pooled"]["pq"] == cohort["mean_over_labels"]["pq"] == 0.4
    assert cohort["labels"]["white"]["pq"] is None
    assert (cohort["n_absent"], cohort["labels"]["white"]["n_images_empty"]) == (1, 2)
    assert cohort["labels"]["red"]["n_images_empty"] == 0


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_pooling_equals_one_large_image(seed: int) -> None:
    parts = [pair(seed + i, (9, 11)) for i in range(3)]
    counts = [count_instances(*part)["instance"] for part in parts]
    stacked = [
        np.concatenate([np.where(part[side] > 0, part[side] + 100 * i, 0) for i, part in enumerate(parts)])
        for side in (0, 1)
    ]
    pooled, whole = instance_figures(pool_counts(counts)), one(*stacked)
    assert set(whole) - {"label"} == set(pooled)
    assert all(pooled[key] == pytest.approx(whole[key], abs=1e-12) for key in pooled if key != "status")


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_symmetry_identity_and_order(seed: int) -> None:
    prediction, reference = pair(seed, (14, 13))
    forth, back = one(prediction, reference), one(reference, prediction)
    for key in ("pq", "sq", "rq", "map_count_50_95"):
        assert forth[key] == pytest.approx(back[key], abs=1e-12)
    assert forth["precision"] == back["sensitivity"]
    assert forth["f1_75"] <= forth["f1_50"]
    same = one(reference, reference)
    assert all(same[key] == 1 for key in ("pq", "sq", "rq", "aji", "aji_plus", "map_count_50_95"))


def test_thresholds_of_coco() -> None:
    assert COCO_THRESHOLDS == (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
    row = one(HAND_PREDICTION, HAND_REFERENCE, thresholds=(0.6,))
    assert {"f1_60", "ap_count_60"} <= set(row)
    assert "f1_50" not in row


# ---- refusals ------------------------------------------------------------------------------------------------------

IMAGE = np.ones((4, 4), int)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((IMAGE, np.ones((4, 5), int)), "cannot be compared"),
        ((np.ones((1, 2, 4, 4), int), np.ones((1, 2, 4, 4), int)), "cannot be compared"),
        ((-IMAGE, IMAGE), "the prediction has an instance -1"),
        ((IMAGE, IMAGE * 0.5), "the reference is no map of instances"),
        ((IMAGE, np.full((4, 4), np.nan)), "the reference is no map of instances"),
        ((IMAGE, IMAGE, CLASSES, {}, {1: 1}), "predicted instance 1 has the class None"),
        ((IMAGE, IMAGE, CLASSES, {1: 1}, {1: 9}), "reference instance 1 has the class 9"),
        ((IMAGE, IMAGE, None, None, None, {2: 0.5}), "predicted instance 1 has the score None"),
        ((IMAGE, IMAGE, None, None, None, {1: float("nan")}), "predicted instance 1 has the score nan"),
    ],
)
def test_refuses_bad_data(arguments, message) -> None:
    with pytest.raises(DataError, match=f"case patient_7: .*{message}"):
        instance_metrics(*arguments, case="patient_7")


def test_refuses_a_mask_of_other_values() -> None:
    with pytest.raises(DataError, match="case patient_7: the evaluation mask is not a mask"):
        instance_metrics(IMAGE, IMAGE, mask=IMAGE * 0.5, case="patient_7")


@pytest.mark.parametrize(
    "options",
    [
        {"labels": {0: "background"}},
        {"labels": CLASSES},
        {"match_iou": 1.0},
        {"match_iou": -0.1},
        {"thresholds": (0.4,)},
        {"thresholds": ()},
    ],
)
def test_refuses_bad_arguments(options) -> None:
    with pytest.raises(UsageError):
        instance_metrics(IMAGE, IMAGE, **options)


def test_refuses_to_pool_what_does_not_fit() -> None:
    without = count_instances(IMAGE, IMAGE)
    with_scores = count_instances(IMAGE, IMAGE, scores={1: 0.5})
    with pytest.raises(DataError, match="1 of 2 have scores"):
        pool_cases([without, with_scores])
    with pytest.raises(UsageError):
        pool_counts([])
    with pytest.raises(UsageError):
        pool_cases([without, {"other": without["instance"]}])
    with pytest.raises(UsageError):
        pool_cases([])
