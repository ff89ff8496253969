"""What the gate accepts: sound files of every format, type and layout, with the voxels and the geometry that went in.

What it refuses is in ``test_ingest_corruption.py``; who goes through it in ``test_ingest_everywhere.py``.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numcodecs
import numpy as np
import pytest
import SimpleITK
import tifffile
import zarr
from PIL import Image
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, TransposeCodec, ZstdCodec

from transforms.errors import DataError, UsageError
from transforms.ingest import ENDINGS, Budget, read_image, read_label_image
from transforms.ingest.npz import read_arrays
from transforms.ingest_budget import check_declared
from transforms.ingest_checks import check_same_grid
from transforms.ingest_stream import content_digest

SHAPE = (7, 9, 10)
NUMBERS = ["uint8", "int8", "int16", "uint16", "int32", "uint32", "float32", "float64"]


def values(dtype: str, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Different numbers that every data type holds, none of them 0."""
    return (np.arange(np.prod(shape)).reshape(shape) % 120 + 1).astype(dtype)


def assert_equal(path: Path, expected: np.ndarray, axes: str, part: str | None = None) -> None:
    image = read_image(path, part)
    assert image.axes == axes
    assert image.voxels.dtype == expected.dtype.newbyteorder("=")
    assert image.voxels.dtype.isnative
    np.testing.assert_array_equal(image.voxels, expected)


# --- scans ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", NUMBERS)
def test_nifti(tmp_path: Path, ending: str, order: str, dtype: str, oblique: np.ndarray) -> None:
    header = nib.Nifti1Header(endianness=order)
    header.set_data_dtype(dtype)
    header.set_xyzt_units("mm")
    path = tmp_path / f"image{ending}"
    nib.save(nib.Nifti1Image(values(dtype), oblique, header), path)
    assert_equal(path, values(dtype), "xyz")
    image = read_image(path)
    np.testing.assert_allclose(image.affine, oblique, atol=1e-6)
    assert image.spacing == pytest.approx((0.5, 1.0, 3.0), rel=1e-6)
    assert (image.kind, image.unit, image.shape) == ("nifti", "mm", SHAPE)


def test_nifti_with_channels_and_an_extension(tmp_path: Path) -> None:
    image = nib.Nifti1Image(values("int16", (*SHAPE, 2)), np.eye(4))
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"how it was made, in more than 16 bytes"))
    nib.save(image, tmp_path / "image.nii.gz")
    assert_equal(tmp_path / "image.nii.gz", values("int16", (*SHAPE, 2)), "xyzc")
    assert read_image(tmp_path / "image.nii.gz").shape == SHAPE


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint32", "float32", "float64"])
def test_nrrd_as_simpleitk_writes_and_reads_it(tmp_path: Path, dtype: str, compressed: bool) -> None:
    itk = SimpleITK.GetImageFromArray(values(dtype).T)
    itk.SetSpacing((0.5, 1.5, 3.0))
    itk.SetOrigin((10.0, -20.0, 30.0))
    c, s = np.cos(0.3), np.sin(0.3)
    itk.SetDirection((c, -s, 0, s, c, 0, 0, 0, 1))
    path = tmp_path / "image.nrrd"
    SimpleITK.WriteImage(itk, str(path), compressed)
    assert_equal(path, values(dtype), "xyz")
    image = read_image(path)
    assert image.affine is not None
    assert image.spacing == pytest.approx((0.5, 1.5, 3.0))
    # ITK's world is left, posterior, superior: the first two signs change.
    point = np.array(itk.TransformIndexToPhysicalPoint((3, 5, 2))) * (-1, -1, 1)
    np.testing.assert_allclose(image.affine @ (3, 5, 2, 1), (*point, 1), atol=1e-6)


