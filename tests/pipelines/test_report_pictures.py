"""Gallery and viewer by hand: which slice, which colour, which way round, and how voxels become pixels."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from matplotlib.image import imread

from pipelines.reports import viewer
from pipelines.reports.gallery import (
    AGREE,
    FALSE_ALARM,
    GAP_PX,
    MISSED,
    PANEL_PX,
    WRONG_LABEL,
    CaseArrays,
    PlanePicture,
    case_pictures,
    difference_codes,
    fit,
    largest_error_slices,
    load_arrays,
    zoom_box,
)
from pipelines.reports.report_data import CaseFiles
from transforms.errors import DataError

COLOURS = {0: "#000000", 1: "#ff0000", 2: "#00ff00"}


def pixels(picture: PlanePicture) -> np.ndarray:
    """Return the picture as (rows, columns, 3) uint8."""
    content = base64.b64decode(picture.data.removeprefix("data:image/jpeg;base64,"))
    return imread(io.BytesIO(content), format="jpg")


def panel(picture: PlanePicture, number: int) -> np.ndarray:
    start = number * (PANEL_PX + GAP_PX)
    return pixels(picture)[:, start : start + PANEL_PX].astype(int)


def write_case(
    folder: Path, image: np.ndarray, truth: np.ndarray, prediction: np.ndarray, affine: np.ndarray
) -> CaseFiles:
    paths = []
    for name, voxels in (("image", image), ("truth", truth), ("prediction", prediction)):
        paths.append(folder / f"{name}.nii.gz")
        nib.save(nib.Nifti1Image(voxels, affine), paths[-1])
    slices, wrong = largest_error_slices(truth, prediction)
    return CaseFiles("p1", *paths, None, {}, slices, wrong)


def test_every_kind_of_difference() -> None:
    truth = np.array([0, 1, 1, 0, 1])
    prediction = np.array([0, 1, 0, 2, 2])
    assert difference_codes(truth, prediction).tolist() == [0, AGREE, MISSED, FALSE_ALARM, WRONG_LABEL]


def test_the_slice_of_largest_error_per_axis() -> None:
    truth = np.zeros((5, 6, 7), int)
    prediction = np.zeros_like(truth)
    truth[1, 1:4, 2] = 1  # three missed voxels in a row along y
    prediction[4, 3, 6] = 2  # a false alarm
    truth[0, 5, 0:6] = prediction[0, 5, 0:6] = 1  # larger, but right
    assert largest_error_slices(truth, prediction) == ((1, 3, 2), (3, 2, 3))


def test_without_errors_the_most_labelled_slice_and_without_labels_the_middle_one() -> None:
    truth = np.zeros((5, 6, 7), int)
    assert largest_error_slices(truth, truth) == ((2, 3, 3), (0, 0, 0))
    truth[1, 2:4, 6] = 1
    assert largest_error_slices(truth, truth) == ((1, 2, 6), (0, 0, 0))


@settings(deadline=None, max_examples=30)
@given(arrays(np.uint8, (4, 3, 5), elements=st.integers(0, 2)), arrays(np.uint8, (4, 3, 5), elements=st.integers(0, 2)))
def test_no_slice_has_more_errors_than_the_chosen_one(truth: np.ndarray, prediction: np.ndarray) -> None:
    wrong = truth != prediction
    slices, counts = largest_error_slices(truth, prediction)
    for axis in range(3):
        per_slice = [int(np.count_nonzero(np.take(wrong, i, axis))) for i in range(truth.shape[axis])]
        assert counts[axis] == max(per_slice) == per_slice[slices[axis]]


@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, 1), (-1, -1, 1), (1, -1, -1)])
def test_the_chosen_slices_follow_the_turn_to_ras(tmp_path: Path, signs: tuple[int, int, int]) -> None:
    truth = np.zeros((6, 7, 8), np.uint8)
    truth[1, 2, 3] = 1
    affine = np.diag([*np.multiply(signs, (1.0, 2.0, 3.0)), 1.0])
    case = load_arrays(write_case(tmp_path, truth.astype(np.float32), truth, np.zeros_like(truth), affine))
    assert case.truth[case.slices] == 1
    assert case.image[case.slices] == 1
    assert case.slices == tuple(i if s == 1 else n - 1 - i for i, s, n in zip((1, 2, 3), signs, (6, 7, 8), strict=True))
    assert case.spacing_mm == (1, 2, 3)


def test_axes_in_another_order_are_put_right(tmp_path: Path) -> None:
    # the file's axes run to superior (3 mm), to the right (1 mm), to anterior (2 mm)
    affine = np.array([[0, 1, 0, 0], [0, 0, 2, 0], [3, 0, 0, 0], [0, 0, 0, 1]], float)
    truth = np.zeros((4, 5, 6), np.uint8)
    truth[1, 2, 3] = 1
    case = load_arrays(write_case(tmp_path, truth.astype(np.float32), truth, np.zeros_like(truth), affine))
    assert case.truth.shape == (5, 6, 4)
    assert case.slices == (2, 3, 1)
    assert case.spacing_mm == (1, 2, 3)


def test_the_values_of_the_reference_become_label_ids(tmp_path: Path) -> None:
    truth = np.zeros((4, 4, 4), np.uint8)
    truth[1, 1, 1], truth[2, 2, 2] = 255, 128
    files = write_case(tmp_path, truth.astype(np.float32), truth, truth, np.eye(4))
    case = load_arrays(replace(files, label_values={0: 0, 255: 1, 128: 2}))
    assert (case.truth[1, 1, 1], case.truth[2, 2, 2], case.truth.sum()) == (1, 2, 3)
    assert case.prediction[1, 1, 1] == 255  # a mask has ids already


def test_a_channel_of_a_4d_image_and_a_2d_image(tmp_path: Path) -> None:
    label = np.zeros((4, 5, 6), np.uint8)
    image = np.stack([label + 1.0, label + 7.0], axis=-1).astype(np.float32)
    files = write_case(tmp_path, image, label, label, np.eye(4))
    assert np.all(load_arrays(files).image == 1)
    assert np.all(load_arrays(replace(files, channel=1)).image == 7)
    flat = np.zeros((4, 5), np.uint8)
    flat[1, 2] = 1
    case = load_arrays(write_case(tmp_path, flat.astype(np.float32), flat, 0 * flat, np.diag([1.0, 2.0, 1.0, 1.0])))
    assert case.image.shape == (4, 5, 1)
    pictures = case_pictures(case, COLOURS)
    assert [picture.plane for picture in pictures] == ["image"]
    assert viewer.viewer_page(case) is None


def test_another_grid_is_refused_by_name(tmp_path: Path) -> None:
    label = np.zeros((4, 5, 6), np.uint8)
    files = write_case(tmp_path, label.astype(np.float32), label, label, np.eye(4))
    nib.save(nib.Nifti1Image(label[:3], np.eye(4)), files.prediction)
    with pytest.raises(DataError, match="case p1: its prediction") as refused:
        load_arrays(files)
    assert refused.value.why == "shape (3, 5, 6), the image has (4, 5, 6)"


def test_an_image_with_nan_is_still_drawn(tmp_path: Path) -> None:
    label = np.zeros((4, 5, 6), np.uint8)
    image = np.full(label.shape, np.nan, np.float32)
    case = load_arrays(write_case(tmp_path, image, label, label, np.eye(4)))
    assert len(case_pictures(case, COLOURS)) == 3


def test_a_strip_shows_slice_image_truth_prediction_and_difference() -> None:
    # one slice of 20 x 20 voxels, black; truth x 4-7, prediction x 6-9, both y 8-11: 8 missed, 8 agree, 8 false alarms
    truth = np.zeros((20, 20, 1), np.int32)
    prediction = truth.copy()
    truth[4:8, 8:12] = 1
    prediction[6:10, 8:12] = 1
    image = np.zeros(truth.shape, np.float32)
    (picture,) = case_pictures(CaseArrays(image, truth, prediction, (1.0, 1.0, 1.0), (0, 0, 0)), COLOURS)
    assert pixels(picture).shape == (PANEL_PX, 5 * PANEL_PX + 4 * GAP_PX, 3) == (picture.height, picture.width, 3)
    assert panel(picture, 1).max() < 12  # the image alone
    # errors in x 4-9, y 8-11; 1.5 * 6 voxels = 9, so the frame holds x 2-10, and 9 voxels fill the panel
    middles = [(column - 2 + 0.5) * PANEL_PX / 9 for column in (4, 6, 8)]
    row = PANEL_PX // 2
    for number, painted in ((2, (True, True, False)), (3, (False, True, True))):
        colours = [panel(picture, number)[row, int(x)] for x in middles]
        assert [bool(red > 60 and green < 30) for red, green, _ in colours] == list(painted)
    missed, agreed, alarm = (panel(picture, 4)[row, int(x)] for x in middles)
    assert missed[2] > missed[1] > missed[0]  # blue
    assert agreed[1] > max(agreed[0], agreed[2])  # green
    assert min(alarm[0], alarm[2]) > alarm[1]  # magenta
    frame = panel(picture, 0)
    yellow = (frame[..., 0] > 150) & (frame[..., 1] > 150) & (frame[..., 2] < 140)
    columns = np.flatnonzero(yellow.any(axis=0))
    assert columns[0] == pytest.approx(2 / 20 * PANEL_PX, abs=2)
    assert columns[-1] == pytest.approx(11 / 20 * PANEL_PX, abs=2)


def test_proportions_are_those_of_the_patient() -> None:
    # 4 x 4 voxels of 3 mm (rows) x 1 mm (columns): 12 mm x 4 mm, so a third of the panel is filled
    white = np.ones((4, 4, 3), np.float32)
    square = fit(white, (3.0, 1.0), 60)
    assert square.shape == (60, 60, 3)
    assert np.flatnonzero(square[30, :, 0]).tolist() == list(range(20, 40))
    assert square[:, 30].min() == 1


def test_one_voxel_of_a_large_slice_fades_and_does_not_disappear() -> None:
    picture = np.zeros((600, 600, 3), np.float32)
    picture[123, 457] = 1
    small = fit(picture, (1.0, 1.0), 150)
    assert small.sum() == pytest.approx(3 / 16)
    assert small[123 // 4, 457 // 4] == pytest.approx([1 / 16] * 3)


@settings(deadline=None, max_examples=60)
@given(
    arrays(np.uint8, st.tuples(st.integers(1, 12), st.integers(1, 12)), elements=st.integers(0, 4)),
    st.floats(0.2, 5.0),
)
def test_the_frame_holds_every_error_of_the_slice(difference: np.ndarray, row_mm: float) -> None:
    box = zoom_box(difference, (row_mm, 1.0))
    assert difference[box].size > 0
    assert np.count_nonzero(difference[box] > AGREE) == np.count_nonzero(difference > AGREE)


def test_the_viewer_keeps_errors_when_it_reduces(monkeypatch: pytest.MonkeyPatch) -> None:
    nilearn = pytest.importorskip("nilearn.plotting")
    seen = {}
    view_img = nilearn.view_img

    def spy(image: nib.Nifti1Image, **options: object) -> object:
        seen["codes"], seen["background"] = np.asarray(image.dataobj), options["bg_img"]
        return view_img(image, **options)

    monkeypatch.setattr(nilearn, "view_img", spy)
    monkeypatch.setattr(viewer, "LONGEST_AXIS", 8)
    truth = np.zeros((20, 9, 8), np.int32)
    prediction = truth.copy()
    truth[4, 4, 4] = prediction[4, 4, 4] = 1
    prediction[5, 4, 4] = 1  # a false alarm beside it, in the block x 3-5
    case = CaseArrays(np.ones(truth.shape, np.float32), truth, prediction, (1.0, 1.0, 2.0), (5, 4, 4))
    page = viewer.viewer_page(case)
    assert page is not None
    assert page[1] == (3, 2, 1)
    assert seen["codes"].shape == (7, 5, 8)
    assert np.argwhere(seen["codes"]).tolist() == [[1, 2, 4]]
    assert seen["codes"].max() == FALSE_ALARM
    assert nib.affines.voxel_sizes(seen["background"].affine).tolist() == [3, 2, 2]
    assert "<link" not in page[0]
    assert "<title>" in page[0]


def test_nothing_labelled_needs_no_viewer() -> None:
    nothing = np.zeros((4, 4, 4), np.int32)
    assert viewer.viewer_page(CaseArrays(nothing.astype(np.float32), nothing, nothing, (1, 1, 1), (2, 2, 2))) is None
