"""NRRD files (``.nrrd``, ``.nhdr``): the header judged, every byte of voxels counted, the gzip checksum compared.

ITK fills voxels that a truncated file does not have with zeros and says nothing. So header and bytes are held against
each other here; once they are, decoding is a reshape. Format: Teem's definition of NRRD0001 to NRRD0005.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from transforms.errors import DataError
from transforms.ingest.image import ImageFile, Request
from transforms.ingest_budget import check_declared, check_metadata_size
from transforms.ingest_checks import check_affine, check_spacing
from transforms.ingest_stream import COPY_AGAIN, inflated, opened, read_body

_MAGIC = re.compile(r"NRRD000[1-5]")
_TYPES = {
    "int8": "int8, int8_t, signed char",
    "uint8": "uint8, uint8_t, uchar, unsigned char",
    "int16": "int16, int16_t, short, short int, signed short, signed short int",
    "uint16": "uint16, uint16_t, ushort, unsigned short, unsigned short int",
    "int32": "int32, int32_t, int, signed int",
    "uint32": "uint32, uint32_t, uint, unsigned int",
    "int64": "int64, int64_t, longlong, long long, long long int, signed long long, signed long long int",
    "uint64": "uint64, uint64_t, ulonglong, unsigned long long, unsigned long long int",
    "float32": "float",
    "float64": "double",
}
_DTYPES = {name: dtype for dtype, names in _TYPES.items() for name in names.split(", ")}
_SPACES = {  # signs that turn the named directions into right, anterior, superior
    "right-anterior-superior": (1, 1, 1),
    "ras": (1, 1, 1),
    "left-anterior-superior": (-1, 1, 1),
    "las": (-1, 1, 1),
    "left-posterior-superior": (-1, -1, 1),
    "lps": (-1, -1, 1),
}
_SYNONYMS = {"datafile": "data file", "lineskip": "line skip", "byteskip": "byte skip"}
_VECTOR = re.compile(r"none|\([^()]*\)")
_SAVE_AGAIN = "save the image again as a single .nrrd file with raw or gzip encoding"


def read(request: Request) -> ImageFile:
    """Read an NRRD file: voxels (x, y, z), or (x, y, z, c) with an axis outside of space moved behind.

    Raises:
        DataError: another encoding or space, voxels in several files or outside the folder of the header, a header that
            contradicts itself or the number of bytes, no orientation in space that could be used.
    """
    where = request.where
    with opened(request.path, where, request.budget) as file:
        fields = _parse(file, request)
        shape, dtype = _layout(fields, where)
        expected = check_declared(shape, dtype.itemsize, where, request.budget)
        encoding = fields.get("encoding", "").lower()
        if encoding not in ("raw", "gzip", "gz"):
            raise DataError(where, f"the encoding is {encoding!r}, expected raw or gzip", _SAVE_AGAIN)
        data = fields.get("data file")
        if data is None:
            files = [request.path]
            body = _body(file, encoding, expected, where)
        else:
            files = [request.path, _beside(request.path, data, where)]
            with opened(files[1], where, request.budget) as voxels_file:
                body = _body(voxels_file, encoding, expected, where)
    request.drained(request.path.parent, files)
    axis = _channel_axis(fields, len(shape), where)
    affine, spacing = _geometry(fields, axis, len(shape), where)
    voxels = np.frombuffer(body, dtype=dtype).reshape(shape, order="F")
    voxels = voxels.astype(dtype.newbyteorder("="), copy=False)
    axes = "xyz"[: len(shape) - (axis is not None)]
    if axis is not None:
        voxels, axes = np.moveaxis(voxels, axis, -1), axes + "c"
    unit = "mm" if affine is not None or _units(fields) else ""
    return ImageFile(str(request.path), "nrrd", voxels, axes, affine, spacing, unit)


def _parse(file: BinaryIO, request: Request) -> dict[str, str]:
    """Return the fields of the header; the file stands behind the empty line that ends it."""
    where, fields, used = request.where, {}, 0
    first = True
    while True:
        line = file.readline(request.budget.metadata_bytes + 1 - used)
        used += len(line)
        check_metadata_size(used, where, request.budget)
        text = line.rstrip(b"\r\n").decode("latin-1")
        if first and not _MAGIC.fullmatch(text):
            raise DataError(where, "no NRRD header was found", "convert the image to .nrrd, or correct the path")
        if not line or not text:
            break
        if not first and not text.startswith("#") and ":=" not in text:
            name, colon, value = text.partition(":")
            name = _SYNONYMS.get(name.strip().lower(), name.strip().lower())
            if not colon or name in fields:
                problem = "stands twice" if colon else "is no field"
                raise DataError(where, f"the line {text[:60]!r} of the header {problem}", COPY_AGAIN)
            fields[name] = value.strip()
        first = False
    if not line and "data file" not in fields:
        raise DataError(where, "the header has no end: no empty line before the voxels", COPY_AGAIN)
    return fields


def _layout(fields: Mapping[str, str], where: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    for name in ("type", "dimension", "sizes", "encoding"):
        if name not in fields:
            raise DataError(where, f"the header has no field {name!r}", COPY_AGAIN)
    for name in ("line skip", "byte skip"):
        if fields.get(name, "0") != "0":
            raise DataError(where, f"the header has {name} {fields[name]}, expected none", _SAVE_AGAIN)
    sizes = fields["sizes"].split()
    if not all(size.isdecimal() for size in [fields["dimension"], *sizes]):
        raise DataError(where, f"sizes {fields['sizes']!r} and dimension {fields['dimension']!r}", COPY_AGAIN)
    shape = tuple(int(size) for size in sizes)
    if len(shape) != int(fields["dimension"]) or len(shape) not in (3, 4) or min(shape, default=0) < 1:
        raise DataError(
            where,
            f"dimension {fields['dimension']}, sizes {fields['sizes']}; expected 3 axes, or 4 with channels",
            "convert the image to a three-dimensional volume",
        )
    kind = " ".join(fields["type"].lower().split())
    if kind not in _DTYPES:
        raise DataError(where, f"data type {fields['type']!r}, expected integers or floats", "store real numbers")
    dtype = np.dtype(_DTYPES[kind])
    if dtype.itemsize == 1:
        return shape, dtype
    endian = fields.get("endian", "").lower()
    if endian not in ("little", "big"):
        raise DataError(where, f"endian {endian!r}, expected little or big", "write the byte order into the header")
    return shape, dtype.newbyteorder("<" if endian == "little" else ">")


def _body(file: BinaryIO, encoding: str, expected: int, where: str) -> bytearray:
    stream = inflated(file) if encoding != "raw" else file
    if encoding != "raw" and stream is file:
        raise DataError(where, "the header declares gzip, its voxels are none", COPY_AGAIN)
    return read_body(stream, expected, where)


def _beside(header: Path, name: str, where: str) -> Path:
    """Return the file that a detached header names, which must lie in or below its folder."""
    folder = header.resolve().parent
    file = (folder / name).resolve()
    if name.upper().startswith("LIST") or "%" in name or not file.is_relative_to(folder) or file == header.resolve():
        raise DataError(where, f"its data file is {name!r}, expected one file in the folder of the header", _SAVE_AGAIN)
    return header.parent / file.relative_to(folder)


def _channel_axis(fields: Mapping[str, str], axes: int, where: str) -> int | None:
    """Return which of four axes is not in space, None for three."""
    if axes == 3:
        return None
    if "space directions" in fields:
        outside = [index for index, text in enumerate(_VECTOR.findall(fields["space directions"])) if text == "none"]
    else:
        kinds = fields.get("kinds", "").lower().split()
        outside = [index for index, kind in enumerate(kinds) if kind not in ("domain", "space")]
    if len(outside) != 1 or outside[0] >= axes:
        raise DataError(
            where, f"{len(outside)} of 4 axes are said to be no axes of space, expected 1", "name it in kinds"
        )
    return outside[0]


def _geometry(
    fields: Mapping[str, str], channel: int | None, axes: int, where: str
) -> tuple[NDArray[np.float64] | None, tuple[float, ...] | None]:
    """Return the affine to RAS+ mm and the spacing; without a space the affine is None."""
    if set(_units(fields)) - {"mm", "millimeter", "millimeters"}:
        raise DataError(where, f"space units {_units(fields)}, expected mm", "convert the lengths to mm")
    inside = [axis for axis in range(axes) if axis != channel]
    if "space directions" not in fields:
        if any(name in fields for name in ("space", "space origin")):
            raise DataError(where, "the header names a space and no space directions", "write them into the header")
        return None, _spacings(fields, inside, axes, where)
    space = fields.get("space", "").lower()
    if space not in _SPACES:
        raise DataError(
            where,
            f"the space is {space!r}, expected one of {', '.join(_SPACES)}",
            "write into the header how the patient lies",
        )
    vectors = _VECTOR.findall(fields["space directions"])
    directions = [_vector(vectors[axis], where) for axis in inside] if len(vectors) == axes else []
    if not directions:
        raise DataError(where, f"{len(vectors)} space directions for {axes} axes", "correct the header")
    if "space origin" not in fields:
        raise DataError(where, "the header has space directions and no space origin", "write it into the header")
    affine = np.eye(4)
    affine[:3, :3] = np.array(directions).T
    affine[:3, 3] = _vector(fields["space origin"], where)
    affine = np.diag([*_SPACES[space], 1]) @ affine
    lengths = check_affine(affine, where)
    check_spacing(lengths, where)
    return affine, lengths


def _spacings(fields: Mapping[str, str], inside: list[int], axes: int, where: str) -> tuple[float, ...] | None:
    if "spacings" not in fields:
        return None
    values = [_number(text, where) for text in fields["spacings"].split()]
    if len(values) != axes:
        raise DataError(where, f"{len(values)} spacings for {axes} axes", "correct the header")
    spacing = tuple(values[axis] for axis in inside)
    check_spacing(spacing, where)
    return spacing


def _units(fields: Mapping[str, str]) -> list[str]:
    return [
        unit.lower() for unit in re.findall(r'"([^"]*)"', fields.get("space units", fields.get("units", ""))) if unit
    ]


def _vector(text: str, where: str) -> list[float]:
    values = [_number(part, where) for part in text.strip("() ").split(",")]
    if len(values) != 3:
        raise DataError(where, f"the vector {text!r} has {len(values)} entries, expected 3", "correct the header")
    return values


def _number(text: str, where: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise DataError(where, f"found {text.strip()!r}, expected a number", "correct the header") from error
