"""Two images and the regions they are compared in, brought to one form: three axes, C order, boxes of voxels.

A 2D image becomes (Y, 1, X), images in Fortran order are transposed (no metric depends on the order of the axes), and
what is computed is the box of the regions, as wide as the windows around it need.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.metrics.inputs import as_mask
from transforms.errors import DataError, UsageError

BORDERS = ("exclude", "reflect")
_REGIONS_PER_PASS = 8  # one bit of a byte each
LARGEST = 1e70  # SSIM multiplies four values, or four times the data range: neither overflows nor vanishes in float64
_EXACT_IN_FLOAT32 = ("b1", "i1", "u1", "i2", "u2", "f2", "f4")


@dataclass(frozen=True)
class ImagePair:
    """An image and its reference (Z, Y, X), the masks of the regions (None is the whole image), the spacing in mm.

    ``transposed``: the three axes are those of the arrays that were given in reverse order.
    """

    image: NDArray[Any]
    reference: NDArray[Any]
    masks: tuple[NDArray[Any] | None, ...]
    spacing_mm: tuple[float, ...] | None
    case: str = ""
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels along the three axes."""
        return self.image.shape


@dataclass(frozen=True)
class Frame:
    """A box of voxels to compute, in two images of one dtype in which every window of the box lies.

    ``low`` and ``high`` bound the box in the images, ``origin`` is its first voxel in those of the pair.
    """

    image: NDArray[Any]
    reference: NDArray[Any]
    low: tuple[int, ...]
    high: tuple[int, ...]
    origin: tuple[int, ...]

    def box(self, margin: Sequence[int] = (0, 0, 0)) -> tuple[slice, ...]:
        """Slices of the box, ``margin`` voxels wider on either side."""
        return tuple(slice(a - m, b + m) for a, b, m in zip(self.low, self.high, margin, strict=True))

    def own(self, mask: NDArray[Any] | None) -> NDArray[Any]:
        """The part of a mask of the pair that lies in the box; None is a mask of all voxels."""
        shape = [b - a for a, b in zip(self.low, self.high, strict=True)]
        if mask is None:
            return np.ones(shape, bool)
        return mask[tuple(slice(a, a + n) for a, n in zip(self.origin, shape, strict=True))]


def pair_of_images(
    image: NDArray[Any],
    reference: NDArray[Any],
    masks: Mapping[str, NDArray[Any] | None],
    spacing_mm: Sequence[float] | None,
    case: str = "",
) -> ImagePair:
    """Check two images with the masks of their regions, and bring them to three axes in C order.

    Raises:
        DataError: not 2D or 3D, no voxels, different shapes, complex or not numbers, a mask of another shape or not of
            0 and 1, a spacing that is not positive.
    """
    where = f"case {case or 'unnamed'}"
    arrays = [np.asarray(image), np.asarray(reference)]
    shapes = f"image {arrays[0].shape} {arrays[0].dtype}, reference {arrays[1].shape} {arrays[1].dtype}"
    ndim = arrays[1].ndim
    if arrays[0].shape != arrays[1].shape or ndim not in (2, 3) or not arrays[1].size:
        raise DataError(
            f"{where}: image and reference cannot be compared",
            f"{shapes}: expected one shape, (X, Y) or (X, Y, Z), with voxels",
            "bring the image to the grid of the reference; drop the batch and channel axes",
        )
    if any(array.dtype.kind not in "biuf" for array in arrays):
        raise DataError(f"{where}: the images are not real numbers", shapes, "take the magnitude of complex images")
    if spacing_mm is not None and (len(spacing_mm) != ndim or not all(np.isfinite(s) and s > 0 for s in spacing_mm)):
        raise DataError(
            f"{where}: spacing {tuple(spacing_mm)} mm",
            f"expected {ndim} positive lengths",
            "take the spacing from the image's affine",
        )
    own = [None if mask is None else _as_roi(mask, name, arrays[1].shape, case) for name, mask in masks.items()]
    spacing = None if spacing_mm is None else tuple(float(s) for s in spacing_mm)
    transposed = all(array.flags.f_contiguous and not array.flags.c_contiguous for array in arrays)
    if transposed:
        arrays, own = [array.T for array in arrays], [None if mask is None else mask.T for mask in own]
        spacing = spacing and spacing[::-1]
    if ndim == 2:
        arrays = [array[:, None] for array in arrays]
        own = [None if mask is None else mask[:, None] for mask in own]
        spacing = spacing and (spacing[0], 1.0, spacing[1])
    return ImagePair(arrays[0], arrays[1], tuple(own), spacing, case, transposed)


def check_data_range(data_range: Any) -> float:
    """Return the data range, or raise a ``UsageError`` unless it is a number from 1e-70 to 1e70."""
    number = isinstance(data_range, (int, float, np.integer, np.floating)) and not isinstance(data_range, bool)
    if not number or not 1 / LARGEST <= data_range <= LARGEST:
        raise UsageError(
            f"image quality: data range {data_range}",
            f"expected the width of the range of the intensities, {1 / LARGEST:g} to {LARGEST:g}; it is never guessed",
            "255 for 8 bits, 1 for images scaled to [0, 1], for CT the width of the range compared, in HU",
        )
    return float(data_range)


