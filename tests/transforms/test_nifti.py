"""Every way in which a NIfTI file can be wrong is planted and refused by name; sound ones read as nibabel does."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import transforms.nifti as nifti
from transforms.errors import DataError
from transforms.nifti import check_same_grid, check_voxels, read_header, read_label, read_voxels

# Voxels of 0.5 x 1 x 3 mm, turned by 30 degrees about the third axis.
TURN = np.array([[np.cos(np.pi / 6), -np.sin(np.pi / 6), 0], [np.sin(np.pi / 6), np.cos(np.pi / 6), 0], [0, 0, 1]])
AFFINE = np.eye(4)
AFFINE[:3, :3] = TURN @ np.diag([0.5, 1.0, 3.0])
AFFINE[:3, 3] = (-10, 20, 5)
SHAPE = (5, 4, 3)
PIXDIM = 76  # byte offsets in a NIfTI-1 header
DIM, DATATYPE, VOX_OFFSET, SLOPE, UNITS, QFORM, SROW, MAGIC = 40, 70, 108, 112, 123, 252, 280, 344


def voxels(dtype: str = "float32", shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


def save(path: Path, data: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    nib.save(nib.Nifti1Image(data, affine), path)
    return path


def patched(path: Path, offset: int, layout: str, *values: float) -> Path:
    """Write ``values`` into the bytes of a .nii.gz, which nibabel itself would refuse to do."""
    content = bytearray(gzip.decompress(path.read_bytes()))
    struct.pack_into("<" + layout, content, offset, *values)
    path.write_bytes(gzip.compress(bytes(content)))
    return path


def refused(call: object, path: Path, *words: str, **arguments: object) -> None:
    with pytest.raises(DataError) as caught:
        call(path, case="p01", key="flair", **arguments)  # type: ignore[operator]
    assert str(path) in caught.value.what
    assert "case p01" in caught.value.what
    assert "key flair" in caught.value.what
    for word in words:
        assert word in caught.value.why
    assert caught.value.fix


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return save(tmp_path / "image.nii.gz", voxels())


def test_header_gives_shape_spacing_and_affine(image: Path) -> None:
    header = read_header(image)
    assert header.shape == SHAPE
    assert header.channels == 1
    assert header.dtype == np.dtype("float32")
    np.testing.assert_allclose(header.spacing, (0.5, 1.0, 3.0), rtol=1e-6)
    np.testing.assert_allclose(header.affine, AFFINE, atol=1e-6)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "float32", "float64", ">i2", ">f4"])
def test_voxels_are_those_of_nibabel(tmp_path: Path, suffix: str, dtype: str) -> None:
    header = nib.Nifti1Header(endianness=">" if dtype.startswith(">") else "<")
    header.set_data_dtype(dtype)
    path = tmp_path / f"image{suffix}"
    nib.save(nib.Nifti1Image(voxels(dtype), AFFINE, header), path)
    read = read_voxels(path)
    assert read.dtype == np.float32
    assert read.dtype.isnative
    assert read.flags.c_contiguous
    assert read.flags.writeable
    np.testing.assert_array_equal(read, nib.load(path).get_fdata(dtype=np.float32))


def test_nifti2_reads_like_nifti1(tmp_path: Path) -> None:
    path = tmp_path / "two.nii.gz"
    nib.save(nib.Nifti2Image(voxels(), AFFINE), path)
    np.testing.assert_array_equal(read_voxels(path), voxels())
    np.testing.assert_allclose(read_header(path).affine, AFFINE, atol=1e-12)


def test_scaling_is_applied_as_simpleitk_does(tmp_path: Path) -> None:
    path = save(tmp_path / "scaled.nii.gz", voxels("int16"))
    patched(path, SLOPE, "2f", 0.25, -3.0)
    independent = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path), SimpleITK.sitkFloat32)).T
    np.testing.assert_allclose(read_voxels(path), independent, atol=1e-6)
    assert read_voxels(path)[0, 0, 1] == 0.25 * 1 - 3.0


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(*[st.integers(1, 6)] * 3),
    spacing=st.tuples(*[st.floats(0.1, 8.0)] * 3),
    dtype=st.sampled_from(["uint8", "int16", "float32"]),
)
def test_what_is_written_is_read(
    tmp_path: Path, shape: tuple[int, int, int], spacing: tuple[float, float, float], dtype: str
) -> None:
    path = save(tmp_path / "any.nii.gz", voxels(dtype, shape), np.diag([*spacing, 1.0]))
    header = read_header(path)
    assert header.shape == shape
    np.testing.assert_allclose(header.spacing, spacing, rtol=1e-6)
    np.testing.assert_array_equal(read_voxels(path), voxels(dtype, shape))


def test_qform_with_unset_handedness_counts_as_right_handed(image: Path) -> None:
    patched(image, QFORM, "2h", 1, 0)
    expected = nib.load(image).affine
    patched(image, PIXDIM, "f", 0.0)
    np.testing.assert_allclose(read_header(image).affine, expected, atol=1e-6)


def test_channel_of_a_4d_file(tmp_path: Path) -> None:
    data = voxels(shape=(*SHAPE, 2))
    path = save(tmp_path / "four.nii.gz", data)
    assert read_header(path).channels == 2
    assert read_header(path).shape == SHAPE
    np.testing.assert_array_equal(read_voxels(path, channel=1), data[..., 1])
    refused(read_voxels, path, "2 channels")
    refused(read_voxels, path, "channel 2", "has 2", channel=2)


def test_trailing_axes_of_length_one_are_no_channels(tmp_path: Path) -> None:
    path = save(tmp_path / "four.nii.gz", voxels(shape=(*SHAPE, 1, 1)))
    assert read_voxels(path).shape == SHAPE


@pytest.mark.parametrize("spacing", [0.0, -1.0, float("nan"), float("inf")])
def test_a_spacing_that_is_no_length_is_refused(image: Path, spacing: float) -> None:
    patched(image, PIXDIM + 8, "f", spacing)
    refused(read_header, image, "spacing", str(spacing))
    refused(read_voxels, image, "spacing")


def test_nibabel_would_have_called_a_zero_spacing_one(image: Path) -> None:
    patched(image, PIXDIM + 8, "f", 0.0)
    assert nib.load(image).header.get_zooms()[1] == 1.0


@pytest.mark.parametrize(
    ("row", "word"), [((0.0, 0.0, 0.0, 0.0), "not invertible"), ((float("nan"), 0.0, 0.0, 0.0), "not finite")]
)
def test_an_affine_without_inverse_is_refused(image: Path, row: tuple[float, ...], word: str) -> None:
    patched(image, SROW, "4f", *row)
    refused(read_header, image, word)


def test_a_zero_affine_is_refused(image: Path) -> None:
    patched(image, SROW, "12f", *[0.0] * 12)
    refused(read_header, image, "not invertible")


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 3, 2, 2)])
def test_other_numbers_of_axes_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    refused(read_header, save(tmp_path / "axes.nii.gz", voxels(shape=shape)), f"{len(shape)} axes")


def test_an_axis_of_length_zero_is_refused(image: Path) -> None:
    patched(image, DIM + 4, "h", 0)
    refused(read_header, image, "axes")


def test_more_voxels_than_the_budget_are_refused_before_they_are_read(image: Path) -> None:
    patched(image, DIM + 2, "3h", 1200, 1200, 1200)
    refused(read_header, image, str(1200**3))


def test_an_unknown_data_type_is_refused(image: Path) -> None:
    patched(image, DATATYPE, "h", 9999)
    refused(read_header, image, "data type")


def test_complex_voxels_are_refused(tmp_path: Path) -> None:
    refused(read_header, save(tmp_path / "complex.nii.gz", voxels("complex64")), "complex64")


def test_two_file_nifti_is_refused(image: Path) -> None:
    patched(image, MAGIC, "4s", b"ni1\0")
    refused(read_header, image, "no single-file NIfTI")


@pytest.mark.parametrize("content", [b"", b"abc", b"\x5c\x01\x00\x00 too short", b"x" * 1000])
def test_what_is_no_nifti_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.nii.gz"
    path.write_bytes(content)
    refused(read_header, path, "no single-file NIfTI")


def test_voxels_inside_the_header_are_refused(image: Path) -> None:
    patched(image, VOX_OFFSET, "f", 0.0)
    refused(read_voxels, image, "inside the header")


def test_an_infinite_slope_is_refused(tmp_path: Path) -> None:
    path = patched(save(tmp_path / "scaled.nii.gz", voxels("int16")), SLOPE, "f", float("inf"))
    refused(read_voxels, path, "scaling")


def test_a_width_that_is_not_that_of_the_type_is_refused(image: Path) -> None:
    patched(image, DATATYPE + 2, "h", 16)
    refused(read_header, image, "float32 and 16 bits per voxel, expected 32")


@pytest.mark.parametrize(("unit", "name"), [(1, "metres"), (3, "micrometres"), (5, "an unknown unit")])
def test_lengths_in_another_unit_are_refused(image: Path, unit: int, name: str) -> None:
    patched(image, UNITS, "B", unit + 8)  # 8: seconds, which change nothing
    refused(read_header, image, name)
    patched(image, UNITS, "B", 2 + 8)
    assert read_header(image).spacing == pytest.approx((0.5, 1.0, 3.0), rel=1e-6)


def test_a_pixdim_that_contradicts_the_affine_is_refused(image: Path) -> None:
    """The affine's columns are 0.5, 1 and 3 mm long: 0.8 % more is rounding, 3 % another voxel size."""
    patched(image, PIXDIM + 12, "f", 3 * 1.008)
    assert read_header(image).spacing == pytest.approx((0.5, 1.0, 3.0), rel=1e-6)
    patched(image, PIXDIM + 12, "f", 3 * 1.03)
    refused(read_header, image, "pixdim says [0.5, 1.0, 3.09] mm")


