"""Edge voxels, surface cells and the distances between them, for one label of two masks.

:func:`label_pairs` cuts two label maps into one pair per label, on the compiled path (:mod:`pipelines.metrics.packed`)
or on NumPy and SciPy (:class:`DensePair`); both give the same values. Everything is exact: Euclidean distances in mm
between the centres of voxels, or of the cells of 2 x 2 x 2 voxels whose codes Nikolov et al. 2018 (arXiv:1809.04430)
turn into areas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
from monai.metrics.utils import get_code_to_measure_table
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

from pipelines.metrics.jit import HAVE_NUMBA

LEAF_POINTS = 64
"""In a leaf of a k-d tree: far from a surface many leaves are nearly equally near, and few large ones are faster."""

Array = NDArray[np.float64]


class EdgeDistances(NamedTuple):
    """Distance in mm from every edge voxel of a mask to the nearest edge voxel of the other."""

    from_prediction: Array
    from_reference: Array


class CellDistances(NamedTuple):
    """Area in mm^2 (2D: length in mm) of every surface element, and its distance in mm to the other mask's surface."""

    area_prediction: Array
    from_prediction: Array
    area_reference: Array
    from_reference: Array


class Components(NamedTuple):
    """Connected components: size in voxels, and how many of them lie in the other mask."""

    sizes: NDArray[np.int64]
    covered: NDArray[np.int64]


