"""Surfaces of two masks as triangles (2D: segments), and the distances between them: the definition "surface".

A mask says only which side of the surface the voxel centres are on. Taken literally its surface has steps, and a shift
of half a voxel is lost in them. Here the mask is smoothed just enough to level the steps, and never so far that a voxel
changes sides; then it is contoured (marching cubes), every triangle counts by its area, and distances go to the nearest
point of the other surface. ``benchmarks/metrics_segmentation.py`` compares it with analytic values.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree
from skimage.measure import find_contours, marching_cubes

from pipelines.metrics.distances import LEAF_POINTS, CellDistances
from pipelines.metrics.jit import HAVE_NUMBA
from pipelines.metrics.threads import run

if HAVE_NUMBA:
    from pipelines.metrics.surface_kernels import nearest_triangles

SIGMA = 0.8
"""Width of the smoothing in voxels, times the root of the ratio of the coarsest spacing to that of the axis."""

MARGIN = 0.05
"""The least by which a voxel stays on its side of the level 0.5."""

STRAIGHT = 5
"""Voxels over which both faces of an edge run straight for it to be an edge and not a step of a slanted surface."""

NEIGHBOURS = 16
"""Triangles, nearest by their centres, among which the nearest point is sought."""

Array = NDArray[np.float64]


def surface_distances(
    prediction: NDArray[np.bool_], reference: NDArray[np.bool_], spacing_mm: Sequence[float], threads: int = 1
) -> CellDistances:
    """Return area and distance to the other surface of every surface element, in both directions.

    Args:
        prediction: mask (X, Y) or (X, Y, Z) with at least one voxel; beyond the array is background.
        reference: mask of the same shape, with at least one voxel.
        spacing_mm: voxel size along each axis, in mm.
        threads: that work at once; there is work for two.

    Returns:
        Per element of the prediction and of the reference: area in mm^2 (2D: length in mm) and distance in mm from its
        centre.
    """
    first, second = run(lambda mask: surface_elements(mask, spacing_mm), (prediction, reference), threads)
    forth, back = run(lambda sides: _nearest(*sides), ((first, second), (second, first)), threads)
    return CellDistances(_areas(first), forth, _areas(second), back)


def surface_elements(mask: NDArray[np.bool_], spacing_mm: Sequence[float]) -> Array:
    """Return the surface of a mask: triangles (n, 3, 3), or in 2D segments (n, 2, 2); corners in mm.

    The origin is the same for all masks of one shape.
    """
    spacing = np.asarray(spacing_mm, float)
    level = smooth_level(mask, spacing)
    if mask.ndim == 3:
        vertices, faces, _, _ = marching_cubes(level, 0.5, allow_degenerate=False)
        corners: Array = vertices.astype(np.float64)[faces]
    else:
        lines = [np.stack([line[:-1], line[1:]], axis=1) for line in find_contours(level, 0.5)]
        corners = np.concatenate(lines)
    return corners * spacing


def smooth_level(mask: NDArray[np.bool_], spacing_mm: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return a smooth function, above 0.5 in every voxel of the mask and below in all others, on a padded grid.

    The kernel 2 G(sigma) - G(sqrt 2 sigma) has no second moment: a curved surface stays where it is. Where it would put
    a voxel on the wrong side, the structure is finer than the kernel, and the function goes back to the mask itself;
    so it does along straight edges, which are not steps.
    """
    sigma = SIGMA * np.sqrt(spacing_mm.max() / spacing_mm)
    padded = np.pad(mask, [(int(np.ceil(4 * s)) + 2,) * 2 for s in sigma])
    values = padded.astype(np.float32)
    smooth = 2 * ndimage.gaussian_filter(values, sigma) - ndimage.gaussian_filter(values, np.sqrt(2) * sigma)
    contradicted = ((smooth > 0.5) != padded).astype(np.float32)
    # About 1 in a contradicted voxel, 0.4 in its neighbours.
    literal = np.minimum(6 * ndimage.gaussian_filter(contradicted, 0.7), 1)
    edges = _straight_edges(padded)
    if edges.any():
        size = [2 * int(np.ceil(2 * s)) + 1 for s in sigma]
        literal = np.maximum(literal, ndimage.maximum_filter(edges.astype(np.float32), size=size))
    smooth += literal * (values - smooth)
    return np.where(padded, np.maximum(smooth, 0.5 + MARGIN), np.minimum(smooth, 0.5 - MARGIN))


