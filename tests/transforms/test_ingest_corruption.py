"""The corruption matrix: every way in which an image file can be damaged, planted with 20 seeds, and none accepted.

A row is a sound file, what is done to it, and a word of the refusal, which proves that it was refused for that reason.
The sound file of every row is read first and must be accepted.
"""

from __future__ import annotations

import gzip
import json
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numcodecs
import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image
from zarr.codecs import BloscCodec, GzipCodec

from transforms.errors import DataError
from transforms.ingest import Budget, read_image
from transforms.ingest_stream import content_digest

Rng = np.random.Generator
SEEDS = range(20)
SMALL = Budget(voxels=20_000, voxel_bytes=80_000, metadata_bytes=20_000, files=200)


@dataclass(frozen=True)
class Row:
    """A sound file by ``make``, the damage, a word of the refusal, options of the reader, whether a digest is known."""

    name: str
    make: Callable[[Path, Rng], None]
    damage: Callable[[Path, Rng], Any]
    word: str
    options: dict[str, Any] = field(default_factory=dict)
    digest: bool = False


def sizes(rng: Rng, axes: int, least: int = 5, most: int = 12) -> tuple[int, ...]:
    return tuple(int(n) for n in rng.integers(least, most, size=axes))


def noise(rng: Rng, shape: tuple[int, ...], dtype: str = "int16") -> np.ndarray:
    """Voxels that compress badly, so that damage hits them."""
    if np.dtype(dtype).kind == "f":
        return rng.normal(size=shape).astype(dtype)
    return rng.integers(1, 250, size=shape).astype(dtype)


def flip(path: Path, rng: Rng, start: int, end: int) -> None:
    """Flip a bit between two positions, counted from the end where they are not positive (the first: negative)."""
    content = bytearray(path.read_bytes())
    first = start if start >= 0 else len(content) + start
    content[int(rng.integers(first, end if end > 0 else len(content) + end))] ^= 1 << int(rng.integers(8))
    path.write_bytes(bytes(content))


def cut(path: Path, rng: Rng, least: int = 1) -> None:
    """Keep a part, at least the first byte and never all."""
    content = path.read_bytes()
    path.write_bytes(content[: int(rng.integers(least, len(content) - 1))])


# --- NIfTI ---------------------------------------------------------------------------------------------------------


def nifti(path: Path, rng: Rng, dtype: str = "int16", axes: int = 3) -> None:
    affine = np.diag([*rng.uniform(0.5, 4, size=3), 1.0])
    affine[:3, 3] = rng.uniform(-90, 90, size=3)
    nib.save(nib.Nifti1Image(noise(rng, sizes(rng, axes), dtype), affine), path)


def nifti_float(path: Path, rng: Rng) -> None:
    nifti(path, rng, "float32")


def patch(path: Path, offset: int, layout: str, *values: Any) -> None:
    raw = path.read_bytes()
    content = bytearray(gzip.decompress(raw) if path.suffix == ".gz" else raw)
    struct.pack_into("<" + layout, content, offset, *values)
    path.write_bytes(gzip.compress(bytes(content)) if path.suffix == ".gz" else bytes(content))


def header(offset: int, layout: str, *values: Any) -> Callable[[Path, Rng], None]:
    return lambda path, rng: patch(path, offset, layout, *values)


def spoiled_voxel(value: float) -> Callable[[Path, Rng], None]:
    def damage(path: Path, rng: Rng) -> None:
        image = nib.load(path)
        voxels = image.get_fdata(dtype=np.float32)
        voxels[tuple(rng.integers(0, voxels.shape))] = value
        nib.save(nib.Nifti1Image(voxels, image.affine), path)

    return damage


def gzip_crc(path: Path, rng: Rng) -> None:
    flip(path, rng, path.stat().st_size - 8, 0)


def zero_row(path: Path, rng: Rng) -> None:
    patch(path, 280 + 16 * int(rng.integers(3)), "4f", 0, 0, 0, 0)


def changed_size(by: int) -> Callable[[Path, Rng], None]:
    def damage(path: Path, rng: Rng) -> None:
        axis = int(rng.integers(3))
        patch(path, 42 + 2 * axis, "h", nib.load(path).shape[axis] + by * int(rng.integers(1, 4)))

    return damage


def shifted_voxels(path: Path, rng: Rng) -> None:
    """A wrong offset, hidden by zero bytes behind the voxels: everything would move by a few voxels."""
    by = int(rng.integers(1, 16)) * 16
    path.write_bytes(path.read_bytes() + bytes(by))
    patch(path, 108, "f", 352.0 + by)


def gzip_bomb(path: Path, rng: Rng) -> None:
    """Zeros behind a header that does not speak of them; and all that it does speak of."""
    content = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(content + bytes(2_000_000)))


def declared_bomb(path: Path, rng: Rng) -> None:
    content = bytearray(gzip.decompress(path.read_bytes())[:352])
    struct.pack_into("<3h", content, 42, *(int(n) for n in rng.integers(500, 30_000, size=3)))
    path.write_bytes(gzip.compress(bytes(content) + bytes(3_000_000)))


