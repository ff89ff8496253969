"""What is asked of every image once its bytes are sound: geometry, finite values, whole labels, one grid per case.

Pure functions over arrays; the readers of all formats share them, so a limit means the same for all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from transforms.errors import DataError
from transforms.ingest_stream import named

GRID_TOLERANCE = 1e-3
INTEGER_TOLERANCE = 1e-3
SPACING_MM = (1e-4, 1e3)  # 0.1 micrometre to 1 m: beyond, the number is no voxel size of a scan in mm
_SINGULAR = 1e-6  # share of the volume that perpendicular axes of the same lengths would span


class OnGrid(Protocol):
    """Anything whose grid can be compared: spatial shape, affine (None where the format has none) and path."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def affine(self) -> NDArray[np.float64] | None: ...
    @property
    def path(self) -> str: ...


def check_real(dtype: np.dtype[Any], where: str) -> np.dtype[Any]:
    """Return ``dtype`` if it holds one real number or truth value per voxel, else raise a ``DataError``."""
    if dtype.kind not in "iufb" or dtype.fields is not None:
        raise DataError(where, f"data type {dtype}, expected integers or floats", "store one real number per voxel")
    return dtype


def check_spacing(spacing: Sequence[float], where: str, limits: tuple[float, float] | None = SPACING_MM) -> None:
    """Raise a ``DataError`` unless all voxel sizes are positive, finite and within ``limits``."""
    if not all(math.isfinite(size) and size > 0 for size in spacing):
        raise DataError(
            where,
            f"the header's spacing is {list(spacing)}, expected {len(spacing)} positive numbers",
            "write the true voxel size into the header",
        )
    if limits is not None and not all(limits[0] <= size <= limits[1] for size in spacing):
        raise DataError(
            where,
            f"the header's spacing is {list(spacing)} mm, expected {limits[0]:g} to {limits[1]:g} mm",
            "write the true voxel size in mm into the header",
        )


def check_affine(affine: NDArray[np.float64], where: str) -> tuple[float, ...]:
    """Return the lengths of the voxel axes of an affine (n + 1, n + 1).

    Raises:
        DataError: not finite, not invertible.
    """
    fix = "write the true orientation into the header"
    if not np.isfinite(affine).all():
        raise DataError(where, "the affine is not finite", fix)
    axes = affine[:-1, :-1]
    with np.errstate(over="ignore", invalid="ignore"):
        lengths = np.linalg.norm(axes, axis=0)
        volume = abs(float(np.linalg.det(axes)))
        share = volume / float(lengths.prod()) if lengths.min() > 0 else 0.0
    if not share >= _SINGULAR:  # NaN too: lengths that overflow
        raise DataError(
            where,
            f"the affine is not invertible: axes of length {lengths.round(6).tolist()} span {volume:g}",
            fix,
        )
    return tuple(float(length) for length in lengths)


def check_finite(values: NDArray[Any], where: str) -> None:
    """Raise a ``DataError`` that counts and locates NaN and infinite values."""
    if values.dtype.kind != "f":
        return
    finite = np.isfinite(values)
    if not finite.all():
        bad = int((~finite).sum())
        first = tuple(int(index) for index in np.argwhere(~finite)[0])
        raise DataError(
            where,
            f"{bad} of {finite.size} voxels are NaN or infinite as {values.dtype}, the first at {first}",
            "find out what they mean and write a number, or leave the case out",
        )


def check_range(values: NDArray[Any], where: str) -> None:
    """Raise a ``DataError`` where a finite value would be infinite in float32, in which every network computes."""
    if values.dtype.kind != "f" or values.dtype.itemsize <= 4:
        return
    largest = max(abs(float(values.max())), abs(float(values.min())))
    if largest > float(np.finfo(np.float32).max):
        raise DataError(
            where,
            f"voxels reach {largest:g}, which is infinite as float32",
            "find out what they mean and write a number, or leave the case out",
        )


def finite_as(values: NDArray[Any], dtype: DTypeLike, where: str) -> NDArray[Any]:
    """Return a C-contiguous copy as ``dtype``; a value that overflows it is refused like infinity."""
    with np.errstate(over="ignore"):
        cast_values = np.array(values, dtype=dtype, order="C")
    check_finite(cast_values, where)
    return cast_values