def test_the_same_scan_as_nrrd_and_as_nifti_lies_on_one_grid(tmp_path: Path) -> None:
    itk = SimpleITK.GetImageFromArray(values("int16").T)
    itk.SetSpacing((0.5, 1.5, 3.0))
    itk.SetOrigin((10.0, -20.0, 30.0))
    for name in ("image.nrrd", "image.nii.gz"):
        SimpleITK.WriteImage(itk, str(tmp_path / name))
    nrrd, nifti = read_image(tmp_path / "image.nrrd"), read_image(tmp_path / "image.nii.gz")
    check_same_grid(nifti, nrrd, "t1", "p01")
    np.testing.assert_array_equal(nrrd.voxels, nifti.voxels)
    itk.SetOrigin((10.4, -20.0, 30.0))
    SimpleITK.WriteImage(itk, str(tmp_path / "moved.nrrd"))
    with pytest.raises(DataError, match=r"0\.4 mm"):
        check_same_grid(nifti, read_image(tmp_path / "moved.nrrd"), "t1", "p01")


def nrrd_text(path: Path, body: bytes, *lines: str) -> Path:
    path.write_bytes("\r\n".join(["NRRD0005", *lines, "encoding: raw", "", ""]).encode() + body)
    return path


def test_nrrd_with_channels_first_and_big_endian(tmp_path: Path) -> None:
    stored = values(">i2", (2, *SHAPE))
    path = nrrd_text(
        tmp_path / "image.nrrd",
        stored.tobytes(order="F"),
        "type: short",
        "endian: big",
        "dimension: 4",
        "sizes: 2 7 9 10",
        "space: RAS",
        "space directions: none (1,0,0) (0,2,0) (0,0,3)",
        "space origin: (1,2,3)",
        'space units: "mm" "mm" "mm"',
    )
    assert_equal(path, np.moveaxis(stored, 0, -1), "xyzc")
    image = read_image(path)
    assert image.affine is not None
    np.testing.assert_array_equal(image.affine, [[1, 0, 0, 1], [0, 2, 0, 2], [0, 0, 3, 3], [0, 0, 0, 1]])


def test_nrrd_without_a_space_has_a_spacing_and_no_affine(tmp_path: Path) -> None:
    fields = ("type: uchar", "dimension: 3", "sizes: 7 9 10", "spacings: 1 2 3")
    image = read_image(nrrd_text(tmp_path / "image.nrrd", values("uint8").tobytes(order="F"), *fields))
    assert (image.affine, image.spacing, image.unit) == (None, (1.0, 2.0, 3.0), "")


def test_a_detached_header_and_its_voxels_have_one_digest(tmp_path: Path) -> None:
    (tmp_path / "voxels.raw").write_bytes(values("uint8").tobytes(order="F"))
    fields = ("type: uchar", "dimension: 3", "sizes: 7 9 10", "data file: ./voxels.raw")
    path = nrrd_text(tmp_path / "image.nhdr", b"", *fields)
    assert_equal(path, values("uint8"), "xyz")
    digest = content_digest([path, tmp_path / "voxels.raw"], tmp_path)
    read_image(path, sha256=digest)
    (tmp_path / "voxels.raw").write_bytes(values("uint8")[::-1].tobytes(order="F"))
    with pytest.raises(DataError, match="sha256"):
        read_image(path, sha256=digest)


# --- pictures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "shape", "axes"),
    [
        ("uint8", (9, 11), "yx"),
        ("uint16", (9, 11), "yx"),
        ("uint8", (9, 11, 2), "yxc"),
        ("uint8", (9, 11, 3), "yxc"),
        ("uint8", (9, 11, 4), "yxc"),
        ("uint8", (1, 1), "yx"),
    ],
)
def test_png(tmp_path: Path, dtype: str, shape: tuple[int, ...], axes: str) -> None:
    Image.fromarray(values(dtype, shape)).save(tmp_path / "image.png")
    assert_equal(tmp_path / "image.png", values(dtype, shape), axes)
    assert read_image(tmp_path / "image.png").spacing is None


def interlaced_png(path: Path, picture: np.ndarray) -> None:
    """Adam7 by hand, as Pillow cannot write it: seven passes, every line with filter 0."""

    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    lines = [b"\0" + row.tobytes() for y, x, dy, dx in passes for row in picture[y::dy, x::dx] if row.size]
    height, width = picture.shape
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 1)),
        (b"IDAT", zlib.compress(b"".join(lines))),
        (b"IEND", b""),
    ]
    raw = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + raw)


