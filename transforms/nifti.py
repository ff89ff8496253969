"""NIfTI files read with every check that the usual readers leave out.

nibabel turns a spacing of 0 into 1, accepts a gzip stream with a wrong checksum, and hands on NaN; a lesion volume or a
surface distance computed from such a file is wrong without a word. Here the raw header is judged before anything
repairs it, the compressed stream is read to its end so that its CRC is compared, and refusals name file, case and key.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO, cast

import nibabel
import numpy as np
from nibabel.spatialimages import HeaderDataError
from nibabel.volumeutils import apply_read_scaling
from numpy.typing import DTypeLike, NDArray

from transforms.errors import DataError

GRID_TOLERANCE = 1e-3
INTEGER_TOLERANCE = 1e-3
MAX_VOXELS = 2**30
_PADDING = 512  # Zero bytes behind the voxels, which some writers add to fill a block.
_CHUNK = 1 << 20
_GZIP_MAGIC = b"\x1f\x8b"
_COPY_AGAIN = "copy the file again from its source, or leave the case out of the manifest"


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
        DataError: absent, unreadable or no NIfTI; not three spatial axes; spacing zero, negative or not finite; an
            affine not finite or not invertible; a data type that is no real number; more than ``MAX_VOXELS`` voxels.
    """
    where = _where(path, case, key)
    with _opened(path, where) as stream:
        return _check_header(_parse_header(stream, where), path, where)


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
    where = _where(path, case, key)
    header, voxels = _load(path, where)
    return _finite(_pick_channel(voxels, header, channel, where), dtype, where)


def check_voxels(path: str | Path, *, case: str = "", key: str = "") -> None:
    """Read all channels of a file once and raise the ``DataError`` that ``read_voxels`` would raise for any of them."""
    where = _where(path, case, key)
    header, voxels = _load(path, where)
    _finite(voxels[..., 0] if header.channels == 1 else voxels, np.float32, where)


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
    where = _where(path, case, key)
    header, stored = _load(path, where)
    volume = _pick_channel(stored, header, None, where)
    values = _as_integers(volume if volume.dtype.kind in "iu" else _finite(volume, volume.dtype, where), where)
    lowest, highest = int(values.min()), int(values.max())
    if lowest < -(2**15) or highest >= 2**15:
        raise DataError(
            where, f"label values span {lowest} .. {highest}, expected int16", "check that it is a label map"
        )
    shifted = values.astype(np.int32) - lowest
    counts = {lowest + index: int(n) for index, n in enumerate(np.bincount(shifted.ravel())) if n}
    table = {value: value for value in counts} if value_to_id is None else value_to_id
    unknown = ", ".join(f"{value} ({count} voxels)" for value, count in counts.items() if value not in table)
    if unknown:
        raise DataError(
            where,
            f"label values {unknown} are not in the label table, which knows {sorted(table)}",
            "add these values to a label (for example 1:lesion=1+2) or correct the file",
        )
    ids = np.zeros(highest - lowest + 1, dtype=np.int16)
    for value in counts:
        ids[value - lowest] = table[value]
    return (ids.astype(np.uint8) if ids.min() >= 0 and ids.max() <= 255 else ids)[shifted]


def check_same_grid(
    reference: NiftiHeader, header: NiftiHeader, key: str, case: str, tolerance: float = GRID_TOLERANCE
) -> None:
    """Raise a ``DataError`` unless two files of a case share shape and affine.

    Args:
        reference: header of the case's first image.
        header: header of the file in question.
        key: what that file is (a modality, ``label``, a mask's role).
        case: case id.
        tolerance: largest accepted difference of any element of the affines (mm, or mm per voxel).
    """
    where = _where(header.path, case, key)
    fix = "resample the file onto the grid of the case's first image, or correct the header that is wrong"
    if header.shape != reference.shape:
        raise DataError(where, f"shape {header.shape}, expected {reference.shape} as in {reference.path}", fix)
    difference = float(np.abs(header.affine - reference.affine).max())
    if difference > tolerance:
        shift = _largest_shift(reference, header)
        raise DataError(
            where,
            f"the affine differs by {difference:.4g} (tolerance {tolerance:g}) from that of {reference.path}, "
            f"which moves a corner of the volume by {shift:.3g} mm",
            fix,
        )