def one_spacing(value: float) -> Callable[[Path, Rng], None]:
    return lambda path, rng: patch(path, 80 + 4 * int(rng.integers(3)), "f", value)


def small_spacing(path: Path, rng: Rng) -> None:
    """A consistent header whose lengths were written in metres."""
    image = nib.load(path)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), np.diag([2e-5, 2e-5, 2e-5, 1])), path)


def other_content(path: Path, rng: Rng) -> None:
    path.write_bytes(rng.bytes(int(rng.integers(0, 2000))))


NIFTI = [
    Row("gzip_crc", nifti, gzip_crc, "corrupt|bytes of voxels"),
    Row("gzip_bit", nifti, lambda p, r: flip(p, r, 30, -9), "gzip|bytes of voxels|header|declares|axes"),
    Row("gzip_cut", nifti, cut, "truncated|header|gzip"),
    Row("gzip_garbage_behind", nifti, lambda p, r: p.write_bytes(p.read_bytes() + b"x" + r.bytes(9)), "corrupt"),
    Row("nan", nifti_float, spoiled_voxel(np.nan), "NaN"),
    Row("infinity", nifti_float, spoiled_voxel(-np.inf), "infinite"),
    Row("affine_row_zero", nifti, zero_row, "not invertible"),
    Row("affine_zero", nifti, header(280, "12f", *[0.0] * 12), "not invertible"),
    Row("affine_nan", nifti, header(284, "f", np.nan), "not finite"),
    Row("affine_not_that_of_pixdim", nifti, one_spacing(7.5), "pixdim says"),
    Row("spacing_zero", nifti, one_spacing(0.0), "spacing"),
    Row("spacing_negative", nifti, one_spacing(-1.0), "spacing"),
    Row("spacing_nan", nifti, one_spacing(np.nan), "spacing"),
    Row("spacing_in_metres", nifti, small_spacing, "expected 0.0001 to 1000 mm"),
    Row("unit_micrometre", nifti, header(123, "B", 3), "micrometres"),
    Row("orientation_unknown", nifti, header(252, "2h", 0, 0), "no orientation"),
    Row("orientation_code_negative", nifti, header(254, "h", -2), "codes"),
    Row("more_voxels_declared", nifti, changed_size(1), "bytes of voxels"),
    Row("fewer_voxels_declared", nifti, changed_size(-1), "bytes of voxels"),
    Row("size_overflows_64_bit", nifti, header(40, "8h", 7, *[32767] * 7), "axes|budget"),
    Row("size_negative", nifti, header(42, "h", -5), "axes"),
    Row("declared_bomb", nifti, declared_bomb, "budget"),
    Row("gzip_bomb", nifti, gzip_bomb, "at least"),
    Row("larger_than_the_budget", nifti, lambda p, r: p.write_bytes(bytes(2000)), "budget", {"budget": Budget(1999)}),
    Row("five_axes", nifti, lambda p, r: nifti(p, r, axes=5), "5 axes"),
    Row("two_axes", nifti, header(40, "h", 2), "2 axes"),
    Row("voxel_width", nifti, header(72, "h", 32), "bits per voxel"),
    Row("type_unknown", nifti, header(70, "h", 77), "unknown data type"),
    Row("type_complex", nifti, lambda p, r: nifti(p, r, "complex64"), "complex64"),
    Row("scaling_overflows", nifti_float, header(112, "2f", 3e38, 3e38), "infinite"),
    Row("scaling_infinite", nifti, header(116, "f", np.inf), "scaling"),
    Row("offset_inside_header", nifti, header(108, "f", 348.0), "inside the header"),
    Row("offset_endless", nifti, header(108, "f", 3e38), "budget"),
    Row("offset_of_a_fraction", nifti, header(108, "f", 352.5), "inside the header"),
    Row("offset_shifted", nifti, shifted_voxels, "no extension"),
    Row("other_content", nifti, other_content, "no single-file NIfTI"),
    Row("absent", nifti, lambda p, r: p.unlink(), "does not exist"),
]
NIFTI_PLAIN = [
    Row("cut", nifti, lambda p, r: cut(p, r, 4), "bytes of voxels|no single-file NIfTI|bytes that are no"),
    Row("offset_shifted", nifti, shifted_voxels, "no extension"),
    Row("bytes_behind", nifti, lambda p, r: p.write_bytes(p.read_bytes() + b"\1" * 40), "at least"),
    Row("changed_voxel", nifti, lambda p, r: flip(p, r, 352, 0), "sha256", digest=True),
]

# --- NRRD ----------------------------------------------------------------------------------------------------------


def nrrd(path: Path, rng: Rng, encoding: str = "gzip", dtype: str = "short") -> None:
    shape = sizes(rng, 3)
    voxels = noise(rng, shape, {"short": "<i2", "float": "<f4"}[dtype]).tobytes(order="F")
    body = gzip.compress(voxels) if encoding == "gzip" else voxels
    lines = [
        "NRRD0004",
        "# written by a test",
        f"type: {dtype}",
        "dimension: 3",
        "space: left-posterior-superior",
        f"sizes: {' '.join(map(str, shape))}",
        "space directions: (0.5,0,0) (0,1.5,0) (0,0,3)",
        "kinds: domain domain domain",
        "endian: little",
        f"encoding: {encoding}",
        "space origin: (10,-20,30)",
        "comment:=free text",
    ]
    path.write_bytes("\n".join([*lines, "", ""]).encode() + body)