def _straight_edges(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the voxels at edges whose two faces are straight along the axes, seen from inside or from outside."""
    found = np.zeros_like(mask)
    for side in (mask, ~mask):
        exposed = {(a, s): side & ~_neighbour(side, a, s) for a in range(mask.ndim) for s in (-1, 1)}
        for (a, s), (b, t) in itertools.combinations(exposed, 2):
            if a == b:
                continue
            edge = exposed[a, s] & exposed[b, t]
            if not edge.any():
                continue
            for step in range(1, STRAIGHT):
                edge &= _neighbour(exposed[a, s], b, -t * step) & _neighbour(exposed[b, t], a, -s * step)
            found |= edge
    return found


def _neighbour(mask: NDArray[np.bool_], axis: int, step: int) -> NDArray[np.bool_]:
    """Return the mask read ``step`` voxels further along an axis; beyond the array the value at its border."""
    moved = np.empty_like(mask)
    source, target = np.moveaxis(mask, axis, 0), np.moveaxis(moved, axis, 0)
    if step > 0:
        target[:-step], target[-step:] = source[step:], source[-1]
    else:
        target[-step:], target[:-step] = source[:step], source[0]
    return moved


def _areas(elements: Array) -> Array:
    edges = elements[:, 1:] - elements[:, :1]
    if elements.shape[1] == 2:
        length: Array = np.linalg.norm(edges[:, 0], axis=1)
        return length
    area: Array = np.linalg.norm(np.cross(edges[:, 0], edges[:, 1]), axis=1) / 2
    return area


def _nearest(query: Array, target: Array, chunk: int = 8192) -> Array:
    """Return the distance from the centre of every element of ``query`` to the nearest point of ``target``."""
    points = query.mean(axis=1)
    tree = cKDTree(target.mean(axis=1), LEAF_POINTS)
    distances = np.empty(len(points))
    for start in range(0, len(points), chunk):
        part = points[start : start + chunk]
        near = tree.query(part, k=np.arange(1, min(NEIGHBOURS, len(target)) + 1))[1]
        if HAVE_NUMBA and target.shape[-1] == 3:
            nearest_triangles(part, target, near, distances[start : start + chunk])
        else:
            distances[start : start + chunk] = _to_element(part[:, None], target[near]).min(axis=1)
    # An element of both surfaces is at distance 0, not at the rounding of its own centre.
    return np.where(distances < 1e-9, 0, distances)


def _to_element(points: Array, elements: Array) -> Array:
    """Return the distance from points (..., d) to segments (..., 2, d) or triangles (..., 3, d)."""
    corners = [elements[..., i, :] for i in range(elements.shape[-2])]
    sides = [(corners[0], corners[1])] if len(corners) == 2 else list(itertools.combinations(corners, 2))
    squared: Array = np.minimum.reduce([_to_segment(points, a, b) for a, b in sides])
    if len(corners) == 3:
        u, v, w = corners[1] - corners[0], corners[2] - corners[0], points - corners[0]
        uu, uv, vv, uw, vw = _dot(u, u), _dot(u, v), _dot(v, v), _dot(u, w), _dot(v, w)
        # Barycentric coordinates of the foot of the perpendicular, times the determinant.
        determinant = uu * vv - uv * uv
        s, t = vv * uw - uv * vw, uu * vw - uv * uw
        inside = (s > 0) & (t > 0) & (s + t < determinant)
        height = _dot(np.cross(u, v), w) ** 2 / np.where(inside, determinant, 1)
        squared = np.where(inside, height, squared)
    return np.sqrt(squared)


def _to_segment(points: Array, start: Array, end: Array) -> Array:
    along = end - start
    length2 = _dot(along, along)
    share = np.clip(_dot(points - start, along) / np.where(length2 > 0, length2, 1), 0, 1)
    gap = points - start - share[..., None] * along
    return _dot(gap, gap)


def _dot(a: Any, b: Any) -> Array:
    product: Array = np.einsum("...i,...i->...", a, b)
    return product
