"""Which instance of one label map overlaps which of another, and by how many voxels: everything instance metrics need.

Neighbours along the last axis mostly carry the same pair of ids, so a volume is read once, as runs of equal pairs; only
the runs are counted: in a hash table of the pairs (compiled), or sorted (NumPy), with the same result. Time is that of
one pass over the voxels, memory that of the pairs or runs, for any number of instances, and ids need not be contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipelines.metrics.inputs import as_mask
from pipelines.metrics.jit import HAVE_NUMBA
from transforms.errors import DataError

if HAVE_NUMBA:
    from pipelines.metrics.kernels_instances import count_pairs, tabulate

_BLOCK_VOXELS = 1 << 18  # runs are looked for in a piece that fits into the cache
_Ids = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Contingency:
    """The sparse table of overlaps: P predicted and R reference instances, K pairs that share at least one voxel.

    Attributes:
        predicted_ids: (P,) ids in ascending order, background (0) left out; ``reference_ids``: (R,) likewise.
        predicted_sizes: (P,) voxels, int64; ``reference_sizes``: (R,) likewise.
        predicted_index: (K,) positions in ``predicted_ids``, ascending; ``reference_index``: (K,) in ``reference_ids``.
        intersection: (K,) voxels that the two instances of a pair share, int64, at least 1.
    """

    predicted_ids: _Ids
    reference_ids: _Ids
    predicted_sizes: NDArray[np.int64]
    reference_sizes: NDArray[np.int64]
    predicted_index: NDArray[np.int64]
    reference_index: NDArray[np.int64]
    intersection: NDArray[np.int64]

    @property
    def union(self) -> NDArray[np.int64]:
        """Voxels of either instance of each pair, (K,)."""
        sizes = self.predicted_sizes[self.predicted_index] + self.reference_sizes[self.reference_index]
        return sizes - self.intersection

    @property
    def iou(self) -> NDArray[np.float64]:
        """Intersection over union of each pair, (K,): the nearest float to the quotient of two whole numbers."""
        return self.intersection / self.union

    def select(self, predicted: NDArray[np.bool_], reference: NDArray[np.bool_]) -> Contingency:
        """Return the table of the marked instances, (P,) and (R,); a pair stays when both of its instances do."""
        kept = predicted[self.predicted_index] & reference[self.reference_index]
        return Contingency(
            self.predicted_ids[predicted],
            self.reference_ids[reference],
            self.predicted_sizes[predicted],
            self.reference_sizes[reference],
            (np.cumsum(predicted) - 1)[self.predicted_index[kept]],
            (np.cumsum(reference) - 1)[self.reference_index[kept]],
            self.intersection[kept],
        )


def contingency(
    prediction: ArrayLike, reference: ArrayLike, mask: ArrayLike | None = None, case: str = ""
) -> Contingency:
    """Count the voxels that each pair of instances shares.

    Args:
        prediction: instance ids, (X, Y) or (X, Y, Z), whole numbers of any dtype, 0 is background.
        reference: ids of the same shape; equal ids in both maps mean nothing.
        mask: bool or 0/1, same shape; voxels where it is 0 count nowhere, as if they were not in the image.
        case: named in errors.

    Raises:
        DataError: different shapes, not 2D or 3D, ids that are negative or no whole numbers, a mask not of 0 and 1.
    """
    maps: list[NDArray[Any]] = [_as_ids(prediction, "prediction", case), _as_ids(reference, "reference", case)]
    if mask is not None:
        maps.append(as_mask(mask, "evaluation mask", case))
    shapes = [array.shape for array in maps]
    if len(set(shapes)) != 1 or len(shapes[0]) not in (2, 3):
        raise DataError(
            f"case {case or 'unnamed'}: instances cannot be compared",
            f"prediction, reference and mask have shapes {shapes}; (X, Y) or (X, Y, Z), all equal, is expected",
            "bring them to the grid of the reference and drop the batch and channel axes",
        )
    if all(array.flags.f_contiguous for array in maps):
        maps = [array.T for array in maps]
    return _compiled_table(maps, case) if HAVE_NUMBA else _sorted_table(maps, case)


def majority_classes(instances: ArrayLike, class_map: ArrayLike, case: str = "") -> dict[int, int]:
    """Return for each instance the class that most of its voxels have in a class map of the same shape.

    Background (0) has no vote, as in the post-processing of HoVer-Net (Graham et al. 2019): an instance gets 0 only
    when all of it is background. A tie goes to the smaller class.

    Raises:
        DataError: as :func:`contingency`.
    """
    table = contingency(instances, class_map, case=case)
    classes = dict.fromkeys(table.predicted_ids.tolist(), 0)
    # Pairs in order of votes, the winner last; of equal votes the smaller class.
    order = np.lexsort((-table.reference_index, table.intersection))
    for instance, label in zip(table.predicted_index[order], table.reference_index[order], strict=True):
        classes[int(table.predicted_ids[instance])] = int(table.reference_ids[label])
    return classes


def classes_of_map(instances: ArrayLike, class_map: ArrayLike, case: str = "") -> dict[int, int]:
    """Return the one class that all voxels of each instance have.

    Raises:
        DataError: as :func:`contingency`; an instance with voxels of two classes, background included.
    """
    table = contingency(instances, class_map, case=case)
    classes = {}
    for i, j, shared in zip(table.predicted_index, table.reference_index, table.intersection, strict=True):
        if shared == table.predicted_sizes[i]:
            classes[int(table.predicted_ids[i])] = int(table.reference_ids[j])
    mixed = [int(i) for i in table.predicted_ids if int(i) not in classes]
    if mixed:
        raise DataError(
            f"case {case or 'unnamed'}: instance {mixed[0]} has voxels of more than one class (background included)",
            f"{len(mixed)} of {len(table.predicted_ids)} instances; one class per instance is expected",
            "give a mapping of id to class, for example majority_classes(instances, class_map)",
        )
    return classes


def _as_ids(array: ArrayLike, name: str, case: str) -> _Ids:
    array = np.asarray(array)
    if array.dtype.kind == "b":
        return array.view(np.uint8)
    if array.dtype.kind in "iu":
        return array
    # A NaN or an infinity has no whole number; NumPy would only warn.
    with np.errstate(invalid="ignore"):
        ids = array.astype(np.int64)
    if not np.array_equal(ids, array):
        raise DataError(
            f"case {case or 'unnamed'}: the {name} is no map of instances",
            f"{array.dtype} with values that are no whole numbers",
            "give the instance ids, not probabilities",
        )
    return ids


def _refuse_negative(predicted: _Ids, referenced: _Ids, case: str) -> None:
    for ids, name in ((predicted, "prediction"), (referenced, "reference")):
        if ids.min(initial=0) < 0:
            raise DataError(
                f"case {case or 'unnamed'}: the {name} has an instance {ids.min()}",
                "ids are positive, 0 is background",
                "mark what is not to be compared with the mask",
            )


def _compiled_table(maps: list[NDArray[Any]], case: str) -> Contingency:
    """Return the table of two maps, and perhaps a mask, of one shape."""
    types = [array.dtype.newbyteorder("=") for array in maps[:2]]
    # One kernel per width of the ids; zeros in front of a negative id are cut off again below.
    width = np.dtype(f"u{max(dtype.itemsize for dtype in types)}")
    # Rows of a map with gaps are flattened to a view with gaps, which the kernel does not take.
    flat = [np.ascontiguousarray(array.reshape(-1)) for array in maps]
    words = [
        row.astype(dtype, copy=False).view(f"u{dtype.itemsize}").astype(width, copy=False)
        for row, dtype in zip(flat, types, strict=False)
    ]
    keep = flat[2].view(np.uint8) if len(flat) > 2 else np.empty(0, np.uint8)
    (*found, predicted_sizes, reference_sizes), pairs = tabulate(*count_pairs(words[0], words[1], keep))
    ids = [word.astype(f"u{dtype.itemsize}").view(dtype) for word, dtype in zip(found, types, strict=True)]
    _refuse_negative(ids[0], ids[1], case)
    return Contingency(ids[0], ids[1], predicted_sizes, reference_sizes, *pairs)


def _sorted_table(maps: list[NDArray[Any]], case: str) -> Contingency:
    """Return what :func:`_compiled_table` returns, by NumPy alone."""
    predicted, referenced, voxels = _runs(maps)
    _refuse_negative(predicted, referenced, case)
    return _table(*_sum_equal_pairs(predicted, referenced, voxels))


def _runs(maps: list[NDArray[Any]]) -> tuple[_Ids, _Ids, NDArray[np.int64]]:
    """Return ids and lengths of the runs of equal pairs, block by block; what is background in both is left out."""
    prediction, reference, *mask = (array.reshape(-1) for array in maps)
    found = []
    for start in range(0, max(prediction.size, 1), _BLOCK_VOXELS):
        block = slice(start, start + _BLOCK_VOXELS)
        p, r = prediction[block], reference[block]
        if mask:
            p, r = (np.where(mask[0][block], ids, ids.dtype.type(0)) for ids in (p, r))
        changes = p[1:] != p[:-1]
        changes |= r[1:] != r[:-1]
        first = np.concatenate(([0], np.flatnonzero(changes) + 1))[: p.size]
        length = np.diff(first, append=p.size)
        p, r = p[first], r[first]
        kept = np.flatnonzero((p != 0) | (r != 0))
        found.append((p[kept], r[kept], length[kept]))
    predicted, referenced, voxels = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return predicted, referenced, voxels


def _sum_equal_pairs(
    predicted: _Ids, referenced: _Ids, voxels: NDArray[np.int64]
) -> tuple[_Ids, _Ids, NDArray[np.int64]]:
    """Return every distinct pair once, ordered by predicted and then by reference id, with its voxels."""
    if not voxels.size:
        return predicted, referenced, voxels
    width = int(referenced.max()) + 1
    if (int(predicted.max()) + 1) * width < 2**63:
        pairs = predicted.astype(np.int64) * width + referenced.astype(np.int64)
        order = np.argsort(pairs)
        changes = np.diff(pairs[order]) != 0
    else:  # ids of 64 bits, as hashes are: slower, but nothing overflows
        order = np.lexsort((referenced, predicted))
        p, r = predicted[order], referenced[order]
        changes = (p[1:] != p[:-1]) | (r[1:] != r[:-1])
    first = np.concatenate(([0], np.flatnonzero(changes) + 1))
    return predicted[order[first]], referenced[order[first]], np.add.reduceat(voxels[order], first)


def _table(predicted: _Ids, referenced: _Ids, voxels: NDArray[np.int64]) -> Contingency:
    """Return the table of distinct pairs that are ordered by predicted id, background left out."""
    changes = predicted[1:] != predicted[:-1]
    first = np.concatenate(([0], np.flatnonzero(changes) + 1))[: predicted.size]
    reference_ids = np.unique(referenced)
    reference_index = np.searchsorted(reference_ids, referenced)
    # bincount adds in float64, which holds whole numbers up to 2**53.
    reference_sizes = np.bincount(reference_index, voxels, reference_ids.size).astype(np.int64)
    everything = Contingency(
        predicted[first],
        reference_ids,
        np.add.reduceat(voxels, first) if first.size else voxels,
        reference_sizes,
        np.concatenate(([0], np.cumsum(changes)))[: predicted.size],
        reference_index,
        voxels,
    )
    return everything.select(everything.predicted_ids != 0, reference_ids != 0)