@pytest.mark.parametrize("spacing", [1e-5, 5e3])
def test_a_spacing_that_no_scan_has_is_refused(tmp_path: Path, spacing: float) -> None:
    path = save(tmp_path / "image.nii.gz", voxels(), np.diag([1, spacing, 1, 1.0]))
    refused(read_header, path, "expected 0.0001 to 1000 mm")


def test_an_unknown_orientation_is_refused_and_not_guessed(image: Path) -> None:
    """nibabel takes such a file for one whose first axis runs to the left."""
    patched(image, QFORM, "2h", 0, 0)
    assert nib.load(image).affine[0, 0] < 0
    refused(read_header, image, "no orientation")
    patched(image, QFORM, "2h", 0, -1)
    refused(read_header, image, "codes")


def test_extensions_are_passed_over(tmp_path: Path) -> None:
    stored = nib.Nifti1Image(voxels(), AFFINE)
    for text in (b"short", b"a longer comment than sixteen bytes"):
        stored.header.extensions.append(nib.nifti1.Nifti1Extension("comment", text))
    nib.save(stored, tmp_path / "image.nii.gz")
    np.testing.assert_array_equal(read_voxels(tmp_path / "image.nii.gz"), voxels())


def test_an_offset_that_moves_the_voxels_is_refused(tmp_path: Path) -> None:
    """16 bytes later: the image would begin with its fifth voxel and end with four zeros from the padding."""
    path = save(tmp_path / "image.nii", voxels())
    content = bytearray(path.read_bytes() + bytes(16))
    struct.pack_into("<f", content, VOX_OFFSET, 368.0)
    path.write_bytes(bytes(content))
    assert nib.load(path).get_fdata()[0, 0, 0] != voxels()[0, 0, 0]
    refused(read_voxels, path, "16 bytes that are no extension")


