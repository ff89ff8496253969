"""The definition "surface" against analytic distances, brute force, and the surface that is not smoothed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from pipelines.metrics import surface
from pipelines.metrics.jit import HAVE_NUMBA
from pipelines.metrics.segmentation import segmentation_metrics
from pipelines.metrics.surface import smooth_level, surface_distances, surface_elements

OFFSET = np.array([0.31, 0.17, 0.43])


def ball(radius: float, centre, spacing, half: float = 26.0) -> np.ndarray:
    grid = np.meshgrid(*[np.arange(-np.ceil(half / s), np.ceil(half / s) + 1) * s for s in spacing], indexing="ij")
    return sum((axis - c) ** 2 for axis, c in zip(grid, centre, strict=True)) <= radius**2


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
    assert row["hd95_mm"] == pytest.approx(2.0, abs=1e-6)
    assert row["nsd_2.01mm"] == pytest.approx(1.0, abs=1e-3)
    inside = 192 * 2 - 56 * 2**2 / 2 + 4 * 2**3 / 3
    assert row["assd_mm"] == pytest.approx((192 * 2 + 56 * 2 * 1 + inside) / 1504, abs=0.04)


def test_circles_in_the_plane() -> None:
    spacing = (1.0, 0.7)
    row = measure(ball(15, (0.2, 0.4), spacing, 20), ball(17, (0.2, 0.4), spacing, 20), spacing)
    assert row["assd_mm"] == pytest.approx(2.0, abs=0.05)
    elements = surface_elements(ball(15, (0.2, 0.4), spacing, 20), spacing)
    assert np.linalg.norm(elements[:, 1] - elements[:, 0], axis=1).sum() == pytest.approx(2 * np.pi * 15, rel=0.015)


def test_smoothing_is_better_than_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = ball(9, OFFSET, (1, 1, 1), 12), ball(10.3, OFFSET, (1, 1, 1), 12)
    smooth = measure(first, second, (1, 1, 1))["assd_mm"]
    monkeypatch.setattr(surface, "smooth_level", lambda mask, spacing: np.pad(mask, 1).astype(np.float32))
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
    level = smooth_level(mask, np.array(spacing[:ndim]))
    inside = np.argwhere(level > 0.5)
    margin = [(n - m) // 2 for n, m in zip(level.shape, mask.shape, strict=True)]
    np.testing.assert_array_equal(inside - margin, np.argwhere(mask))
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


# The nearest point among the triangles with the nearest centres is the nearest point of all.
def test_nearest_point_is_that_of_a_full_search(monkeypatch: pytest.MonkeyPatch) -> None:
    spacing = (0.8, 0.8, 2.5)
    first, second = (surface_elements(ball(r, OFFSET + s, spacing, 9), spacing) for r, s in ((6, 0), (5, 1.2)))
    found = surface._nearest(first, second)
    monkeypatch.setattr(surface, "NEIGHBOURS", len(second))
    np.testing.assert_allclose(found, surface._nearest(first, second, chunk=64), atol=1e-6)


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