def frame_of(pair: ImagePair, margin: Sequence[int], border: str) -> Frame | None:
    """Return the box of all regions with ``margin`` voxels around it, or None where there is nothing to compute.

    Args:
        pair: the images.
        margin: voxels from the centre of the window to its end, along each axis.
        border: "exclude" leaves out voxels whose window reaches beyond the image; "reflect" mirrors the image at its
            faces (d c b a | a b c d).

    Raises:
        DataError: a value that is not finite, or beyond 1e70, in the box or its margin.
        UsageError: ``border`` is neither of the two.
    """
    if border not in BORDERS:
        raise UsageError(f"image quality: border {border!r}", f"expected one of {', '.join(BORDERS)}", "correct it")
    keep = margin if border == "exclude" else (0, 0, 0)
    low, high = list(keep), [n - m for n, m in zip(pair.shape, keep, strict=True)]
    if all(mask is not None for mask in pair.masks):
        boxes = [box for mask in pair.masks if mask is not None and (box := _box_of(mask)) is not None]
        if not boxes:
            return None
        low = [max(a, min(box[axis][0] for box in boxes)) for axis, a in enumerate(low)]
        high = [min(b, max(box[axis][1] for box in boxes)) for axis, b in enumerate(high)]
    if any(a >= b for a, b in zip(low, high, strict=True)):
        return None
    inside = tuple(
        slice(max(a - m, 0), min(b + m, n)) for a, b, m, n in zip(low, high, margin, pair.shape, strict=True)
    )
    images = pair.image, pair.reference
    for name, array in zip(("image", "reference"), images, strict=True):
        _check_finite(array[inside], name, pair.case)
    dtype = _common_dtype(*images)
    missing = [(part.start - a + m, b + m - part.stop) for a, b, m, part in zip(low, high, margin, inside, strict=True)]
    if not any(map(any, missing)) and all(array.dtype == dtype and array.flags.c_contiguous for array in images):
        return Frame(*images, tuple(low), tuple(high), tuple(low))
    image, reference = (np.pad(array[inside].astype(dtype, order="C"), missing, mode="symmetric") for array in images)
    size = [b - a for a, b in zip(low, high, strict=True)]
    end = tuple(m + n for m, n in zip(margin, size, strict=True))
    return Frame(image, reference, tuple(margin), end, tuple(low))


def region_means(
    pair: ImagePair, frame: Frame | None, sums: Callable[[Frame, Sequence[NDArray[Any]]], NDArray[np.float64]]
) -> list[tuple[int, float, float]]:
    """Return, per region, its voxels in the frame and the means of two local figures over them (NaN without voxel).

    ``sums`` gets the frame and the masks of up to eight regions in it; it returns sums of both figures (regions, 2).
    """
    means = []
    for first in range(0, len(pair.masks), _REGIONS_PER_PASS):
        group = pair.masks[first : first + _REGIONS_PER_PASS]
        if frame is None:
            means += [(0, np.nan, np.nan)] * len(group)
            continue
        masks = [frame.own(mask) for mask in group]
        for mask, (one, other) in zip(masks, sums(frame, masks), strict=True):
            n = int(np.count_nonzero(mask))
            means.append((n, one / n, other / n) if n else (0, np.nan, np.nan))
    return means


def codes_of(masks: Sequence[NDArray[Any]]) -> NDArray[np.uint8]:
    """Return a byte per voxel in which bit r is set where the r-th of up to eight masks is."""
    codes = np.ascontiguousarray(masks[0], bool).view(np.uint8)
    for region, mask in enumerate(masks[1:], start=1):
        codes = codes | (np.ascontiguousarray(mask, bool).view(np.uint8) << np.uint8(region))
    return codes


def _as_roi(mask: NDArray[Any], name: str, shape: tuple[int, ...], case: str) -> NDArray[np.bool_]:
    if np.shape(mask) != shape:
        raise DataError(
            f"case {case or 'unnamed'}: the ROI {name} does not fit the images",
            f"ROI {np.shape(mask)}, images {shape}",
            "bring the ROI to the grid of the reference",
        )
    return as_mask(mask, f"ROI {name}", case)


def _box_of(mask: NDArray[Any]) -> list[tuple[int, int]] | None:
    """Return (first, end) along each of three axes."""
    profile = np.asarray(mask.any(axis=0))
    hits = [np.flatnonzero(line) for line in (mask.any(axis=(1, 2)), profile.any(axis=1), profile.any(axis=0))]
    return [(int(hit[0]), int(hit[-1]) + 1) for hit in hits] if hits[0].size else None


def _common_dtype(image: NDArray[Any], reference: NDArray[Any]) -> np.dtype[Any]:
    exact = all(array.dtype.str[1:] in _EXACT_IN_FLOAT32 for array in (image, reference))
    return np.dtype(np.float32 if exact else np.float64)


def _check_finite(array: NDArray[Any], name: str, case: str) -> None:
    if array.dtype.kind != "f":
        return
    with np.errstate(all="ignore"):
        # One pass without a temporary array: where this sum is small enough, so is every value.
        if array.dtype.itemsize > 4:
            fine = np.einsum("ijk,ijk->", array, array) <= LARGEST**2
        else:
            fine = np.isfinite(np.einsum("ijk->", array))
    n_bad = 0 if fine else int(array.size - np.count_nonzero(np.abs(array) <= np.float64(LARGEST)))
    if n_bad:
        raise DataError(
            f"case {case or 'unnamed'}: the {name} has {n_bad} values that are not finite",
            f"NaN, or beyond {LARGEST:g}, in the box of the regions or within half a window of it",
            "repair the image, or compare a region that keeps clear of them",
        )