def nrrd_raw(path: Path, rng: Rng) -> None:
    nrrd(path, rng, "raw")


def nrrd_float(path: Path, rng: Rng) -> None:
    nrrd(path, rng, "raw", "float")


def line(start: str, new: str | None) -> Callable[[Path, Rng], None]:
    """Replace a line of the header, or take it away."""

    def damage(path: Path, rng: Rng) -> None:
        head, body = path.read_bytes().split(b"\n\n", 1)
        lines = [old for old in head.decode().split("\n") if new is not None or not old.startswith(start)]
        changed = [new if old.startswith(start) and new is not None else old for old in lines]
        path.write_bytes("\n".join(changed).encode() + b"\n\n" + body)

    return damage


def nrrd_nan(path: Path, rng: Rng) -> None:
    content = path.read_bytes()
    at = content.index(b"\n\n") + 2 + 4 * int(rng.integers(100))
    path.write_bytes(content[:at] + struct.pack("<f", np.nan) + content[at + 4 :])


def data_file(name: str) -> Callable[[Path, Rng], None]:
    def damage(path: Path, rng: Rng) -> None:
        (path.parent.parent / "outside.raw").write_bytes(bytes(5000))
        line("comment", f"data file: {name}")(path, rng)

    return damage


NRRD = [
    Row("gzip_crc", nrrd, gzip_crc, "corrupt|bytes of voxels"),
    Row("gzip_cut", nrrd, lambda p, r: cut(p, r, 300), "truncated|gzip"),
    Row("raw_cut", nrrd_raw, lambda p, r: cut(p, r, 300), "bytes of voxels"),
    Row("header_cut", nrrd, lambda p, r: p.write_bytes(p.read_bytes()[: int(r.integers(3, 200))]), "header|field"),
    Row("header_endless", nrrd, lambda p, r: p.write_bytes(b"NRRD0004\n" + b"#\n" * 20_000), "budget"),
    Row("bytes_behind", nrrd_raw, lambda p, r: p.write_bytes(p.read_bytes() + b"\7" * 9), "at least"),
    Row("changed_voxel", nrrd_raw, lambda p, r: flip(p, r, -100, 0), "sha256", digest=True),
    Row("sizes_too_many", nrrd, line("sizes", "sizes: 5 5 5 5"), "dimension 3"),
    Row("sizes_wrong", nrrd, line("sizes", "sizes: 30 20 20"), "bytes of voxels"),
    Row("sizes_bomb", nrrd, line("sizes", "sizes: 90000 90000 90000"), "budget"),
    Row("sizes_no_numbers", nrrd, line("sizes", "sizes: 5 five 5"), "sizes"),
    Row("nan", nrrd_float, nrrd_nan, "NaN"),
    Row("direction_zero", nrrd, line("space dir", "space directions: (0,0,0) (0,1,0) (0,0,1)"), "not invertible"),
    Row("direction_nan", nrrd, line("space dir", "space directions: (nan,0,0) (0,1,0) (0,0,1)"), "not finite"),
    Row("direction_missing", nrrd, line("space dir", "space directions: (1,0,0) (0,1,0)"), "2 space directions"),
    Row("origin_missing", nrrd, line("space origin", None), "no space origin"),
    Row("space_unknown", nrrd, line("space:", "space: scanner-xyz"), "scanner-xyz"),
    Row("unit_micrometre", nrrd, line("comment", 'space units: "um" "um" "um"'), "space units"),
    Row("endian_missing", nrrd, line("endian", None), "endian"),
    Row("encoding_unknown", nrrd, line("encoding", "encoding: bzip2"), "encoding"),
    Row("encoding_untrue", nrrd_raw, line("encoding", "encoding: gzip"), "declares gzip"),
    Row("field_twice", nrrd, line("comment", "type: float"), "twice"),
    Row("type_block", nrrd, line("type", "type: block"), "block"),
    Row("data_file_outside", nrrd, data_file("../outside.raw"), "in the folder"),
    Row("data_file_absolute", nrrd, data_file("/etc/hostname"), "in the folder"),
    Row("data_file_list", nrrd, data_file("LIST"), "in the folder"),
    Row("data_file_missing", nrrd, data_file("gone.raw"), "does not exist"),
    Row("other_content", nrrd, other_content, "no NRRD header"),
]

# --- PNG -----------------------------------------------------------------------------------------------------------


def png(path: Path, rng: Rng) -> None:
    Image.fromarray(noise(rng, sizes(rng, 2, 20, 40), "uint8")).save(path)


def png_palette(path: Path, rng: Rng) -> None:
    picture = Image.fromarray(rng.integers(0, 4, size=sizes(rng, 2, 20, 40)).astype(np.uint8))
    picture.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    picture.save(path, bits=8)