def _largest_shift(reference: NiftiHeader, header: NiftiHeader) -> float:
    corners = np.array([(*corner, 1) for corner in product(*((0, size - 1) for size in reference.shape))], dtype=float)
    return float(np.linalg.norm((corners @ (header.affine - reference.affine).T)[:, :3], axis=1).max())


def _where(path: str | Path, case: str, key: str) -> str:
    owner = ", ".join(f"{name} {value}" for name, value in (("case", case), ("key", key)) if value)
    return f"{path} ({owner})" if owner else str(path)


@contextmanager
def _opened(path: str | Path, where: str) -> Iterator[BinaryIO]:
    """Yield the uncompressed stream; translate what the operating system or zlib raise while it is read."""
    try:
        with open(path, "rb") as raw:
            compressed = raw.read(2) == _GZIP_MAGIC
            raw.seek(0)
            yield cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if compressed else raw
    except EOFError as error:
        raise DataError(where, "the gzip stream is truncated: it ends before its checksum", _COPY_AGAIN) from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(where, f"the gzip stream is corrupt: {error}", _COPY_AGAIN) from error
    except FileNotFoundError as error:
        raise DataError(where, "the file does not exist", "check the manifest's root and the path") from error
    except OSError as error:
        raise DataError(where, f"the file cannot be read: {error.strerror}", "check the path and its rights") from error


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
                if bytes(header["magic"].item())[:3] in (b"n+1", b"n+2"):
                    return header
    raise DataError(
        where, "no single-file NIfTI-1 or NIfTI-2 header was found", "convert the image to .nii.gz, or correct the path"
    )


def _check_header(raw: Any, path: str | Path, where: str) -> NiftiHeader:
    shape, channels = _check_shape(raw, where)
    _check_spacing(raw, where)
    affine = _check_affine(raw, where)
    spacing = tuple(float(size) for size in np.linalg.norm(affine[:3, :3], axis=0))
    dtype = _check_dtype(raw, where)
    return NiftiHeader(shape, cast(tuple[float, float, float], spacing), affine, dtype, channels, str(path))


def _check_shape(raw: Any, where: str) -> tuple[tuple[int, int, int], int]:
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
    if math.prod(shape) > MAX_VOXELS:
        raise DataError(
            where,
            f"the header declares {math.prod(shape)} voxels, more than the {MAX_VOXELS} this project reads",
            "correct the header, or crop or resample the volume",
        )
    return (shape[0], shape[1], shape[2]), (shape[3] if len(shape) == 4 else 1)


def _check_spacing(raw: Any, where: str) -> None:
    spacing = [float(size) for size in raw["pixdim"][1:4]]
    if not all(math.isfinite(size) and size > 0 for size in spacing):
        raise DataError(
            where,
            f"the header's spacing is {spacing} mm, expected three positive numbers",
            "write the true voxel size into the header's pixdim",
        )


def _check_affine(raw: Any, where: str) -> NDArray[np.float64]:
    fix = "write the true orientation into the header's sform"
    geometry = raw.copy()
    if geometry["pixdim"][0] == 0:  # The NIfTI-1 standard reads a handedness of 0 as 1.
        geometry["pixdim"][0] = 1
    try:
        affine = np.asarray(geometry.get_best_affine(), dtype=np.float64)
    except (HeaderDataError, ValueError) as error:
        raise DataError(where, f"the header gives no affine: {error}", fix) from error
    if not np.isfinite(affine).all():
        raise DataError(where, "the affine is not finite", fix)
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    volume = abs(float(np.linalg.det(affine[:3, :3])))
    if lengths.min() <= 0 or volume / float(lengths.prod()) < 1e-6:
        raise DataError(
            where,
            f"the affine is not invertible: axes of length {lengths.round(6).tolist()} mm span {volume:g} mm3",
            fix,
        )
    return affine


