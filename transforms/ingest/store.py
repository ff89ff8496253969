"""Zarr arrays and OME-Zarr images (formats 2 and 3): every chunk there, of the declared size, and inside of the folder.

Zarr takes a chunk that is not there for the fill value, so half a copy reads as half an image of zeros. Here the chunks
that the shape needs are counted first, also inside of shards, and what a chunk will inflate to is read from its first
bytes. Voxel sizes come from ``multiscales`` (OME-Zarr 0.4 and 0.5).
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.storage import LocalStore

from transforms.errors import DataError
from transforms.ingest.image import SPATIAL, ImageFile, Request
from transforms.ingest_budget import (
    Budget,
    check_declared,
    check_file_size,
    check_metadata_size,
    variable,
)
from transforms.ingest_checks import check_affine, check_real, check_spacing
from transforms.ingest_stream import COPY_AGAIN

_METADATA = ("zarr.json", ".zarray", ".zgroup", ".zattrs", ".zmetadata")
_CHUNK_FILE = re.compile(r"(c[/.])?\d+([/.]\d+)*")
_COMPRESSORS = ("gzip", "zlib", "zstd", "blosc")
_ABSENT = 2**64 - 1  # offset and length, in a shard's index, of a chunk that was not written
_FIX = "write valid OME-Zarr metadata"
_CONVERT = "write it again with zarr: chunks on a regular grid, compressed by gzip, zstd or blosc"


@dataclass(frozen=True)
class _Layout:
    """An array as its metadata declare it.

    Attributes:
        version: format, 2 or 3.
        shape, chunks: sizes; for a sharded array ``chunks`` are the shards.
        inner: chunks inside of a shard, or None.
        index_at_end: where a shard keeps its index.
        compressor: name, or None; it works on ``checksummed`` bytes with a CRC32C behind.
        prefix, separator: how the names of chunks are made.
    """

    version: Literal[2, 3]
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: np.dtype[Any]
    compressor: str | None
    checksummed: bool
    prefix: str
    separator: str
    inner: tuple[int, ...] | None = None
    index_at_end: bool = True


def read(request: Request) -> ImageFile:
    """Read an array of a store: ``part`` by its path, or the array itself, or the finest level of an OME-Zarr image.

    Raises:
        DataError: a link out of the folder, metadata that are damaged or contradict the chunks, a chunk that is missing
            (unless ``sparse``) or not of its size, a codec that is not known, no usable voxel size.
    """
    where, root = request.where, request.path
    if not root.is_dir():
        raise DataError(where, "there is no such folder", "give the folder of a Zarr array or group")
    files = _files(root, where, request.budget)
    attributes = {} if _is_array(root) else _attributes(root, request)
    scales = _multiscale(attributes, where)
    part = _chosen(root, scales, request.part, where)
    folder = _inside(root, part, where)
    place = f"{where}, array {part}" if part else where
    layout = _layout(folder, request, place)
    check_declared(layout.shape, layout.dtype.itemsize, place, request.budget)
    check_declared(layout.chunks, layout.dtype.itemsize, place, request.budget)
    _check_chunks(folder, layout, request, place)
    request.drained(root, files)
    values = _values(folder, layout, place)
    axes, affine, spacing, unit = _geometry(scales, part, values.ndim, place)
    return ImageFile(f"{root / part}" if part else str(root), "zarr", values, axes, affine, spacing, unit)


def _files(root: Path, where: str, budget: Budget) -> list[Path]:
    """Return all files of the store: within the budget, and none a link that leads out of it."""
    files, size, real = [], 0, root.resolve()
    for parent, folders, names in os.walk(root):
        for name in [*folders, *names]:
            path = Path(parent, name)
            if path.is_symlink() and (name in folders or not path.resolve().is_relative_to(real)):
                raise DataError(
                    where, f"{path.relative_to(root)} is a link to {os.readlink(path)}", "copy the store with its files"
                )
        files += [Path(parent, name) for name in names]
        size += sum(Path(parent, name).stat().st_size for name in names)
        if len(files) > budget.files:
            raise DataError(
                where,
                f"the store has more files than the budget of {budget.files}",
                f"check it; if it is sound, raise {variable('files')}",
            )
        check_file_size(size, where, budget)
    if not all(path.is_file() for path in files):
        raise DataError(where, "the store holds something that is no regular file", "copy the store with its files")
    return files


def _json(path: Path, request: Request) -> dict[str, Any]:
    where = f"{request.where}, {path.name}"
    check_metadata_size(path.stat().st_size, where, request.budget, "the file")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(where, f"the metadata are no JSON: {error}", COPY_AGAIN) from error
    if not isinstance(value, dict):
        raise DataError(where, "the metadata are no JSON object", COPY_AGAIN)
    return value


def _is_array(folder: Path) -> bool:
    if (folder / ".zarray").is_file():
        return True
    return (folder / "zarr.json").is_file() and not any(
        (child / name).is_file() for child in folder.iterdir() if child.is_dir() for name in ("zarr.json", ".zarray")
    )


def _attributes(root: Path, request: Request) -> dict[str, Any]:
    """Return the attributes of the group, without the step ``ome`` that version 0.5 puts between."""
    if (root / "zarr.json").is_file():
        found = _json(root / "zarr.json", request).get("attributes", {})
    elif (root / ".zgroup").is_file() or (root / ".zattrs").is_file():
        found = _json(root / ".zattrs", request) if (root / ".zattrs").is_file() else {}
    else:
        raise DataError(request.where, "the folder holds no Zarr metadata", "give the folder of an array or group")
    attributes = found if isinstance(found, dict) else {}
    inner = attributes.get("ome", attributes)
    return inner if isinstance(inner, dict) else {}


def _multiscale(attributes: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the one multiscale image of a group, or nothing for a group that is no OME-Zarr image."""
    if "multiscales" not in attributes:
        return {}
    images = attributes["multiscales"]
    if not isinstance(images, list) or len(images) != 1 or not isinstance(images[0], dict):
        raise DataError(where, "multiscales is no list of one image", "keep one image per group")
    return images[0]


