"""Two label maps as one bit per voxel: the compiled path of the segmentation metrics.

Each map is read once. Counts, boxes, edges, surface cells, components and nearest neighbours then come from the words
of :mod:`pipelines.metrics.kernels`, inside the joint box of a label. Nearest neighbours are exact: rows in order of
their distance with an early stop, and a k-d tree for the few voxels (outliers) that the rows do not decide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from pipelines.metrics import kernels, kernels_search
from pipelines.metrics.distances import (
    LEAF_POINTS,
    CellDistances,
    Components,
    EdgeDistances,
    cell_areas,
    crop_to_joint_box,
    search_radius,
    within,
)
from pipelines.metrics.threads import run

N_ROWS = 192
"""Rows searched around a voxel before the k-d tree takes over: a radius of 8 voxels where they are square."""

SLAB_VOXELS = 8_192
"""Edge voxels in a piece of a search, about: large beside the start of a task, small beside the search of a label."""

Bits = NDArray[np.uint64]
Marked = tuple[Bits, NDArray[np.int64]]
"""Voxels of a box that a search begins or ends at, and their number per plane."""

T = TypeVar("T")


@dataclass(frozen=True)
class PackedPair:
    """Prediction and reference of one label in their joint box, packed (Z, Y, W); axes in the order of memory.

    The interface is that of :class:`pipelines.metrics.distances.DensePair`.
    """

    prediction: Bits
    reference: Bits
    n_prediction: int
    n_reference: int
    spacing_mm: tuple[float, float, float]
    axes: tuple[int, ...]
    threads: int

    @property
    def n_both(self) -> int:
        """Voxels in both masks."""
        return int(kernels.count_common(self.prediction, self.reference)[0])

    def edge_distances(self) -> EdgeDistances:
        """Distances in mm between the edge voxels of the two masks, in both directions."""
        edges = self._of_both(lambda mask: kernels.edges(mask, self._planes, False))
        return EdgeDistances(*self._both_ways(edges[0], edges[1]))

    def cell_distances(self, spacing_mm: Sequence[float], bound_mm: float) -> CellDistances:
        """Areas and distances of the surface cells; distances above ``bound_mm`` may be infinite."""
        weights = self._corner_weights()
        areas = cell_areas(tuple(spacing_mm))
        found = self._of_both(lambda mask: kernels.cells(mask, self._planes, weights))
        forth, back = self._both_ways(found[0][:2], found[1][:2], bound_mm)
        return CellDistances(areas[found[0][2]], forth, areas[found[1][2]], back)

    def boundary_overlap(self, width_mm: float) -> tuple[int, int]:
        """Voxels in both boundary bands, and in at least one."""
        dz, dy, reach = _ball(self.spacing_mm, width_mm, self._planes)

        def band_of(mask: Bits) -> Bits:
            band: Bits = kernels.edges(mask, self._planes, False)[0]
            if len(reach):
                centres = kernels.edges(mask, self._planes, True)[0]
                band |= kernels.paint_balls(centres, mask, dz, dy, reach)
            return band

        both, either = kernels.count_common(*self._of_both(band_of))
        return int(both), int(either)

    def masks(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Both masks as bool arrays in the order of the image's axes, in their joint box."""
        unpacked = [
            np.unpackbits(bits.view(np.uint8), axis=-1, bitorder="little").view(bool)
            for bits in (self.prediction, self.reference)
        ]
        if not self._planes:
            unpacked = [mask[1] for mask in unpacked]
        first, second = crop_to_joint_box(unpacked[0], unpacked[1], margin=0)
        return first.transpose(self.axes), second.transpose(self.axes)

    def components(self) -> tuple[Components, Components]:
        """Components of the reference and of the prediction with their overlap."""
        sides = [(self.reference, self.prediction), (self.prediction, self.reference)]
        found = run(lambda masks: kernels_search.components(*masks, self._planes), sides, self.threads)
        return Components(*found[0]), Components(*found[1])

    def _of_both(self, task: Callable[[Bits], T]) -> list[T]:
        return run(task, (self.prediction, self.reference), self.threads)

    @property
    def _planes(self) -> bool:
        return len(self.axes) == 3

    def _corner_weights(self) -> NDArray[np.int64]:
        """Weight of each corner of a cell in memory order, so that codes do not depend on the order of the axes."""
        ndim = len(self.axes)
        in_image_order = 2 ** np.arange(2**ndim)[::-1].reshape((2,) * ndim)
        return np.ascontiguousarray(in_image_order.transpose(self.axes)).ravel()

    def _both_ways(self, first: Marked, second: Marked, bound_mm: float = np.inf) -> list[NDArray[np.float64]]:
        ways = ((first, second), (second, first))
        return run(lambda way: self._distances(*way, bound_mm), ways, self.threads)

    def _distances(self, query: Marked, target: Marked, bound_mm: float) -> NDArray[np.float64]:
        bits, counts = query
        begins = np.concatenate([[0], np.cumsum(counts)])
        squared = np.empty(begins[-1])
        dz, dy, row_mm2 = _rows_by_distance(self.spacing_mm[:2], self._planes)
        extent = [n * s for n, s in zip(bits.shape[:2], self.spacing_mm[:2], strict=True)]
        if np.hypot(*extent) ** 2 <= row_mm2[-1]:
            row_mm2 = np.append(row_mm2[:-1], np.inf)
        bound, step_mm = search_radius(bound_mm) ** 2, np.array(self.spacing_mm)
        # Slabs with about as many voxels each. Their number must not depend on the threads: no value may.
        n_slabs = -(-squared.size // SLAB_VOXELS)
        cuts = np.unique(np.searchsorted(begins, np.linspace(0, begins[-1], n_slabs + 1)))
        cuts[0], cuts[-1] = 0, len(counts)

        def search(slab: tuple[int, int]) -> None:
            out = squared[begins[slab[0]] : begins[slab[1]]]
            kernels_search.nearest_squared(bits, target[0], dz, dy, row_mm2, step_mm, bound, *slab, out)

        run(search, pairwise(cuts.tolist()), self.threads)
        undecided = np.flatnonzero(squared < 0)
        distances = np.sqrt(np.maximum(squared, 0))
        if undecided.size:
            places = kernels.coordinates(bits, begins[-1])[undecided] * step_mm
            tree = cKDTree(kernels.coordinates(target[0], target[1].sum()) * step_mm, LEAF_POINTS)
            parts = np.array_split(places, -(-len(places) // SLAB_VOXELS))
            radius = search_radius(bound_mm)
            found = run(lambda part: tree.query(part, distance_upper_bound=radius)[0], parts, self.threads)
            distances[undecided] = np.concatenate(found)
        return distances


@lru_cache(maxsize=64)
def _rows_by_distance(
    spacing_mm: tuple[float, float], planes: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Return offsets (dz, dy) and squared distances of rows, nearest first, and last a mark how far they reach."""
    sz, sy = spacing_mm
    radius = np.sqrt(N_ROWS * sz * sy / np.pi) if planes else N_ROWS / 2 * sy
    reach = [int(radius / sz) if planes else 0, int(radius / sy)]
    dz, dy = np.meshgrid(*(np.arange(-n, n + 1) for n in reach), indexing="ij")
    squared = ((dz * sz) ** 2 + (dy * sy) ** 2).ravel()
    order = np.argsort(squared, kind="stable")
    order = order[squared[order] <= radius * radius]
    return (
        np.append(dz.ravel()[order], 0),
        np.append(dy.ravel()[order], 0),
        np.append(squared[order], radius * radius),
    )


def _ball(spacing_mm: tuple[float, float, float], width_mm: float, planes: bool) -> tuple[NDArray[np.int64], ...]:
    """Return the rows (dz, dy) of a ball and how many voxels they reach to either side of its centre."""
    sz, sy, sx = spacing_mm
    nz, ny, nx = (int(search_radius(width_mm) / s) for s in spacing_mm)
    nz = nz if planes else 0
    dz, dy, dx = np.meshgrid(np.arange(-nz, nz + 1), np.arange(-ny, ny + 1), np.arange(nx + 1), indexing="ij")
    inside = within(np.sqrt((dz * sz) ** 2 + (dy * sy) ** 2 + (dx * sx) ** 2), width_mm)
    far = inside.sum(axis=2) - 1
    some = far >= 0
    return dz[..., 0][some], dy[..., 0][some], far[some]
