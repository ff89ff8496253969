"""NIfTI files read with every check that the usual readers leave out.

nibabel turns a spacing of 0 into 1, accepts a gzip stream with a wrong checksum, and hands on NaN; a lesion volume or a
surface distance computed from such a file is wrong without a word. Here the raw header is judged before anything
repairs it, the compressed stream is read to its end so that its CRC is compared, and refusals name file, case and key.
What formats share is in ``ingest_budget``, ``ingest_stream`` and ``ingest_checks``; other formats are in ``ingest``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import nibabel
import numpy as np
from nibabel.spatialimages import HeaderDataError
from nibabel.volumeutils import apply_read_scaling
from numpy.typing import DTypeLike, NDArray

from transforms.errors import DataError
from transforms.ingest_budget import Budget, check_declared, check_metadata_size
from transforms.ingest_checks import (
    check_affine,
    check_real,
    check_same_grid,
    check_spacing,
    finite_as,
    label_ids,
)
from transforms.ingest_stream import COPY_AGAIN, inflated, named, opened, read_body, read_up_to

__all__ = [
    "NiftiHeader",
    "check_same_grid",
    "check_voxels",
    "read_header",
    "read_label",
    "read_stored",
    "read_voxels",
]

# Relative difference of pixdim and affine: tools that read the one and tools that read the other would disagree on
# every volume by three times as much.
SPACING_TOLERANCE = 0.01
_MAGIC = {348: b"n+1", 540: b"n+2"}
_FORM_CODES = range(6)  # readers disagree on whether a negative code counts as set
_LINE_ENDS = ((13, 10, 26, 10), (0, 0, 0, 0))  # NIfTI-2's guard against transfers that translate them, or not written


@dataclass(frozen=True, eq=False)
class NiftiHeader:
    """What a NIfTI header says once it has passed the checks.

    Attributes:
        shape: voxels along the three spatial axes.
        spacing: voxel size in mm along these axes, taken from the affine.
        affine: 4 x 4 float64, voxel index to mm (sform if set, else qform).
        dtype: stored data type.
        channels: length of the fourth axis, 1 for a three-dimensional file.
        path: the file, for error messages.
    """

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    affine: NDArray[np.float64]
    dtype: np.dtype[Any]
    channels: int
    path: str


def read_header(path: str | Path, *, case: str = "", key: str = "") -> NiftiHeader:
    """Read and check the header of a NIfTI-1 or NIfTI-2 file (``.nii`` or ``.nii.gz``), without its voxels.

    Args:
        path: the file.
        case: case id for the error message.
        key: what the file is in that case (a modality, ``label``, ``mask``), for the error message.

    Raises:
        DataError: absent, unreadable or no NIfTI; not three spatial axes; a spacing that is no length in mm or not that
            of the affine; an affine not finite or not invertible; a data type that is no real number or not as wide as
            declared; more bytes or voxels than the budget of the environment.
    """
    where, budget = named(path, case, key), Budget.of_environment()
    with opened(path, where, budget) as stream:
        raw = _parse_header(inflated(stream), where)
        return _check_geometry(raw, *_check_declared(raw, where, budget), path, where)


def read_voxels(
    path: str | Path, channel: int | None = None, dtype: DTypeLike = np.float32, *, case: str = "", key: str = ""
) -> NDArray[Any]:
    """Read one volume, scaled by the header's slope and intercept.

    Args:
        path: the file.
        channel: index on the fourth axis; None for a three-dimensional file.
        dtype: a floating type.
        case, key: for the error message.

    Returns:
        Array of shape (x, y, z), C-contiguous, native byte order.

    Raises:
        DataError: as ``read_header``; truncated or corrupt stream (CRC included); fewer or more bytes than the header
            declares; a channel that is not there, or a fourth axis and no channel; NaN or infinite voxels.
    """
    where = named(path, case, key)
    header, voxels = read_stored(path, where, Budget.of_environment())
    return finite_as(_pick_channel(voxels, header, channel, where), dtype, where)


def check_voxels(path: str | Path, *, case: str = "", key: str = "") -> None:
    """Read all channels of a file once and raise the ``DataError`` that ``read_voxels`` would raise for any of them."""
    where = named(path, case, key)
    header, voxels = read_stored(path, where, Budget.of_environment())
    finite_as(voxels[..., 0] if header.channels == 1 else voxels, np.float32, where)


def read_label(
    path: str | Path, value_to_id: Mapping[int, int] | None = None, *, case: str = "", key: str = "label"
) -> NDArray[np.integer[Any]]:
    """Read a label map, its source values translated to label ids.

    Args:
        path: the file; integers, or floats within 1e-3 of integers.
        value_to_id: label id for every value that may occur, 0 included; None keeps the values.
        case, key: for the error message.

    Returns:
        Array of shape (x, y, z): uint8 where all ids fit, else int16.

    Raises:
        DataError: as ``read_voxels``; values that are no integers; values missing from ``value_to_id``, with their
            counts; values beyond int16.
    """
    where = named(path, case, key)
    header, stored = read_stored(path, where, Budget.of_environment())
    return label_ids(np.ascontiguousarray(_pick_channel(stored, header, None, where)), value_to_id, where)


def read_stored(
    path: str | Path, where: str, budget: Budget, drained: Callable[[], None] = lambda: None
) -> tuple[NiftiHeader, NDArray[Any]]:
    """Return header and scaled voxels (x, y, z, channels), the stream read to its end; values are not looked at.

    Args:
        path: the file.
        where: file, case and key for the error message.
        budget: limits of the file.
        drained: called once the bytes are proven complete and before their meaning is checked.

    Raises:
        DataError: as ``read_voxels``, but for the values.
    """
    with opened(path, where, budget) as file:
        stream = inflated(file)
        raw = _parse_header(stream, where)
        shape, channels, dtype = _check_declared(raw, where, budget)
        _skip_to_voxels(raw, stream, where, budget)
        body = read_body(stream, math.prod(shape) * channels * dtype.itemsize, where)
    drained()
    header = _check_geometry(raw, shape, channels, dtype, path, where)
    voxels = np.frombuffer(body, dtype=dtype).reshape((*shape, channels), order="F")
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is found as not finite
        return header, apply_read_scaling(voxels, *_scaling(raw, where))


def _parse_header(stream: BinaryIO, where: str) -> Any:
    """Return nibabel's header object over the unrepaired bytes; the stream stands behind the header."""
    size = stream.read(4)
    kinds = {348: nibabel.Nifti1Header, 540: nibabel.Nifti2Header}
    for order, endianness in (("little", "<"), ("big", ">")):
        length = int.from_bytes(size, order)  # type: ignore[arg-type]
        if len(size) == 4 and length in kinds:
            block = size + stream.read(length - 4)
            if len(block) == length:
                header = kinds[length](block, endianness, check=False)
                line_ends = tuple(header["eol_check"].tolist()) if length == 540 else _LINE_ENDS[0]
                if bytes(header["magic"].item()) == _MAGIC[length] and line_ends in _LINE_ENDS:
                    return header
    raise DataError(
        where, "no single-file NIfTI-1 or NIfTI-2 header was found", "convert the image to .nii.gz, or correct the path"
    )