def label_ids(values: NDArray[Any], table: Mapping[int, int] | None, where: str) -> NDArray[np.integer[Any]]:
    """Return the label ids of the source values of a label map.

    Args:
        values: integers, truth values, or floats within 1e-3 of integers; any shape.
        table: label id for every value that may occur, 0 included; None keeps the values.
        where: file, case and key for the error message.

    Returns:
        Array of the same shape: uint8 where all ids fit, else int16.

    Raises:
        DataError: NaN, values that are no integers, values missing from ``table`` (counted), values beyond int16.
    """
    check_finite(values, where)
    whole = _whole_numbers(values, where)
    lowest, highest = int(whole.min()), int(whole.max())
    if lowest < -(2**15) or highest >= 2**15:
        raise DataError(
            where, f"label values span {lowest} .. {highest}, expected int16", "check that it is a label map"
        )
    shifted = whole.astype(np.int32) - lowest
    counts = {lowest + index: int(n) for index, n in enumerate(np.bincount(shifted.ravel())) if n}
    known = {value: value for value in counts} if table is None else table
    unknown = ", ".join(f"{value} ({count} voxels)" for value, count in counts.items() if value not in known)
    if unknown:
        raise DataError(
            where,
            f"label values {unknown} are not in the label table, which knows {sorted(known)}",
            "add these values to a label (for example 1:lesion=1+2) or correct the file",
        )
    ids = np.zeros(highest - lowest + 1, dtype=np.int16)
    for value in counts:
        ids[value - lowest] = known[value]
    return (ids.astype(np.uint8) if ids.min() >= 0 and ids.max() <= 255 else ids)[shifted]


def _whole_numbers(values: NDArray[Any], where: str) -> NDArray[Any]:
    if values.dtype.kind in "iub":
        return values
    rounded = np.rint(values)
    off = np.abs(values - rounded) > INTEGER_TOLERANCE
    if off.any():
        raise DataError(
            where,
            f"{int(off.sum())} voxels of the label are no integers, for example {float(values[off][0]):.6g}",
            "resample labels with nearest-neighbour interpolation, and give probability maps as images",
        )
    if np.abs(rounded).max(initial=0) >= 2**62:  # int64 would wrap around without a word
        raise DataError(where, f"label values reach {np.abs(rounded).max():g}", "check that it is a label map")
    return rounded.astype(np.int64)


def check_same_grid(reference: OnGrid, image: OnGrid, key: str, case: str, tolerance: float = GRID_TOLERANCE) -> None:
    """Raise a ``DataError`` unless two files of a case share shape and affine.

    Args:
        reference: the case's first image.
        image: the file in question.
        key: what that file is (a modality, ``label``, a mask's role).
        case: case id.
        tolerance: largest accepted difference of any element of the affines (mm, or mm per voxel).
    """
    where = named(image.path, case, key)
    fix = "resample the file onto the grid of the case's first image, or correct the header that is wrong"
    if image.shape != reference.shape:
        raise DataError(where, f"shape {image.shape}, expected {reference.shape} as in {reference.path}", fix)
    if image.affine is None and reference.affine is None:
        return
    if image.affine is None or reference.affine is None:
        has = "no affine, expected that" if image.affine is None else "an affine, expected none as in that"
        raise DataError(where, f"the file has {has} of {reference.path}", "store both files in one format")
    difference = float(np.abs(image.affine - reference.affine).max())
    if difference > tolerance:
        shift = _largest_shift(reference.shape, image.affine - reference.affine)
        raise DataError(
            where,
            f"the affine differs by {difference:.4g} (tolerance {tolerance:g}) from that of {reference.path}, "
            f"which moves a corner of the volume by {shift:.3g} mm",
            fix,
        )


def _largest_shift(shape: Sequence[int], difference: NDArray[np.float64]) -> float:
    corners = np.array([(*corner, 1) for corner in product(*((0, size - 1) for size in shape))], dtype=float)
    return float(np.linalg.norm((corners @ difference.T)[:, :-1], axis=1).max())
