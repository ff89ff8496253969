"""TIFF pictures and stacks: the chain of pages walked to its end, every strip and tile there and of the right length.

tifffile fills absent strips with zeros, stops at a broken chain of pages, and only logs what it could not parse; Pillow
takes the first page. So the pages are counted here from the bytes, each strip is inflated within its declared size, and
what tifffile logs is a refusal. Format: Adobe TIFF 6.0, and BigTIFF.
"""

from __future__ import annotations

import logging
import math
import os
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL.TiffImagePlugin import TiffImageFile

from transforms.errors import DataError
from transforms.ingest.image import ImageFile, Request
from transforms.ingest_budget import check_declared
from transforms.ingest_checks import check_real
from transforms.ingest_stream import COPY_AGAIN, opened

_COMPRESSIONS = {1: "none", 5: "LZW", 8: "deflate", 32946: "deflate", 32773: "PackBits"}
_PHOTOMETRIC = {1: "grey", 2: "RGB", 3: "palette", 4: "mask"}
_LZW, _PACKBITS = 5, 32773
_MAX_PAGES = 65_536
_MAX_TAGS = 4096
_SAVE_AGAIN = "save it again as grey or RGB, uncompressed or with deflate, one page per slice"


def read(request: Request) -> ImageFile:
    """Read a TIFF file: (y, x) or (y, x, c), of several pages (z, y, x) or (z, y, x, c); of a palette the indices.

    Raises:
        DataError: a broken or circular chain of pages, pages of several sizes or types, a strip that is absent,
            outside of the file or of another length, a compression or colour that cannot be read exactly.
    """
    where = request.where
    with opened(request.path, where, request.budget) as file, _logged_is_raised(where):
        size = os.fstat(file.fileno()).st_size
        count = _count_pages(file, size, where)
        with tifffile.TiffFile(file, name=request.path.name) as tiff:
            pages = _pages(tiff, count, where)
            first = pages[0]
            dtype = check_real(np.dtype(first.dtype), where) if first.dtype is not None else _refuse_type(first, where)
            shape = (len(pages), *(int(n) for n in first.shape))
            check_declared(shape, dtype.itemsize, where, request.budget)
            for number, page in enumerate(pages):
                _check_page(page, number, first, where)
                _check_segments(page, number, file, size, request)
            request.drained(request.path.parent, [request.path])
            planes = [_plane(page, number, file, where) for number, page in enumerate(pages)]
    values = np.stack(planes) if len(planes) > 1 else planes[0]
    axes = ("z" if len(planes) > 1 else "") + ("yx" if planes[0].ndim == 2 else "yxc")
    return ImageFile(str(request.path), "tiff", values.astype(values.dtype.newbyteorder("="), copy=False), axes)


def _refuse_type(page: Any, where: str) -> np.dtype[Any]:
    raise DataError(where, f"samples of {page.bitspersample} bits cannot be read", _SAVE_AGAIN)


@contextmanager
def _logged_is_raised(where: str) -> Iterator[None]:
    """Turn the first warning of tifffile into a refusal: it stands for something that was passed over."""
    records: list[logging.LogRecord] = []
    thread = threading.get_ident()

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.thread == thread:
                records.append(record)

    handler = Keep(logging.WARNING)
    logger = logging.getLogger("tifffile")
    propagates = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates
    if records:
        raise DataError(where, f"the TIFF is damaged: {records[0].getMessage()}", COPY_AGAIN)


