"""From two label maps to one pair of packed masks per label: each map is read once.

What the scan leaves are the words of 64 voxels that hold a label. They give the voxel counts and the joint box of every
label, and are then written into those boxes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.metrics import kernels
from pipelines.metrics.packed import Bits, PackedPair
from pipelines.metrics.threads import run


class Words(NamedTuple):
    """What a scan found on one side (0: predictions): places (row, word, slot of the label), and 64 voxels each."""

    side: int
    place: NDArray[np.int32]
    bits: Bits


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
    words = _scan(
        [[_rows_of(map_, axes) for map_ in maps] for maps in (predictions, references)], values, kept, threads
    )
    counts, boxes = _measure(words, sum(len(of_map) for of_map in values), rows_per_plane, threads)
    masks = _fill(words, boxes, rows_per_plane, threads)
    step = (1.0,) * (3 - ndim) + tuple(float(spacing_mm[axis]) for axis in axes)
    return [
        PackedPair(*both, int(counts[0, slot]), int(counts[1, slot]), (step[0], step[1], step[2]), axes, threads)
        for slot, both in enumerate(zip(masks[0], masks[1], strict=True))
    ]


def _rows_of(array: NDArray[Any], axes: tuple[int, ...]) -> NDArray[Any]:
    """Return the array as rows along the axis that is last in memory; a view where that is possible."""
    array = np.ascontiguousarray(array.transpose(axes))
    return array.reshape(-1, array.shape[-1])


def _scan(
    maps: Sequence[Sequence[NDArray[Any]]],
    values: Sequence[Sequence[int]],
    kept: NDArray[np.uint8] | None,
    threads: int,
) -> list[Words]:
    """Return the words of every part of every map, with its side; slots count the labels of all maps."""
    keep = np.empty((0, 0), np.uint8) if kept is None else kept
    parts = []
    for side, of_side in enumerate(maps):
        first_slot = 0
        for rows, labels in zip(of_side, values, strict=True):
            # A label that the type cannot hold is in no voxel.
            possible = np.array(labels).astype(rows.dtype)
            wanted = np.where(possible == labels, possible, 0).astype(rows.dtype)
            unsigned = np.dtype(f"u{rows.dtype.itemsize}")
            cuts = np.linspace(0, len(rows), 4 * threads + 1 if threads > 1 else 2).astype(int).tolist()
            parts += [
                (side, first_slot, rows.view(unsigned), wanted.view(unsigned), first, last)
                for first, last in pairwise(cuts)
            ]
            first_slot += len(labels)

    def scan(part: tuple[int, int, NDArray[Any], NDArray[Any], int, int]) -> Words:
        side, first_slot, rows, wanted, first, last = part
        place, bits = kernels.pack_rows(rows, wanted, keep, kept is not None, first, last)
        place[:, 2] += first_slot
        return Words(side, place, bits)

    return run(scan, parts, threads)


def _measure(
    words: Sequence[Words], n_labels: int, rows_per_plane: int, threads: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the voxels per side and label, and the joint boxes: first and last plane, row and word (labels, 3, 2)."""

    def measure(part: Words) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        counts = np.zeros((2, n_labels), np.int64)
        boxes = np.empty((n_labels, 3, 2), np.int64)
        boxes[...] = np.iinfo(np.int64).max, -1
        kernels.measure(part.place, part.bits, rows_per_plane, counts[part.side], boxes)
        return counts, boxes

    of_parts = run(measure, words, threads)
    counts = np.sum([part[0] for part in of_parts], axis=0)
    low, high = (
        choose([part[1][..., end] for part in of_parts], axis=0) for end, choose in enumerate((np.min, np.max))
    )
    boxes = np.stack([low, high], axis=-1)
    boxes[boxes[:, 0, 1] < 0] = 0, -1
    return counts, boxes


def _fill(words: Sequence[Words], boxes: NDArray[np.int64], rows_per_plane: int, threads: int) -> list[list[Bits]]:
    """Return per side the packed mask of every label in its box, with an empty row or word on either side."""
    sizes = boxes[:, :, 1] - boxes[:, :, 0] + 3
    begins = np.concatenate([[0], np.cumsum(sizes.prod(axis=1))])
    strides = np.stack([sizes[:, 1] * sizes[:, 2], sizes[:, 2]], axis=1)
    origins = begins[:-1] - ((boxes[:, :2, 0] - 1) * strides).sum(axis=1) - (boxes[:, 2, 0] - 1)
    flat = np.zeros((2, begins[-1]), np.uint64)
    # No two parts of a side share a word.
    run(lambda of: kernels.scatter(of.place, of.bits, rows_per_plane, origins, strides, flat[of.side]), words, threads)
    return [
        [of_side[begins[slot] : begins[slot + 1]].reshape(size) for slot, size in enumerate(sizes)] for of_side in flat
    ]