def _chosen(root: Path, scales: Mapping[str, Any], part: str | None, where: str) -> str:
    if part is not None:
        return part.strip("/")
    if scales:
        return str(_datasets(scales, where)[0]["path"])
    if _is_array(root):
        return ""
    arrays = sorted(child.name for child in root.iterdir() if child.is_dir() and _is_array(child))
    if len(arrays) == 1:
        return arrays[0]
    raise DataError(where, f"the group holds the arrays {arrays}, and none is named", "name one of them")


def _datasets(scales: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    datasets = scales.get("datasets")
    if (
        not isinstance(datasets, list)
        or not datasets
        or not all(isinstance(item, dict) and isinstance(item.get("path"), str) for item in datasets)
    ):
        raise DataError(where, "multiscales names no datasets with their paths", _FIX)
    return datasets


def _inside(root: Path, part: str, where: str) -> Path:
    parts = PurePosixPath(part).parts
    folder = root.joinpath(*parts)
    if PurePosixPath(part).is_absolute() or ".." in parts or "\\" in part or not folder.is_dir():
        raise DataError(where, f"there is no array {part!r} in the store", "name an array inside of it")
    return folder


def _layout(folder: Path, request: Request, where: str) -> _Layout:
    try:
        if (folder / "zarr.json").is_file():
            return _layout_3(_json(folder / "zarr.json", request), where)
        if (folder / ".zarray").is_file():
            return _layout_2(_json(folder / ".zarray", request), where)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise DataError(
            where, f"the metadata declare no array that can be read: {type(error).__name__} {error}", _CONVERT
        ) from error
    raise DataError(where, "it holds no metadata of an array", COPY_AGAIN)


def _layout_2(raw: Mapping[str, Any], where: str) -> _Layout:
    compressor = raw["compressor"]
    name = None if compressor is None else str(compressor["id"])
    if raw["zarr_format"] != 2 or raw.get("filters") or not isinstance(raw["dtype"], str):
        raise DataError(where, "filters, a structured type, or another format than 2", _CONVERT)
    shape, chunks = _sizes(raw["shape"], raw["chunks"], where)
    return _Layout(
        2, shape, chunks, _dtype(raw["dtype"], where), _compressor(name, where), False, "", _separator(raw, ".", where)
    )


def _layout_3(raw: Mapping[str, Any], where: str) -> _Layout:
    if raw["zarr_format"] != 3 or raw["node_type"] != "array":
        raise DataError(where, f"it is a {raw['node_type']} of format {raw['zarr_format']}", "name an array")
    if raw["chunk_grid"]["name"] != "regular" or raw.get("storage_transformers"):
        raise DataError(where, f"the chunk grid is {raw['chunk_grid']['name']!r}, expected regular", _CONVERT)
    shape, chunks = _sizes(raw["shape"], raw["chunk_grid"]["configuration"]["chunk_shape"], where)
    dtype = _dtype(raw["data_type"], where)
    encoding = raw["chunk_key_encoding"]
    if encoding["name"] not in ("default", "v2"):
        raise DataError(where, f"chunks are named by {encoding['name']!r}, expected default or v2", _CONVERT)
    default = encoding["name"] == "default"
    separator = _separator(encoding.get("configuration", {}), "/" if default else ".", where, "separator")
    prefix = f"c{separator}" if default else ""
    codecs = raw["codecs"]
    if codecs[0]["name"] != "sharding_indexed":
        compressor, checksummed = _pipeline(codecs, where)
        return _Layout(3, shape, chunks, dtype, compressor, checksummed, prefix, separator)
    shard = codecs[0]["configuration"]
    compressor, checksummed = _pipeline(shard["codecs"], where)
    _, inner = _sizes(chunks, shard["chunk_shape"], where)
    index = [codec["name"] for codec in shard["index_codecs"]]
    if len(codecs) > 1 or index != ["bytes", "crc32c"] or any(n % m for n, m in zip(chunks, inner, strict=True)):
        raise DataError(where, "shards within codecs, or an index without checksum", _CONVERT)
    at_end = shard.get("index_location", "end") == "end"
    return _Layout(3, shape, chunks, dtype, compressor, checksummed, prefix, separator, inner, at_end)


def _sizes(shape: Sequence[Any], chunks: Sequence[Any], where: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    numbers = [*shape, *chunks]
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in numbers)
    if not whole or len(shape) != len(chunks) or not shape:
        raise DataError(where, f"shape {list(shape)} in chunks of {list(chunks)}", "correct the metadata")
    return tuple(shape), tuple(chunks)


def _dtype(name: Any, where: str) -> np.dtype[Any]:
    if not isinstance(name, str):
        raise DataError(where, f"data type {str(name)[:60]}, expected integers or floats", _CONVERT)
    return check_real(np.dtype(name), where)


def _separator(raw: Mapping[str, Any], default: str, where: str, key: str = "dimension_separator") -> str:
    separator = raw.get(key, default)
    if separator not in (".", "/"):
        raise DataError(where, f"chunk names are separated by {separator!r}, expected . or /", _CONVERT)
    return str(separator)


def _compressor(name: str | None, where: str) -> str | None:
    if name is not None and name not in _COMPRESSORS:
        raise DataError(
            where, f"chunks are compressed by {name!r}, expected one of {', '.join(_COMPRESSORS)}", _CONVERT
        )
    return name


def _pipeline(codecs: Sequence[Mapping[str, Any]], where: str) -> tuple[str | None, bool]:
    """Return compressor and whether a CRC32C stands behind each chunk, for the codecs of format 3."""
    names = [str(codec["name"]) for codec in codecs if codec["name"] not in ("transpose", "bytes")]
    checksummed = names[-1:] == ["crc32c"]
    names = names[:-1] if checksummed else names
    if len(names) > 1 or sum(codec["name"] == "bytes" for codec in codecs) != 1:
        raise DataError(where, f"the codecs {[codec['name'] for codec in codecs]} are not known together", _CONVERT)
    return _compressor(names[0] if names else None, where), checksummed


def _check_chunks(folder: Path, layout: _Layout, request: Request, where: str) -> None:
    """Prove that the chunks on disk are those of the shape, and that each inflates to its size."""
    grid = [math.ceil(n / m) for n, m in zip(layout.shape, layout.chunks, strict=True)]
    if math.prod(grid) > request.budget.files:
        raise DataError(
            where,
            f"the shape needs {math.prod(grid)} chunks, more than the budget of {request.budget.files} files",
            f"use larger chunks or shards, or raise {variable('files')}",
        )
    expected = {layout.prefix + layout.separator.join(map(str, index)): index for index in product(*map(range, grid))}
    present = set(_chunk_files(folder))
    if surplus := sorted(present - set(expected)):
        raise DataError(
            where, f"chunk {surplus[0]} is outside of the shape {list(layout.shape)} ({len(surplus)} such)", COPY_AGAIN
        )
    if absent := sorted(set(expected) - present):
        _refuse_absent(f"chunk {absent[0]}", len(absent), len(expected), request, where)
    for name in sorted(present):
        content = (folder / name).read_bytes()
        place = f"{where}, chunk {name}"
        if layout.inner is None:
            _check_chunk(content, layout.chunks, layout, place)
            continue
        chunks = list(_inner_chunks(content, expected[name], layout, place))
        if missing := sum(chunk is None for chunk in chunks):
            _refuse_absent(f"a part of shard {name}", missing, len(chunks), request, where)
        for chunk in chunks:
            if chunk is not None:
                _check_chunk(chunk, layout.inner, layout, place)


def _refuse_absent(what: str, absent: int, expected: int, request: Request, where: str) -> None:
    if not request.sparse:
        raise DataError(
            where,
            f"{what} is missing ({absent} of {expected}); it would be read as the fill value",
            "copy the store again; if empty chunks were left out on purpose, write them (write_empty_chunks), or read "
            "with sparse=True",
        )


def _chunk_files(folder: Path) -> Iterator[str]:
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name).relative_to(folder).as_posix()
            if name not in _METADATA and _CHUNK_FILE.fullmatch(path):
                yield path