def _count_pages(file: BinaryIO, size: int, where: str) -> int:
    """Return the number of pages, each directory inside of the file and met once."""
    start = file.read(16)
    orders = {b"II": "<", b"MM": ">"}
    order = orders.get(start[:2], "")
    version = struct.unpack(f"{order}H", start[2:4])[0] if order and len(start) == 16 else 0
    if version not in (42, 43):
        raise DataError(where, "no TIFF signature was found", "convert the picture to TIFF, or correct the path")
    big = version == 43
    count_format, offset_format, tag_bytes = (f"{order}Q", f"{order}Q", 20) if big else (f"{order}H", f"{order}I", 12)
    count_bytes, offset_bytes = struct.calcsize(count_format), struct.calcsize(offset_format)
    offset = struct.unpack(offset_format, start[8:16] if big else start[4:8])[0]
    seen: set[int] = set()
    while offset:
        if offset in seen or len(seen) >= _MAX_PAGES:
            problem = "circular" if offset in seen else f"longer than {_MAX_PAGES} pages"
            raise DataError(where, f"the chain of pages is {problem} at byte {offset}", COPY_AGAIN)
        seen.add(offset)
        file.seek(min(offset, size))
        count = file.read(count_bytes)
        tags = struct.unpack(count_format, count)[0] if len(count) == count_bytes else 0
        end = offset + count_bytes + tags * tag_bytes + offset_bytes
        if not 0 < tags <= _MAX_TAGS or end > size:
            raise DataError(
                where,
                f"page {len(seen)} has {tags} tags at byte {offset} and the file {size} bytes: it is truncated",
                COPY_AGAIN,
            )
        file.seek(end - offset_bytes)
        offset = struct.unpack(offset_format, file.read(offset_bytes))[0]
    if not seen:
        raise DataError(where, "the file holds no page", COPY_AGAIN)
    file.seek(0)
    return len(seen)


def _pages(tiff: Any, count: int, where: str) -> list[Any]:
    tiff.pages.useframes = False
    pages = [tiff.pages[index] for index in range(count)]
    metadata = (tiff.shaped_metadata or [{}])[0] if tiff.is_shaped else {}
    planes = int((tiff.imagej_metadata or {}).get("images", count)) if tiff.is_imagej else count
    if metadata.get("truncated") or planes != count:
        raise DataError(
            where, f"the file has {count} pages and voxels of more behind the first", "save one page per slice"
        )
    return pages


def _check_page(page: Any, number: int, first: Any, where: str) -> None:
    place = f"{where}, page {number + 1}"
    if (page.shape, page.dtype) != (first.shape, first.dtype):
        raise DataError(
            place,
            f"it is {page.shape} of {page.dtype}, expected {first.shape} of {first.dtype} as the first",
            "save pages of one size and type; previews and pyramids go into files of their own",
        )
    if page.compression not in _COMPRESSIONS or page.photometric not in _PHOTOMETRIC:
        raise DataError(
            place,
            f"{_name(page.compression)} compression or {_name(page.photometric)} colour cannot be read exactly",
            _SAVE_AGAIN,
        )
    lengths = (page.imagelength, page.imagewidth, page.samplesperpixel, page.bitspersample)
    parts = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip,)
    if not all(isinstance(length, int) and length > 0 for length in (*lengths, *parts)):
        raise DataError(place, f"sizes {lengths}, strips or tiles of {parts}: expected positive numbers", COPY_AGAIN)
    if page.imagedepth != 1 or page.ndim not in (2, 3) or page.fillorder != 1:
        raise DataError(place, f"shape {page.shape}, depth {page.imagedepth}: expected a plane", _SAVE_AGAIN)


def _name(code: Any) -> str:
    return str(getattr(code, "name", f"unknown ({code})"))


def _check_segments(page: Any, number: int, file: BinaryIO, size: int, request: Request) -> None:
    """Prove that every strip or tile is inside of the file and holds the bytes that its part of the page needs."""
    place = f"{request.where}, page {number + 1}"
    expected = _segment_bytes(page)
    offsets, counts = list(page.dataoffsets), list(page.databytecounts)
    if len(offsets) != len(counts) or len(offsets) != len(expected):
        raise DataError(place, f"it has {len(offsets)} strips or tiles, its size needs {len(expected)}", COPY_AGAIN)
    if page.is_tiled:
        check_declared((sum(full for _, full in expected),), 1, place, request.budget)
    for index, (offset, count, (least, full)) in enumerate(zip(offsets, counts, expected, strict=True)):
        if count < 1 or offset < 8 or offset + count > size:
            raise DataError(
                place,
                f"strip or tile {index} of {count} bytes at byte {offset} is not in the file of {size} bytes",
                COPY_AGAIN,
            )
        found = count if page.compression == 1 else _inflated_bytes(page, file, offset, count, full, place)
        if found is not None and not least <= found <= full:
            raise DataError(
                place, f"strip or tile {index} holds {found} bytes, expected {least} (at most {full})", COPY_AGAIN
            )