def test_an_offset_beyond_all_memory_is_refused(image: Path) -> None:
    patched(image, VOX_OFFSET, "f", 3e38)
    refused(read_voxels, image, "budget")


def test_a_nifti2_whose_line_ends_were_translated_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "two.nii"
    nib.save(nib.Nifti2Image(voxels(), AFFINE), path)
    content = bytearray(path.read_bytes())
    content[8:12] = b"\n\n\x1a\n"
    path.write_bytes(bytes(content))
    refused(read_header, path, "no single-file NIfTI")


def test_the_budget_of_the_environment_holds_for_every_reader(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIDUCIAL_MAX_VOXELS", "59")
    for call in (read_header, read_voxels, check_voxels, read_label):
        refused(call, image, "60 voxels, more than the budget of 59")
    monkeypatch.setenv("FIDUCIAL_MAX_VOXELS", "60")
    assert read_voxels(image).size == 60


def test_an_absent_file_is_refused(tmp_path: Path) -> None:
    refused(read_header, tmp_path / "nothing.nii.gz", "does not exist")
    refused(read_voxels, tmp_path / "nothing.nii.gz", "does not exist")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    refused(read_header, tmp_path, "cannot be read")


def noisy(path: Path) -> Path:
    """An image that gzip cannot shrink, so that cuts and flips fall into its voxels."""
    return save(path, np.random.default_rng(0).normal(size=(12, 12, 12)).astype(np.float32))


@pytest.mark.parametrize("kept", [0.5, 0.99])
def test_a_truncated_gzip_is_refused(tmp_path: Path, kept: float) -> None:
    path = noisy(tmp_path / "cut.nii.gz")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    refused(read_voxels, path, "truncated")
    refused(check_voxels, path, "truncated")


def test_a_gzip_without_its_checksum_is_refused(tmp_path: Path) -> None:
    path = noisy(tmp_path / "cut.nii.gz")
    path.write_bytes(path.read_bytes()[:-8])
    refused(read_voxels, path, "truncated")


def test_a_wrong_checksum_is_refused_where_nibabel_accepts_it(tmp_path: Path) -> None:
    path = noisy(tmp_path / "crc.nii.gz")
    content = bytearray(path.read_bytes())
    content[-8] ^= 1
    path.write_bytes(bytes(content))
    assert np.isfinite(nib.load(path).get_fdata()).all()
    refused(read_voxels, path, "corrupt")


def test_a_flipped_bit_is_refused(tmp_path: Path) -> None:
    path = noisy(tmp_path / "bit.nii.gz")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(bytes(content))
    refused(read_voxels, path, "gzip")


def test_a_truncated_plain_file_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "cut.nii", voxels())
    path.write_bytes(path.read_bytes()[:-4])
    refused(read_voxels, path, f"{60 * 4 - 4} bytes", f"declares {60 * 4}")