def _check_declared(raw: Any, where: str, budget: Budget) -> tuple[tuple[int, int, int], int, np.dtype[Any]]:
    """Return spatial shape, channels and data type, within the budget."""
    dtype = _check_dtype(raw, where)
    sizes = [int(size) for size in raw["dim"]]
    shape = sizes[1 : 1 + sizes[0]] if 0 <= sizes[0] <= 7 else []
    axes = len(shape)
    while len(shape) > 3 and shape[-1] == 1:
        shape.pop()
    if len(shape) not in (3, 4) or min(shape, default=0) < 1:
        raise DataError(
            where,
            f"the header declares {axes} axes of sizes {sizes[1:8]}, expected 3, or 4 with channels last",
            "convert the image to a three-dimensional volume",
        )
    check_declared(shape, dtype.itemsize, where, budget)
    return (shape[0], shape[1], shape[2]), (shape[3] if len(shape) == 4 else 1), dtype


def _check_dtype(raw: Any, where: str) -> np.dtype[Any]:
    try:
        dtype = np.dtype(raw.get_data_dtype())
    except (HeaderDataError, KeyError) as error:
        raise DataError(
            where, f"unknown data type {int(raw['datatype'])}", "convert the image to float32 or int16"
        ) from error
    if int(raw["bitpix"]) != 8 * dtype.itemsize:
        raise DataError(
            where,
            f"the header declares data type {dtype} and {int(raw['bitpix'])} bits per voxel, expected "
            f"{8 * dtype.itemsize}",
            "correct datatype or bitpix in the header",
        )
    return check_real(dtype, where)


