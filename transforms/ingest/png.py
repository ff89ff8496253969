"""PNG pictures: every chunk's CRC compared, the scan lines counted before anything is decoded.

Pillow decodes; what it passes over is found before: a wrong CRC behind the picture, bytes behind the end, more or fewer
scan lines than declared, several frames, 16-bit colour that it would round to 8 bits. Format: W3C PNG specification.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL.PngImagePlugin import PngImageFile

from transforms.errors import DataError
from transforms.ingest.image import ImageFile, Request
from transforms.ingest_budget import check_declared
from transforms.ingest_stream import COPY_AGAIN, opened

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # grey, RGB, palette, grey and alpha, RGB and alpha
_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_SAVE_AGAIN = "save the picture again as PNG or TIFF"
_BLOCK = 1 << 20


def read(request: Request) -> ImageFile:
    """Read a PNG file: values (y, x), or (y, x, c) for colour and alpha, as stored; of a palette the indices.

    Raises:
        DataError: a damaged chunk, bytes missing or too many, several frames, colour of 16 bits, an index outside of
            the palette.
    """
    where = request.where
    with opened(request.path, where, request.budget) as file:
        content = file.read()
    if not content.startswith(_SIGNATURE):
        raise DataError(where, "no PNG signature was found", "convert the picture to PNG, or correct the path")
    # The header first, so that the budget decides before the picture is looked at.
    width, height, depth, colour, interlaced = _header(content, where)
    channels = _CHANNELS[colour]
    check_declared((height, width, channels), 2 if depth == 16 else 1, where, request.budget)
    chunks = list(_chunks(content, where))
    names = [name for name, _ in chunks]
    for problem, found in (
        ("it does not begin with one IHDR and end with one IEND", names.count(b"IHDR") != 1 or names[-1] != b"IEND"),
        ("it has several frames", b"acTL" in names),
        ("it has a palette of the wrong size, or none", not _palette_fits(chunks, colour)),
    ):
        if found:
            raise DataError(where, f"the PNG cannot be used: {problem}", _SAVE_AGAIN)
    if depth == 16 and channels > 1:
        raise DataError(where, "colour of 16 bits, expected 8 (or 16 bits of grey)", "save it as TIFF")
    _count_scan_lines(
        b"".join(data for name, data in chunks if name == b"IDAT"),
        _scan_bytes(width, height, depth * channels, interlaced),
        where,
    )
    request.drained(request.path.parent, [request.path])
    values = _decoded(content, depth, colour)
    expected = (height, width) if channels == 1 else (height, width, channels)
    if values.shape != expected:
        raise DataError(where, f"the picture was decoded as {values.shape}, expected {expected}", _SAVE_AGAIN)
    if colour == 3 and int(values.max()) >= _palette_size(chunks):
        raise DataError(
            where,
            f"index {int(values.max())} is outside of the palette of {_palette_size(chunks)} colours",
            _SAVE_AGAIN,
        )
    return ImageFile(str(request.path), "png", values, "yx" if channels == 1 else "yxc")


def _header(content: bytes, where: str) -> tuple[int, int, int, int, bool]:
    """Return width, height, bits per sample, colour type and whether the picture is interlaced."""
    length, name = struct.unpack(">I4s", content[8:16].ljust(8, b"\0"))
    if name != b"IHDR" or length != 13 or len(content) < 33:
        raise DataError(where, "the PNG does not begin with a header (IHDR of 13 bytes)", COPY_AGAIN)
    width, height, depth, colour, compression, filtering, interlace = struct.unpack(">IIBBBBB", content[16:29])
    if width < 1 or height < 1 or depth not in _DEPTHS.get(colour, ()) or compression or filtering or interlace > 1:
        raise DataError(
            where,
            f"the header declares {width} x {height} pixels, colour type {colour} of {depth} bits, methods "
            f"{compression}, {filtering}, {interlace}: this is no valid PNG",
            COPY_AGAIN,
        )
    return width, height, depth, colour, bool(interlace)


def _chunks(content: bytes, where: str) -> Iterator[tuple[bytes, bytes]]:
    """Yield name and data of every chunk, its CRC compared."""
    position = len(_SIGNATURE)
    while position < len(content):
        length, name = struct.unpack(">I4s", content[position : position + 8].ljust(8, b"\0"))
        end = position + 12 + length
        if end > len(content):
            raise DataError(where, f"the file is truncated in chunk {name!r} at byte {position}", COPY_AGAIN)
        data = content[position + 8 : end - 4]
        if zlib.crc32(name + data) != int.from_bytes(content[end - 4 : end]):
            raise DataError(where, f"chunk {name!r} at byte {position} has a wrong CRC", COPY_AGAIN)
        yield name, data
        position = end
        if name == b"IEND" and position < len(content):
            raise DataError(where, f"{len(content) - position} bytes stand behind the end of the picture", COPY_AGAIN)


def _palette_size(chunks: list[tuple[bytes, bytes]]) -> int:
    return next((len(data) // 3 for name, data in chunks if name == b"PLTE"), 0)


def _palette_fits(chunks: list[tuple[bytes, bytes]], colour: int) -> bool:
    palettes = [data for name, data in chunks if name == b"PLTE"]
    if colour != 3:
        return len(palettes) <= 1
    return len(palettes) == 1 and len(palettes[0]) % 3 == 0 and 3 <= len(palettes[0]) <= 768


def _scan_bytes(width: int, height: int, bits: int, interlaced: bool) -> int:
    """Return the bytes of all scan lines, each with its filter byte, as they are before compression."""
    if not interlaced:
        return height * (1 + (width * bits + 7) // 8)
    total = 0
    for x0, y0, dx, dy in _ADAM7:
        columns, rows = -(-(width - x0) // dx), -(-(height - y0) // dy)
        if columns > 0 and rows > 0:
            total += rows * (1 + (columns * bits + 7) // 8)
    return total


def _count_scan_lines(compressed: bytes, expected: int, where: str) -> None:
    """Inflate block by block, never more than expected, and compare length and Adler checksum."""
    inflater, found = zlib.decompressobj(), 0
    try:
        rest = compressed
        while not inflater.eof and found <= expected:
            block = inflater.decompress(rest, _BLOCK)
            rest, found = inflater.unconsumed_tail, found + len(block)
            if not block and not rest:
                break
    except zlib.error as error:
        raise DataError(where, f"the picture's compressed data are corrupt: {error}", COPY_AGAIN) from error
    if found != expected or not inflater.eof or inflater.unused_data:
        more = "at least " if found > expected else ""
        raise DataError(
            where, f"the file holds {more}{found} bytes of scan lines, its header declares {expected}", COPY_AGAIN
        )


def _decoded(content: bytes, depth: int, colour: int) -> NDArray[Any]:
    # The class itself, not Image.open: the budget above is the one limit on pixels.
    with PngImageFile(io.BytesIO(content)) as picture:
        picture.load()
        values = np.array(picture)
    if values.dtype == bool:
        return values.astype(np.uint8)
    if depth == 16:
        return values.astype(np.uint16)
    if colour == 0 and depth in (2, 4):  # Pillow stretches them to 0 ... 255
        return (values // (255 // (2**depth - 1))).astype(np.uint8)
    return values