def test_a_file_with_more_voxels_than_its_header_says_is_refused(tmp_path: Path) -> None:
    path = noisy(tmp_path / "long.nii.gz")
    patched(path, DIM + 2, "h", 6)
    refused(read_voxels, path, "at least")


def test_zero_bytes_that_fill_a_block_are_accepted(tmp_path: Path) -> None:
    path = save(tmp_path / "padded.nii", voxels())
    path.write_bytes(path.read_bytes() + bytes(100))
    np.testing.assert_array_equal(read_voxels(path), voxels())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_no_numbers_are_refused_and_located(tmp_path: Path, value: float) -> None:
    data = voxels()
    data[2, 1, 0] = value
    path = save(tmp_path / "nan.nii.gz", data)
    refused(read_voxels, path, "1 of 60", "(2, 1, 0)")
    refused(check_voxels, path, "1 of 60")


def test_check_voxels_looks_at_every_channel(tmp_path: Path) -> None:
    data = voxels(shape=(*SHAPE, 3))
    check_voxels(save(tmp_path / "good.nii.gz", data))
    data[0, 0, 0, 2] = np.nan
    refused(check_voxels, save(tmp_path / "bad.nii.gz", data), "NaN")


def test_values_beyond_the_wanted_type_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "large.nii.gz", np.full(SHAPE, 1e300))
    refused(read_voxels, path, "float32")
    assert read_voxels(path, dtype=np.float64).max() == 1e300


def test_label_values_become_ids(tmp_path: Path) -> None:
    data = np.zeros(SHAPE, dtype=np.uint8)
    data[0], data[1, 0], data[4, 3, 2] = 1, 2, 4
    label = read_label(save(tmp_path / "label.nii.gz", data), {0: 0, 1: 1, 2: 2, 4: 1})
    assert label.dtype == np.uint8
    # 12 voxels of value 1 and one of value 4 mean 1; three voxels of value 2 mean 2.
    assert np.bincount(label.ravel()).tolist() == [44, 13, 3]
    assert label[4, 3, 2] == 1


def test_floats_near_integers_are_labels(tmp_path: Path) -> None:
    data = np.zeros(SHAPE, dtype=np.float32)
    data[0], data[1] = 0.99999997, 2.0004
    label = read_label(save(tmp_path / "label.nii.gz", data), {0: 0, 1: 1, 2: 2})
    assert (label[0] == 1).all()
    assert (label[1] == 2).all()