def chunks_of(path: Path) -> list[tuple[bytes, bytes]]:
    content, at, chunks = path.read_bytes(), 8, []
    while at < len(content):
        length = int.from_bytes(content[at : at + 4])
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
        at += 12 + length
    return chunks


def rewrite(path: Path, change: Callable[[bytes, bytes], list[tuple[bytes, bytes]]]) -> None:
    """Write the chunks again, changed, with CRCs that are right."""
    parts = [part for name, data in chunks_of(path) for part in change(name, data)]
    raw = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + raw)


def png_header(change: Callable[[list[int], Rng], None]) -> Callable[[Path, Rng], None]:
    def damage(path: Path, rng: Rng) -> None:
        def edit(name: bytes, data: bytes) -> list[tuple[bytes, bytes]]:
            if name != b"IHDR":
                return [(name, data)]
            values = list(struct.unpack(">IIBBBBB", data))
            change(values, rng)
            return [(name, struct.pack(">IIBBBBB", *values))]

        rewrite(path, edit)

    return damage


def taller(values: list[int], rng: Rng) -> None:
    values[1] += int(rng.choice([-2, -1, 1, 2, 3]))


def huge(values: list[int], rng: Rng) -> None:
    values[0], values[1] = (int(n) for n in rng.integers(30_000, 2**31 - 1, size=2))


def png_picture(change: Callable[[bytes, Rng], bytes]) -> Callable[[Path, Rng], None]:
    return lambda path, rng: rewrite(path, lambda n, d: [(n, change(d, rng) if n == b"IDAT" else d)])


def wrong_adler(data: bytes, rng: Rng) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1 << int(rng.integers(8))])


def png_index(path: Path, rng: Rng) -> None:
    rewrite(path, lambda n, d: [(n, d[:6] if n == b"PLTE" else d)])  # two colours of four are gone


def png_drop(gone: bytes) -> Callable[[Path, Rng], None]:
    return lambda path, rng: rewrite(path, lambda n, d: [] if n == gone else [(n, d)])


PNG = [
    Row("any_bit", png, lambda p, r: flip(p, r, 0, 0), "CRC|signature|truncated|header|valid PNG|bytes"),
    Row("cut", png, cut, "truncated|signature|header|IEND"),
    Row("end_missing", png, png_drop(b"IEND"), "IEND"),
    Row("picture_missing", png, png_drop(b"IDAT"), "0 bytes of scan lines"),
    Row("bytes_behind", png, lambda p, r: p.write_bytes(p.read_bytes() + r.bytes(5)), "behind the end"),
    Row("other_height", png, png_header(taller), "scan lines"),
    Row("bomb", png, png_header(huge), "budget"),
    Row("depth_invalid", png, png_header(lambda v, r: v.__setitem__(2, 5)), "no valid PNG"),
    Row("picture_bomb", png, png_picture(lambda d, r: zlib.compress(bytes(5_000_000))), "at least"),
    Row("picture_checksum", png, png_picture(wrong_adler), "corrupt"),
    Row("picture_cut", png, png_picture(lambda d, r: d[: int(r.integers(3, len(d) - 5))]), "scan lines"),
    Row("palette_too_small", png_palette, png_index, "outside of the palette"),
    Row("palette_missing", png_palette, png_drop(b"PLTE"), "palette"),
    Row(
        "several_frames",
        png,
        lambda p, r: rewrite(p, lambda n, d: [(n, d)] + [(b"acTL", bytes(8))] * (n == b"IHDR")),
        "frames",
    ),
    Row("other_content", png, other_content, "no PNG signature"),
]

# --- TIFF ----------------------------------------------------------------------------------------------------------


def tiff(path: Path, rng: Rng, dtype: str = "uint16", **options: Any) -> None:
    tifffile.imwrite(path, noise(rng, sizes(rng, 2, 20, 40), dtype), rowsperstrip=7, **options)


def tiff_float(path: Path, rng: Rng) -> None:
    tiff(path, rng, "float32")


def tiff_deflate(path: Path, rng: Rng) -> None:
    tiff(path, rng, compression="zlib")


def tiff_pages(path: Path, rng: Rng) -> None:
    tifffile.imwrite(path, noise(rng, (3, *sizes(rng, 2)), "uint8"), photometric="minisblack", metadata=None)


def tiff_lzw(path: Path, rng: Rng) -> None:
    Image.fromarray(noise(rng, sizes(rng, 2, 20, 40), "uint8")).save(path, compression="tiff_lzw")


def tag(name: str, change: Callable[[Any, Rng], Any], page: int = 0) -> Callable[[Path, Rng], None]:
    """Write another value of the same length into a tag."""

    def damage(path: Path, rng: Rng) -> None:
        with tifffile.TiffFile(path, mode="r+") as file:
            found = file.pages[page].tags[name]
            found.overwrite(change(found.value, rng))

    return damage


def one_of(change: Callable[[int], int]) -> Callable[[Any, Rng], Any]:
    """Change one entry of a tag that holds several."""

    def edit(values: Any, rng: Rng) -> Any:
        entries = list(values)
        at = int(rng.integers(len(entries)))
        entries[at] = change(entries[at])
        return tuple(entries)

    return edit


