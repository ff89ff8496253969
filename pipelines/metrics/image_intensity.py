"""Figures of merit that compare intensities voxel by voxel in regions: errors and mutual information."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.metrics.image_regions import Frame, ImagePair, codes_of, frame_of, region_means
from pipelines.metrics.jit import HAVE_NUMBA
from pipelines.metrics.threads import run, thread_count
from transforms.errors import UsageError

if HAVE_NUMBA:
    from pipelines.metrics import image_kernels

PSNR_CAP_DB = 100.0
"""PSNR of identical images, and of any pair that would exceed it: an RMSE of 1e-5 of the data range."""


def mean_errors(pair: ImagePair, threads: int | None = None) -> list[tuple[int, float, float]]:
    """Return, per region, the number of voxels, the mean absolute and the mean squared error (NaN without voxel)."""
    frame = frame_of(pair, (0, 0, 0), "exclude")
    n_threads = thread_count(threads)
    return region_means(pair, frame, lambda own, masks: _sum_errors(own, masks, n_threads))


def _sum_errors(frame: Frame, masks: Sequence[NDArray[Any]], threads: int) -> NDArray[np.float64]:
    """Return the sums of absolute and squared errors, (regions, 2)."""
    if not HAVE_NUMBA:
        difference = np.subtract(frame.image[frame.box()], frame.reference[frame.box()], dtype=np.float64)
        return np.array([(np.abs(difference[mask]).sum(), np.square(difference[mask]).sum()) for mask in masks])
    sums = np.zeros((masks[0].shape[0], len(masks), 2))
    shape, low, high = (np.array(values, np.int64) for values in (frame.image.shape, frame.low, frame.high))
    image, reference, codes = frame.image.reshape(-1), frame.reference.reshape(-1), codes_of(masks).reshape(-1)

    def work(start: int) -> None:
        image_kernels.error_planes(image, reference, shape, codes, low, high, start, threads, sums)

    run(work, range(threads), threads)
    return sums.sum(axis=0)


def psnr_from_nrmse(nrmse: float) -> float:
    """Return -20 log10(RMSE / R) = 10 log10(R^2 / MSE) in dB, at most ``PSNR_CAP_DB``."""
    return float(np.minimum(-20 * np.log10(nrmse), PSNR_CAP_DB)) if nrmse != 0 else PSNR_CAP_DB


def information(pair: ImagePair, bins: int) -> list[tuple[float, float]]:
    """Return mutual information in bits and its normalised form of each region (NaN where undefined).

    From the joint histogram of the region's voxels with ``bins`` bins of equal width between the smallest and the
    largest value of each image in the region: I = H(A) + H(B) - H(A, B), and (H(A) + H(B)) / H(A, B) (Studholme, Hill
    and Hawkes 1999, doi:10.1016/S0031-3203(98)00091-0), 1 for independent images, 2 for images that determine each
    other. Neither changes with the scale or the offset of an image. Two constant images share 0 bits and have no
    normalised value.

    Raises:
        UsageError: fewer than two bins.
    """
    if not isinstance(bins, (int, np.integer)) or bins < 2:
        raise UsageError(f"image quality: {bins} bins", "expected a whole number from 2", "64 is the default")
    frame = frame_of(pair, (0, 0, 0), "exclude")
    values = []
    for mask in pair.masks:
        own = None if frame is None else frame.own(mask)
        if frame is None or own is None or not own.any():
            values.append((np.nan, np.nan))
            continue
        places = [_bin(array[frame.box()][own], bins) for array in (frame.image, frame.reference)]
        joint = np.bincount(places[0] * bins + places[1], minlength=bins**2).reshape(bins, bins)
        marginal = _entropy_bits(joint.sum(axis=0)) + _entropy_bits(joint.sum(axis=1))
        both = _entropy_bits(joint)
        values.append((max(marginal - both, 0.0), marginal / both if both > 0 else np.nan))
    return values


def _bin(values: NDArray[Any], bins: int) -> NDArray[np.int64]:
    values = values.astype(np.float64)
    low, high = values.min(), values.max()
    if low == high:
        return np.zeros(values.size, np.int64)
    return np.minimum(((values - low) * (bins / (high - low))).astype(np.int64), bins - 1)


def _entropy_bits(counts: NDArray[np.int64]) -> float:
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum()) + 0.0
