"""From two label maps to one pair of packed masks per label: each map is read once.

What the scan leaves are the words of 64 voxels that hold a label. They give the voxel counts and the joint box of every
label, and are then written into those boxes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.metrics import kernels
from pipelines.metrics.packed import Bits, PackedPair
from pipelines.metrics.threads import run

Words = tuple[NDArray[np.int32], Bits]


def pack_pairs(
    predictions: Sequence[NDArray[Any]],
    references: Sequence[NDArray[Any]],
    values: Sequence[Sequence[int]],
    keep: NDArray[np.bool_] | None,
    spacing_mm: Sequence[float],
    threads: int,
) -> list[PackedPair]:
    """Return what :func:`pipelines.metrics.distances.label_pairs` returns, packed; arguments as there."""
    ndim = predictions[0].ndim
    # Work in the order of memory: images read from NIfTI run along the first axis.
    columns_first = all(map_.flags.f_contiguous and not map_.flags.c_contiguous for map_ in (*predictions, *references))
    axes = tuple(range(ndim))[::-1] if columns_first else tuple(range(ndim))
    rows_per_plane = predictions[0].shape[axes[-2]]
    kept = None if keep is None else _rows_of(keep, axes).view(np.uint8)
    words = [
        _words_of([_rows_of(map_, axes) for map_ in maps], values, kept, threads) for maps in (predictions, references)
    ]
    n_labels = sum(len(of_map) for of_map in values)
    counts, boxes = _measure(words, n_labels, rows_per_plane)
    masks = [_fill(of_side, boxes, rows_per_plane) for of_side in words]
    step = (1.0,) * (3 - ndim) + tuple(float(spacing_mm[axis]) for axis in axes)
    of_label = max(threads // n_labels, 1)
    return [
        PackedPair(*both, int(counts[0, slot]), int(counts[1, slot]), (step[0], step[1], step[2]), axes, of_label)
        for slot, both in enumerate(zip(masks[0], masks[1], strict=True))
    ]


def _rows_of(array: NDArray[Any], axes: tuple[int, ...]) -> NDArray[Any]:
    """Return the array as rows along the axis that is last in memory; a view where that is possible."""
    array = np.ascontiguousarray(array.transpose(axes))
    return array.reshape(-1, array.shape[-1])


def _words_of(
    maps: Sequence[NDArray[Any]], values: Sequence[Sequence[int]], kept: NDArray[np.uint8] | None, threads: int
) -> list[Words]:
    """Scan all maps of one side; slots count the labels of all maps."""
    found, first_slot = [], 0
    for rows, labels in zip(maps, values, strict=True):
        for place, bits in _scan(rows, labels, kept, threads):
            place[:, 2] += first_slot
            found.append((place, bits))
        first_slot += len(labels)
    return found


def _scan(rows: NDArray[Any], labels: Sequence[int], kept: NDArray[np.uint8] | None, threads: int) -> list[Words]:
    # A label that the type cannot hold is in no voxel.
    possible = np.array(labels).astype(rows.dtype)
    wanted = np.where(possible == labels, possible, 0).astype(rows.dtype)
    unsigned = np.dtype(f"u{rows.dtype.itemsize}")
    keep = np.empty((0, 0), np.uint8) if kept is None else kept
    cuts = np.linspace(0, len(rows), 4 * threads + 1 if threads > 1 else 2).astype(int).tolist()

    def scan(part: tuple[int, int]) -> Words:
        place, bits = kernels.pack_rows(rows.view(unsigned), wanted.view(unsigned), keep, kept is not None, *part)
        return place, bits

    return run(scan, pairwise(cuts), threads)


def _measure(
    words: Sequence[Sequence[Words]], n_labels: int, rows_per_plane: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the voxels per side and label, and the joint boxes: first and last plane, row and word (labels, 3, 2)."""
    counts = np.zeros((2, n_labels), np.int64)
    boxes = np.empty((n_labels, 3, 2), np.int64)
    boxes[...] = np.iinfo(np.int64).max, -1
    for side, of_side in enumerate(words):
        for place, bits in of_side:
            kernels.measure(place, bits, rows_per_plane, counts[side], boxes)
    boxes[boxes[:, 0, 1] < 0] = 0, -1
    return counts, boxes


def _fill(words: Sequence[Words], boxes: NDArray[np.int64], rows_per_plane: int) -> list[Bits]:
    """Return the packed mask of every label in its box, with an empty row or word on either side."""
    sizes = boxes[:, :, 1] - boxes[:, :, 0] + 3
    begins = np.concatenate([[0], np.cumsum(sizes.prod(axis=1))])
    strides = np.stack([sizes[:, 1] * sizes[:, 2], sizes[:, 2]], axis=1)
    origins = begins[:-1] - ((boxes[:, :2, 0] - 1) * strides).sum(axis=1) - (boxes[:, 2, 0] - 1)
    flat = np.zeros(begins[-1], np.uint64)
    for place, bits in words:
        kernels.scatter(place, bits, rows_per_plane, origins, strides, flat)
    return [flat[begins[slot] : begins[slot + 1]].reshape(size) for slot, size in enumerate(sizes)]