def _segment_bytes(page: Any) -> list[tuple[int, int]]:
    """Return for every strip or tile the bytes that the page needs of it, and those of a full one."""
    samples = page.samplesperpixel if page.planarconfig == 1 else 1
    planes = page.samplesperpixel // samples
    bits = samples * page.bitspersample
    if page.is_tiled:
        tiles = math.ceil(page.imagelength / page.tilelength) * math.ceil(page.imagewidth / page.tilewidth)
        full = page.tilelength * ((page.tilewidth * bits + 7) // 8)
        return [(full, full)] * (tiles * planes)
    row = (page.imagewidth * bits + 7) // 8
    height = min(page.rowsperstrip, page.imagelength)
    starts = range(0, page.imagelength, height)
    return [(min(height, page.imagelength - start) * row, height * row) for start in starts] * planes


def _inflated_bytes(page: Any, file: BinaryIO, offset: int, count: int, limit: int, place: str) -> int | None:
    """Return the length of a strip as inflated, at most one more than ``limit``; None where only decoding can tell."""
    if page.compression == _LZW:
        return None
    file.seek(offset)
    content = file.read(count)
    if page.compression == _PACKBITS:
        return _packbits_bytes(content)
    inflater = zlib.decompressobj()
    try:
        found = len(inflater.decompress(content, limit + 1))
        if found == limit and not inflater.eof:  # the checksum behind the last byte
            found += len(inflater.decompress(inflater.unconsumed_tail, 1))
    except zlib.error as error:
        raise DataError(place, f"compressed data are corrupt: {error}", COPY_AGAIN) from error
    if found <= limit and not inflater.eof:
        raise DataError(place, f"compressed data are truncated after {found} bytes", COPY_AGAIN)
    return found


def _packbits_bytes(content: bytes) -> int:
    found = position = 0
    while position < len(content):
        code = content[position]
        literal = code < 128
        length = code + 1 if literal else 257 - code if code > 128 else 0
        position += 1 + (length if literal else 1 if code > 128 else 0)
        found += length if position <= len(content) else 0
    return found


def _plane(page: Any, number: int, file: BinaryIO, where: str) -> NDArray[Any]:
    values = _lzw_plane(page, number, file) if page.compression == _LZW else page.asarray()
    if values.shape != page.shape or values.dtype != page.dtype:
        raise DataError(
            f"{where}, page {number + 1}",
            f"decoded as {values.shape} of {values.dtype}, expected {page.shape} of {page.dtype}",
            _SAVE_AGAIN,
        )
    if values.dtype == bool:
        values = values.astype(np.uint8)
    return np.moveaxis(values, 0, -1) if values.ndim == 3 and page.planarconfig == 2 else values


def _lzw_plane(page: Any, number: int, file: BinaryIO) -> NDArray[Any]:
    """Return a page of LZW, which Pillow decodes; it fails where data end before the page is full."""
    file.seek(0)
    with warnings.catch_warnings(), _left_open(TiffImageFile(file)) as picture:
        warnings.simplefilter("error")  # Pillow warns of a tag and goes on without it
        picture.seek(number)
        picture.load()
        return np.array(picture)


@contextmanager
def _left_open(picture: TiffImageFile) -> Iterator[TiffImageFile]:
    """The file belongs to the caller, and the next page needs it."""
    picture._exclusive_fp = False
    yield picture
