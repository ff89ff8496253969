"""Surfaces of two masks as triangles (2D: segments), and the distances between them: the definition "surface".

A mask says only which side of the surface the voxel centres are on. Taken literally its surface has steps, and a shift
of half a voxel is lost in them. Here the mask is smoothed just enough to level the steps, and never so far that a voxel
changes sides; then it is contoured (marching cubes), and distances go to the nearest point of the other surface. Where
two straight faces meet, a mask does not say whether its edge is sharp or round: there the other surface is what either
leaves, whichever is nearer. ``benchmarks/metrics_segmentation.py`` compares all this with analytic values.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

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


class Surface(NamedTuple):
    """The surface of a mask, in mm from the centre of the image's first voxel.

    Attributes:
        vertices: (n, d); ``elements``: (m, d) vertices of each triangle, or in 2D of each segment.
        areas: (m,) of the elements, in mm^2 (2D: length in mm).
        targets: (k, d, d) corners of what the other surface's distances go to: the elements, and straight edges.
    """

    vertices: Array
    elements: NDArray[np.int64]
    areas: Array
    targets: Array

    def centres(self) -> Array:
        """Return the middle of every element, (m, d)."""
        middle: Array = self.vertices[self.elements].mean(axis=1)
        return middle


def surface_distances(
    prediction: NDArray[np.bool_], reference: NDArray[np.bool_], spacing_mm: Sequence[float], threads: int = 1
) -> CellDistances:
    """Return area and distance to the other surface of every point of a surface, in both directions.

    Args:
        prediction: mask (X, Y) or (X, Y, Z) with at least one voxel; beyond the array is background.
        reference: mask of the same shape, with at least one voxel.
        spacing_mm: voxel size along each axis, in mm.
        threads: that work at once; there is work for two.

    Returns:
        Of the prediction and of the reference: areas in mm^2 (2D: length in mm) and their distances in mm. An element
        counts as d equal parts, half way between its centre and its corners.
    """
    first, second = run(lambda mask: surface_of(mask, spacing_mm), (prediction, reference), threads)
    forth, back = run(lambda way: _distances(*way), ((first, second), (second, first)), threads)
    ndim = prediction.ndim
    return CellDistances(np.repeat(first.areas / ndim, ndim), forth, np.repeat(second.areas / ndim, ndim), back)


def _distances(surface: Surface, other: Surface) -> Array:
    """Return the distance of each part of each element, (m d,); a corner is measured once for all that meet there."""
    tree = cKDTree(other.targets.mean(axis=1), LEAF_POINTS)
    corners, centres = (_nearest(points, other.targets, tree) for points in (surface.vertices, surface.centres()))
    halves: Array = (corners[surface.elements] + centres[:, None]) / 2
    return halves.ravel()


def surface_of(mask: NDArray[np.bool_], spacing_mm: Sequence[float]) -> Surface:
    """Return the surface of a mask (X, Y) or (X, Y, Z) with at least one voxel."""
    spacing = np.asarray(spacing_mm, float)
    sigma = SIGMA * np.sqrt(spacing.max() / spacing)
    # The wider of the two kernels ends there; what lies farther apart, and the voxels beside it, never meets in one.
    reach = (4 * np.sqrt(2) * sigma + 0.5).astype(int) + 5
    parts = [_surface_of_island(island, start, sigma, spacing) for start, island in _islands(mask, reach)]
    counts = np.cumsum([0] + [len(part.vertices) for part in parts])
    return Surface(
        np.concatenate([part.vertices for part in parts]),
        np.concatenate([part.elements + before for part, before in zip(parts, counts, strict=False)]),
        np.concatenate([part.areas for part in parts]),
        np.concatenate([part.targets for part in parts]),
    )


def _islands(mask: NDArray[np.bool_], gap: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.bool_]]]:
    """Cut a mask into parts that are ``gap`` voxels or more from each other: first voxel of the box, and the part.

    A lesion here and one there would otherwise mean work and memory for all that lies between them.
    """
    padded = np.pad(mask, [(0, -n % g) for n, g in zip(mask.shape, gap, strict=True)])
    blocks = padded.reshape([m for n, g in zip(padded.shape, gap, strict=True) for m in (n // g, g)])
    labels, _ = ndimage.label(blocks.any(axis=tuple(range(1, 2 * mask.ndim, 2))), np.ones((3,) * mask.ndim))
    for label, box in enumerate(ndimage.find_objects(labels), 1):
        own = labels[box] == label
        for axis, g in enumerate(gap):
            own = np.repeat(own, g, axis)
        start = np.array([side.start for side in box]) * gap
        place = tuple(slice(first, first + n) for first, n in zip(start, own.shape, strict=True))
        yield start, padded[place] & own


def _surface_of_island(mask: NDArray[np.bool_], start: NDArray[np.int64], sigma: Array, spacing: Array) -> Surface:
    """Return the surface of a part of the image; ``start``: the part's first voxel."""
    margin = np.ceil(4 * sigma).astype(int) + 2
    padded = np.pad(mask, [(m, m) for m in margin])
    vertices, elements = _contour(smooth_level(padded, sigma), start - margin, spacing)
    targets = corners = vertices[elements]
    edges = _straight_edges(padded)
    if edges.any():
        size = [2 * int(np.ceil(2 * s)) + 1 for s in sigma]
        near = ndimage.maximum_filter(edges, size=size)
        literal, sharp = _contour(padded.astype(np.float32), start - margin, spacing, near)
        targets = np.concatenate([corners, literal[sharp]])
    return Surface(vertices, elements, _areas(corners), targets)


