"""A series becomes voxels with their affine: stored integers to physical values, LPS to RAS, padding filled.

Every image is decoded by itself and checked against its own header. What was no measurement (the padding around the
reconstruction circle of a CT) becomes the lowest value that was measured, and is counted. A tilted or unevenly spaced
stack is refused by the gate, or, where that is allowed, resampled: every slice is interpolated where it truly lies, and
a result goes back to the slices by the same positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless

from pipelines.dicom.geometry import DEFECTS, Grid, check_planes, grid_of, refuse, stacked
from pipelines.dicom.headers import planes_of, refuse_compressed
from pipelines.dicom.privacy import quiet_reading
from pipelines.dicom.resample import nearest_in_slice, on_regular_grid
from pipelines.dicom.series import Image, Series
from transforms.errors import DataError
from transforms.ingest_budget import Budget, check_declared

UNCOMPRESSED = (ImplicitVRLittleEndian, ExplicitVRLittleEndian)
DECODED = (*UNCOMPRESSED, RLELossless)  # other codecs: refused by name, their decoders trust the compressed header
RESAMPLABLE = ("tilted gantry", "uneven gaps", "missing slice")


@dataclass(frozen=True, eq=False)
class Volume:
    """A series as one volume.

    Attributes:
        voxels: float32 (columns, rows, slices), physical values (CT: HU).
        affine: 4 x 4, index to RAS mm.
        series: where it comes from.
        order: index of the series' image for every source slice, along the normal.
        padding: voxels that were no measurement, and the value that they have now.
        resampled: why the stack was resampled, or an empty text.
        slices: where the source slices lie in a resampled volume: column, row, slice index of their first pixel.
    """

    voxels: NDArray[np.float32]
    affine: NDArray[np.float64]
    series: Series
    order: tuple[int, ...]
    padding: tuple[int, float] = (0, 0.0)
    resampled: str = ""
    slices: NDArray[np.float64] | None = field(default=None, repr=False)

    def without_voxels(self) -> Volume:
        """Return the same geometry with voxels that take no memory, for the way back."""
        return replace(self, voxels=np.broadcast_to(np.float32(0), self.voxels.shape))

    @property
    def sources(self) -> list[Dataset]:
        """The headers of the source images in the order of ``to_slices``."""
        return [self.series.images[index].header for index in self.order]

    def to_slices(self, labels: NDArray[Any]) -> NDArray[Any]:
        """Return an array on this volume's grid as (source slice, row, column), in the order of ``sources``.

        On a resampled grid, every pixel takes the value of the voxel nearest to it; outside of the volume it is 0.

        Raises:
            DataError: the shape is not the volume's.
        """
        if labels.shape != self.voxels.shape:
            raise DataError(
                f"{self.series.what}: a result of shape {labels.shape}",
                f"the volume has {self.voxels.shape}",
                "this is a defect of the bundle's postprocessing: report it",
            )
        if self.slices is None:
            return np.ascontiguousarray(labels.transpose(2, 1, 0))
        rows, columns = int(self.series.header.Rows), int(self.series.header.Columns)
        return np.stack([nearest_in_slice(labels, start, columns, rows).T for start in self.slices])


def read_volume(series: Series, allow_resampling: bool = False) -> Volume:
    """Return the volume of a series.

    Args:
        series: as ``find_series`` returns it.
        allow_resampling: interpolate a stack that is tilted, unevenly spaced or lacks slices, instead of refusing it.

    Raises:
        DataError: every defect of ``geometry.DEFECTS``, by its name; more voxels than the budget.
    """
    planes = planes_of(series)
    refuse_compressed(series, DECODED)
    check_planes(planes, series.what)
    check_declared((planes[0].rows, planes[0].columns, len(planes)), 4, series.what, Budget.of_environment())
    try:
        grid: Grid | None = grid_of(planes, series.what)
        reason = ""
    except DataError as defect:
        if not allow_resampling or not any(defect.what.endswith(f": {name}") for name in RESAMPLABLE):
            raise
        grid, reason = None, f"{defect.what.rpartition(': ')[2]}: {defect.why}"
    order = tuple(stacked(planes, series.what))
    stack, padding = _physical([series.images[index] for index in order], series.what)
    if grid is not None:
        return Volume(np.ascontiguousarray(stack.transpose(2, 1, 0)), grid.affine, series, order, padding)
    voxels, affine, slices = on_regular_grid(stack, [planes[index] for index in order])
    return Volume(voxels, affine, series, order, padding, reason, slices)


def stored_values(dataset: Dataset, what: str) -> NDArray[np.int64]:
    """Return the stored integers (rows, columns) of one image with its pixels, unused high bits taken off.

    Args:
        dataset: read completely.
        what: series and image, for the error message.

    Raises:
        DataError: pixel format, truncated pixels.
    """
    allocated, stored = int(dataset.get("BitsAllocated", 0)), int(dataset.get("BitsStored", 0))
    high, signed = int(dataset.get("HighBit", -1)), int(dataset.get("PixelRepresentation", -1))
    if allocated not in (8, 16) or not 1 <= stored <= allocated or high != stored - 1 or signed not in (0, 1):
        why = f"{stored} of {allocated} bits stored, highest {high}, representation {signed}"
        refuse("pixel format", what, why)
    if str(dataset.get("PhotometricInterpretation", "")) != "MONOCHROME2":
        refuse(
            "not a plain image", what, f"photometric interpretation {dataset.get('PhotometricInterpretation')!s:.16}"
        )
    if "PixelData" not in dataset:
        refuse("truncated pixels", what, "no pixel data")
    expected = int(dataset.Rows) * int(dataset.Columns) * allocated // 8
    length = len(dataset.PixelData)
    if dataset.file_meta.TransferSyntaxUID in UNCOMPRESSED and length not in (expected, expected + expected % 2):
        refuse("truncated pixels", what, f"{length} bytes, expected {expected}")
    try:
        raw = dataset.pixel_array.astype(np.int64)
    except Exception as problem:  # decoders raise what they like on damaged bytes
        refuse("truncated pixels", what, f"they cannot be decoded ({type(problem).__name__})")
    if raw.shape != (int(dataset.Rows), int(dataset.Columns)):
        refuse("truncated pixels", what, f"decoded to shape {raw.shape}")
    raw &= (1 << stored) - 1
    return raw - ((raw >> (stored - 1)) << stored) if signed else raw


def rescale_of(header: Dataset, what: str) -> tuple[float, float]:
    """Return slope and intercept of one image; (1, 0) where an MR image has none.

    Raises:
        DataError: rescale: absent in a CT, only one of the two, not a number, slope 0, CT in another unit than HU, a
            lookup table.
    """
    if "ModalityLUTSequence" in header:
        refuse("rescale", what, "values are given by a lookup table")
    given = [keyword for keyword in ("RescaleSlope", "RescaleIntercept") if header.get(keyword) not in (None, "")]
    is_ct = header.get("SOPClassUID") == CTImageStorage
    if len(given) == 1 or (is_ct and not given):
        refuse("rescale", what, f"{given[0]} without its partner" if given else "a CT without slope and intercept")
    if not given:
        return 1.0, 0.0
    try:
        slope, intercept = float(header.RescaleSlope), float(header.RescaleIntercept)
    except (TypeError, ValueError):
        slope = intercept = math.nan
    if not (math.isfinite(slope) and math.isfinite(intercept)) or slope == 0:
        refuse("rescale", what, f"slope {slope:g}, intercept {intercept:g}")
    unit = str(header.get("RescaleType", "") or "HU").strip().upper()
    if is_ct and unit != "HU":
        refuse("rescale", what, f"a CT in {unit[:8]}, expected HU")
    return slope, intercept


def padding_of(header: Dataset, what: str) -> tuple[int, int] | None:
    """Return the range of stored values that mean "no measurement" (both ends included), or None.

    Raises:
        DataError: padding value: not representable in the stored bits, or a range limit without a value.
    """
    value, limit = header.get("PixelPaddingValue"), header.get("PixelPaddingRangeLimit")
    if value in (None, ""):
        if limit not in (None, ""):
            refuse("padding value", what, "a range limit without a value")
        return None
    stored, signed = int(header.BitsStored), int(header.PixelRepresentation)
    lowest, highest = (-(1 << (stored - 1)), (1 << (stored - 1)) - 1) if signed else (0, (1 << stored) - 1)
    ends = []
    for end in (value, value if limit in (None, "") else limit):
        # the value representation is US or SS as the pixels are, but implicit files are read as US in some archives
        number = int(end) - (1 << 16) if signed and int(end) >= 1 << 15 else int(end)
        if not lowest <= number <= highest:
            refuse("padding value", what, f"{number}, but {stored} bits hold {lowest} to {highest}")
        ends.append(number)
    return min(ends), max(ends)


def _physical(images: Sequence[Image], series: str) -> tuple[NDArray[np.float32], tuple[int, float]]:
    """Return (slices, rows, columns) in physical values, and how much padding was filled with what."""
    paddings = {(padding_of(image.header, f"{series}, {image.name}")) for image in images}
    if len(paddings) > 1:
        listed = ", ".join(sorted("none" if one is None else f"{one[0]}..{one[1]}" for one in paddings))
        refuse("padding value", series, f"several in one series: {listed}")
    signs = {(int(i.header.get("PixelRepresentation", 0)), str(i.header.get("Units", ""))) for i in images}
    if len(signs) > 1:
        refuse("mixed series", series, "signed and unsigned pixels, or several units")
    padding = paddings.pop()
    shape = (len(images), int(images[0].header.Rows), int(images[0].header.Columns))
    stack, blank = np.empty(shape, np.float32), np.zeros(shape, bool)
    for index, image in enumerate(images):
        what = f"{series}, {image.name}"
        stored = stored_values(_read(image, what), what)
        slope, intercept = rescale_of(image.header, what)
        stack[index] = stored * slope + intercept
        if padding is not None:
            blank[index] = (stored >= padding[0]) & (stored <= padding[1])
    if not blank.any():
        return stack, (0, 0.0)
    if blank.all():
        refuse("padding value", series, "every pixel has it: nothing was measured")
    lowest = float(stack[~blank].min())
    stack[blank] = lowest
    return stack, (int(blank.sum()), lowest)


def _read(image: Image, what: str) -> Dataset:
    try:
        with quiet_reading():
            dataset = pydicom.dcmread(image.path)
            same = str(dataset.SOPInstanceUID) == str(image.header.SOPInstanceUID)
    except Exception as problem:
        raise DataError(f"{what}: broken file", f"{type(problem).__name__}", DEFECTS["broken file"]) from None
    if not same:
        raise DataError(f"{what}: broken file", "it changed while it was read", "wait until the transfer is complete")
    return dataset
