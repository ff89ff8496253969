"""SSIM and MS-SSIM in regions: closed forms, windows by hand, scikit-image and MONAI, both paths, rules at borders."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import SSIMMetric
from monai.metrics.regression import compute_ms_ssim
from scipy import ndimage
from skimage.metrics import structural_similarity

from pipelines.metrics import image_ssim
from pipelines.metrics.image_quality import image_quality, image_quality_in_rois, ms_ssim, ssim, ssim_map
from pipelines.metrics.image_regions import pair_of_images
from pipelines.metrics.image_ssim import Window, ms_ssim_means, window_weights
from pipelines.metrics.jit import HAVE_NUMBA
from transforms.errors import UsageError

UNIFORM_3 = Window("uniform", 3)


def images(shape: tuple[int, ...], seed: int = 0, noise: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """A smooth image in [0, 1] and a noisy copy, float64."""
    random = np.random.default_rng(seed)
    reference = ndimage.gaussian_filter(random.normal(size=shape), 1.5)
    reference = (reference - reference.min()) / np.ptp(reference)
    return reference + noise * random.normal(size=shape), reference


def half_space(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """A random smooth region that fills about half of the image and touches its border."""
    return ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 2) > 0


@pytest.fixture(params=["compiled", "scipy"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test on both paths."""
    if request.param == "scipy":
        monkeypatch.setattr(image_ssim, "HAVE_NUMBA", False)
    elif not HAVE_NUMBA:
        pytest.skip("numba is not used here")


# One window of 3 x 3 fits:   x  0 0 0    mean 9 / 9 = 1, mean square 81 / 9 = 9, variance 8
#                                0 9 0
#                                0 0 0    y is 1 everywhere: mean 1, variance 0, covariance 0
# The luminance term is 1; with R = 10, C2 = (0.03 * 10)^2 = 0.09: SSIM = (0 + 0.09) / (8 + 0 + 0.09).
@pytest.mark.usefixtures("path")
def test_one_window_by_hand() -> None:
    x, y = np.zeros((3, 3)), np.ones((3, 3))
    x[1, 1] = 9
    row = image_quality(x, y, 10, metrics=("ssim",), window=UNIFORM_3)
    assert (row["n_voxels"], row["n_windows"], row["status"]) == (9, 1, "ok")
    assert row["ssim"] == pytest.approx(0.09 / 8.09, rel=1e-12)


# Constant images a and b have no variance: SSIM is the luminance term, (2ab + C1) / (a^2 + b^2 + C1).
@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("shape", [(20, 13), (12, 30, 14)])
@pytest.mark.parametrize("border", ["exclude", "reflect"])
def test_constant_images_have_the_luminance_term(shape: tuple[int, ...], border: str) -> None:
    a, b, data_range = 3.0, 5.0, 8.0
    c1 = (0.01 * data_range) ** 2
    value = ssim(np.full(shape, a), np.full(shape, b), data_range, border=border)
    assert value == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1), rel=1e-12)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("shape", [(31, 70), (13, 27, 75)])