def _check_dtype(raw: Any, where: str) -> np.dtype[Any]:
    try:
        dtype = np.dtype(raw.get_data_dtype())
    except (HeaderDataError, KeyError) as error:
        raise DataError(
            where, f"unknown data type {int(raw['datatype'])}", "convert the image to float32 or int16"
        ) from error
    if dtype.kind not in "iuf":
        raise DataError(where, f"data type {dtype}, expected integers or floats", "store one real number per voxel")
    return dtype


def _load(path: str | Path, where: str) -> tuple[NiftiHeader, NDArray[Any]]:
    """Return header and scaled voxels (x, y, z, channels), the stream drained to its end."""
    with _opened(path, where) as stream:
        raw = _parse_header(stream, where)
        header = _check_header(raw, path, where)
        offset, consumed = float(raw["vox_offset"]), int(raw["sizeof_hdr"])
        if not math.isfinite(offset) or offset < consumed:
            raise DataError(where, f"voxels start at byte {offset:g}, inside the header", _COPY_AGAIN)
        expected = math.prod(header.shape) * header.channels * header.dtype.itemsize
        stream.read(int(offset) - consumed)
        body = stream.read(expected)
        tail = _drain(stream)
    if len(body) < expected or len(tail) > _PADDING or any(tail):
        found = f"{len(body)}" if len(body) < expected else f"at least {expected + len(tail)}"
        raise DataError(where, f"the file holds {found} bytes of voxels, its header declares {expected}", _COPY_AGAIN)
    voxels = np.frombuffer(body, dtype=header.dtype).reshape((*header.shape, header.channels), order="F")
    return header, apply_read_scaling(voxels, *_scaling(raw, where))


def _scaling(raw: Any, where: str) -> tuple[float | None, float | None]:
    """Return slope and intercept, None and None for no scaling (0 or NaN in the header)."""
    if not any(math.isinf(float(raw[key])) for key in ("scl_slope", "scl_inter")):
        with suppress(HeaderDataError):
            return cast(tuple[float | None, float | None], raw.get_slope_inter())
    scaling = f"slope {float(raw['scl_slope'])}, intercept {float(raw['scl_inter'])}"
    raise DataError(where, f"the intensity scaling is unusable: {scaling}", "correct scl_slope and scl_inter")


def _drain(stream: BinaryIO) -> bytes:
    """Read on to the end, where gzip compares its CRC; return what stands there, or enough of it to be refused."""
    tail = b""
    while len(tail) <= _PADDING and (chunk := stream.read(_CHUNK)):
        tail += chunk
    return tail


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


def _finite(voxels: NDArray[Any], dtype: DTypeLike, where: str) -> NDArray[Any]:
    with np.errstate(over="ignore"):
        cast_voxels = np.array(voxels, dtype=dtype, order="C")
    finite = np.isfinite(cast_voxels)
    if not finite.all():
        bad = int((~finite).sum())
        first = tuple(int(index) for index in np.argwhere(~finite)[0])
        raise DataError(
            where,
            f"{bad} of {finite.size} voxels are NaN or infinite as {np.dtype(dtype)}, the first at {first}",
            "find out what they mean and write a number, or leave the case out",
        )
    return cast_voxels


def _as_integers(values: NDArray[Any], where: str) -> NDArray[Any]:
    if values.dtype.kind in "iu":
        return values
    rounded = np.rint(values)
    off = np.abs(values - rounded) > INTEGER_TOLERANCE
    if off.any():
        raise DataError(
            where,
            f"{int(off.sum())} voxels of the label are no integers, for example {float(values[off][0]):.6g}",
            "resample labels with nearest-neighbour interpolation, and give probability maps as images",
        )
    return rounded.astype(np.int64)