@pytest.mark.parametrize("shape", [(9, 11), (1, 1), (2, 3), (8, 8), (5, 1)])
def test_png_interlaced(tmp_path: Path, shape: tuple[int, int]) -> None:
    interlaced_png(tmp_path / "image.png", values("uint8", shape))
    assert_equal(tmp_path / "image.png", values("uint8", shape), "yx")


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_palette_of_a_label_map_keeps_its_indices(tmp_path: Path, bits: int) -> None:
    labels = (np.arange(99).reshape(9, 11) % 2**bits).astype(np.uint8)
    picture = Image.fromarray(labels)
    picture.putpalette(list(range(3 * 2**bits))[: 3 * 2**bits] if bits < 8 else [n % 256 for n in range(768)])
    picture.save(tmp_path / "label.png", bits=bits)
    assert_equal(tmp_path / "label.png", labels, "yx")
    image, ids = read_label_image(tmp_path / "label.png", {value: value % 2 for value in range(256)})
    assert image.shape == (9, 11)
    np.testing.assert_array_equal(ids, labels % 2)


def test_a_bit_of_a_mask_is_one_and_not_255(tmp_path: Path) -> None:
    mask = np.arange(99).reshape(9, 11) % 3 == 0
    Image.fromarray(mask).save(tmp_path / "mask.png")
    assert_equal(tmp_path / "mask.png", mask.astype(np.uint8), "yx")


TIFF: dict[str, dict[str, Any]] = {
    "plain": {},
    "strips": {"rowsperstrip": 4},
    "deflate": {"compression": "zlib"},
    "deflated_strips": {"compression": "zlib", "rowsperstrip": 4},
    "big": {"bigtiff": True},
    "big_endian": {"byteorder": ">"},
    "tiles": {"tile": (16, 16)},
    "deflated_tiles": {"tile": (16, 16), "compression": "zlib"},
    "ome": {"ome": True},
}


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "float32"])
@pytest.mark.parametrize("layout", TIFF)
def test_tiff(tmp_path: Path, layout: str, dtype: str) -> None:
    tifffile.imwrite(tmp_path / "image.tif", values(dtype, (33, 20)), **TIFF[layout])
    assert_equal(tmp_path / "image.tif", values(dtype, (33, 20)), "yx")


@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"imagej": True}], ids=str)
def test_the_pages_of_a_tiff_are_slices(tmp_path: Path, options: dict[str, Any]) -> None:
    tifffile.imwrite(tmp_path / "image.tiff", values("uint8", (5, 33, 20)), photometric="minisblack", **options)
    assert_equal(tmp_path / "image.tiff", values("uint8", (5, 33, 20)), "zyx")