class LabelPair(Protocol):
    """Prediction and reference of one label."""

    @property
    def n_prediction(self) -> int:
        """Voxels of the prediction."""

    @property
    def n_reference(self) -> int:
        """Voxels of the reference."""

    @property
    def n_both(self) -> int:
        """Voxels in both."""

    def edge_distances(self) -> EdgeDistances:
        """Edge voxels have a face neighbour (6 in 3D, 4 in 2D) outside the mask; beyond the image all is outside."""

    def cell_distances(self, spacing_mm: Sequence[float], bound_mm: float) -> CellDistances:
        """Cells of 2 x 2 x 2 voxels neither full nor empty; a distance above ``bound_mm`` may be infinite."""

    def boundary_overlap(self, width_mm: float) -> tuple[int, int]:
        """Voxels in both boundary bands, and in at least one. A band is the edge voxels and every voxel of the mask
        whose centre is within ``width_mm`` of the centre of a voxel outside."""

    def masks(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Prediction and reference in a joint box, in the order of the image's axes."""

    def components(self) -> tuple[Components, Components]:
        """Components of the reference and of the prediction; neighbours share a face, an edge or a corner."""


@dataclass(frozen=True)
class DensePair:
    """Prediction and reference of one label, bool, cut to their joint box: the path without compiled kernels."""

    prediction: NDArray[np.bool_]
    reference: NDArray[np.bool_]
    spacing_mm: tuple[float, ...]

    @property
    def n_prediction(self) -> int:
        """Voxels of the prediction."""
        return int(np.count_nonzero(self.prediction))

    @property
    def n_reference(self) -> int:
        """Voxels of the reference."""
        return int(np.count_nonzero(self.reference))

    @property
    def n_both(self) -> int:
        """Voxels in both masks."""
        return int(np.count_nonzero(self.prediction & self.reference))

    def edge_distances(self) -> EdgeDistances:
        """Distances in mm between the edge voxels of the two masks, in both directions."""
        prediction, reference = (np.argwhere(_edges(mask)) for mask in (self.prediction, self.reference))
        return EdgeDistances(self._nearest(prediction, reference), self._nearest(reference, prediction))

    def cell_distances(self, spacing_mm: Sequence[float], bound_mm: float) -> CellDistances:
        """Areas and distances of the surface cells; distances above ``bound_mm`` may be infinite."""
        areas = cell_areas(tuple(spacing_mm))
        codes = [_cell_codes(mask) for mask in (self.prediction, self.reference)]
        crossed = [(code > 0) & (code < len(areas) - 1) for code in codes]
        prediction, reference = (np.argwhere(cells) for cells in crossed)
        return CellDistances(
            areas[codes[0][crossed[0]]],
            self._nearest(prediction, reference, bound_mm),
            areas[codes[1][crossed[1]]],
            self._nearest(reference, prediction, bound_mm),
        )

    def boundary_overlap(self, width_mm: float) -> tuple[int, int]:
        """Voxels in both boundary bands, and in at least one."""
        bands = []
        for mask in (self.prediction, self.reference):
            inwards = ndimage.distance_transform_edt(np.pad(mask, 1), self.spacing_mm)[(slice(1, -1),) * mask.ndim]
            bands.append(mask & (within(inwards, width_mm) | _edges(mask)))
        return int(np.count_nonzero(bands[0] & bands[1])), int(np.count_nonzero(bands[0] | bands[1]))

    def masks(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Both masks in their joint box."""
        return self.prediction, self.reference

    def components(self) -> tuple[Components, Components]:
        """Components of the reference and of the prediction with their overlap."""
        return (
            covered_components(self.reference, self.prediction),
            covered_components(self.prediction, self.reference),
        )

    def _nearest(self, query: NDArray[np.int64], target: NDArray[np.int64], bound_mm: float = np.inf) -> Array:
        tree = cKDTree(target * np.array(self.spacing_mm), LEAF_POINTS)
        found: Array = tree.query(query * np.array(self.spacing_mm), distance_upper_bound=search_radius(bound_mm))[0]
        return found


def label_pairs(
    predictions: Sequence[NDArray[Any]],
    references: Sequence[NDArray[Any]],
    values: Sequence[Sequence[int]],
    keep: NDArray[np.bool_] | None,
    spacing_mm: Sequence[float],
    threads: int = 1,
) -> Sequence[LabelPair]:
    """Return one pair per label.

    Args:
        predictions: one label map (X, Y) or (X, Y, Z) of whole numbers, or several whose labels may overlap.
        references: as many, of the same shape.
        values: the labels of each map, not 0.
        keep: mask of the voxels that count, or None for all; the others are background in both maps.
        spacing_mm: voxel size along each axis, in mm.
        threads: that work at once on the compiled path.
    """
    if HAVE_NUMBA:
        from pipelines.metrics.packing import pack_pairs

        return pack_pairs(predictions, references, values, keep, spacing_mm, threads)
    return dense_pairs(predictions, references, values, keep, spacing_mm)


def dense_pairs(
    predictions: Sequence[NDArray[Any]],
    references: Sequence[NDArray[Any]],
    values: Sequence[Sequence[int]],
    keep: NDArray[np.bool_] | None,
    spacing_mm: Sequence[float],
) -> list[DensePair]:
    """Return what :func:`label_pairs` returns, on NumPy and SciPy alone."""
    pairs = []
    for prediction, reference, of_map in zip(predictions, references, values, strict=True):
        if keep is not None:
            prediction, reference = prediction * keep, reference * keep
        prediction, reference = crop_to_joint_box(prediction, reference)
        for value in of_map:
            masks = crop_to_joint_box(prediction == value, reference == value)
            pairs.append(DensePair(*masks, tuple(float(s) for s in spacing_mm)))
    return pairs


def crop_to_joint_box(first: NDArray[Any], second: NDArray[Any], margin: int = 1) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return views of both arrays on the box of their nonzero voxels plus ``margin``; no metric changes by it.

    Two empty arrays shrink to a single voxel.
    """
    occupied = (first != 0) | (second != 0)
    box = []
    for axis in range(occupied.ndim):
        others = tuple(a for a in range(occupied.ndim) if a != axis)
        hits = np.flatnonzero(occupied.any(axis=others))
        box.append(slice(max(hits[0] - margin, 0), hits[-1] + 1 + margin) if hits.size else slice(0, 1))
    return first[tuple(box)], second[tuple(box)]


def within(distances_mm: Array, tolerance_mm: float) -> NDArray[np.bool_]:
    """Return which distances are at most the tolerance, in single precision: 3 x 0.1 mm are within 0.3 mm."""
    return np.asarray(distances_mm, np.float32) <= np.float32(tolerance_mm)


def search_radius(bound_mm: float) -> float:
    """Return a radius in mm that surely holds all that is :func:`within` the bound."""
    return bound_mm * (1 + 1e-6) + 1e-9


@lru_cache(maxsize=64)
def cell_areas(spacing_mm: tuple[float, ...]) -> Array:
    """Return the area in mm^2 (2D: the length in mm) of the surface in a cell, by its code; MONAI's table."""
    table: Array = get_code_to_measure_table(spacing_mm)[0].numpy().astype(np.float64)
    return table


def covered_components(
    mask: NDArray[np.bool_], other: NDArray[np.bool_], connectivity: int | None = None
) -> Components:
    """Return the components of ``mask``; ``connectivity`` as in :func:`pipelines.metrics.lesions.lesion_detection`."""
    labelled, n = ndimage.label(mask, ndimage.generate_binary_structure(mask.ndim, connectivity or mask.ndim))
    sizes = np.bincount(labelled.ravel(), minlength=n + 1)[1:]
    return Components(sizes, np.bincount(labelled[other], minlength=n + 1)[1:])


def _edges(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return mask & ~ndimage.binary_erosion(mask)


def _cell_codes(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the code of every cell of the mask with a margin of one; 2^(2^dimensions) - 1 is full."""
    padded = np.pad(mask, 1).astype(np.int64)
    n = 2**mask.ndim
    codes = np.zeros(tuple(size - 1 for size in padded.shape), np.int64)
    for corner in range(n):
        offset = [(corner >> (mask.ndim - 1 - axis)) & 1 for axis in range(mask.ndim)]
        shifted = padded[tuple(slice(o, o + size) for o, size in zip(offset, codes.shape, strict=True))]
        codes += shifted << (n - 1 - corner)
    return codes