def _inner_chunks(shard: bytes, position: Sequence[int], layout: _Layout, where: str) -> Iterator[bytes | None]:
    """Yield the chunks of a shard that the shape needs, None for one that was not written.

    Args:
        shard: its bytes.
        position: its index in the grid of shards; beyond the edge of the shape its chunks are not needed.
        layout: of the array.
        where: for the message.
    """
    assert layout.inner is not None
    grid = [n // m for n, m in zip(layout.chunks, layout.inner, strict=True)]
    size = 16 * math.prod(grid) + 4
    index = shard[-size:] if layout.index_at_end else shard[:size]
    if len(shard) < size:
        raise DataError(where, f"the shard has {len(shard)} bytes, its index alone needs {size}", COPY_AGAIN)
    entries = struct.iter_unpack("<QQ", index[:-4])
    for inner, (offset, length) in zip(product(*map(range, grid)), entries, strict=True):
        starts = [p * n + i * m for p, n, i, m in zip(position, layout.chunks, inner, layout.inner, strict=True)]
        if any(start >= end for start, end in zip(starts, layout.shape, strict=True)):
            continue
        if offset == length == _ABSENT:
            yield None
        elif offset + length > len(shard):
            raise DataError(where, f"{length} bytes at byte {offset} are not in its {len(shard)} bytes", COPY_AGAIN)
        else:
            yield shard[offset : offset + length]


def _check_chunk(content: bytes, shape: Sequence[int], layout: _Layout, where: str) -> None:
    expected = math.prod(shape) * layout.dtype.itemsize
    if layout.checksummed:
        content = content[:-4]  # compared by zarr when it decodes
    found = _declared_bytes(content, layout.compressor, expected, where)
    if found != expected:
        raise DataError(where, f"it holds {found} bytes, expected {expected}", COPY_AGAIN)


def _declared_bytes(content: bytes, compressor: str | None, limit: int, where: str) -> int:
    """Return the bytes that a chunk says it inflates to, before it does."""
    if compressor is None:
        return len(content)
    if compressor == "blosc":
        inflated, _, compressed = struct.unpack("<III", content[4:16].ljust(12, b"\0"))
        return inflated if compressed == len(content) else -1
    if compressor == "zstd":
        return _zstd_bytes(content, where)
    inflater = zlib.decompressobj(wbits=31 if compressor == "gzip" else 15)
    try:
        found = len(inflater.decompress(content, limit + 1))
        if found == limit and not inflater.eof:  # the checksum behind the last byte
            found += len(inflater.decompress(inflater.unconsumed_tail, 1))
    except zlib.error as error:
        raise DataError(where, f"compressed data are corrupt: {error}", COPY_AGAIN) from error
    if found <= limit and (not inflater.eof or inflater.unused_data):
        raise DataError(where, f"compressed data are truncated, or more follow, after {found} bytes", COPY_AGAIN)
    return found


def _zstd_bytes(content: bytes, where: str) -> int:
    """Return the content size of a Zstandard frame (RFC 8878, section 3.1.1.1), which its header may state."""
    if content[:4] != b"\x28\xb5\x2f\xfd" or len(content) < 6:
        raise DataError(where, "it is no Zstandard frame", COPY_AGAIN)
    descriptor = content[4]
    single = descriptor >> 5 & 1
    width = (single, 2, 4, 8)[descriptor >> 6]
    start = 5 + (1 - single) + (0, 1, 2, 4)[descriptor & 3]
    if not width or len(content) < start + width:
        raise DataError(where, "the Zstandard frame does not state the size of its content", _CONVERT)
    return int.from_bytes(content[start : start + width], "little") + (256 if width == 2 else 0)


def _values(folder: Path, layout: _Layout, where: str) -> NDArray[Any]:
    try:
        array = zarr.open_array(LocalStore(folder, read_only=True), mode="r", zarr_format=layout.version)
        values = np.asarray(array[...])
    except MemoryError:
        raise
    except Exception as error:  # every codec raises its own
        raise DataError(where, f"a chunk cannot be decoded: {type(error).__name__}: {error}", COPY_AGAIN) from error
    if values.shape != layout.shape:
        raise DataError(where, f"decoded as {values.shape}, expected {layout.shape}", _CONVERT)
    return np.asarray(values, dtype=values.dtype.newbyteorder("="))


def _geometry(
    scales: Mapping[str, Any], part: str, dimensions: int, where: str
) -> tuple[str, NDArray[np.float64] | None, tuple[float, ...] | None, str]:
    """Return axes, affine, spacing and unit by OME-Zarr's metadata; nothing where there are none."""
    if not scales:
        return "", None, None, ""
    dataset = next((item for item in _datasets(scales, where) if item["path"] == part), None)
    if dataset is None:
        raise DataError(where, "multiscales does not name this array", "name one of its datasets")
    raw_axes = scales.get("axes")
    axes = raw_axes if isinstance(raw_axes, list) and all(isinstance(axis, dict) for axis in raw_axes) else []
    names = "".join(str(axis.get("name", "")) for axis in axes)
    space = [index for index, name in enumerate(names) if name in SPATIAL]
    if len(names) != dimensions or len(set(names)) != dimensions or set(names) - set("tczyx") or len(space) < 2:
        raise DataError(where, f"the axes are {names!r} for {dimensions} dimensions, expected some of t c z y x", _FIX)
    units = {str(axes[index].get("unit", "")) for index in space}
    if len(units) != 1:
        raise DataError(where, f"the axes in space have the units {sorted(units)}, expected one", _FIX)
    scale, shift = np.ones(dimensions), np.zeros(dimensions)
    for owner in (dataset, scales):  # those of the image come after those of its levels
        for step in owner.get("coordinateTransformations", []) or []:
            values = _step(step, dimensions, where)
            scale, shift = (scale * values, shift * values) if step["type"] == "scale" else (scale, shift + values)
    if "coordinateTransformations" not in dataset:
        raise DataError(where, "the level has no coordinateTransformations, so no voxel size", _FIX)
    affine = np.eye(len(space) + 1)
    affine[:-1, :-1] = np.diag(scale[space])
    affine[:-1, -1] = shift[space]
    spacing = tuple(float(size) for size in scale[space])
    check_spacing(spacing, where, limits=None)
    check_affine(affine, where)
    return names, affine, spacing, units.pop()


def _step(step: Any, dimensions: int, where: str) -> NDArray[np.float64]:
    kind = step.get("type") if isinstance(step, dict) else None
    values = step.get(kind) if kind in ("scale", "translation") else None
    numbers = isinstance(values, list) and all(isinstance(n, int | float) and not isinstance(n, bool) for n in values)
    if not numbers or len(values) != dimensions:  # type: ignore[arg-type]
        raise DataError(where, f"the coordinate transformation {str(step)[:80]} cannot be used", _FIX)
    return np.asarray(values, dtype=np.float64)
