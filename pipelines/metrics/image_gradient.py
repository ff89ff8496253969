"""Gradient magnitude similarity in regions of interest.

The local measure of Xue et al. 2014 (doi:10.1109/TIP.2013.2293423): the gradient term of FSIM, without its phase
congruency. The published index GMSD halves the resolution first; here the images keep theirs, so that a region keeps
its voxels: the values are not those of GMSD.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pipelines.metrics.image_regions import ImagePair, frame_of

STABILITY = 170 / 255**2  # the published 170 of 8-bit images, for a data range of 1
_SLAB = 8  # planes at a time: no intermediate volume


def gradient_similarity(
    pair: ImagePair, data_range: float, border: str, in_mm: bool = False
) -> list[tuple[int, float, float]]:
    """Return, per region, the number of voxels averaged over, and mean and standard deviation of the local similarity.

    Similarity is (2 gx gy + c) / (gx^2 + gy^2 + c), with c = 170 / 255^2 R^2 and g the length of the gradient by the
    Prewitt operator: the difference of the two neighbours, averaged over three lines side by side (nine in 3D).
    Identical images have mean 1 and deviation 0; NaN without voxel. An axis with fewer than three voxels has no
    gradient and is not averaged over.

    Args:
        pair: the images.
        data_range: width of the range that the intensities can take.
        border: as for :func:`pipelines.metrics.image_regions.frame_of`.
        in_mm: divide the component along an axis by its voxel size, in units of the smallest one: a gradient per mm.
            Otherwise per voxel.
    """
    axes = [axis for axis, n in enumerate(pair.shape) if n >= 3]
    margin = [int(axis in axes) for axis in range(3)]
    frame = frame_of(pair, margin, border)
    steps = [1.0] * 3
    if in_mm and pair.spacing_mm is not None and axes:
        steps = [s / min(pair.spacing_mm[axis] for axis in axes) for s in pair.spacing_mm]
    n, loss, squares = (np.zeros(len(pair.masks)) for _ in range(3))
    if frame is not None:
        masks = [frame.own(mask) for mask in pair.masks]
        images = [array[frame.box(margin)] for array in (frame.image, frame.reference)]
        c = STABILITY * data_range**2
        for start in range(0, masks[0].shape[0], _SLAB):
            stop = min(start + _SLAB, masks[0].shape[0])
            gx, gy = (
                _gradient_squared(image[start : stop + 2 * margin[0]].astype(np.float64), axes, steps)
                for image in images
            )
            # 1 - similarity: its square keeps the digits that 1 would take.
            lost = (np.sqrt(gx) - np.sqrt(gy)) ** 2 / (gx + gy + c)
            for region, mask in enumerate(masks):
                own = lost[mask[start:stop]]
                n[region] += own.size
                loss[region] += own.sum()
                squares[region] += (own * own).sum()
    results = []
    for count, total, square in zip(n, loss, squares, strict=True):
        mean = total / count if count else np.nan
        spread = np.sqrt(max(square / count - mean**2, 0)) if count else np.nan
        results.append((int(count), 1 - mean, float(spread)))
    return results


def _gradient_squared(image: NDArray[np.float64], axes: Sequence[int], steps: Sequence[float]) -> NDArray[np.float64]:
    """Return the squared length of the Prewitt gradient where the operator lies within ``image``."""
    inner = tuple(slice(1, -1) if axis in axes else slice(None) for axis in range(image.ndim))
    squared = np.zeros(image[inner].shape)
    for along in axes:
        component = image
        for axis in axes:
            weights = [-1 / steps[axis], 0, 1 / steps[axis]] if axis == along else [1 / 3, 1 / 3, 1 / 3]
            component = ndimage.correlate1d(component, weights, axis=axis)
        squared += component[inner] ** 2
    return squared