def next_page(offset: Callable[[list[int]], int]) -> Callable[[Path, Rng], None]:
    """Let the chain of pages go elsewhere after the second."""

    def damage(path: Path, rng: Rng) -> None:
        with tifffile.TiffFile(path) as file:
            offsets = [page.offset for page in file.pages]
        content = bytearray(path.read_bytes())
        tags = struct.unpack_from("<H", content, offsets[1])[0]
        struct.pack_into("<I", content, offsets[1] + 2 + 12 * tags, offset(offsets))
        path.write_bytes(bytes(content))

    return damage


def tiff_nan(path: Path, rng: Rng) -> None:
    values = noise(rng, (20, 30), "float32")
    values[tuple(rng.integers(0, 20, size=2))] = np.nan
    tifffile.imwrite(path, values)


def mixed_pages(path: Path, rng: Rng) -> None:
    with tifffile.TiffWriter(path) as writer:
        writer.write(noise(rng, (20, 20), "uint8"), metadata=None)
        writer.write(noise(rng, (20, 20 + int(rng.integers(1, 9))), "uint8"), metadata=None)


def mixed_types(path: Path, rng: Rng) -> None:
    with tifffile.TiffWriter(path) as writer:
        writer.write(noise(rng, (20, 20), "uint8"), metadata=None)
        writer.write(noise(rng, (20, 20), "uint16"), metadata=None)


def strip(change: Callable[[bytes, Rng], bytes]) -> Callable[[Path, Rng], None]:
    """Change the bytes of one compressed strip; a shorter one keeps the rest of its place."""

    def damage(path: Path, rng: Rng) -> None:
        with tifffile.TiffFile(path, mode="r+") as file:
            page = file.pages[0]
            at = int(rng.integers(len(page.dataoffsets)))
            offset, count = page.dataoffsets[at], page.databytecounts[at]
            content = bytearray(path.read_bytes())
            new = change(bytes(content[offset : offset + count]), rng)
            content[offset : offset + len(new)] = new
            path.write_bytes(bytes(content))
            counts = list(page.databytecounts)
            counts[at] = len(new)
        tag("StripByteCounts", lambda value, rng: tuple(counts))(path, rng)

    return damage


def shorter_strip(data: bytes, rng: Rng) -> bytes:
    return zlib.compress(zlib.decompress(data)[:-10], 9)


