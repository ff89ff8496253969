"""Edges, cells, bands and components: the compiled path against NumPy and SciPy, both against drawings and MONAI."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import compute_surface_dice
from scipy import ndimage

from pipelines.metrics import distances
from pipelines.metrics.distances import DensePair, LabelPair, cell_areas, dense_pairs, label_pairs, within
from pipelines.metrics.jit import HAVE_NUMBA
from pipelines.metrics.segmentation import segmentation_metrics
from pipelines.metrics.threads import run
from transforms.errors import DataError

needs_numba = pytest.mark.skipif(not HAVE_NUMBA, reason="the compiled path is switched off")


def blobs(seed: int, shape: tuple[int, ...], n_labels: int = 2) -> np.ndarray:
    field = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 1.5)
    return np.digitize(field, np.quantile(field, np.linspace(0.6, 0.95, n_labels))).astype(np.int16)


def specks(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Single voxels far apart: nearest neighbours are far, components many."""
    return (np.random.default_rng(seed).random(shape) < 0.01).astype(np.int16)


def same(first: LabelPair, second: LabelPair, spacing: tuple[float, ...]) -> None:
    """Every number of the two paths; edges and cells may come in another order."""
    assert (first.n_prediction, first.n_reference, first.n_both) == (
        second.n_prediction,
        second.n_reference,
        second.n_both,
    )
    for width in (0.0, 1.0, 2.7):
        assert first.boundary_overlap(width) == second.boundary_overlap(width)
    for mine, yours in zip(first.components(), second.components(), strict=True):
        assert sorted(zip(*map(np.ndarray.tolist, mine), strict=True)) == sorted(
            zip(*map(np.ndarray.tolist, yours), strict=True)
        )
    for mine, yours in zip(first.masks(), second.masks(), strict=True):
        assert mine.sum() == yours.sum()
    if first.n_prediction and first.n_reference:
        for mine, yours in zip(first.edge_distances(), second.edge_distances(), strict=True):
            np.testing.assert_allclose(np.sort(mine), np.sort(yours), rtol=1e-12, atol=1e-12)
        a, b = first.cell_distances(spacing, 2.0), second.cell_distances(spacing, 2.0)
        for side in (0, 2):
            mine, yours = (np.round(np.stack(cells[side : side + 2]), 9) for cells in (a, b))
            np.testing.assert_array_equal(mine[:, np.lexsort(mine)], yours[:, np.lexsort(yours)])


@needs_numba
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    shape=st.tuples(st.integers(2, 9), st.integers(2, 12), st.integers(2, 140)) | st.tuples(*[st.integers(2, 150)] * 2),
    spacing=st.tuples(*[st.sampled_from([0.5, 0.9, 1.0, 2.0, 3.3])] * 3),
    kind=st.sampled_from(["blobs", "specks"]),
    columns_first=st.booleans(),
    masked=st.booleans(),
    threads=st.integers(1, 3),
)
def test_compiled_path_equals_numpy(seed, shape, spacing, kind, columns_first, masked, threads) -> None:
    spacing = spacing[: len(shape)]
    make = blobs if kind == "blobs" else specks
    maps = [[make(seed + i, shape)] for i in range(2)]
    keep = np.random.default_rng(seed).random(shape) < 0.8 if masked else None
    order = "F" if columns_first else "C"
    ordered = [[np.asarray(map_, order=order) for map_ in of_side] for of_side in maps]
    fast = label_pairs(ordered[0], ordered[1], [[1, 2, 9]], keep, spacing, threads)
    slow = dense_pairs(maps[0], maps[1], [[1, 2, 9]], keep, spacing)
    for first, second in zip(fast, slow, strict=True):
        same(first, second, spacing)


@needs_numba
@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int8, np.int16, np.uint16, np.int32, np.int64, ">i2"])
def test_every_type_of_whole_numbers(dtype) -> None:
    prediction, reference = (blobs(seed, (6, 7, 70), 1).astype(dtype) for seed in (1, 2))
    fast = label_pairs([prediction], [reference], [[1, 300, -1]], None, (1, 1, 1))
    expected = [int(np.count_nonzero(reference == 1)), 0, 0]
    assert [pair.n_reference for pair in fast] == expected


# Two voxels 300 and 400 voxels apart along two axes: 500 mm, beyond all rows that are searched before the k-d tree.
def test_far_outliers_are_exact() -> None:
    shape = (3, 310, 410)
    prediction, reference = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    prediction[1, 302, 403] = prediction[1, 2, 3] = 1
    reference[1, 2, 3] = 1
    (pair,) = label_pairs([prediction], [reference], [[1]], None, (1, 1, 1))
    forth, back = pair.edge_distances()
    assert sorted(forth) == [0.0, 500.0]
    assert back.tolist() == [0.0]
    capped = pair.cell_distances((1, 1, 1), 10.0).from_prediction
    assert np.isinf(capped).sum() == 8
    assert (capped == 0).sum() == 8


def test_switched_off_means_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "HAVE_NUMBA", False)
    mask = blobs(0, (5, 6, 7))
    assert all(isinstance(pair, DensePair) for pair in label_pairs([mask], [mask], [[1]], None, (1, 1, 1)))


