"""Structural similarity (SSIM) and its multi-scale form in regions of interest.

The local map belongs to the whole image: a window at the rim of a region sees the voxels beyond it. The map is then
averaged over the region; what is not needed for that is not computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pipelines.metrics.image_regions import Frame, ImagePair, codes_of, frame_of, region_means
from pipelines.metrics.jit import HAVE_NUMBA
from pipelines.metrics.threads import run, thread_count
from transforms.errors import UsageError

if HAVE_NUMBA:
    from pipelines.metrics import image_kernels

K1, K2 = 0.01, 0.03
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
_SLAB = 32


@dataclass(frozen=True)
class Window:
    """The window of SSIM, by default that of Wang et al. 2004: a Gaussian of 11 voxels with a sigma of 1.5 voxels.

    Args:
        kind: "gaussian" or "uniform" (every voxel weighs the same, ``sigma`` is not used).
        size: length along every axis, in ``unit``; an odd number of voxels. In mm the window holds the voxels whose
            centre is at most half of it away.
        sigma: standard deviation, in ``unit``.
        unit: "voxel", as published, whatever the spacing; "mm" gives anisotropic images a window that is round in the
            body.

    Along an axis with fewer voxels than the window, the window is cut to the longest odd length that fits, and its
    weights again add up to 1: a single slice gets the SSIM of the 2D image.
    """

    kind: Literal["gaussian", "uniform"] = "gaussian"
    size: float = 11
    sigma: float = 1.5
    unit: Literal["voxel", "mm"] = "voxel"

    def __post_init__(self) -> None:
        odd = self.unit == "mm" or self.size % 2 == 1
        lengths = np.isfinite([self.size, self.sigma]).all() and self.size > 0 and self.sigma > 0
        if self.kind not in ("gaussian", "uniform") or self.unit not in ("voxel", "mm") or not (odd and lengths):
            raise UsageError(
                f"image quality: {self}",
                "expected kind gaussian or uniform, unit voxel or mm, size (odd in voxels) and sigma above 0",
                "correct the window",
            )


def window_weights(
    window: Window, shape: Sequence[int], spacing_mm: Sequence[float] | None
) -> list[NDArray[np.float64]]:
    """Return the weights along each axis of an image of ``shape``; odd lengths, each adding up to 1.

    Raises:
        UsageError: a window in mm without a spacing.
    """
    if window.unit == "mm" and spacing_mm is None:
        raise UsageError(
            "image quality: a window in mm needs the spacing", "spacing_mm is None", "pass spacing_mm, from the affine"
        )
    steps = spacing_mm if window.unit == "mm" and spacing_mm is not None else (1.0,) * len(shape)
    weights = []
    for n, step in zip(shape, steps, strict=True):
        half = min(int(window.size / step / 2), (n - 1) // 2)
        offsets = step * np.arange(-half, half + 1)
        raw = np.exp(-0.5 * (offsets / window.sigma) ** 2) if window.kind == "gaussian" else np.ones(offsets.size)
        weights.append(raw / raw.sum())
    return weights


def ssim_means(
    pair: ImagePair, data_range: float, window: Window, border: str, threads: int | None = None
) -> list[tuple[int, float, float]]:
    """Return, per region, the number of voxels averaged over, mean SSIM and mean contrast-structure (NaN without one).

    SSIM is (2 mx my + C1)(2 sxy + C2) / ((mx^2 + my^2 + C1)(sxx + syy + C2)) with weighted means m and covariances s,
    C1 = (0.01 R)^2, C2 = (0.03 R)^2 (Wang et al. 2004, doi:10.1109/TIP.2003.819861, eq. 13); contrast-structure is its
    second factor.
    """
    weights = window_weights(window, pair.shape, pair.spacing_mm)
    frame = frame_of(pair, [len(w) // 2 for w in weights], border)
    return region_means(pair, frame, lambda own, masks: _sum_ssim(own, weights, data_range, masks, threads))


def ssim_local(
    pair: ImagePair, data_range: float, window: Window, border: str, threads: int | None = None
) -> tuple[Frame, NDArray[np.float64]] | None:
    """Return the box of all regions and the maps (2, Z, Y, X) of SSIM and contrast-structure in it.

    Only voxels of a region have defined values. None where no voxel is left.
    """
    weights = window_weights(window, pair.shape, pair.spacing_mm)
    frame = frame_of(pair, [len(w) // 2 for w in weights], border)
    if frame is None:
        return None
    wanted = np.logical_or.reduce([frame.own(mask) != 0 for mask in pair.masks])
    maps = np.empty((2, *wanted.shape))
    _sum_ssim(frame, weights, data_range, [wanted], threads, maps)
    return frame, maps


def ms_ssim_means(
    pair: ImagePair,
    data_range: float,
    window: Window,
    border: str,
    scale_weights: Sequence[float] = SCALE_WEIGHTS,
    threads: int | None = None,
    finest: list[tuple[int, float, float]] | None = None,
) -> list[float]:
    """Return MS-SSIM of each region (NaN where a scale has no voxel to average over).

    The product over the scales of (mean contrast-structure)^weight, with mean SSIM at the coarsest one (Wang,
    Simoncelli and Bovik 2003, doi:10.1109/ACSSC.2003.1292216, eq. 7); a negative mean counts as 0. From scale to scale,
    pairs of voxels are averaged along each axis that has two. A region becomes the share of each coarse voxel that it
    fills, and weighs the map. ``finest``: what :func:`ssim_means` returned for the same arguments, where it is known.
    """
    rows = finest or ssim_means(pair, data_range, window, border, threads)
    means = np.array([row[1:] for row in rows])
    product = np.ones(len(pair.masks))
    for scale, exponent in enumerate(scale_weights):
        if scale:
            pair = _halved(pair)
            means = _weighted_means(pair, data_range, window, border, threads)
        last = scale == len(scale_weights) - 1
        product *= np.maximum(means[:, 0 if last else 1], 0) ** exponent
    return [float(value) for value in product]


def _weighted_means(
    pair: ImagePair, data_range: float, window: Window, border: str, threads: int | None
) -> NDArray[np.float64]:
    """Return means (regions, 2) of SSIM and contrast-structure, weighted by masks of any values from 0."""
    local = ssim_local(pair, data_range, window, border, threads)
    means = np.full((len(pair.masks), 2), np.nan)
    if local is not None:
        frame, maps = local
        for region, mask in enumerate(pair.masks):
            share = frame.own(mask)
            chosen = share != 0
            if chosen.any():
                means[region] = [np.average(values[chosen], weights=share[chosen]) for values in maps]
    return means


def _halved(pair: ImagePair) -> ImagePair:
    spacing = pair.spacing_mm and tuple(
        s * (2 if n > 1 else 1) for s, n in zip(pair.spacing_mm, pair.shape, strict=True)
    )
    masks = tuple(None if mask is None else _averaged(mask) for mask in pair.masks)
    return replace(
        pair, image=_averaged(pair.image), reference=_averaged(pair.reference), masks=masks, spacing_mm=spacing
    )


def _averaged(array: NDArray[Any]) -> NDArray[np.float64]:
    """Average neighbours in pairs along each axis with two voxels or more; a last odd one is left out."""
    for axis in range(array.ndim):
        n = array.shape[axis] // 2 * 2
        if n:
            lead = (slice(None),) * axis
            array = np.add(array[(*lead, slice(0, n, 2))], array[(*lead, slice(1, n, 2))], dtype=np.float64) / 2
    return np.ascontiguousarray(array, np.float64)


def _sum_ssim(
    frame: Frame,
    weights: Sequence[NDArray[np.float64]],
    data_range: float,
    masks: Sequence[NDArray[Any]],
    threads: int | None,
    maps: NDArray[np.float64] | None = None,
) -> NDArray[np.float64]:
    """Return sums (regions, 2) of SSIM and contrast-structure; ``maps`` (2, Z, Y, X) receives both."""
    constants, threads = ((K1 * data_range) ** 2, (K2 * data_range) ** 2), thread_count(threads)
    if HAVE_NUMBA and max(map(len, weights)) <= 2 * image_kernels.HALF + 1:
        return _compiled_ssim(frame, weights, constants, masks, threads, maps)
    return _filtered_ssim(frame, weights, constants, masks, maps)


def _compiled_ssim(
    frame: Frame,
    weights: Sequence[NDArray[np.float64]],
    constants: tuple[float, float],
    masks: Sequence[NDArray[Any]],
    threads: int,
    maps: NDArray[np.float64] | None,
) -> NDArray[np.float64]:
    shape = masks[0].shape
    half = np.zeros((3, image_kernels.HALF + 1))
    for axis, w in enumerate(weights):
        half[axis, image_kernels.HALF - len(w) // 2 :] = w[: len(w) // 2 + 1]
    tiles = -(-shape[1] // image_kernels.STRIP) * -(-shape[2] // image_kernels.TILE)
    sums = np.zeros((tiles, len(masks), 2))
    flat = np.empty((2, 0)) if maps is None else maps.reshape(2, -1)
    full, low, high = (np.array(values, np.int64) for values in (frame.image.shape, frame.low, frame.high))
    image, reference, codes = frame.image.reshape(-1), frame.reference.reshape(-1), codes_of(masks).reshape(-1)

    def work(start: int) -> None:
        image_kernels.ssim_tiles(image, reference, full, codes, low, high, half, *constants, start, threads, sums, flat)

    run(work, range(threads), threads)
    return sums.sum(axis=0)


def _filtered_ssim(
    frame: Frame,
    weights: Sequence[NDArray[np.float64]],
    constants: tuple[float, float],
    masks: Sequence[NDArray[Any]],
    maps: NDArray[np.float64] | None,
) -> NDArray[np.float64]:
    """The same in SciPy, for windows of any length; a slab of planes at a time, for memory."""
    sums = np.zeros((len(masks), 2))
    margin = [len(w) // 2 for w in weights]
    x, y = (array[frame.box(margin)] for array in (frame.image, frame.reference))
    for start in range(0, len(masks[0]), _SLAB):
        planes = slice(start, start + _SLAB)
        halo = slice(start, start + _SLAB + 2 * margin[0])
        local = _filtered_slab(x[halo].astype(np.float64), y[halo].astype(np.float64), weights, constants)
        sums += [[values[mask[planes]].sum() for values in local] for mask in masks]
        if maps is not None:
            maps[:, planes] = local
    return sums


def _filtered_slab(
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    weights: Sequence[NDArray[np.float64]],
    constants: tuple[float, float],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return SSIM and contrast-structure where the window lies within the slab."""
    inner = tuple(slice(len(w) // 2, n - len(w) // 2) for w, n in zip(weights, x.shape, strict=True))

    def local_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
        for axis, w in enumerate(weights):
            values = ndimage.correlate1d(values, w, axis=axis)
        return values[inner]

    c1, c2 = constants
    mean_x, mean_y = local_mean(x), local_mean(y)
    product, squares = mean_x * mean_y, mean_x**2 + mean_y**2
    structure = (2 * (local_mean(x * y) - product) + c2) / (local_mean(x * x + y * y) - squares + c2)
    return structure * (2 * product + c1) / (squares + c1), structure