def test_a_rescaled_mask_is_a_label(tmp_path: Path) -> None:
    """int32 with slope 2**-32 and intercept 0.5: 0 is stored as -2**31, 1 as 2**31 - 1."""
    stored = np.full(SHAPE, -(2**31), dtype=np.int32)
    stored[0] = 2**31 - 1
    path = patched(save(tmp_path / "mask.nii.gz", stored), SLOPE, "2f", 2.0**-32, 0.5)
    assert np.bincount(read_label(path).ravel()).tolist() == [48, 12]


def test_without_a_table_label_values_stay(tmp_path: Path) -> None:
    data = voxels("int16") * 30 - 10
    label = read_label(save(tmp_path / "label.nii.gz", data))
    assert label.dtype == np.int16
    np.testing.assert_array_equal(label, data)


def test_big_endian_labels(tmp_path: Path) -> None:
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(">i2")
    nib.save(nib.Nifti1Image(voxels(">i2"), AFFINE, header), tmp_path / "label.nii.gz")
    np.testing.assert_array_equal(read_label(tmp_path / "label.nii.gz"), voxels("uint8"))


def test_label_values_outside_the_table_are_counted(tmp_path: Path) -> None:
    data = np.zeros(SHAPE, dtype=np.uint8)
    data[0], data[1, 0, 0] = 3, 7
    path = save(tmp_path / "label.nii.gz", data)
    refused(read_label, path, "3 (12 voxels)", "7 (1 voxels)", "[0, 1]", value_to_id={0: 0, 1: 1})


def test_interpolated_labels_are_refused(tmp_path: Path) -> None:
    data = np.zeros(SHAPE, dtype=np.float32)
    data[0, 0, 0] = 0.5
    refused(read_label, save(tmp_path / "label.nii.gz", data), "1 voxels", "0.5")


def test_nan_in_a_label_is_refused(tmp_path: Path) -> None:
    data = np.zeros(SHAPE, dtype=np.float32)
    data[0, 0, 0] = np.nan
    refused(read_label, save(tmp_path / "label.nii.gz", data), "NaN")


def test_label_values_beyond_int16_are_refused(tmp_path: Path) -> None:
    refused(read_label, save(tmp_path / "label.nii.gz", np.full(SHAPE, 40000, dtype=np.int32)), "40000")


def test_one_grid_within_tolerance(tmp_path: Path, image: Path) -> None:
    reference = read_header(image)
    near = AFFINE.copy()
    near[0, 3] += 5e-4
    check_same_grid(reference, read_header(save(tmp_path / "near.nii.gz", voxels(), near)), "label", "p01")
    far = AFFINE.copy()
    far[0, 3] += 0.4
    path = save(tmp_path / "far.nii.gz", voxels(), far)
    with pytest.raises(DataError) as caught:
        check_same_grid(reference, read_header(path), "label", "p01")
    assert str(path) in caught.value.what
    assert "case p01, key label" in caught.value.what
    assert "differs by 0.4 " in caught.value.why
    assert "0.4 mm" in caught.value.why
    check_same_grid(reference, read_header(path), "label", "p01", tolerance=0.5)


def test_another_spacing_moves_the_far_corner_most(tmp_path: Path) -> None:
    """Third axis 3 instead of 2 mm, 3 slices: the last slice lies (3 - 2) * (3 - 1) = 2 mm away."""
    first = read_header(save(tmp_path / "a.nii.gz", voxels(), np.diag([1, 1, 2, 1.0])))
    second = read_header(save(tmp_path / "b.nii.gz", voxels(), np.diag([1, 1, 3, 1.0])))
    with pytest.raises(DataError, match=r"differs by 1 .* by 2 mm"):
        check_same_grid(first, second, "t1", "p01")


def test_another_shape_is_another_grid(tmp_path: Path, image: Path) -> None:
    other = read_header(save(tmp_path / "other.nii.gz", voxels(shape=(4, 5, 3))))
    with pytest.raises(DataError, match=r"shape \(4, 5, 3\), expected \(5, 4, 3\)"):
        check_same_grid(read_header(image), other, "t1", "p01")


def test_the_module_knows_nothing_of_pipelines() -> None:
    assert "import pipelines" not in Path(nifti.__file__).read_text()
    assert "from pipelines" not in Path(nifti.__file__).read_text()
