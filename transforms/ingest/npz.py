"""NumPy archives (``.npz``): nothing unpickled, sizes known before anything is inflated, every CRC compared.

``read_arrays`` returns several arrays of an archive by name; as an image, one of them is read.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from transforms.errors import DataError
from transforms.ingest.image import ImageFile, Request
from transforms.ingest_budget import Budget, check_declared
from transforms.ingest_checks import check_finite, check_real
from transforms.ingest_stream import COPY_AGAIN, named, opened, read_up_to, reading

_ENDING = ".npy"
_HEADER_BYTES = 10_000  # NumPy's own limit; a header is parsed as a Python literal
_ENCRYPTED = 0x1


def read(request: Request) -> ImageFile:
    """Read the array ``part`` of an archive, or its only one, as it is stored.

    Raises:
        DataError: as ``read_arrays``; several arrays and no ``part``.
    """
    with opened(request.path, request.where, request.budget) as file:
        members = _members(file, request.where, request.budget)
        name = _chosen(members, request.part, request.where)
        values = _array(file, members[name], request.where, request.budget)
    request.drained(request.path.parent, [request.path])
    return ImageFile(f"{request.path}, array {name}", "npz", values)


def read_arrays(
    path: str | Path, required: Iterable[str] = (), *, budget: Budget | None = None, case: str = "", key: str = ""
) -> dict[str, NDArray[Any]]:
    """Return all arrays of an archive by name: real numbers, finite, of one or more axes.

    Args:
        path: the archive.
        required: names that must be there.
        budget: limits; those of voxels count for all arrays together.
        case, key: for the message.

    Raises:
        DataError: no archive or a damaged one, a required array that is missing, objects that would have to be
            unpickled, a header that contradicts the bytes, values that are not finite.
    """
    where, limits = named(path, case, key), budget or Budget.of_environment()
    with opened(path, where, limits) as file, reading(where):
        members = _members(file, where, limits)
        for name in required:
            _chosen(members, name, where)
        arrays = {name: _array(file, member, where, limits) for name, member in members.items()}
    for name, values in arrays.items():
        check_finite(values, f"{where}, array {name}")
    return arrays


def _members(file: BinaryIO, where: str, budget: Budget) -> dict[str, zipfile.ZipInfo]:
    """Return the members of the archive by the name of their array, sizes within the budget."""
    try:
        infos = zipfile.ZipFile(file).infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, IndexError, struct.error) as error:
        raise DataError(where, f"the archive cannot be read: {error}", COPY_AGAIN) from error
    if not infos or len(infos) > budget.files:
        raise DataError(where, f"the archive holds {len(infos)} arrays", "check that it is an .npz file")
    members: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        name = info.filename.removesuffix(_ENDING)
        for problem, found in (
            ("no array", not info.filename.endswith(_ENDING)),
            ("there twice", name in members),
            ("encrypted", bool(info.flag_bits & _ENCRYPTED)),
            ("compressed by another method than deflate", info.compress_type not in (0, zipfile.ZIP_DEFLATED)),
        ):
            if found:
                raise DataError(where, f"member {info.filename!r} is {problem}", "save it again with numpy.savez")
        members[name] = info
    declared = sum(max(0, info.file_size - _HEADER_BYTES) for info in infos)  # all arrays are in memory together
    check_declared((declared,), 1, where, replace(budget, voxels=budget.voxel_bytes))
    return members


def _chosen(members: dict[str, zipfile.ZipInfo], name: str | None, where: str) -> str:
    if name is None and len(members) == 1:
        return next(iter(members))
    if name is None or name not in members:
        wanted = "none is named" if name is None else f"array {name!r} is missing"
        raise DataError(where, f"the archive holds the arrays {sorted(members)}; {wanted}", "name one of them")
    return name


def _array(file: BinaryIO, info: zipfile.ZipInfo, where: str, budget: Budget) -> NDArray[Any]:
    """Return one array; the member is read to its end, where zipfile compares the CRC."""
    place = f"{where}, array {info.filename.removesuffix(_ENDING)}"
    try:
        with zipfile.ZipFile(file) as archive, archive.open(info) as stream:
            shape, fortran, dtype = _header(stream, place)  # type: ignore[arg-type]
            expected = check_declared(shape, dtype.itemsize, place, budget)
            body = read_up_to(stream, expected)  # type: ignore[arg-type]
            tail = stream.read(1)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, struct.error, zlib.error) as error:
        raise DataError(place, f"the archive is corrupt: {error}", COPY_AGAIN) from error
    if len(body) != expected or tail:
        more = "more than " if tail else ""
        raise DataError(place, f"it holds {more}{len(body)} bytes, its header declares {expected}", COPY_AGAIN)
    values = np.frombuffer(body, dtype=dtype).reshape(shape, order="F" if fortran else "C")
    return values.astype(dtype.newbyteorder("="), copy=False)


def _header(stream: BinaryIO, place: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    try:
        version = npy.read_magic(stream)
        readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
        if version not in readers:
            raise ValueError(f"version {version}")
        shape, fortran, dtype = readers[version](stream, max_header_size=_HEADER_BYTES)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise DataError(place, f"no header of an array was found: {error}", COPY_AGAIN) from error
    if dtype.hasobject:
        raise DataError(
            place, "it holds Python objects, which only unpickling could read", "save numbers: unpickling runs code"
        )
    check_real(dtype, place)
    if not shape or min(shape) < 1:
        raise DataError(place, f"the shape is {shape}, expected axes of length 1 or more", "check how it was made")
    return shape, fortran, dtype
