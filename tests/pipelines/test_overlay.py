"""Overlays by hand: which slice, which way up, which colour."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipelines.reports.overlay import FILL, most_labelled_slice, overlay_panels, save_overlay_figure

COLOURS = {0: "#000000", 1: "#ff0000", 2: "#0000ff"}


def test_the_most_labelled_slice() -> None:
    label = np.zeros((4, 4, 5), np.uint8)
    assert most_labelled_slice(label) == 2  # nothing labelled: the middle
    label[0, 0, 1] = 7
    label[:2, 0, 3] = 1
    assert most_labelled_slice(label) == 3


def test_anterior_is_up_and_the_panels_stand_side_by_side() -> None:
    # x runs to the right of the picture, y upwards: the voxel (x = 2, y = 0) of 3 x 2 is in the last row, last column
    image = np.zeros((3, 2, 1), np.float32)
    image[2, 0, 0] = 1.0
    panels = overlay_panels(image, np.zeros((3, 2, 1), int), np.zeros((3, 2, 1), int), 0, COLOURS)
    assert panels.shape == (2, 9, 3)
    assert panels.dtype == np.float32
    for start in (0, 3, 6):
        assert panels[1, start + 2].tolist() == [1, 1, 1]
        assert panels[:, start : start + 3].sum() == 3


def test_borders_are_opaque_and_the_interior_is_tinted() -> None:
    image = np.zeros((7, 7, 1), np.float32)
    image[0, 0, 0] = 1  # so that the rest is black and not constant
    truth = np.zeros((7, 7, 1), np.uint8)
    truth[2:5, 2:5] = 1
    prediction = np.zeros_like(truth)
    prediction[6, 6] = 2
    panels = overlay_panels(image, truth, prediction, 0, COLOURS)
    assert panels[3, 7 + 3] == pytest.approx([FILL, 0, 0])  # the middle of the square
    assert panels[2, 7 + 2].tolist() == [1, 0, 0]  # its corner
    assert panels[0, 14 + 6].tolist() == [0, 0, 1]  # x = 6, y = 6 is the top right of the last panel
    assert panels[:, :7].sum() == 3  # nothing is drawn on the image itself


def test_grey_levels_run_from_the_1st_to_the_995th_percentile() -> None:
    image = np.arange(1000, dtype=np.float32).reshape(10, 10, 10)
    panels = overlay_panels(image, None, np.zeros((10, 10, 10), int), 5, COLOURS)
    assert panels.shape == (10, 20, 3)
    # of 0 ... 999 the percentiles are 9.99 and 994.005; voxel (5, 5, 5) is 555, in row 9 - 5
    assert panels[4, 5, 0] == pytest.approx((555 - 9.99) / (994.005 - 9.99), abs=1e-5)


def test_a_constant_image_is_black_and_finite() -> None:
    panels = overlay_panels(np.full((4, 4, 4), 3.0, np.float32), None, np.zeros((4, 4, 4), int), 0, COLOURS)
    assert np.all(panels == 0)


@pytest.mark.parametrize("with_truth", [True, False])
def test_a_figure_is_a_whole_png(tmp_path: Path, with_truth: bool) -> None:
    draw = np.random.default_rng(0)
    image, label = draw.normal(size=(12, 10, 8)), draw.integers(0, 2, (12, 10, 8))
    path = tmp_path / "overlays" / "p01.png"
    save_overlay_figure(path, image, label if with_truth else None, label, COLOURS, "p01")
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert content.endswith(b"IEND\xaeB`\x82")
    assert len(list(path.parent.iterdir())) == 1