@pytest.mark.parametrize("window", [Window(), Window("uniform", 7)])
def test_map_and_mean_of_scikit_image(shape: tuple[int, ...], window: Window) -> None:
    image, reference = images(shape)
    gaussian = {"gaussian_weights": True} if window.kind == "gaussian" else {"win_size": 7}
    mean, local = structural_similarity(
        reference, image, data_range=1.3, use_sample_covariance=False, full=True, **gaussian
    )
    assert ssim(image, reference, 1.3, window=window) == pytest.approx(mean, abs=1e-12)
    np.testing.assert_allclose(
        ssim_map(image, reference, 1.3, window=window, border="reflect"), local, rtol=0, atol=1e-11
    )
    mapped = ssim_map(image, reference, 1.3, window=window)
    inner = (slice(int(window.size) // 2, -(int(window.size) // 2)),) * len(shape)
    np.testing.assert_allclose(mapped[inner], local[inner], rtol=0, atol=1e-11)
    assert np.isnan(mapped).sum() == mapped.size - local[inner].size
    roi = half_space(shape, 5)
    row = image_quality(image, reference, 1.3, roi, window=window, metrics=("ssim",))
    assert row["ssim"] == pytest.approx(local[inner][roi[inner]].mean(), abs=1e-12)
    assert row["n_windows"] == roi[inner].sum() < row["n_voxels"] == roi.sum()
    assert ssim(image, reference, 1.3, roi=roi, window=window, border="reflect") == pytest.approx(
        local[roi].mean(), abs=1e-12
    )


@pytest.mark.parametrize("shape", [(40, 33), (15, 20, 33)])
def test_mean_of_monai(shape: tuple[int, ...]) -> None:
    image, reference = (array.astype(np.float32) for array in images(shape))
    tensors = [torch.from_numpy(array)[None, None] for array in (image, reference)]
    theirs = SSIMMetric(len(shape), data_range=1.0)(*tensors)
    assert ssim(image, reference, 1.0) == pytest.approx(float(theirs), abs=1e-5)
    assert ssim(image, reference, 1.0, roi=np.ones(shape, np.uint8)) == ssim(image, reference, 1.0)


@pytest.mark.skipif(not HAVE_NUMBA, reason="numba is not used here")
@settings(max_examples=25, deadline=None)
@given(
    shape=st.one_of(
        st.tuples(*[st.integers(1, 40)] * 2), st.tuples(st.integers(1, 60), st.integers(1, 24), st.integers(1, 130))
    ),
    size=st.sampled_from([1, 3, 7, 11]),
    border=st.sampled_from(["exclude", "reflect"]),
    threads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_both_paths_agree(shape: tuple[int, ...], size: int, border: str, threads: int, seed: int) -> None:
    image, reference = images((max(shape[0], 2), *shape[1:]), seed)
    rois = {"half": half_space(image.shape, seed), "all": None, "corner": np.zeros(image.shape, bool)}
    rois["corner"][(slice(0, 7),) * image.ndim] = True
    options = {"window": Window(size=size), "border": border, "metrics": ("ssim",)}
    compiled = image_quality_in_rois(image, reference, 1.0, rois, threads=threads, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_ssim, "HAVE_NUMBA", False)
        filtered = image_quality_in_rois(image, reference, 1.0, rois, **options)
    for ours, other in zip(compiled, filtered, strict=True):
        assert ours["ssim"] == (None if other["ssim"] is None else pytest.approx(other["ssim"], abs=1e-12))
        assert {**ours, "ssim": 0} == {**other, "ssim": 0}


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float16, np.float32, np.int32, ">f4"])
def test_dtypes_and_memory_orders(dtype: object) -> None:
    image, reference = (np.clip(200 * array, 0, 255).astype(dtype) for array in images((14, 20, 17), 3))
    roi = half_space(image.shape, 3)
    exact = ssim(image.astype(np.float64), reference.astype(np.float64), 255, roi=roi)
    assert ssim(image, reference, 255, roi=roi) == exact
    assert ssim(image[:, ::-1], reference[:, ::-1], 255, roi=roi[:, ::-1]) == pytest.approx(exact, abs=1e-12)
    fortran = [np.asfortranarray(array) for array in (image, reference)]
    assert ssim(*fortran, 255, roi=roi) == pytest.approx(exact, abs=1e-12)
    assert ssim(fortran[0], reference, 255, roi=roi) == exact
    np.testing.assert_allclose(ssim_map(*fortran, 255), ssim_map(image, reference, 255), rtol=0, atol=1e-12)


def test_number_of_threads_changes_nothing() -> None:
    image, reference = images((20, 45, 130))
    values = [ssim(image, reference, 1.0, roi=half_space(image.shape, 1), threads=n) for n in (1, 2, 3)]
    assert values[0] == values[1] == values[2]


@pytest.mark.usefixtures("path")
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 99), axis=st.integers(0, 2))
def test_symmetry_flips_and_order_of_axes(seed: int, axis: int) -> None:
    image, reference = images((12, 14, 16), seed)
    roi = half_space(image.shape, seed)
    roi[6, 7, 8] = True
    value = ssim(image, reference, 1.0, roi=roi)
    assert ssim(reference, image, 1.0, roi=roi) == pytest.approx(value, abs=1e-12)
    flipped = [np.flip(array, axis) for array in (image, reference, roi)]
    assert ssim(*flipped[:2], 1.0, roi=flipped[2]) == pytest.approx(value, abs=1e-12)
    moved = [np.ascontiguousarray(np.moveaxis(array, axis, 0)) for array in (image, reference, roi)]
    assert ssim(*moved[:2], 1.0, roi=moved[2]) == pytest.approx(value, abs=1e-12)
    for scale in (7.0, 1e69, 1e-69):
        assert ssim(scale * image, scale * reference, scale, roi=roi) == pytest.approx(value, abs=1e-12)
    assert ssim(image, image, 1.0, roi=roi) == pytest.approx(1.0, abs=1e-12)


