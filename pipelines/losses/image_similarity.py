"""SSIM as a loss: the local map of the metric, differentiable, and its mean over a region.

The map is not clamped, so that the gradient is alive where the images are anticorrelated. Means and variances are
double precision, whatever autocast says: a variance is a difference of squares, of which half precision keeps nothing,
nor does the ten-bit arithmetic (TF32) with which many GPU installations multiply float32 matrices.
"""

from __future__ import annotations

from functools import cache

import torch
from monai.utils import convert_to_tensor

from pipelines.losses.processes import summed_over_processes
from transforms.errors import BundleError

WINDOW_SIZE = 11
WINDOW_SIGMA = 1.5
K1, K2 = 0.01, 0.03


def ssim_map(x: torch.Tensor, y: torch.Tensor, data_range: float) -> torch.Tensor:
    """Return the local SSIM of two images, in [-1, 1], with gradient to both.

    Wang et al., Image quality assessment, IEEE TIP 13(4), 2004, eq. 13, with a Gaussian window of 11 voxels and a
    sigma of 1.5 voxels along every axis. Along an axis with fewer voxels than the window, the window is cut to the
    longest odd length that fits; one slice has the SSIM of the 2D image. The image is mirrored at its faces
    (d c b a | a b c d), so that every voxel has a value: the map of :func:`pipelines.metrics.ssim_map` with the border
    "reflect", and within five voxels of no face that with the border "exclude".

    Args:
        x, y: (B, C, *spatial), any floating dtype; intensities in one unit.
        data_range: width of the range that the intensities can take, in their unit.

    Returns:
        (B, C, *spatial) float32.

    Raises:
        BundleError: the shapes differ, or the range is not positive.
    """
    if x.shape != y.shape or not data_range > 0:
        raise BundleError(
            f"SSIM of {tuple(x.shape)} and {tuple(y.shape)} with data range {data_range}",
            "expected one shape and a positive range",
            "give both images on one grid, and the width of the range of their intensities",
        )
    with torch.autocast(x.device.type, enabled=False):
        a, b = (convert_to_tensor(image).double() / data_range for image in (x, y))
        mean_a, mean_b, square_a, square_b, product = _smooth(torch.stack([a, b, a * a, b * b, a * b])).unbind()
        variances = square_a - mean_a**2 + square_b - mean_b**2
        structure = (2 * (product - mean_a * mean_b) + K2**2) / (variances + K2**2)
        return (structure * (2 * mean_a * mean_b + K1**2) / (mean_a**2 + mean_b**2 + K1**2)).float()


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the mean over the voxels of ``mask`` in the whole batch (of all processes); 0, zero gradient, if none.

    Each voxel counts the same, so a sample whose mask is empty does not count, and one that shows only a corner of the
    region does not outweigh the others. A value that is not finite makes the mean so, even outside of the mask: it is
    a defect of the data, and must not be hidden.

    Args:
        values, mask: one shape; the mask holds 0 and 1.
    """
    inside = mask.float()
    total, count = summed_over_processes(torch.stack([(values * inside).sum(), inside.sum()])).unbind()
    return total / count.clamp(min=1)


def _smooth(images: torch.Tensor) -> torch.Tensor:
    """Return (..., B, C, *spatial) smoothed along each spatial axis."""
    for axis in range(3, images.ndim):
        matrix = _window_matrix(images.shape[axis]).to(images.device)
        images = (images.movedim(axis, -1) @ matrix).movedim(-1, axis)
    return images


@cache
def _window_matrix(size: int) -> torch.Tensor:
    """Return the (size, size) matrix whose column j holds the weights around voxel j, mirrored voxels folded back.

    A product with it beats a convolution of one channel several times, on the CPU most of all.
    """
    half = min(WINDOW_SIZE // 2, (size - 1) // 2)
    offsets = torch.arange(-half, half + 1, dtype=torch.float64)
    weights = torch.exp(-0.5 * (offsets / WINDOW_SIGMA) ** 2)
    weights = weights / weights.sum()
    centre = torch.arange(size)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    for offset, weight in zip(offsets.long().tolist(), weights, strict=True):
        neighbour = centre + offset
        neighbour = torch.where(neighbour < 0, -1 - neighbour, neighbour)
        neighbour = torch.where(neighbour >= size, 2 * size - 1 - neighbour, neighbour)
        matrix.index_put_((neighbour, centre), weight.expand(size), accumulate=True)
    return matrix