TIFF = [
    Row("cut", tiff, cut, "truncated|signature|not in the file|damaged|no page"),
    Row("strip_absent", tiff, tag("StripByteCounts", one_of(lambda n: 0)), "not in the file"),
    Row("strip_short", tiff, tag("StripByteCounts", one_of(lambda n: n // 2)), "holds"),
    Row("strip_outside", tiff, tag("StripOffsets", one_of(lambda n: 2_000_000)), "not in the file"),
    Row("strips_of_another_height", tiff, tag("RowsPerStrip", lambda n, r: 3), "strips or tiles"),
    Row("taller", tiff, tag("ImageLength", lambda n, r: n + int(r.integers(7, 30))), "strips or tiles"),
    Row("wider", tiff, tag("ImageWidth", lambda n, r: n + int(r.integers(1, 30))), "holds"),
    Row("bomb", tiff, tag("ImageWidth", lambda n, r: int(r.integers(20_000, 60_000))), "budget"),
    Row("pages_circular", tiff_pages, next_page(lambda offsets: offsets[0]), "circular"),
    Row("pages_itself", tiff_pages, next_page(lambda offsets: offsets[1]), "circular"),
    Row("pages_outside", tiff_pages, next_page(lambda offsets: 9_999_999), "truncated"),
    Row("pages_of_two_sizes", tiff_pages, mixed_pages, "page 2"),
    Row("pages_of_two_types", tiff_pages, mixed_types, "page 2"),
    Row(
        "compression_unknown",
        tiff,
        tag("Compression", lambda n, r: int(r.choice([7, 34712, 50000, 999]))),
        "compression|decoded",
    ),
    Row(
        "colour_unknown",
        tiff,
        tag("PhotometricInterpretation", lambda n, r: int(r.choice([0, 5, 6, 8]))),
        "colour|decoded",
    ),
    Row(
        "deflate_bit",
        tiff_deflate,
        strip(lambda d, r: d[:20] + bytes([d[20] ^ 1 << int(r.integers(8))]) + d[21:]),
        "compressed|holds",
    ),
    Row("deflate_cut", tiff_deflate, strip(lambda d, r: d[: int(r.integers(5, len(d) - 1))]), "truncated|holds"),
    Row("deflate_of_less", tiff_deflate, strip(shorter_strip), "holds"),
    Row("deflate_bomb", tiff_deflate, strip(lambda d, r: zlib.compress(bytes(9_000))[: len(d)]), "holds|truncated"),
    Row("lzw_cut", tiff_lzw, tag("StripByteCounts", lambda n, r: int(r.integers(4, n[0] - 40))), "read|decode"),
    Row("lzw_changed", tiff_lzw, lambda p, r: flip(p, r, 60, 200), "sha256|read|decode", digest=True),
    Row("changed_voxel", tiff, lambda p, r: flip(p, r, -100, 0), "sha256", digest=True),
    Row("nan", tiff_float, tiff_nan, "NaN"),
    Row("other_content", tiff, other_content, "no TIFF signature"),
]

# --- NPZ -----------------------------------------------------------------------------------------------------------


def npz(path: Path, rng: Rng) -> None:
    np.savez_compressed(path, image=noise(rng, sizes(rng, 3), "float32"))


def npz_stored(path: Path, rng: Rng) -> None:
    np.savez(path, image=noise(rng, sizes(rng, 3), "float32"))


def other_array(value: Callable[[Rng], Any]) -> Callable[[Path, Rng], None]:
    return lambda path, rng: np.savez_compressed(path, image=value(rng))


def with_nan(rng: Rng) -> np.ndarray:
    values = noise(rng, (6, 6, 6), "float32")
    values[tuple(rng.integers(0, 6, size=3))] = np.nan
    return values


def npy_header(old: bytes, new: Callable[[Rng], bytes]) -> Callable[[Path, Rng], None]:
    """Write the member again with another header, its CRC right."""

    def damage(path: Path, rng: Rng) -> None:
        with zipfile.ZipFile(path) as archive:
            content = archive.read("image.npy")
        start, end = content.index(old), content.index(b"\n") + 1
        stop = content.index(b", }", start) if old.startswith(b"'shape'") else start + len(old)
        head = content[10:start] + new(rng) + content[stop : end - 1].rstrip()
        head = head.ljust(end - 11 + 32) + b"\n"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("image.npy", content[:8] + struct.pack("<H", len(head)) + head + content[end:])

    return damage


def other_shape(rng: Rng) -> bytes:
    return f"'shape': ({int(rng.integers(1, 5))}, 4, 3)".encode()


def large_shape(rng: Rng) -> bytes:
    return f"'shape': ({int(rng.integers(1000, 10**6))}, {int(rng.integers(1000, 2**40))}, 3)".encode()


def two_members(path: Path, rng: Rng) -> None:
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("image.npy", archive.read("image.npy"))


def zip_field(name: bytes, offset: int, layout: str, value: int) -> Callable[[Path, Rng], None]:
    """Write into the first record of a kind: PK 1 2 of the directory, PK 3 4 of the member."""

    def damage(path: Path, rng: Rng) -> None:
        content = bytearray(path.read_bytes())
        struct.pack_into("<" + layout, content, content.index(name) + offset, value)
        path.write_bytes(bytes(content))

    return damage


NPZ = [
    Row("cut", npz, cut, "archive cannot be read"),
    Row("deflate_bit", npz, lambda p, r: flip(p, r, 150, -130), "corrupt|bytes"),
    Row("stored_bit", npz_stored, lambda p, r: flip(p, r, 250, -130), "corrupt"),
    Row("crc", npz, zip_field(b"PK\1\2", 16, "I", 12345), "corrupt"),
    Row("objects", npz, other_array(lambda r: np.array([{"a": 1}, None], dtype=object)), "Python objects"),
    Row("structured", npz, other_array(lambda r: np.zeros(4, dtype=[("a", "i4"), ("b", "f4")])), "data type"),
    Row("complex", npz, other_array(lambda r: np.zeros((4, 4), dtype="complex64")), "complex64"),
    Row("text", npz, other_array(lambda r: np.array(["a", "b"])), "data type"),
    Row("dates", npz, other_array(lambda r: np.array(["2020-01-01"], dtype="datetime64[D]")), "data type"),
    Row("empty", npz, other_array(lambda r: np.zeros((0, 4))), "shape"),
    Row("scalar", npz, other_array(lambda r: np.float64(3)), "shape"),
    Row("nan", npz, other_array(with_nan), "NaN"),
    Row("bomb", npz, other_array(lambda r: np.zeros((300, 300, int(r.integers(3, 9))))), "budget"),
    Row("declared_bomb", npz, zip_field(b"PK\1\2", 24, "I", 2**31), "budget"),
    Row("shape_of_less", npz, npy_header(b"'shape'", other_shape), "more than"),
    Row("shape_bomb", npz, npy_header(b"'shape'", large_shape), "budget"),
    Row("header_is_code", npz, npy_header(b"'shape'", lambda r: b"'shape': __import__('os').getcwd()"), "no header"),
    Row("encrypted", npz, zip_field(b"PK\1\2", 8, "H", 1), "encrypted"),
    Row("method", npz, zip_field(b"PK\1\2", 10, "H", 12), "deflate"),
    Row("twice", npz, two_members, "twice"),
    Row("array_missing", npz, other_array(with_nan), "missing", {"part": "label"}),
    Row("other_content", npz, other_content, "archive cannot be read"),
]

# --- Zarr ----------------------------------------------------------------------------------------------------------


def store(path: Path, rng: Rng, values: np.ndarray | None = None, **options: Any) -> None:
    shutil.rmtree(path, ignore_errors=True)
    values = noise(rng, (6, 7, 8), "uint16") if values is None else values
    array = zarr.create_array(path, shape=values.shape, chunks=(4, 4, 4), dtype=values.dtype, **options)
    array[...] = values


def store_raw(path: Path, rng: Rng) -> None:
    store(path, rng, compressors=None)


def store_gzip(path: Path, rng: Rng) -> None:
    store(path, rng, compressors=GzipCodec())


def store_blosc(path: Path, rng: Rng) -> None:
    store(path, rng, compressors=BloscCodec())


def store_shards(path: Path, rng: Rng) -> None:
    values = noise(rng, (6, 7, 8), "uint16")
    shutil.rmtree(path, ignore_errors=True)
    zarr.create_array(path, shape=values.shape, chunks=(2, 2, 2), shards=(4, 4, 4), dtype=values.dtype)[...] = values


def store_v2(path: Path, rng: Rng) -> None:
    store(path, rng, zarr_format=2, compressors=numcodecs.GZip())


def ome(path: Path, rng: Rng) -> None:
    """OME-Zarr 0.4: one level, micrometres."""
    shutil.rmtree(path, ignore_errors=True)
    group = zarr.create_group(path, zarr_format=2)
    group.create_array("0", shape=(6, 7, 8), chunks=(4, 4, 4), dtype="uint8")[...] = noise(rng, (6, 7, 8), "uint8")
    scale = {"type": "scale", "scale": [4.0, 0.5, 0.5]}
    level = {"path": "0", "coordinateTransformations": [scale]}
    axes = [{"name": name, "type": "space", "unit": "micrometer"} for name in "zyx"]
    group.attrs["multiscales"] = [{"version": "0.4", "axes": axes, "datasets": [level]}]


def some_chunk(path: Path, rng: Rng) -> Path:
    chunks = sorted(
        p for p in path.rglob("*") if p.is_file() and p.name not in ("zarr.json", ".zarray", ".zattrs", ".zgroup")
    )
    return chunks[int(rng.integers(len(chunks)))]


def chunk(change: Callable[[bytes, Rng], bytes | None]) -> Callable[[Path, Rng], None]:
    def damage(path: Path, rng: Rng) -> None:
        file = some_chunk(path, rng)
        content = change(file.read_bytes(), rng)
        file.unlink()
        if content is not None:
            file.write_bytes(content)

    return damage


def any_bit(data: bytes, rng: Rng, start: int = 0, end: int = 0) -> bytes:
    at = int(rng.integers(start, len(data) + end))
    return data[:at] + bytes([data[at] ^ 1 << int(rng.integers(8))]) + data[at + 1 :]


def metadata(change: Callable[[Any], Any], name: str = "zarr.json") -> Callable[[Path, Rng], None]:
    def damage(path: Path, rng: Rng) -> None:
        raw = json.loads((path / name).read_text())
        change(raw)
        (path / name).write_text(json.dumps(raw))

    return damage


def linked_chunk(path: Path, rng: Rng) -> None:
    file = some_chunk(path, rng)
    outside = path.parent / "outside"
    shutil.copy(file, outside)
    file.unlink()
    file.symlink_to(outside)


def linked_folder(path: Path, rng: Rng) -> None:
    (path / "more").symlink_to(path.parent)


def level(change: Callable[[Any], Any]) -> Callable[[Path, Rng], None]:
    return metadata(lambda raw: change(raw["multiscales"][0]), ".zattrs")


def scaled(values: Any) -> Callable[[Path, Rng], None]:
    return level(lambda image: image["datasets"][0]["coordinateTransformations"][0].update(scale=values))


def blosc_bomb(data: bytes, rng: Rng) -> bytes:
    return data[:4] + struct.pack("<I", 2**31 - 1) + data[8:]


ZARR = [
    Row("chunk_missing", store, chunk(lambda d, r: None), "missing"),
    Row("chunk_missing_v2", store_v2, chunk(lambda d, r: None), "missing"),
    Row("chunk_empty", store, chunk(lambda d, r: b""), "Zstandard"),
    Row("chunk_cut", store, chunk(lambda d, r: d[: int(r.integers(0, len(d) - 1))]), "decoded|holds|Zstandard"),
    Row("raw_chunk_cut", store_raw, chunk(lambda d, r: d[: int(r.integers(0, len(d) - 1))]), "holds"),
    Row("raw_chunk_changed", store_raw, chunk(any_bit), "sha256", digest=True),
    Row("zstd_chunk_changed", store, chunk(any_bit), "sha256|decoded|holds|Zstandard", digest=True),
    Row("gzip_chunk_bit", store_gzip, chunk(lambda d, r: any_bit(d, r, 12, -9)), "compressed|holds"),
    Row("gzip_chunk_crc", store_gzip, chunk(lambda d, r: any_bit(d, r, len(d) - 8)), "compressed|holds"),
    Row("gzip_chunk_bomb", store_gzip, chunk(lambda d, r: gzip.compress(bytes(10**6))), "holds"),
    Row("blosc_chunk_bomb", store_blosc, chunk(blosc_bomb), "holds"),
    Row("blosc_chunk_cut", store_blosc, chunk(lambda d, r: d[:-3]), "holds"),
    Row(
        "shard_cut",
        store_shards,
        chunk(lambda d, r: d[: int(r.integers(0, len(d) - 1))]),
        "shard|chunk|bytes|Zstandard",
    ),
    Row(
        "shard_index", store_shards, chunk(lambda d, r: any_bit(d, r, len(d) - 132)), "bytes|missing|decoded|Zstandard"
    ),
    Row("chunk_of_another_shape", store, metadata(lambda raw: raw.update(shape=[6, 4, 8])), "outside of the shape"),
    Row("shape_larger", store, metadata(lambda raw: raw.update(shape=[6, 7, 9])), "missing"),
    Row("shape_bomb", store, metadata(lambda raw: raw.update(shape=[10**6, 10**6, 10**6])), "budget"),
    Row(
        "chunk_shape_bomb",
        store,
        metadata(lambda raw: raw["chunk_grid"]["configuration"].update(chunk_shape=[9**9] * 3)),
        "budget",
    ),
    Row("shape_negative", store, metadata(lambda raw: raw.update(shape=[-6, 7, 8])), "shape"),
    Row("type_unknown", store, metadata(lambda raw: raw.update(data_type="string")), "data type|declare no array"),
    Row("type_wider", store, metadata(lambda raw: raw.update(data_type="uint32")), "holds"),
    Row("codec_unknown", store, metadata(lambda raw: raw["codecs"][-1].update(name="pickle")), "pickle"),
    Row("filters", store_v2, metadata(lambda raw: raw.update(filters=[{"id": "pickle"}]), ".zarray"), "filters"),
    Row("objects", store_v2, metadata(lambda raw: raw.update(dtype="|O"), ".zarray"), "object"),
    Row("metadata_cut", store, lambda p, r: cut(p / "zarr.json", r), "JSON"),
    Row("metadata_missing", store, lambda p, r: (p / "zarr.json").unlink(), "metadata"),
    Row("metadata_large", store, lambda p, r: (p / "zarr.json").write_text(" " * 30_000 + "{}"), "budget"),
    Row("metadata_deep", store, lambda p, r: (p / "zarr.json").write_text("[" * 15_000), "JSON"),
    Row("link_of_a_chunk", store, linked_chunk, "link"),
    Row("link_of_a_folder", store, linked_folder, "link"),
    Row("many_files", store, lambda p, r: [(p / f"x{n}").touch() for n in range(250)], "budget"),
    Row(
        "nan",
        lambda p, r: store(p, r, noise(r, (6, 7, 8), "float32")),
        lambda p, r: store(p, r, np.full((6, 7, 8), np.nan, "f4")),
        "NaN",
    ),
    Row("path_outside", ome, level(lambda image: image["datasets"][0].update(path="../other.zarr")), "no array"),
    Row("path_absolute", ome, level(lambda image: image["datasets"][0].update(path="/etc")), "no array"),
    Row("part_outside", ome, lambda p, r: None, "no array", {"part": "../file.zarr/0"}),
    Row("scale_zero", ome, scaled([4.0, 0.0, 0.5]), "spacing"),
    Row("scale_nan", ome, scaled([4.0, float("nan"), 0.5]), "spacing"),
    Row("scale_of_two_axes", ome, scaled([0.5, 0.5]), "coordinate transformation"),
    Row("scale_missing", ome, level(lambda image: image["datasets"][0].pop("coordinateTransformations")), "voxel size"),
    Row("axes_of_two", ome, level(lambda image: image["axes"].pop()), "axes"),
    Row("units_of_two", ome, level(lambda image: image["axes"][0].update(unit="nanometer")), "units"),
]

MATRIX = [
    pytest.param(ending, row, id=f"{ending.lstrip('.')}-{row.name}")
    for ending, rows in (
        (".nii.gz", NIFTI),
        (".nii", NIFTI_PLAIN),
        (".nrrd", NRRD),
        (".png", PNG),
        (".tif", TIFF),
        (".npz", NPZ),
        (".zarr", ZARR),
    )
    for row in rows
]


def digest_of(path: Path) -> str:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return content_digest(files, path)


@pytest.mark.filterwarnings("ignore::zarr.errors.ZarrUserWarning")
@pytest.mark.parametrize(("ending", "row"), MATRIX)
def test_no_damage_is_accepted(tmp_path: Path, ending: str, row: Row) -> None:
    for seed in SEEDS:
        rng = np.random.default_rng([seed, len(row.name)])
        folder = tmp_path / str(seed)
        folder.mkdir()
        path = folder / f"file{ending}"
        row.make(path, rng)
        options = {"budget": SMALL, **({"sha256": digest_of(path)} if row.digest else {})}
        read_image(path, **options)  # the sound twin
        row.damage(path, rng)
        with pytest.raises(DataError, match=row.word) as caught:
            read_image(path, case="p01", key="flair", **{**options, **row.options})
        assert f"{path} (case p01, key flair)" in caught.value.what, seed
        assert caught.value.fix, seed


def test_the_matrix_has_all_formats_and_classes() -> None:
    assert len(MATRIX) >= 25
    assert len({param.id for param in MATRIX}) == len(MATRIX)