def test_the_colours_of_a_tiff_come_last(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", values("uint8", (9, 11, 3)), photometric="rgb")
    tifffile.imwrite(tmp_path / "b.tif", values("uint8", (3, 9, 11)), photometric="rgb", planarconfig="separate")
    assert_equal(tmp_path / "a.tif", values("uint8", (9, 11, 3)), "yxc")
    assert_equal(tmp_path / "b.tif", np.moveaxis(values("uint8", (3, 9, 11)), 0, -1), "yxc")


@pytest.mark.parametrize("compression", ["tiff_lzw", "packbits", "tiff_adobe_deflate"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_tiff_as_pillow_writes_it(tmp_path: Path, compression: str, dtype: str) -> None:
    pages = [Image.fromarray(values(dtype, (33, 20)) + page) for page in range(3)]
    pages[0].save(tmp_path / "image.tif", save_all=True, append_images=pages[1:], compression=compression)
    assert_equal(tmp_path / "image.tif", np.stack([values(dtype, (33, 20)) + page for page in range(3)]), "zyx")


def test_voxels_behind_the_first_page_are_not_passed_over(tmp_path: Path) -> None:
    """One directory, five planes behind it: a reader of pages sees the first plane only."""
    tifffile.imwrite(
        tmp_path / "image.tif", values("uint8", (5, 33, 20)), photometric="minisblack", metadata={}, truncate=True
    )
    with pytest.raises(DataError, match="voxels of more"):
        read_image(tmp_path / "image.tif")


# --- archives and stores -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*NUMBERS, "bool", ">f4"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path: Path, dtype: str, save: Callable[..., None]) -> None:
    save(tmp_path / "image.npz", image=values(dtype), turned=values(dtype).T)
    assert_equal(tmp_path / "image.npz", values(dtype), "", part="image")
    assert_equal(tmp_path / "image.npz", values(dtype).T, "", part="turned")


def test_the_arrays_of_an_archive(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", cube=values("float32"), labels=values("uint8"))
    arrays = read_arrays(tmp_path / "a.npz", ["cube", "labels"])
    assert sorted(arrays) == ["cube", "labels"]
    np.testing.assert_array_equal(arrays["labels"], values("uint8"))
    with pytest.raises(DataError, match="array 'mask' is missing"):
        read_arrays(tmp_path / "a.npz", ["mask"], case="p01")
    with pytest.raises(DataError, match="none is named"):
        read_image(tmp_path / "a.npz")
    # Each fits the budget, both together do not: 630 * 4 + 630 bytes.
    with pytest.raises(DataError, match="budget"):
        read_arrays(tmp_path / "a.npz", budget=Budget(voxel_bytes=630 * 4 - 1))


STORES: dict[str, dict[str, Any]] = {
    "v3": {},
    "v3_raw": {"compressors": None},
    "v3_gzip": {"compressors": GzipCodec()},
    "v3_blosc": {"compressors": BloscCodec()},
    "v3_checksum": {"compressors": [ZstdCodec(), Crc32cCodec()]},
    "v3_big_endian": {"serializer": BytesCodec(endian="big")},
    "v3_transposed": {"filters": [TransposeCodec(order=(2, 1, 0))]},
    "v3_shards": {"chunks": (2, 2, 2), "shards": (4, 4, 4)},
    "v2": {"zarr_format": 2},
    "v2_blosc": {"zarr_format": 2, "compressors": numcodecs.Blosc()},
    "v2_zlib": {"zarr_format": 2, "compressors": numcodecs.Zlib()},
    "v2_raw": {"zarr_format": 2, "compressors": None},
    "v2_fortran": {"zarr_format": 2, "order": "F"},
    "v2_nested": {"zarr_format": 2, "chunk_key_encoding": {"name": "v2", "separator": "/"}},
}


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("layout", STORES)
def test_zarr(tmp_path: Path, layout: str, dtype: str) -> None:
    options = {"chunks": (4, 4, 4), **STORES[layout]}
    zarr.create_array(tmp_path / "a.zarr", shape=SHAPE, dtype=dtype, **options)[...] = values(dtype)
    assert_equal(tmp_path / "a.zarr", values(dtype), "")


def test_a_chunk_left_out_on_purpose_is_read_on_demand_only(tmp_path: Path) -> None:
    stored = values("uint8")
    stored[:4, :4, :4] = 0  # one chunk of the fill value: zarr does not write it
    zarr.create_array(tmp_path / "a.zarr", shape=SHAPE, dtype="uint8", chunks=(4, 4, 4))[...] = stored
    with pytest.raises(DataError, match=r"chunk c/0/0/0 is missing \(1 of 18\)"):
        read_image(tmp_path / "a.zarr")
    np.testing.assert_array_equal(read_image(tmp_path / "a.zarr", sparse=True).voxels, stored)


def write_ome(path: Path, version: int) -> None:
    """Two levels of 8 x 4 x 4 nm and 16 x 8 x 8 nm, with a channel axis; the image as a whole is scaled by 1.5."""
    shutil.rmtree(path, ignore_errors=True)
    group = zarr.create_group(path, zarr_format=version)
    levels = []
    for name, factor in (("s0", 1), ("s1", 2)):
        shape = (2, *(size // factor for size in (8, 10, 12)))
        group.create_array(name, shape=shape, chunks=(1, 4, 4, 4), dtype="uint8")[...] = values("uint8", shape)
        steps = [
            {"type": "scale", "scale": [1.0, 8.0 * factor, 4.0 * factor, 4.0 * factor]},
            {"type": "translation", "translation": [0.0, 2.0, 1.0, 1.0]},
        ]
        levels.append({"path": name, "coordinateTransformations": steps})
    axes = [{"name": "c", "type": "channel"}]
    axes += [{"name": name, "type": "space", "unit": "nanometer"} for name in "zyx"]
    whole = [{"type": "scale", "scale": [1.0, 1.5, 1.5, 1.5]}]
    images = [{"axes": axes, "datasets": levels, "coordinateTransformations": whole}]
    if version == 3:
        group.attrs["ome"] = {"version": "0.5", "multiscales": images}
    else:
        group.attrs["multiscales"] = images


@pytest.mark.parametrize("version", [2, 3])
def test_the_voxel_size_of_ome_zarr(tmp_path: Path, version: int) -> None:
    write_ome(tmp_path / "a.zarr", version)
    finest, coarse = read_image(tmp_path / "a.zarr"), read_image(tmp_path / "a.zarr", "s1")
    np.testing.assert_array_equal(finest.voxels, values("uint8", (2, 8, 10, 12)))
    assert (finest.axes, finest.unit, finest.shape) == ("czyx", "nanometer", (8, 10, 12))
    assert finest.spacing == (12.0, 6.0, 6.0)  # 8 * 1.5, 4 * 1.5, 4 * 1.5
    assert coarse.spacing == (24.0, 12.0, 12.0)
    assert finest.affine is not None
    # Voxel (1, 2, 3): (8 * 1 + 2) * 1.5, (4 * 2 + 1) * 1.5, (4 * 3 + 1) * 1.5
    np.testing.assert_allclose(finest.affine @ (1, 2, 3, 1), (15.0, 13.5, 19.5, 1))


def test_a_folder_of_zarr_without_metadata_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.zarr").mkdir()
    with pytest.raises(DataError, match="no Zarr metadata"):
        read_image(tmp_path / "a.zarr")


# --- the gate itself -----------------------------------------------------------------------------------------------


def test_an_unknown_ending_is_refused(tmp_path: Path) -> None:
    for name in ("image.bmp", "image", "image.nii.gz.part"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(DataError, match="unknown ending"):
            read_image(tmp_path / name)


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_is_not_there_is_refused(tmp_path: Path, ending: str) -> None:
    with pytest.raises(DataError, match="no such folder" if ending == ".zarr" else "does not exist"):
        read_image(tmp_path / f"image{ending}")


@pytest.mark.parametrize("ending", [ending for ending in ENDINGS if ending != ".zarr"])
def test_a_folder_and_a_pipe_are_refused_at_once(tmp_path: Path, ending: str) -> None:
    (tmp_path / f"folder{ending}").mkdir()
    with pytest.raises(DataError, match="no regular file"):
        read_image(tmp_path / f"folder{ending}")
    os.mkfifo(tmp_path / f"pipe{ending}")  # opened, it would wait for a writer
    with pytest.raises(DataError, match="no regular file"):
        read_image(tmp_path / f"pipe{ending}")


def test_the_digest_of_a_file_and_of_a_store(tmp_path: Path) -> None:
    """Of a file the sha256; of a store that of the lines that sha256sum prints, sorted by path."""

    np.savez(tmp_path / "a.npz", image=values("uint8"))
    read_image(tmp_path / "a.npz", sha256=hashlib.sha256((tmp_path / "a.npz").read_bytes()).hexdigest())
    with pytest.raises(DataError, match="the sha256 is"):
        read_image(tmp_path / "a.npz", sha256="0" * 64)
    zarr.create_array(tmp_path / "a.zarr", shape=SHAPE, dtype="uint8", chunks=(4, 4, 4))[...] = values("uint8")
    files = sorted(
        p.relative_to(tmp_path / "a.zarr").as_posix() for p in (tmp_path / "a.zarr").rglob("*") if p.is_file()
    )
    lines = [f"{hashlib.sha256((tmp_path / 'a.zarr' / name).read_bytes()).hexdigest()}  {name}\n" for name in files]
    read_image(tmp_path / "a.zarr", sha256=hashlib.sha256("".join(lines).encode()).hexdigest())


def test_checksum_comes_before_digest_and_digest_before_geometry(tmp_path: Path) -> None:
    """A file with all three faults is refused for the first; each repair brings the next to light."""
    path = tmp_path / "image.nii.gz"
    nib.save(nib.Nifti1Image(values("float32"), np.eye(4)), path)
    content = bytearray(gzip.decompress(path.read_bytes()))
    struct.pack_into("<12f", content, 280, *[0.0] * 12)
    sound = gzip.compress(bytes(content), mtime=0)
    path.write_bytes(sound[:-8] + bytes(8))
    with pytest.raises(DataError, match="gzip stream is corrupt"):
        read_image(path, sha256="0" * 64)
    path.write_bytes(sound)
    with pytest.raises(DataError, match="sha256"):
        read_image(path, sha256="0" * 64)
    with pytest.raises(DataError, match="not invertible"):
        read_image(path)


def test_limits_are_raised_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nib.save(nib.Nifti1Image(values("int16"), np.eye(4)), tmp_path / "image.nii.gz")
    monkeypatch.setenv("FIDUCIAL_MAX_VOXELS", "629")
    with pytest.raises(DataError, match=r"630 voxels, more than the budget of 629[\s\S]*raise FIDUCIAL_MAX_VOXELS"):
        read_image(tmp_path / "image.nii.gz")
    monkeypatch.setenv("FIDUCIAL_MAX_VOXELS", "630")
    assert read_image(tmp_path / "image.nii.gz").voxels.size == 630
    monkeypatch.setenv("FIDUCIAL_MAX_VOXEL_BYTES", "1259")
    with pytest.raises(DataError, match="1260 bytes of voxels"):
        read_image(tmp_path / "image.nii.gz")
    monkeypatch.setenv("FIDUCIAL_MAX_VOXELS", "many")
    with pytest.raises(UsageError, match="FIDUCIAL_MAX_VOXELS"):
        read_image(tmp_path / "image.nii.gz")


def test_declared_sizes_do_not_overflow() -> None:
    """2**62 voxels of 8 bytes are 2**65 bytes, which 64 bits would call 0."""
    with pytest.raises(DataError, match=str(2**65)):
        check_declared((2**31, 2**31), 8, "file", Budget(voxels=2**63))


def test_labels_of_any_format_pass_the_table(tmp_path: Path) -> None:
    labels = np.zeros((9, 11), np.uint8)
    labels[2, 3:6] = 255
    Image.fromarray(labels).save(tmp_path / "label.png")
    _, ids = read_label_image(tmp_path / "label.png", {0: 0, 255: 1})
    assert ids.dtype == np.uint8
    assert np.bincount(ids.ravel()).tolist() == [96, 3]
    with pytest.raises(DataError, match=r"255 \(3 voxels\)"):
        read_label_image(tmp_path / "label.png", {0: 0, 1: 1}, case="p01", key="label")
    np.savez(tmp_path / "label.npz", label=np.full((3, 3), 0.5))
    with pytest.raises(DataError, match="no integers"):
        read_label_image(tmp_path / "label.npz")
    np.savez(tmp_path / "label.npz", label=np.full((3, 3), 2**64 - 1, np.uint64))
    with pytest.raises(DataError, match="expected int16"):
        read_label_image(tmp_path / "label.npz")


def test_an_image_with_and_one_without_an_affine_share_no_grid(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", image=values("uint8"))
    nib.save(nib.Nifti1Image(values("uint8"), np.eye(4)), tmp_path / "a.nii.gz")
    plain, scan = read_image(tmp_path / "a.npz"), read_image(tmp_path / "a.nii.gz")
    check_same_grid(plain, plain, "label", "p01")
    for first, second in ((plain, scan), (scan, plain)):
        with pytest.raises(DataError, match="affine"):
            check_same_grid(first, second, "label", "p01")


def test_metadata_of_a_store_are_data_and_not_code(tmp_path: Path) -> None:
    """A name that Python would resolve, in place of a codec, is refused by name and never looked up."""
    zarr.create_array(tmp_path / "a.zarr", shape=SHAPE, dtype="uint8", chunks=(4, 4, 4))[...] = values("uint8")
    raw = json.loads((tmp_path / "a.zarr" / "zarr.json").read_text())
    raw["codecs"][-1] = {"name": "os.system", "configuration": {"command": "true"}}
    (tmp_path / "a.zarr" / "zarr.json").write_text(json.dumps(raw))
    with pytest.raises(DataError, match=r"os\.system"):
        read_image(tmp_path / "a.zarr")
