"""The definition "surface" against analytic distances, brute force, and the surface that is not smoothed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.spatial import cKDTree

from pipelines.metrics import surface
from pipelines.metrics.jit import HAVE_NUMBA
from pipelines.metrics.segmentation import _area_distances, segmentation_metrics
from pipelines.metrics.surface import smooth_level, surface_distances, surface_of

OFFSET = np.array([0.31, 0.17, 0.43])


def ball(radius: float, centre, spacing, half: float = 26.0) -> np.ndarray:
    grid = np.meshgrid(*[np.arange(-np.ceil(half / s), np.ceil(half / s) + 1) * s for s in spacing], indexing="ij")
    return sum((axis - c) ** 2 for axis, c in zip(grid, centre, strict=True)) <= radius**2


def nearest(points: np.ndarray, targets: np.ndarray, **options) -> np.ndarray:
    return surface._nearest(points, targets, cKDTree(targets.mean(axis=1)), **options)


def measure(prediction: np.ndarray, reference: np.ndarray, spacing, **options) -> dict:
    maps = (prediction.astype(np.uint8), reference.astype(np.uint8))
    (row,) = segmentation_metrics(*maps, spacing, {1: "x"}, definition="surface", groups=("distance", "nsd"), **options)
    return row


# Concentric balls of 20 and 22 mm: every point is 2 mm away. Edge voxels give 2.13 mm, 0.59 and 0.93 instead.
def test_balls() -> None:
    row = measure(ball(20, OFFSET, (1, 1, 1)), ball(22, OFFSET, (1, 1, 1)), (1, 1, 1), nsd_tolerance_mm=(2.2, 1.8))
    assert row["assd_mm"] == pytest.approx(2.0, abs=0.04)
    assert row["hd95_mm"] == pytest.approx(2.0, abs=0.15)
    assert row["nsd"] > 0.95
    assert row["nsd_1.8mm"] < 0.15


# A ball of radius r shifted by t: towards a direction at angle a from the shift, a point of one sphere is
# |sqrt(r^2 + t^2 + 2 r t cos a) - r| from the other; cos a is uniform over the sphere.
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.8, 0.8, 2.5)])
def test_shifted_ball(spacing) -> None:
    radius, shift = 10.0, np.array([2.0, 1.0, 0.5])
    t = np.linalg.norm(shift)
    distances = np.abs(np.sqrt(radius**2 + t**2 + 2 * radius * t * np.linspace(-1, 1, 200_001)) - radius)
    row = measure(ball(radius, OFFSET, spacing, 15), ball(radius, OFFSET + shift, spacing, 15), spacing)
    assert row["assd_mm"] == pytest.approx(distances.mean(), abs=0.05)
    assert row["nsd"] == pytest.approx((distances <= 1).mean(), abs=0.04)
    assert row["hd95_mm"] == pytest.approx(np.percentile(distances, 95), abs=0.15 * max(spacing))


# A box of 20 x 16 x 12 mm, area 1504 mm^2, shifted by 2 mm along the first axis. Its leading face of 192 mm^2 is 2 mm
# outside of the other box, with a strip of 56 x 2 mm behind its rim that is 1 mm away on average; its trailing face is
# inside, 2 mm from the other one or less from the sides: the integral of (16 - 2 t)(12 - 2 t) over t from 0 to 2 mm.
def test_shifted_box_keeps_its_edges() -> None:
    reference = np.zeros((30, 16, 10), bool)
    reference[4:24, 4:12, 2:8] = True
    row = measure(np.roll(reference, 2, 0), reference, (1.0, 2.0, 2.0), nsd_tolerance_mm=(1.99, 2.01))
    assert row["hd95_mm"] == pytest.approx(2.0, abs=5e-3)  # near its edges the face is round
    assert row["nsd_2.01mm"] == pytest.approx(1.0, abs=1e-3)
    inside = 192 * 2 - 56 * 2**2 / 2 + 4 * 2**3 / 3
    assert row["assd_mm"] == pytest.approx((192 * 2 + 56 * 2 * 1 + inside) / 1504, abs=0.04)


def test_circles_in_the_plane() -> None:
    spacing = (1.0, 0.7)
    row = measure(ball(15, (0.2, 0.4), spacing, 20), ball(17, (0.2, 0.4), spacing, 20), spacing)
    assert row["assd_mm"] == pytest.approx(2.0, abs=0.05)
    found = surface_of(ball(15, (0.2, 0.4), spacing, 20), spacing)
    assert found.areas.sum() == pytest.approx(2 * np.pi * 15, rel=0.015)


# A sphere: area 4 pi r^2, and the mean square of a coordinate from its centre is r^2 / 3.
def test_elements_have_the_area_of_a_sphere() -> None:
    found = surface_of(ball(12, OFFSET, (1, 1, 2), 16), (1, 1, 2))
    assert found.areas.sum() == pytest.approx(4 * np.pi * 12**2, rel=0.02)
    centred = found.centres() - np.average(found.centres(), axis=0, weights=found.areas)
    for axis in range(3):
        assert np.average(centred[:, axis] ** 2, weights=found.areas) == pytest.approx(12**2 / 3, rel=0.02)


# Two right triangles that share the side from (0, 0) to (4, 0), on the plane z = 0; the other surface is a wide one
# through that side, sloping by 3 in 4 along y: a point at y is 3/5 |y| from it. Corners: y = 0, 0 and 3, centre y = 1,
# so the three parts lie at y = 1/2, 1/2 and 2; of the other at -1/3, -1/3 and -4/3.
def test_an_element_counts_as_its_parts() -> None:
    vertices = np.array([[0.0, 0, 0], [4, 0, 0], [0, 3, 0], [0, -2, 0]])
    corners = np.array([[[-100.0, -80, -60], [100, -80, -60], [0, 80, 60]]])
    first = surface.Surface(vertices, np.array([[0, 1, 2], [0, 1, 3]]), np.array([6.0, 4.0]), vertices[None, :3])
    other = surface.Surface(corners[0], np.array([[0, 1, 2]]), np.array([1.0]), corners)
    expected = 0.6 * np.array([1 / 2, 1 / 2, 2, 1 / 3, 1 / 3, 4 / 3])
    np.testing.assert_allclose(surface._distances(first, other), expected)


# A square of 11 x 11 pixels; from its middle the centre of the last one is 5 mm away along both axes. Contoured, the
# mask cuts its corner between (5.5, 5) and (5, 5.5); smoothed it is rounder and does not get there. To a point of
# another surface either is the surface.
def test_a_straight_edge_is_sharp_or_round() -> None:
    mask = np.zeros((30, 30), bool)
    mask[10:21, 10:21] = True
    found = surface_of(mask, (1.0, 1.0))
    cut = np.array([20.25, 20.25])
    assert nearest(cut[None], found.targets)[0] == pytest.approx(0, abs=1e-6)
    assert nearest(cut[None], found.vertices[found.elements])[0] > 0.1


# Areas in mm^2 that lie at 1, 5 and 6 mm; a voxel of 1 x 1 x 1 mm has faces of 1 mm^2. Beyond 5 mm lie 0.6 mm^2, beyond
# 1 mm 1.1: the largest distance that at least a face has is 5 mm. With 0.9 mm^2 beyond 1 mm it is 1 mm, and with the
# larger faces of voxels of 1 x 2 x 3 mm too. Of little area 5 % are less than a face: never below HD95.
@pytest.mark.parametrize(
    ("areas", "spacing", "hd"),
    [
        ([100, 0.5, 0.6], (1.0, 1.0, 1.0), 5.0),
        ([100, 0.5, 0.4], (1.0, 1.0, 1.0), 1.0),
        ([1000, 2.5, 3.4], (1.0, 2.0, 3.0), 1.0),
        ([1000, 2.7, 3.4], (3.0, 1.0, 2.0), 5.0),
        ([5, 0.1, 0.3], (1.0, 1.0, 1.0), 6.0),
    ],
)
def test_a_largest_distance_has_a_face_of_area(areas: list[float], spacing, hd: float) -> None:
    forth = np.array(areas), np.array([1.0, 5.0, 6.0])
    back = np.array([100.0]), np.array([0.0])
    found = _area_distances([*forth, *back], spacing)
    assert found["hd_mm"] == hd
    assert _area_distances([*back, *forth], spacing)["hd_mm"] == hd


# A box and the same with one voxel more, whose centre is 9 mm from the face: it decides, by its own middle.
def test_a_lone_voxel_decides_the_largest_distance() -> None:
    reference = np.zeros((40, 24, 24), bool)
    reference[4:24, 4:20, 4:20] = True
    prediction = reference.copy()
    prediction[32, 12, 12] = True
    row = measure(prediction, reference, (1.0, 1.0, 1.0))
    assert row["hd_mm"] == pytest.approx(8.5, abs=0.3)
    assert row["hd95_mm"] == 0.0


def test_smoothing_is_better_than_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = ball(9, OFFSET, (1, 1, 1), 12), ball(10.3, OFFSET, (1, 1, 1), 12)
    smooth = measure(first, second, (1, 1, 1))["assd_mm"]
    monkeypatch.setattr(surface, "smooth_level", lambda mask, sigma: mask.astype(np.float32))
    assert abs(smooth - 1.3) < abs(measure(first, second, (1, 1, 1))["assd_mm"] - 1.3)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 4, 1), (2, 2, 2), (1, 5, 5)])
def test_the_smallest_structures_keep_a_surface(shape: tuple[int, ...]) -> None:
    mask = np.zeros((7, 7, 7), bool)
    mask[tuple(slice(1, 1 + n) for n in shape)] = True
    areas = surface_distances(mask, mask, (1, 1, 1)).area_prediction
    n_faces = 2 * sum(np.prod(shape) / n for n in shape)
    assert 0.25 * n_faces < areas.sum() < n_faces


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    ndim=st.sampled_from([2, 3]),
    density=st.sampled_from([0.0, 1.0]),
    spacing=st.tuples(*[st.sampled_from([0.6, 1.0, 3.0])] * 3),
)
def test_no_voxel_changes_sides(seed: int, ndim: int, density: float, spacing) -> None:
    noise = np.random.default_rng(seed).normal(size=(9,) * ndim)
    mask = (ndimage.gaussian_filter(noise, 1.0) if density else noise) > 0.3 * density
    level = smooth_level(mask, 0.8 * np.sqrt(max(spacing[:ndim]) / np.array(spacing[:ndim])))
    np.testing.assert_array_equal(level > 0.5, mask)
    assert not np.isclose(level, 0.5, atol=0.04).any()


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), spacing=st.tuples(*[st.sampled_from([0.6, 1.0, 2.0])] * 3), ndim=st.integers(2, 3))
def test_symmetric_scaled_and_at_home(seed: int, spacing, ndim: int) -> None:
    noise = np.random.default_rng(seed).normal(size=(2, *(10,) * ndim))
    first, second = (ndimage.gaussian_filter(n, 1.5) > 0.05 for n in noise)
    first[(5,) * ndim] = second[(4,) * ndim] = True
    spacing = spacing[:ndim]
    forth, back = measure(first, second, spacing), measure(second, first, spacing)
    for key in ("hd_mm", "hd95_mm", "assd_mm", "nsd"):
        assert forth[key] == pytest.approx(back[key], rel=1e-9)
    doubled = measure(first, second, [2 * s for s in spacing], nsd_tolerance_mm=2.0)
    assert doubled["assd_mm"] == pytest.approx(2 * forth["assd_mm"], rel=1e-6)
    assert doubled["nsd"] == pytest.approx(forth["nsd"], abs=1e-6)
    same = measure(first, first, spacing, nsd_tolerance_mm=0.0)
    assert (same["hd_mm"], same["nsd"]) == (0.0, 1.0)


# Blobs strewn over a wide image, some near each other, some far: cut into islands and contoured one by one they give
# the elements of the image contoured as a whole, in another order. The contour is in single precision.
@pytest.mark.parametrize("spacing", [(1.0, 1.0), (1.0, 1.0, 1.0), (3.0, 0.8, 0.8)])
def test_islands_are_parts_of_the_whole(spacing, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    shape = (140, 120, 101)[: len(spacing)]
    noise = ndimage.gaussian_filter(rng.normal(size=shape), 2.5)
    mask = np.zeros(shape, bool)
    for _ in range(6 if len(spacing) == 3 else 4):
        place = tuple(slice(first, first + 15) for first in rng.integers(0, np.array(shape) - 15))
        mask[place] = noise[place] > np.quantile(noise[place], 0.8)
    gap = np.array([9, 12, 10][: len(spacing)])
    islands = list(surface._islands(mask, gap))
    assert len(islands) >= 3
    together = np.zeros(np.add(shape, gap), bool)
    for start, part in islands:
        place = tuple(slice(first, first + n) for first, n in zip(start, part.shape, strict=True))
        assert not (together[place] & part).any()
        together[place] |= part
    np.testing.assert_array_equal(together[tuple(map(slice, shape))], mask)
    cut = surface_of(mask, spacing)
    monkeypatch.setattr(surface, "_islands", lambda mask, gap: [(np.zeros(mask.ndim, int), mask)])
    whole = surface_of(mask, spacing)
    for mine, yours in ((cut.centres(), whole.centres()), (cut.targets.mean(axis=1), whole.targets.mean(axis=1))):
        assert len(mine) == len(yours)
        assert max(cKDTree(yours).query(mine)[0].max(), cKDTree(mine).query(yours)[0].max()) < 1e-4
    np.testing.assert_allclose(np.sort(cut.areas), np.sort(whole.areas), atol=1e-4)


# The nearest point among the triangles with the nearest centres is the nearest point of all.
def test_nearest_point_is_that_of_a_full_search(monkeypatch: pytest.MonkeyPatch) -> None:
    spacing = (0.8, 0.8, 2.5)
    first, second = (surface_of(ball(r, OFFSET + s, spacing, 9), spacing) for r, s in ((6, 0), (5, 1.2)))
    found = nearest(first.vertices, second.targets)
    monkeypatch.setattr(surface, "NEIGHBOURS", len(second.targets))
    np.testing.assert_allclose(found, nearest(first.vertices, second.targets, chunk=64), atol=1e-6)


@pytest.mark.skipif(not HAVE_NUMBA, reason="the compiled path is switched off")
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), spacing=st.tuples(*[st.sampled_from([0.6, 1.0, 3.0])] * 3), ndim=st.integers(2, 3))
def test_compiled_path_and_threads_change_no_value(seed: int, spacing, ndim: int) -> None:
    noise = np.random.default_rng(seed).normal(size=(2, *(12,) * ndim))
    masks = [ndimage.gaussian_filter(n, 1.0) > 0.1 for n in noise]
    masks[0][(5,) * ndim] = masks[1][(4,) * ndim] = True
    fast = surface_distances(*masks, spacing[:ndim], threads=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(surface, "HAVE_NUMBA", False)
        slow = surface_distances(*masks, spacing[:ndim])
    for mine, yours in zip(fast, slow, strict=True):
        np.testing.assert_allclose(mine, yours, rtol=1e-9, atol=1e-9)


# A point above the inside of a triangle, beyond a side, beyond a corner; and beside a segment.
def test_distance_to_a_triangle_and_a_segment() -> None:
    triangle = np.array([[[0.0, 0, 0], [4, 0, 0], [0, 3, 0]]])
    points = np.array([[1.0, 1, 2], [2, -2, 0], [-3, -4, 0], [4, 3, 0]])
    np.testing.assert_allclose(surface._to_element(points, triangle), [2.0, 2.0, 5.0, 2.4])
    segment = np.array([[[0.0, 0], [2, 0]]])
    np.testing.assert_allclose(surface._to_element(np.array([[1.0, 3], [5, 4]]), segment), [3.0, 5.0])