# Edge voxels counted, not weighted: what MONAI calls the surface Dice without subvoxels.
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), tolerance=st.sampled_from([0.0, 0.9, 1.0, 2.5]))
def test_edges_are_those_of_monai(seed: int, tolerance: float) -> None:
    spacing = (0.9, 1.0, 2.5)
    prediction, reference = blobs(seed, (9, 10, 8), 1), blobs(seed + 1, (9, 10, 8), 1)
    (pair,) = label_pairs([prediction], [reference], [[1]], None, spacing)
    both = np.concatenate(pair.edge_distances())
    y_pred, y = (torch.from_numpy(m == 1)[None, None] for m in (prediction, reference))
    expected = compute_surface_dice(y_pred, y, [tolerance], include_background=True, spacing=spacing)
    assert within(both, tolerance).mean() == pytest.approx(expected.item(), abs=1e-6)


# A band of width w holds the edge voxels and those whose centre is within w of a voxel outside; 1 x 2 mm:
#
#     e e e e e      e: edge, in every band
#     e 2 2 2 e      2: two rows from the outside, 2 mm
#     e 3 3 3 e      3: three rows from the outside, 3 mm; along the row at least two columns, 4 mm
#     e 2 2 2 e
#     e e e e e
@pytest.mark.parametrize(("width", "voxels"), [(0.0, 16), (1.0, 16), (1.9, 16), (2.0, 22), (2.9, 22), (3.0, 25)])
def test_boundary_band(width: float, voxels: int) -> None:
    mask = np.zeros((9, 9), np.uint8)
    mask[2:7, 2:7] = 1
    (pair,) = label_pairs([mask], [mask], [[1]], None, (1.0, 2.0))
    assert pair.boundary_overlap(width) == (voxels, voxels)


def test_tolerance_in_single_precision() -> None:
    assert within(np.array([3 * 0.1]), 0.3).all()
    assert not within(np.array([0.3001]), 0.3).any()


def test_area_of_a_cell_cut_along_an_axis() -> None:
    areas = cell_areas((1.0, 2.0, 3.0))
    # Four voxels on one side of the cell: its cross-section, without the axis that is cut.
    assert areas[0b11110000] == pytest.approx(6.0)
    assert areas[0b11001100] == pytest.approx(3.0)
    assert areas[0b10101010] == pytest.approx(2.0)
    assert areas[0] == areas[255] == 0


# Slabs, parts of a scan and the k-d tree of the far voxels are cut by the size of the task, not by the threads: equal
# numbers, not only close ones. The specks are far apart, so that the search by rows leaves some undecided.
@needs_numba
@pytest.mark.parametrize("make", [blobs, specks])
def test_threads_change_no_bit(make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.metrics.packed.SLAB_VOXELS", 16)
    maps = [make(seed, (23, 37, 90)) for seed in (1, 2)]
    labels = {value: str(value) for value in (1, 2, 9)}
    for map_ in maps:
        map_[0, 0, 0] = map_[22, 36, 89] = 1
    rows = [segmentation_metrics(*maps, (3.0, 0.7, 0.9), labels, threads=threads) for threads in (1, 2, 3, 7)]
    assert rows[0][0]["status"] == "both"
    assert rows[1:] == rows[:1] * 3


@needs_numba
def test_slabs_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = [blobs(seed, (23, 37, 90)) for seed in (1, 2)]
    whole = segmentation_metrics(*maps, (3.0, 0.7, 0.9), {1: "a", 2: "b"}, threads=2)
    monkeypatch.setattr("pipelines.metrics.packed.SLAB_VOXELS", 100)
    assert segmentation_metrics(*maps, (3.0, 0.7, 0.9), {1: "a", 2: "b"}, threads=2) == whole


# ---- work shared by threads ------------------------------------------------------------------------------------------


def test_nested_runs_keep_the_order_and_the_number_of_threads() -> None:
    working, most, lock = 0, 0, threading.Lock()

    def leaf(i: int) -> int:
        nonlocal working, most
        with lock:
            working += 1
            most = max(most, working)
        time.sleep(0.002)
        with lock:
            working -= 1
        return i * i

    found = run(lambda j: run(leaf, range(10 * j, 10 * j + 5), 4), range(6), 3)
    assert found == [[i * i for i in range(10 * j, 10 * j + 5)] for j in range(6)]
    assert most <= 3


# The last item of the outer run is the long one: the thread that is done with the others takes some of its parts.
def test_a_free_thread_helps_inside_of_the_last_item() -> None:
    barrier = threading.Barrier(2, timeout=10)

    def part(_: int) -> int:
        barrier.wait()  # passed only by two threads at once
        return threading.get_ident()

    outer = run(lambda n: run(part, range(n), 1), [0, 2], 2)
    assert len(set(outer[1])) == 2


def test_an_error_in_a_thread_is_raised_and_ends_nothing_else() -> None:
    done = []

    def task(i: int) -> None:
        if i == 1:
            raise DataError("what", "why", "what to do")
        done.append(i)

    with pytest.raises(DataError, match="what"):
        run(lambda j: run(task, range(3), 2) if j else None, range(2), 2)
    assert sorted(done) == [0, 2]
    assert run(lambda i: i, range(3), 2) == [0, 1, 2]
