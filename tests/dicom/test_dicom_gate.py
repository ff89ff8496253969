"""Every defect is refused by its name; every valid layout becomes the right affine and the right voxels."""

from __future__ import annotations

import zipfile
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
import SimpleITK
from generated_series import (
    AXIAL,
    CORONAL,
    FRAME,
    MR,
    NAMES,
    SAGITTAL,
    SERIES,
    Change,
    encoded,
    header,
    set_in,
    stored_pixels,
    without,
    write_series,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from pipelines.dicom.cases import as_case_folders
from pipelines.dicom.geometry import DEFECTS, Plane, grid_of
from pipelines.dicom.privacy import names_found
from pipelines.dicom.series import find_series, line_of
from pipelines.dicom.volume import Volume, read_volume
from transforms.errors import DataError, FiducialError, UsageError


def volume_of(folder: Path, allow_resampling: bool = False) -> Volume:
    (series,) = find_series(folder, folder.parent / "work").series
    return read_volume(series, allow_resampling)


def heights(*z: float) -> Change:
    """Return a change that puts slice k of an axial series at height ``z[k]``."""

    def change(k: int, image: Dataset) -> None:
        image.ImagePositionPatient = [-10.0, 20.0, z[k]]

    return change


def tilted(k: int, image: Dataset) -> None:
    """Slices follow one another along z, and are turned about x by 18.5 degrees: the gantry was tilted."""
    c, s = np.cos(np.radians(18.5)), np.sin(np.radians(18.5))
    image.ImageOrientationPatient = [1, 0, 0, 0, round(c, 9), round(-s, 9)]


def one_frame_of_many(k: int, image: Dataset) -> None:
    image.NumberOfFrames = 1
    image.SharedFunctionalGroupsSequence = Sequence([Dataset()])


def lookup_table(k: int, image: Dataset) -> None:
    table = Dataset()
    table.LUTDescriptor, table.ModalityLUTType, table.LUTData = [2, 0, 16], "HU", bytes(4)
    table["LUTData"].VR = "OW"
    image.ModalityLUTSequence = Sequence([table])


def cut_pixels(k: int, image: Dataset) -> None:
    if k == 2:
        image.PixelData = image.PixelData[:-4]


SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
TURNED = [1, 0, 0, 0, round(np.cos(0.1), 9), round(np.sin(0.1), 9)]
POSITION = [-10.0, 20.0, 36.0]  # of slice 2
PLANTED_DEFECTS: dict[str, tuple[str, Change, str]] = {
    # defect: which of DEFECTS, what is done to five slices of 3 mm, a part of the reason
    "gap": ("missing slice", heights(30, 33, 36, 42, 45), "1 missing; 6 mm between image 3 and image 4"),
    "last far": ("missing slice", heights(30, 33, 36, 39, 48), "2 missing; 9 mm between image 4 and image 5"),
    "uneven": ("uneven gaps", heights(30, 33, 36, 40, 44), "3 (2x), 4 (2x) mm"),
    "twice": ("duplicate slice", set_in(3, ImagePositionPatient=POSITION), "image 3 and image 4"),
    "same uid": ("duplicate slice", set_in(3, SOPInstanceUID=f"{SERIES}.1"), "two files"),
    "time series": ("several volumes", heights(30, 33, 30, 33), "4 images at 2 positions, 2 each"),
    "tilt": ("tilted gantry", tilted, "18.5 degrees"),
    "turned": ("mixed orientation", set_in(1, ImageOrientationPatient=TURNED), "5.73 degrees"),
    "pixel spacing": ("mixed spacing", set_in(2, PixelSpacing=[2.0, 0.55]), "2 x 0.5 mm in image 1"),
    "matrix": ("mixed spacing", set_in(2, Rows=4, Columns=6), "4 x 6 pixels in 4 images"),
    "frames of reference": ("mixed frame of reference", set_in(2, FrameOfReferenceUID=FRAME + ".7"), "2 frames"),
    "another study": ("mixed series", set_in(2, StudyInstanceUID="1.2.3.4.99"), "image 3 has another StudyInstanceUID"),
    "another class": ("mixed series", set_in(3, SOPClassUID=MR), "image 4 has another SOPClassUID"),
    "unsigned among signed": ("mixed series", set_in(2, PixelRepresentation=0), "signed and unsigned"),
    "another patient": ("different patients", set_in(2, PatientID="PID2"), "image 3 has another PatientID"),
    "another birth date": ("different patients", set_in(4, PatientBirthDate="19600101"), "another PatientBirthDate"),
    "class of another modality": (
        "wrong modality",
        set_in(None, SOPClassUID=MR),
        "modality CT in an image of class MR",
    ),
    "no position": ("geometry missing", without("ImagePositionPatient"), "no ImagePositionPatient"),
    "no pixel spacing": ("geometry missing", without("PixelSpacing"), "no PixelSpacing"),
    "empty orientation": ("geometry missing", set_in(0, ImageOrientationPatient=None), "ImageOrientationPatient"),
    "zero spacing": ("impossible geometry", set_in(None, PixelSpacing=[0.0, 0.5]), "0 x 0.5 mm"),
    "not unit": ("impossible geometry", set_in(None, ImageOrientationPatient=[1, 0, 0, 0, 0.9, 0]), "0.9"),
    "not perpendicular": (
        "impossible geometry",
        set_in(0, ImageOrientationPatient=[1, 0, 0, 0.1, 0.995, 0]),
        "product",
    ),
    "two numbers": ("impossible geometry", set_in(0, ImagePositionPatient=[1, 2]), "3 numbers"),
    "off the line": ("impossible geometry", set_in(2, ImagePositionPatient=[-9.0, 20.0, 36.0]), "1 mm off the line"),
    "frames": ("multi-frame", set_in(None, NumberOfFrames=5), "5 frames"),
    "enhanced": ("multi-frame", one_frame_of_many, "in one file"),
    "colour": ("not a plain image", set_in(None, SamplesPerPixel=3), "3 samples"),
    "inverted": ("not a plain image", set_in(None, PhotometricInterpretation="MONOCHROME1"), "MONOCHROME1"),
    "screen capture": ("not a plain image", set_in(None, SOPClassUID=SECONDARY_CAPTURE), "Secondary Capture"),
    "burned in": ("not a plain image", set_in(None, BurnedInAnnotation="YES"), "burned into its pixels"),
    "slope 0": ("rescale", set_in(2, RescaleSlope=0), "slope 0"),
    "no intercept": ("rescale", without("RescaleIntercept"), "RescaleSlope without"),
    "no rescale": ("rescale", without("RescaleSlope", "RescaleIntercept"), "a CT without"),
    "other unit": ("rescale", set_in(None, RescaleType="OD"), "in OD"),
    "lookup table": ("rescale", lookup_table, "lookup table"),
    "padding differs": ("padding value", set_in(1, PixelPaddingValue=-5), "several in one series"),
    "padding beyond": ("padding value", set_in(None, BitsStored=12, HighBit=11, PixelPaddingValue=-3000), "12 bits"),
    "padding limit alone": ("padding value", set_in(None, PixelPaddingRangeLimit=7), "without a value"),
    "high bit": ("pixel format", set_in(None, BitsStored=12, HighBit=15), "highest 15"),
    "truncated": ("truncated pixels", cut_pixels, "44 bytes, expected 48"),
    "no pixels": ("truncated pixels", without("PixelData"), "no pixel data"),
    "jpeg": ("compressed pixels", encoded(JPEGLosslessSV1), "JPEG Lossless"),
    "jpeg 2000": ("compressed pixels", encoded(JPEG2000Lossless), "JPEG 2000"),
    "jpeg-ls": ("compressed pixels", encoded(JPEGLSLossless), "JPEG-LS"),
}


@pytest.mark.parametrize("name", PLANTED_DEFECTS)
def test_a_defect_is_refused_by_its_name_in_three_lines(name: str, tmp_path: Path) -> None:
    defect, change, reason = PLANTED_DEFECTS[name]
    pixels = stored_pixels(slices=4) if name == "time series" else None
    write_series(tmp_path / "in", pixels, change=change)
    with pytest.raises(DataError) as refused:
        as_case_folders(tmp_path / "in", ["ct"], tmp_path / "work")
    error = refused.value
    assert error.what.endswith(f": {defect}")
    assert reason in error.why
    assert error.fix == DEFECTS[defect]
    assert error.exit_code == 3
    assert len(str(error).splitlines()) == 3
    assert not names_found(str(error), NAMES)


def test_every_defect_in_the_table_is_planted() -> None:
    others = {"single slice", "broken file"}  # planted below
    assert {defect for defect, _, _ in PLANTED_DEFECTS.values()} == set(DEFECTS) - others


def test_a_single_slice_is_no_volume(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="single slice"):
        volume_of(write_series(tmp_path / "in", stored_pixels(slices=1)))


@pytest.mark.parametrize(("modality", "wanted"), [("MR", "ct"), ("CT", "flair"), ("MR", "flair")])
def test_a_series_of_another_modality_or_sequence_is_refused(modality: str, wanted: str, tmp_path: Path) -> None:
    write_series(tmp_path / "in", modality=modality)  # its description says t1
    with pytest.raises(DataError, match="wrong modality"):
        as_case_folders(tmp_path / "in", [wanted], tmp_path / "work")


def test_a_sequence_that_the_header_does_not_name_must_be_given(tmp_path: Path) -> None:
    write_series(tmp_path / "in", modality="MR", change=set_in(None, SeriesDescription="head routine"))
    with pytest.raises(UsageError, match="cannot be told") as refused:
        as_case_folders(tmp_path / "in", ["flair"], tmp_path / "work")
    key = find_series(tmp_path / "in", tmp_path / "work").series[0].key
    assert f"--dicom_series flair={key}" in refused.value.fix
    cases = as_case_folders(tmp_path / "in", ["flair"], tmp_path / "work", chosen={"flair": key})
    assert [case.name for case in cases.cases] == [f"series-{key}"]


@pytest.mark.parametrize("syntax", [ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian])
def test_retired_and_deflated_syntaxes_are_refused_before_anything_is_inflated(syntax: str, tmp_path: Path) -> None:
    image = header(1, (0, 0, 0), syntax=syntax)
    image.Rows = image.Columns = 2
    (tmp_path / "in").mkdir()
    pydicom.dcmwrite(tmp_path / "in" / "a.dcm", image, enforce_file_format=True)
    with pytest.raises(DataError, match="compressed pixels") as refused:
        find_series(tmp_path / "in", tmp_path / "work")
    assert UID(syntax).name in refused.value.why


@pytest.mark.parametrize("which", [0, 4])
def test_a_header_that_is_cut_at_an_end_of_the_stack_is_no_shorter_stack(which: int, tmp_path: Path) -> None:
    """The reader stops where the file does: without its matrix the slice would be passed over as no image."""
    path = sorted(write_series(tmp_path / "in").iterdir())[which]
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(DataError, match="broken file"):
        as_case_folders(tmp_path / "in", ["ct"], tmp_path / "work")


def test_bytes_cut_or_overwritten_are_a_refusal_and_never_a_traceback(tmp_path: Path) -> None:
    write_series(tmp_path / "in")
    path = sorted((tmp_path / "in").iterdir())[2]
    content, rng = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for number in range(150):
        damaged = bytearray(content)
        if number % 3 == 0:
            del damaged[int(rng.integers(140, len(damaged))) :]
        else:
            for at in rng.integers(132, len(damaged), size=3):
                damaged[at] = int(rng.integers(256))
        path.write_bytes(bytes(damaged))
        message = ""
        try:
            as_case_folders(tmp_path / "in", ["ct"], tmp_path / "work")
        except FiducialError as error:
            message = str(error)
            refused += 1
        assert len(message.splitlines()) in (0, 3)
        assert not names_found(message, NAMES)
    assert refused > 50  # the cuts at least; a changed pixel or name is not to be seen


# The affine by hand. Slice k at origin + k step; column index goes along the row's direction with the distance of
# columns (the second of PixelSpacing), row index along the column's with the first. LPS to RAS: x and y change sign.
LAYOUTS = {
    "axial": (AXIAL, 3.0, [[-0.5, 0, 0], [0, -2, 0], [0, 0, 3]]),
    "axial, head first": (AXIAL, -3.0, [[-0.5, 0, 0], [0, -2, 0], [0, 0, 3]]),
    "sagittal": (SAGITTAL, 3.0, [[0, 0, 3], [-0.5, 0, 0], [0, -2, 0]]),
    "coronal": (CORONAL, 3.0, [[-0.5, 0, 0], [0, 0, -3], [0, -2, 0]]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_affine_is_the_one_derived_by_hand(layout: str, tmp_path: Path) -> None:
    orientation, gap, expected = LAYOUTS[layout]
    volume = volume_of(write_series(tmp_path / "in", orientation=orientation, gap=gap))
    np.testing.assert_allclose(volume.affine[:3, :3], expected, atol=1e-9)
    # the normal of sagittal is -x, of coronal +y, of axial +z (LPS); with a negative gap the last slice comes first
    first = np.array([-10.0, 20.0, 30.0]) + (4 * np.array([0, 0, -3.0]) if gap < 0 else 0)
    np.testing.assert_allclose(volume.affine[:3, 3], first * [-1, -1, 1])
    k = 4 if gap < 0 else 0
    assert volume.voxels[1, 2, 0] == 2 * (100 * k + 10 * 2 + 1) - 1000  # HU of row 2, column 1 of the lowest slice


def _oblique(a: float, b: float, c: float) -> list[float]:
    def turn(axis: int, angle: float) -> np.ndarray:
        i, j = [(1, 2), (2, 0), (0, 1)][axis]
        matrix = np.eye(3)
        matrix[i, i] = matrix[j, j] = np.cos(angle)
        matrix[i, j], matrix[j, i] = -np.sin(angle), np.sin(angle)
        return matrix

    axes = turn(0, a) @ turn(1, b) @ turn(2, c)
    return [round(float(value), 12) for value in (*axes[:, 0], *axes[:, 1])]


@pytest.mark.parametrize(
    ("orientation", "options", "low", "high"),
    [
        (AXIAL, {}, 0, 500),
        (SAGITTAL, {"signed": False, "bits": 12}, 0, 4095),
        (CORONAL, {"signed": True, "bits": 12}, -2048, 2047),
        (AXIAL, {"signed": False, "bits": 16}, 0, 65535),
        (_oblique(0.3, -0.2, 0.5), {"signed": True, "bits": 16}, -32768, 32767),
        (_oblique(-0.7, 0.4, 2.0), {"signed": False, "bits": 8}, 0, 255),
        (AXIAL, {"syntax": ImplicitVRLittleEndian}, -100, 100),
    ],
)
@pytest.mark.parametrize("gap", [1.25, -4.0])
def test_voxels_and_affine_are_those_of_an_independent_reader(
    orientation: list[float], options: dict[str, object], low: int, high: int, gap: float, tmp_path: Path
) -> None:
    pixels = np.random.default_rng(1).integers(low, high + 1, size=(6, 5, 7))
    pixels.flat[:2] = low, high
    folder = write_series(tmp_path / "in", pixels, orientation=orientation, gap=gap, spacing=(0.8, 1.7), **options)
    volume = volume_of(folder)
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    theirs = np.eye(4)
    theirs[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) @ np.diag(image.GetSpacing())
    theirs[:3, 3] = image.GetOrigin()
    theirs[:2] *= -1
    values = SimpleITK.GetArrayFromImage(image).transpose(2, 1, 0).astype(np.float32)
    np.testing.assert_allclose(volume.affine, theirs, atol=1e-6)
    np.testing.assert_array_equal(volume.voxels, values)


@settings(max_examples=60, deadline=None)
@given(
    angles=st.tuples(*[st.floats(-3, 3)] * 3),
    spacing=st.tuples(st.floats(0.3, 5), st.floats(0.3, 5)),
    gap=st.floats(0.3, 8) | st.floats(-8, -0.3),
    order=st.permutations(range(6)),
)
def test_a_grid_puts_the_first_pixel_of_every_slice_where_its_header_says(
    angles: tuple[float, float, float], spacing: tuple[float, float], gap: float, order: list[int]
) -> None:
    orientation = _oblique(*angles)
    normal = np.cross(orientation[:3], orientation[3:])
    positions = [np.array([5.0, -7.0, 11.0]) + k * gap * normal for k in order]
    planes = [
        Plane(f"image {n}", 4, 3, spacing, tuple(orientation), tuple(position.round(5)))  # type: ignore[arg-type]
        for n, position in enumerate(positions)
    ]
    grid = grid_of(planes, "series")
    for slice_index, plane_index in enumerate(grid.order):
        at = grid.affine @ [0, 0, slice_index, 1]
        np.testing.assert_allclose(at[:3] * [-1, -1, 1], planes[plane_index].position, atol=1e-4)
    np.testing.assert_allclose(grid.spacing, (spacing[1], spacing[0], abs(gap)), rtol=1e-4)


def test_rounded_headers_of_scanners_pass(tmp_path: Path) -> None:
    """Positions with two decimals, orientation with four: what many scanners write."""

    def rounded(k: int, image: Dataset) -> None:
        image.ImagePositionPatient = [round(float(x), 2) for x in image.ImagePositionPatient]
        image.ImageOrientationPatient = [round(float(x), 4) for x in image.ImageOrientationPatient]

    pixels = stored_pixels(slices=30)
    folder = write_series(
        tmp_path / "in", pixels, _oblique(0.1, 0.05, -0.02), gap=1.1, spacing=(0.45, 0.45), change=rounded
    )
    assert volume_of(folder).voxels.shape == (4, 6, 30)


def test_slopes_that_differ_between_slices_are_applied_slice_by_slice(tmp_path: Path) -> None:
    def change(k: int, image: Dataset) -> None:
        image.RescaleSlope, image.RescaleIntercept = k + 1, 10 * k

    volume = volume_of(write_series(tmp_path / "in", modality="MR", change=change))
    assert volume.voxels[3, 5, 4] == 5 * (400 + 50 + 3) + 40
    assert volume.voxels[0, 0, 1] == 2 * 100 + 10


def test_mr_without_rescale_keeps_its_stored_values(tmp_path: Path) -> None:
    volume = volume_of(write_series(tmp_path / "in", modality="MR"))
    np.testing.assert_array_equal(volume.voxels.transpose(2, 1, 0), stored_pixels())


def test_padding_becomes_the_lowest_measured_value_and_is_counted(tmp_path: Path) -> None:
    # stored -2000 around measured 0 .. 453: HU 2 s - 1000, so the lowest measured is 2 * 1 - 1000
    pixels = stored_pixels()
    pixels[:, 0, :] = -2000
    pixels[0, 1, 0] = -1990  # within the range limit
    pixels[0, 2, 0] = 1
    change = set_in(None, PixelPaddingValue=-2000, PixelPaddingRangeLimit=-1985)
    volume = volume_of(write_series(tmp_path / "in", pixels, change=change))
    assert volume.padding == (5 * 4 + 1, 2 * 1 - 1000)
    assert volume.voxels.min() == -998
    assert volume.voxels[0, 1, 0] == -998


def test_bits_above_the_stored_ones_are_no_part_of_the_value(tmp_path: Path) -> None:
    """Old scanners keep overlays in the unused high bits: 12 stored bits, something else in bits 12 to 15."""
    stored = np.array([[[-2048, -1], [0, 2047]]] * 3)
    dirty = ((stored & 0xFFF) | 0x5000).astype(np.uint16).astype(np.int16)
    volume = volume_of(write_series(tmp_path / "in", dirty, bits=12, change=set_in(None, RescaleIntercept=0)))
    np.testing.assert_array_equal(volume.voxels.transpose(2, 1, 0), 2 * stored)


def test_run_length_encoded_pixels_are_read(tmp_path: Path) -> None:
    plain = volume_of(write_series(tmp_path / "plain"))
    folder = write_series(
        tmp_path / "rle", change=lambda k, image: image.compress(RLELossless, generate_instance_uid=False)
    )
    np.testing.assert_array_equal(volume_of(folder).voxels, plain.voxels)


def test_a_zip_file_is_read_as_a_folder_whatever_its_members_are_called(tmp_path: Path) -> None:
    write_series(tmp_path / "in")
    with zipfile.ZipFile(tmp_path / "study.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in (tmp_path / "in").iterdir():
            archive.write(path, f"../../{path.name}")
        archive.writestr("readme.txt", "no image")
    found = find_series(tmp_path / "study.zip", tmp_path / "work")
    assert found.passed_over == 1
    assert {path.parent for path in (image.path for image in found.series[0].images)} == {tmp_path / "work"}
    np.testing.assert_array_equal(read_volume(found.series[0]).voxels, volume_of(tmp_path / "in").voxels)


def test_bombs_and_damage_in_zip_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = tmp_path / "bomb.zip"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.dcm", bytes(4 * 2**20))
    with pytest.raises(DataError, match="inflates"):
        find_series(bomb, tmp_path / "work")
    assert not list((tmp_path / "work").glob("*"))

    write_series(tmp_path / "in")
    sound = tmp_path / "sound.zip"
    with zipfile.ZipFile(sound, "w") as archive:
        for path in (tmp_path / "in").iterdir():
            archive.write(path, path.name)
    damaged = bytearray(sound.read_bytes())
    damaged[600] ^= 1
    (tmp_path / "damaged.zip").write_bytes(bytes(damaged))
    with pytest.raises(DataError, match="damaged"):
        find_series(tmp_path / "damaged.zip", tmp_path / "work")
    monkeypatch.setenv("FIDUCIAL_MAX_FILE_BYTES", "5000")
    with pytest.raises(DataError, match="budget"):
        find_series(sound, tmp_path / "work")


def test_a_folder_of_several_series_has_one_line_for_each_and_nothing_typed_in_it(tmp_path: Path) -> None:
    write_series(tmp_path / "in" / "a")
    other = set_in(None, SeriesInstanceUID="1.2.3.9", Modality="MR")
    write_series(tmp_path / "in" / "b", stored_pixels(slices=3), change=other)
    (tmp_path / "in" / "notes.txt").write_text("Grimsby")
    (tmp_path / "in" / "link.dcm").symlink_to(next((tmp_path / "in" / "a").iterdir()))
    found = find_series(tmp_path / "in", tmp_path / "work")
    lines = sorted(line_of(series)[10:] for series in found.series)
    assert lines == ["CT      5 images (1 to 5)  4 x 6", "MR      3 images (1 to 3)  4 x 6"]
    assert (found.passed_over, found.links) == (1, 1)
    assert not names_found("\n".join(line_of(series) for series in found.series), NAMES)


def test_a_dose_page_of_the_same_modality_does_not_stop_the_scan_beside_it(tmp_path: Path) -> None:
    """Scanners file the dose of a CT as a screen capture of modality CT, without positions."""

    def page(k: int, image: Dataset) -> None:
        image.SeriesInstanceUID, image.SOPClassUID = "1.2.3.9", SECONDARY_CAPTURE
        del image.ImagePositionPatient

    write_series(tmp_path / "in" / "a")
    write_series(tmp_path / "in" / "b", stored_pixels(slices=1), change=page)
    cases = as_case_folders(tmp_path / "in", ["ct"], tmp_path / "work")
    assert sorted(line.split("  ")[-1] for line in cases.lines) == ["ct", "not used"]


def test_one_huge_element_of_a_header_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def swollen(k: int, image: Dataset) -> None:
        image.private_block(0x0029, "GRIMSBY MAKER").add_new(0x02, "OB", bytes(20_000))

    write_series(tmp_path / "in", change=swollen)
    assert find_series(tmp_path / "in", tmp_path / "work").series
    monkeypatch.setenv("FIDUCIAL_MAX_METADATA_BYTES", "10000")
    with pytest.raises(DataError, match="an element of the header has 20000 bytes"):
        find_series(tmp_path / "in", tmp_path / "work")


def test_localisers_beside_a_series_are_passed_over_and_said_so(tmp_path: Path) -> None:
    write_series(tmp_path / "in" / "a")
    localiser = set_in(None, SeriesInstanceUID="1.2.3.9", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    write_series(tmp_path / "in" / "b", stored_pixels(slices=1), change=localiser)
    cases = as_case_folders(tmp_path / "in", ["ct"], tmp_path / "work")
    assert sorted(line.split("  ")[-1] for line in cases.lines) == ["ct", "not used"]


# A stack whose slices are shifted against each other: slice k lies at z = 3 k (uneven where said), shifted along y.
def test_a_tilted_stack_is_resampled_to_where_its_slices_truly_lie(tmp_path: Path) -> None:
    """The voxels are a linear function of the position in the patient, which linear interpolation keeps exactly."""
    origin, step = np.array([-10.0, 20.0, 30.0]), np.array([0.0, 1.0, 3.0])
    k, r, c = np.meshgrid(range(5), range(12), range(4), indexing="ij")
    place = origin + np.stack([0.5 * c, 2.0 * r, 0 * k], -1) + k[..., None] * step
    values = np.rint(10 * (place @ [1.0, 2.0, 4.0])).astype(int)
    folder = write_series(tmp_path / "in", values, step=step, change=set_in(None, RescaleSlope=1, RescaleIntercept=0))
    with pytest.raises(DataError, match="tilted gantry"):
        volume_of(folder)
    volume = volume_of(folder, allow_resampling=True)
    assert "tilted gantry" in volume.resampled
    index = np.stack(np.meshgrid(*map(range, volume.voxels.shape), indexing="ij"), -1)
    ras = index @ volume.affine[:3, :3].T + volume.affine[:3, 3]
    expected = 10 * ((ras * [-1, -1, 1]) @ [1.0, 2.0, 4.0])
    shift = index[..., 2] / 2  # rows by which slice k was moved: k mm of 2 mm
    inside = (index[..., 1] >= np.ceil(shift)) & (index[..., 1] <= np.floor(11 + shift))
    np.testing.assert_allclose(volume.voxels[inside], expected[inside], atol=1e-3)
    assert inside.mean() > 0.7


def test_uneven_gaps_are_resampled_to_the_usual_one(tmp_path: Path) -> None:
    along = [0, 3, 6, 10, 13]  # usual gap 3: new slices at 0, 3, 6, 9, 12
    values = np.array(along)[:, None, None] * 10 + np.zeros((1, 6, 4), int)
    folder = write_series(tmp_path / "in", values, modality="MR", change=heights(*(30 + z for z in along)))
    volume = volume_of(folder, allow_resampling=True)
    np.testing.assert_allclose(volume.voxels[0, 0], [0, 30, 60, 90, 120], atol=1e-4)
    # a label drawn on the new slices goes back to the slice nearest to it: 10 is nearest to 9, 13 to 12
    labels = np.zeros(volume.voxels.shape, np.uint8)
    labels[..., 3] = 1
    labels[..., 4] = 2
    assert [int(slice_[0, 0]) for slice_ in volume.to_slices(labels)] == [0, 0, 0, 1, 2]


@pytest.mark.parametrize("spoiled", ["gap", "uneven", "twice", "tilt", "turned", "pixel spacing", "matrix", ""])
def test_what_we_refuse_another_gate_refuses_and_what_we_accept_it_accepts(spoiled: str, tmp_path: Path) -> None:
    """highdicom's own reader of volumes, which knows the defects of geometry, but not their names."""
    folder = write_series(tmp_path / "in", change=PLANTED_DEFECTS[spoiled][1] if spoiled else None)
    images = [pydicom.dcmread(path) for path in folder.iterdir()]
    if spoiled:
        with pytest.raises((ValueError, RuntimeError)):
            highdicom.get_volume_from_series(images)
        return
    theirs = highdicom.get_volume_from_series(images)  # index: slice from the top, row, column; LPS
    ours = volume_of(folder)
    for k, r, c in ((0, 0, 0), (4, 5, 3)):
        np.testing.assert_allclose(
            (theirs.affine @ [4 - k, r, c, 1])[:3] * [-1, -1, 1], (ours.affine @ [c, r, k, 1])[:3], atol=1e-9
        )
    np.testing.assert_array_equal(theirs.array[::-1], ours.voxels.transpose(2, 1, 0))