def test_monotone_with_noise() -> None:
    values = [ssim(*images((16, 24, 24), noise=noise), 1.0) for noise in (0.0, 0.01, 0.05, 0.2, 0.5)]
    assert values == sorted(values, reverse=True)
    assert values[-1] < 0.5


@pytest.mark.usefixtures("path")
def test_many_overlapping_regions_in_one_call() -> None:
    image, reference = images((14, 30, 60))
    rois = {f"roi {i}": half_space(image.shape, i) for i in range(11)}
    rois["nothing"] = np.zeros(image.shape, bool)
    rows = image_quality_in_rois(image, reference, 1.0, rois, metrics=("ssim", "ms_ssim"))
    for row, (name, roi) in zip(rows[:-1], list(rois.items())[:-1], strict=True):
        alone = image_quality(image, reference, 1.0, roi, metrics=("ssim", "ms_ssim"))
        assert row == {"roi": name, **{k: pytest.approx(v) if k.endswith("ssim") else v for k, v in alone.items()}}
    assert rows[-1] == {
        "roi": "nothing", "status": "empty", "n_voxels": 0, "n_windows": 0, "ssim": None, "ms_ssim": None
    }  # fmt: skip
    left, right = rois["roi 0"], ~rois["roi 0"]
    parts = image_quality_in_rois(image, reference, 1.0, {"l": left, "r": right, "all": None}, metrics=("ssim",))
    total = sum(part["n_windows"] * part["ssim"] for part in parts[:2])
    assert total / parts[2]["n_windows"] == pytest.approx(parts[2]["ssim"], abs=1e-12)


# A region of one voxel sees 5 voxels to either side: a change 5 voxels away counts, one 6 voxels away does not.
@pytest.mark.usefixtures("path")
def test_the_map_belongs_to_the_whole_image() -> None:
    image, reference = images((13, 40, 70))
    roi = np.zeros(image.shape, bool)
    roi[6, 20, 35] = True
    value = ssim(image, reference, 1.0, roi=roi)
    near, far = image.copy(), image.copy()
    near[6, 25, 40] += 1
    far[6, 20, 41] = far[6, 14, 35] = np.nan
    assert ssim(near, reference, 1.0, roi=roi) != value
    assert ssim(far, reference, 1.0, roi=roi) == value


# 1 to 10 voxels along an axis: the window of 11 becomes the longest odd length that fits.
@pytest.mark.parametrize(("n", "taps"), [(1, 1), (2, 1), (3, 3), (4, 3), (10, 9), (11, 11), (50, 11)])
def test_thin_axes_cut_the_window(n: int, taps: int) -> None:
    (weights,) = window_weights(Window(), [n], None)
    offsets = np.arange(taps) - taps // 2
    gaussian = np.exp(-(offsets**2) / (2 * 1.5**2))
    np.testing.assert_allclose(weights, gaussian / gaussian.sum(), rtol=1e-14)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("border", ["exclude", "reflect"])
def test_a_single_slice_is_a_2d_image(border: str) -> None:
    image, reference = images((24, 30))
    flat = ssim(image, reference, 1.0, border=border)
    for axis in range(3):
        stack = [np.expand_dims(array, axis) for array in (image, reference)]
        assert ssim(*stack, 1.0, border=border) == pytest.approx(flat, abs=1e-12)


def test_every_slice_of_a_stack_of_two_counts_as_2d() -> None:
    image, reference = images((24, 30, 2))
    slices = [ssim(image[..., k], reference[..., k], 1.0) for k in range(2)]
    assert ssim(image, reference, 1.0) == pytest.approx(np.mean(slices), abs=1e-12)


def test_region_at_the_border_has_a_status() -> None:
    image, reference = images((20, 20))
    roi = np.zeros(image.shape, bool)
    roi[:4] = True
    row = image_quality(image, reference, 1.0, roi, metrics=("ssim", "gms_mean", "mae"))
    assert (row["status"], row["n_voxels"], row["n_windows"], row["ssim"]) == ("border", 80, 0, None)
    assert row["gms_mean"] is not None
    assert row["mae"] == pytest.approx(np.abs(image - reference)[:4].mean())
    assert image_quality(image, reference, 1.0, roi, border="reflect")["status"] == "ok"