def _check_geometry(
    raw: Any, shape: tuple[int, int, int], channels: int, dtype: np.dtype[Any], path: str | Path, where: str
) -> NiftiHeader:
    unit = int(raw["xyzt_units"]) & 7
    if unit not in (0, 2):  # not stated, or mm
        stated = {1: "metres", 3: "micrometres"}.get(unit, f"an unknown unit ({unit})")
        raise DataError(
            where, f"the header's lengths are in {stated}, expected mm", "convert them to mm and set xyzt_units to 2"
        )
    pixdim = [float(size) for size in raw["pixdim"][1:4]]
    check_spacing(pixdim, where)
    affine = _best_affine(raw, where)
    lengths = check_affine(affine, where)
    check_spacing(lengths, where)
    if any(abs(length - size) > SPACING_TOLERANCE * size for length, size in zip(lengths, pixdim, strict=True)):
        raise DataError(
            where,
            f"the header's pixdim says {[round(size, 6) for size in pixdim]} mm, its affine "
            f"{[round(length, 6) for length in lengths]} mm",
            "find out which is the true voxel size and write it into both",
        )
    return NiftiHeader(shape, cast(tuple[float, float, float], lengths), affine, dtype, channels, str(path))


def _best_affine(raw: Any, where: str) -> NDArray[np.float64]:
    codes = {name: int(raw[name]) for name in ("sform_code", "qform_code")}
    if not all(code in _FORM_CODES for code in codes.values()):
        raise DataError(
            where,
            f"the header's orientation has the codes {codes}, expected 0 to {_FORM_CODES[-1]}",
            "write the true orientation into the header's sform and set sform_code to 1",
        )
    if not any(codes.values()):  # every tool guesses left and right its own way
        raise DataError(
            where,
            "the header gives no orientation: sform_code and qform_code are 0, so left and right are not known",
            "write the true orientation into the header's sform and set sform_code to 1",
        )
    geometry = raw.copy()
    if geometry["pixdim"][0] == 0:  # The NIfTI-1 standard reads a handedness of 0 as 1.
        geometry["pixdim"][0] = 1
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            return np.asarray(geometry.get_best_affine(), dtype=np.float64)
    except (HeaderDataError, ValueError) as error:
        raise DataError(
            where, f"the header gives no affine: {error}", "write the true orientation into the header's sform"
        ) from error


def _skip_to_voxels(raw: Any, stream: BinaryIO, where: str, budget: Budget) -> None:
    """Read up to the voxels; what stands before them must be extensions or nothing, never voxels of a wrong offset."""
    offset, consumed = float(raw["vox_offset"]), int(raw["sizeof_hdr"])
    if not math.isfinite(offset) or offset < consumed + 4 or offset != int(offset):
        raise DataError(where, f"voxels start at byte {offset:g}, inside the header", COPY_AGAIN)
    check_metadata_size(int(offset) - consumed, where, budget, "the part between header and voxels")
    gap = read_up_to(stream, int(offset) - consumed)
    flag, extensions = gap[0] if gap else 0, gap[4:]
    order = "big" if raw.endianness == ">" else "little"
    while flag and len(extensions) >= 8 and any(extensions[:4]):
        size = int.from_bytes(extensions[:4], order)  # type: ignore[arg-type]
        if not 8 <= size <= len(extensions):
            break
        extensions = extensions[size:]
    if any(extensions):
        raise DataError(
            where,
            f"voxels start at byte {int(offset)}, and before them are {len(extensions)} bytes that are no extension",
            COPY_AGAIN,
        )


def _scaling(raw: Any, where: str) -> tuple[float | None, float | None]:
    """Return slope and intercept, None and None for no scaling (0 or NaN in the header)."""
    if not any(math.isinf(float(raw[key])) for key in ("scl_slope", "scl_inter")):
        with suppress(HeaderDataError):
            return cast(tuple[float | None, float | None], raw.get_slope_inter())
    scaling = f"slope {float(raw['scl_slope'])}, intercept {float(raw['scl_inter'])}"
    raise DataError(where, f"the intensity scaling is unusable: {scaling}", "correct scl_slope and scl_inter")


def _pick_channel(voxels: NDArray[Any], header: NiftiHeader, channel: int | None, where: str) -> NDArray[Any]:
    index = 0 if channel is None and header.channels == 1 else channel
    if index is None:
        raise DataError(
            where,
            f"the file has {header.channels} channels, expected one three-dimensional volume",
            "name the channel, or split the file into one per modality",
        )
    if not 0 <= index < header.channels:
        raise DataError(where, f"channel {index} is asked for, the file has {header.channels}", "correct the manifest")
    return voxels[..., index]