def smooth_level(mask: NDArray[np.bool_], sigma: Sequence[float] | Array) -> NDArray[np.float32]:
    """Return a smooth function, above 0.5 in every voxel of the mask and below in all others.

    The kernel 2 G(sigma) - G(sqrt 2 sigma) has no second moment: a curved surface stays where it is. Where it would put
    a voxel on the wrong side, the structure is finer than the kernel, and the function goes back to the mask itself.
    ``sigma``: in voxels, along each axis.
    """
    values = mask.astype(np.float32)
    smooth = 2 * ndimage.gaussian_filter(values, sigma) - ndimage.gaussian_filter(values, np.sqrt(2) * np.array(sigma))
    contradicted = ((smooth > 0.5) != mask).astype(np.float32)
    # About 1 in a contradicted voxel, 0.4 in its neighbours.
    literal = np.minimum(6 * ndimage.gaussian_filter(contradicted, 0.7), 1)
    smooth += literal * (values - smooth)
    return np.where(mask, np.maximum(smooth, 0.5 + MARGIN), np.minimum(smooth, 0.5 - MARGIN))


def _contour(
    level: NDArray[np.float32], start: NDArray[np.int64], spacing: Array, where: NDArray[np.bool_] | None = None
) -> tuple[Array, NDArray[np.int64]]:
    """Return where the level is 0.5: vertices (n, d) in mm, and elements (m, d) of d vertices each.

    ``start``: the first voxel of ``level`` in the image.
    """
    if level.ndim == 3:
        vertices, elements, _, _ = marching_cubes(level, 0.5, allow_degenerate=False, mask=where)
    else:
        lines = find_contours(level, 0.5, mask=where)
        last = np.cumsum([len(line) for line in lines]) - 1
        starts = np.setdiff1d(np.arange(last[-1]), last)
        vertices, elements = np.concatenate(lines), np.stack([starts, starts + 1], axis=1)
    return (vertices.astype(np.float64) + start) * spacing, elements.astype(np.int64)


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


def _nearest(points: Array, target: Array, tree: cKDTree, chunk: int = 8192) -> Array:
    """Return the distance from every one of ``points`` (n, d) to ``target`` (m, d, d), whose centres ``tree`` has."""
    distances = np.empty(len(points))
    for start in range(0, len(points), chunk):
        part = points[start : start + chunk]
        near = tree.query(part, k=np.arange(1, min(NEIGHBOURS, len(target)) + 1))[1]
        if HAVE_NUMBA and target.shape[-1] == 3:
            nearest_triangles(part, target, near, distances[start : start + chunk])
        else:
            distances[start : start + chunk] = _to_element(part[:, None], target[near]).min(axis=1)
    # A point of both surfaces is at distance 0, not at the rounding of its own place.
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