# Spacing 1 and 5 mm, window 11 mm: voxels up to 5.5 mm from the centre, 5 and 1 to either side.
def test_window_in_mm() -> None:
    fine, coarse = window_weights(Window(unit="mm"), [40, 40], [1.0, 5.0])
    np.testing.assert_allclose(fine, window_weights(Window(), [40], None)[0], rtol=1e-14)
    side = np.exp(-25 / (2 * 1.5**2))
    np.testing.assert_allclose(coarse, np.array([side, 1, side]) / (1 + 2 * side), rtol=1e-14)
    image, reference = images((20, 24, 28))
    value = ssim(image, reference, 1.0, spacing_mm=(0.5, 1, 2.5), window=Window(unit="mm"))
    double = Window(size=22, sigma=3, unit="mm")
    assert ssim(image, reference, 1.0, spacing_mm=(1, 2, 5), window=double) == pytest.approx(value, abs=1e-12)
    turned = [np.asfortranarray(array) for array in (image, reference)]
    assert ssim(*turned, 1.0, spacing_mm=(0.5, 1, 2.5), window=Window(unit="mm")) == pytest.approx(value, abs=1e-12)
    published = ssim(image, reference, 1.0)
    assert ssim(image, reference, 1.0, spacing_mm=(0.5, 1, 2.5)) == published != value
    assert ssim(image, reference, 1.0, spacing_mm=(1, 1, 1), window=Window(unit="mm")) == published
    with pytest.raises(UsageError, match="needs the spacing"):
        ssim(image, reference, 1.0, window=Window(unit="mm"))


@pytest.mark.parametrize(
    "wrong", [{"kind": "box"}, {"unit": "cm"}, {"size": 10}, {"size": 0}, {"sigma": 0}, {"sigma": np.nan}]
)
def test_wrong_windows_are_refused(wrong: dict) -> None:
    with pytest.raises(UsageError, match="Window"):
        Window(**wrong)


@pytest.mark.parametrize(
    ("shape", "scales"), [((180, 177), (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)), ((44, 46, 49), (0.3, 0.3, 0.4))]
)
def test_ms_ssim_of_monai(shape: tuple[int, ...], scales: tuple[float, ...]) -> None:
    image, reference = (array.astype(np.float32) for array in images(shape))
    tensors = [torch.from_numpy(array)[None, None] for array in (image, reference)]
    theirs = float(compute_ms_ssim(*tensors, spatial_dims=len(shape), weights=scales))
    masks = {"none": None, "all": np.ones(shape, bool)}
    values = ms_ssim_means(pair_of_images(image, reference, masks, None), 1.0, Window(), "exclude", scales)
    assert values == pytest.approx([theirs, theirs], abs=1e-5)
    assert values[0] == pytest.approx(values[1], abs=1e-12)


# Two scales of a uniform window of one voxel: no variance, so contrast-structure is 1 and SSIM at the coarse scale is
# the luminance term of the averaged voxels. Along one axis, region R:
#
#     image      4 4 | 6 6 | 1 1      coarse 4, 6, 1
#     reference  4 4 | 4 8 | 9 9      coarse 4, 6, 9
#     R          . # | # # | . .      shares 1/2, 1, 0: both coarse voxels inside have SSIM 1, the third does not count
def test_ms_ssim_weighs_coarse_voxels_by_the_share_in_the_region() -> None:
    image, reference = np.array([[4.0, 4, 6, 6, 1, 1]] * 2), np.array([[4.0, 4, 4, 8, 9, 9]] * 2)
    roi = np.array([[0, 1, 1, 1, 0, 0]] * 2)
    c1 = 0.1**2
    third = (2 * 1 * 9 + c1) / (1 + 81 + c1)
    masks = {"R": roi == 1, "half of the last": np.array([[0, 0, 1, 1, 1, 0]] * 2) == 1}
    values = ms_ssim_means(
        pair_of_images(image, reference, masks, None), 10.0, Window("uniform", 1), "exclude", (0.5, 1.0)
    )
    assert values == pytest.approx([1.0, (1 + third / 2) / 1.5])


@pytest.mark.usefixtures("path")
def test_ms_ssim_of_thin_and_identical_images() -> None:
    image, reference = images((3, 40, 50))
    roi = half_space(image.shape, 2)
    assert ms_ssim(image, image, 1.0, roi=roi) == pytest.approx(1.0, abs=1e-12)
    assert 0 < ms_ssim(image, reference, 1.0, roi=roi) < 1
    assert ms_ssim(reference, image, 1.0, roi=roi) == pytest.approx(ms_ssim(image, reference, 1.0, roi=roi))
