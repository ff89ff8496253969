"""A tilted or unevenly spaced stack on a regular grid, and back: every slice is taken from where it truly lies.

Only where a user allows it: interpolation is not what was measured. Pixels keep their size and direction; slices get
the distance that most of them have. On the way back a pixel takes the value of the voxel nearest to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pipelines.dicom.geometry import Plane, axes, lps_affine
from transforms.ingest_budget import Budget, check_declared

FINEST_STEP = 0.25  # of the mean gap: a resampled stack has at most four times as many slices


def on_regular_grid(
    stack: NDArray[np.float32], planes: Sequence[Plane]
) -> tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.float64]]:
    """Interpolate ordered parallel slices on a grid along their normal; pixels keep their size and direction.

    The slice distance is the most frequent gap, the smaller where two are equally frequent. Between two slices, both
    are shifted in their plane to where they truly lie (linear interpolation) and mixed by their distances.

    Returns:
        Voxels (columns, rows, slices), the affine (RAS), and the indices of the source slices' first pixels in it.
    """
    across, down, normal = axes(planes)
    row_distance, column_distance = planes[0].spacing
    positions = np.array([plane.position for plane in planes])
    offsets = (positions - positions[0]) @ np.column_stack([across / column_distance, down / row_distance, normal])
    low = np.floor(offsets[:, :2].min(axis=0) + 1e-6)
    high = np.ceil(offsets[:, :2].max(axis=0) - 1e-6)
    columns, rows = planes[0].columns + int(high[0] - low[0]), planes[0].rows + int(high[1] - low[1])
    gaps = np.diff(offsets[:, 2])
    distances, counts = np.unique(gaps.round(3), return_counts=True)
    usual = float(distances[counts.argmax()])
    span = float(offsets[-1, 2])
    usual = max(usual, FINEST_STEP * span / len(planes))
    depth = math.floor(span / usual + 1e-6) + 1
    check_declared((columns, rows, depth), 4, "the resampled volume", Budget.of_environment())
    fill = float(stack.min())
    shifted: dict[int, NDArray[np.float32]] = {}

    def placed(index: int) -> NDArray[np.float32]:
        if index not in shifted:
            shifted.clear() if len(shifted) > 2 else None
            frame = np.full((rows, columns), fill, np.float32)
            frame[: stack.shape[1], : stack.shape[2]] = stack[index]
            shift = (offsets[index, 1] - low[1], offsets[index, 0] - low[0])
            shifted[index] = ndimage.shift(frame, shift, order=1, mode="constant", cval=fill)
        return shifted[index]

    voxels = np.empty((columns, rows, depth), np.float32)
    for number in range(depth):
        along = number * usual
        upper = int(np.clip(np.searchsorted(offsets[:, 2], along), 1, len(planes) - 1))
        weight = float(np.clip((along - offsets[upper - 1, 2]) / gaps[upper - 1], 0, 1))
        voxels[:, :, number] = ((1 - weight) * placed(upper - 1) + weight * placed(upper)).T
    origin = positions[0] + low[0] * column_distance * across + low[1] * row_distance * down
    affine = lps_affine(across * column_distance, down * row_distance, normal * usual, origin)
    starts = np.column_stack([offsets[:, 0] - low[0], offsets[:, 1] - low[1], offsets[:, 2] / usual])
    return voxels, affine, starts


def nearest_in_slice(labels: NDArray[Any], start: NDArray[np.float64], columns: int, rows: int) -> NDArray[Any]:
    """Return (columns, rows) of a volume at a slice that begins at the index ``start``, nearest neighbour."""
    x = np.rint(start[0] + np.arange(columns)).astype(int)
    y = np.rint(start[1] + np.arange(rows)).astype(int)
    z = min(int(np.rint(start[2])), labels.shape[2] - 1)
    inside = np.ix_((x >= 0) & (x < labels.shape[0]), (y >= 0) & (y < labels.shape[1]))
    result = np.zeros((columns, rows), labels.dtype)
    result[inside] = labels[:, :, z][np.ix_(x[inside[0].ravel()], y[inside[1].ravel()])]
    return result
