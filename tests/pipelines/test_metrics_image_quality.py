"""Image quality in regions: errors, PSNR, information and gradients against closed forms and peers; every refusal."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import PSNRMetric
from scipy import ndimage
from skimage.metrics import normalized_mutual_information, normalized_root_mse, peak_signal_noise_ratio

from pipelines.metrics import image_intensity
from pipelines.metrics.image_quality import (
    IMAGE_METRICS,
    image_quality,
    image_quality_in_rois,
    mutual_information,
    psnr_db,
)
from pipelines.metrics.image_ssim import Window
from pipelines.metrics.jit import HAVE_NUMBA
from transforms.errors import DataError, UsageError

GRADIENT = ("gms_mean", "gms_std")


def images(shape: tuple[int, ...], seed: int = 0, noise: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """An image in [0, 1] and a noisy copy, float64."""
    random = np.random.default_rng(seed)
    reference = random.random(shape)
    return reference + noise * random.normal(size=shape), reference


@pytest.fixture(params=["compiled", "numpy"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test on both paths."""
    if request.param == "numpy":
        monkeypatch.setattr(image_intensity, "HAVE_NUMBA", False)
    elif not HAVE_NUMBA:
        pytest.skip("numba is not used here")


# Reference 0; the image is off by 1, -3 in the region and by 100 outside: MAE = (1 + 3) / 2 = 2, MSE = (1 + 9) / 2 = 5,
# R = 10: NRMSE = sqrt(5) / 10, PSNR = 10 log10(100 / 5) = 13.0103 dB.
@pytest.mark.usefixtures("path")
def test_errors_by_hand() -> None:
    image, roi = np.array([[1.0, -3.0, 100.0]]), np.array([[1, 1, 0]])
    row = image_quality(image, np.zeros((1, 3)), 10, roi, metrics=("mae", "nrmse", "psnr_db"))
    assert row == {
        "status": "ok", "n_voxels": 2, "n_windows": None,
        "mae": 2.0, "nrmse": pytest.approx(5**0.5 / 10), "psnr_db": pytest.approx(13.010299956639813),
    }  # fmt: skip


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
def test_errors_of_peers(dtype: type) -> None:
    image, reference = (np.clip(255 * array, 0, 255).astype(dtype) for array in images((9, 20, 70)))
    roi = ndimage.gaussian_filter(np.random.default_rng(1).normal(size=image.shape), 2) > 0
    inside = [array[roi].astype(np.float64) for array in (image, reference)]
    row = image_quality(image, reference, 255, roi, metrics=("psnr_db", "mae", "nrmse"))
    assert row["psnr_db"] == pytest.approx(peak_signal_noise_ratio(inside[1], inside[0], data_range=255), abs=1e-10)
    assert row["mae"] == pytest.approx(np.abs(inside[0] - inside[1]).mean(), rel=1e-12)
    span = np.ptp(inside[1])
    assert row["nrmse"] * 255 / span == pytest.approx(normalized_root_mse(*inside[::-1], normalization="min-max"))
    tensors = [torch.from_numpy(array.astype(np.float32))[None, None] for array in (image, reference)]
    assert psnr_db(image, reference, 255) == pytest.approx(float(PSNRMetric(255)(*tensors)), abs=1e-4)


# Gaussian noise of standard deviation s on a range of 1 has a PSNR of -20 log10(s): 20 dB for 0.1.
def test_psnr_of_known_noise() -> None:
    assert psnr_db(*images((60, 70, 80), noise=0.1), 1.0) == pytest.approx(20, abs=0.02)
    values = [psnr_db(*images((20, 20), noise=noise), 1.0) for noise in (1e-4, 1e-3, 1e-2, 1e-1)]
    assert values == sorted(values, reverse=True)


def test_psnr_is_capped_for_identical_images() -> None:
    image, reference = images((20, 20))
    assert image_intensity.PSNR_CAP_DB == psnr_db(image, image, 1.0) == 100.0
    assert psnr_db(reference + 1.1e-5, reference, 1.0) == pytest.approx(99.17, abs=0.01)
    assert psnr_db(reference + 0.9e-5, reference, 1.0) == 100.0
    row = image_quality(image, image, 1.0, metrics=IMAGE_METRICS, border="reflect")
    assert (row["mae"], row["nrmse"], row["gms_mean"], row["gms_std"]) == (0.0, 0.0, 1.0, 0.0)
    assert (row["ssim"], row["nmi"]) == (pytest.approx(1.0), pytest.approx(2.0))


# 64 values, each as often as the others: 6 bits. Independent images (all pairs once) share 0 bits, identical ones 6,
# an image and its parity 1 bit; the normalised form of the last is (6 + 1) / 6.
def test_information_by_hand() -> None:
    first, second = (axis.astype(float) for axis in np.mgrid[0:64, 0:64])
    assert mutual_information(first, second) == {"mi_bits": pytest.approx(0, abs=1e-12), "nmi": pytest.approx(1)}
    assert mutual_information(first, first) == {"mi_bits": pytest.approx(6), "nmi": pytest.approx(2)}
    assert mutual_information(first, 9 - 3 * first) == {"mi_bits": pytest.approx(6), "nmi": pytest.approx(2)}
    assert mutual_information(first, first % 2) == {"mi_bits": pytest.approx(1), "nmi": pytest.approx(7 / 6)}
    assert mutual_information(first, first, roi=first < 32, bins=32)["mi_bits"] == pytest.approx(5)


def test_constant_images_share_nothing() -> None:
    constant, image = np.ones((8, 8)), images((8, 8))[0]
    assert mutual_information(constant, constant) == {"mi_bits": 0.0, "nmi": None}
    assert mutual_information(constant, image) == {"mi_bits": pytest.approx(0, abs=1e-12), "nmi": pytest.approx(1)}


@pytest.mark.parametrize("bins", [16, 64])
def test_normalised_information_of_scikit_image(bins: int) -> None:
    image, reference = images((10, 20, 30))
    theirs = normalized_mutual_information(image, reference, bins=bins)
    assert mutual_information(image, reference, bins=bins)["nmi"] == pytest.approx(theirs, rel=1e-9)


# A ramp of slope 2 per voxel against one of slope 1, across the whole image: the Prewitt gradient is the difference of
# the two neighbours, 4 and 2, everywhere: similarity (2 * 8 + c) / (16 + 4 + c), c = 170 / 255^2 R^2, deviation 0.
@pytest.mark.parametrize(("shape", "axis"), [((9, 12), 0), ((9, 12), 1), ((6, 9, 12), 0), ((2, 9, 12), 2)])
@pytest.mark.parametrize("data_range", [1.0, 255.0])
def test_gradient_of_ramps(shape: tuple[int, ...], axis: int, data_range: float) -> None:
    ramp = np.indices(shape)[axis].astype(float)
    c = 170 / 255**2 * data_range**2
    row = image_quality(2 * ramp, ramp, data_range, metrics=GRADIENT)
    assert row["gms_mean"] == pytest.approx((16 + c) / (20 + c), rel=1e-12)
    assert row["gms_std"] == pytest.approx(0, abs=1e-7)


# The same ramps with 2 mm along the last axis and 1 mm along the others: gradients per mm are half, 2 and 1.
def test_gradient_in_mm() -> None:
    ramp = np.indices((6, 9, 12))[2].astype(float)
    c = 170 / 255**2
    options = {"spacing_mm": (1.0, 1.0, 2.0), "metrics": GRADIENT}
    assert image_quality(2 * ramp, ramp, 1.0, **options)["gms_mean"] == pytest.approx((16 + c) / (20 + c))
    in_mm = image_quality(2 * ramp, ramp, 1.0, window=Window(unit="mm"), **options)
    assert in_mm["gms_mean"] == pytest.approx((4 + c) / (5 + c))


@pytest.mark.parametrize("shape", [(20, 25), (19, 12, 14)])
@pytest.mark.parametrize("border", ["exclude", "reflect"])
def test_gradient_of_an_independent_reference(shape: tuple[int, ...], border: str) -> None:
    image, reference = images(shape)
    roi = np.random.default_rng(2).random(shape) < 0.4

    def magnitude(array: np.ndarray) -> np.ndarray:
        components = [
            ndimage.prewitt(array, axis, mode="reflect") / 3 ** (len(shape) - 1) for axis in range(len(shape))
        ]
        return np.linalg.norm(components, axis=0)

    x, y, c = magnitude(image), magnitude(reference), 170 / 255**2
    similarity = (2 * x * y + c) / (x**2 + y**2 + c)
    inner = (slice(1, -1) if border == "exclude" else slice(None),) * len(shape)
    expected = similarity[inner][roi[inner]]
    row = image_quality(image, reference, 1.0, roi, metrics=GRADIENT, border=border)
    assert (row["gms_mean"], row["gms_std"]) == (
        pytest.approx(expected.mean(), abs=1e-12), pytest.approx(expected.std(), abs=1e-10)
    )  # fmt: skip


# Even lengths at every scale: of an odd one, MS-SSIM leaves out the last voxel, wherever that is after a flip.
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 999), axis=st.integers(0, 2), threads=st.integers(1, 3))
def test_every_figure_is_symmetric_and_knows_no_axis(seed: int, axis: int, threads: int) -> None:
    image, reference = images((16, 16, 32), seed)
    roi = np.random.default_rng(seed).random(image.shape) < 0.5
    row = image_quality(image, reference, 1.0, roi, metrics=IMAGE_METRICS)
    same = {key: pytest.approx(value, rel=1e-9) for key, value in row.items() if key != "status"}
    swapped = image_quality(reference, image, 1.0, roi, metrics=IMAGE_METRICS, threads=threads)
    turned = [np.moveaxis(np.flip(array, axis), axis, 0) for array in (image, reference, roi)]
    moved = image_quality(*turned[:2], 1.0, turned[2], metrics=IMAGE_METRICS)
    assert swapped == {"status": "ok", **same}
    assert moved == {"status": "ok", **same}


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), shape=st.tuples(*[st.integers(1, 130)] * 2), n_rois=st.integers(1, 10))
def test_both_paths_of_the_errors_agree(seed: int, shape: tuple[int, int], n_rois: int) -> None:
    image, reference = images(shape, seed)
    random = np.random.default_rng(seed)
    rois = {str(i): random.random(shape) < random.random() for i in range(n_rois)}
    options = {"metrics": ("mae", "nrmse", "psnr_db")}
    ours = image_quality_in_rois(image, reference, 1.0, rois, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_intensity, "HAVE_NUMBA", False)
        other = image_quality_in_rois(image, reference, 1.0, rois, **options)
    for a, b in zip(ours, other, strict=True):
        assert a == {key: pytest.approx(v, rel=1e-12) if isinstance(v, float) else v for key, v in b.items()}


def test_an_empty_region_is_a_status_and_no_value() -> None:
    image, reference = images((14, 15))
    empty = np.zeros(image.shape, bool)
    row = image_quality(image, reference, 1.0, empty, metrics=IMAGE_METRICS)
    assert row == {"status": "empty", "n_voxels": 0, "n_windows": 0, **dict.fromkeys(IMAGE_METRICS)}
    rows = image_quality_in_rois(image, reference, 1.0, {"none": empty, "all": None}, metrics=IMAGE_METRICS)
    assert [row["status"] for row in rows] == ["empty", "ok"]
    assert None not in rows[1].values()


@pytest.mark.parametrize("data_range", [None, 0, -1.0, np.nan, np.inf, 1e-200, 1e200, True, "255"])
def test_the_data_range_is_never_guessed(data_range: object) -> None:
    image, reference = images((12, 12))
    with pytest.raises(UsageError, match="never guessed"):
        image_quality(image, reference, data_range)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ("ssmi",)}, "did you mean 'ssim'"),
        ({"metrics": ()}, "a list of one name or more"),
        ({"metrics": "ssim"}, "a list of one name or more"),
        ({"border": "wrap"}, "exclude, reflect"),
        ({"metrics": ("nmi",), "bins": 1}, "1 bins"),
        ({"metrics": ("nmi",), "bins": 8.5}, "8.5 bins"),
        ({"metrics": ("mae",), "threads": 0}, "threads = 0"),
        ({"metrics": ("ssim",), "threads": -1}, "threads = -1"),
    ],
)
def test_arguments_that_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        image_quality(*images((12, 12)), 1.0, **options)
    with pytest.raises(UsageError, match="no region"):
        image_quality_in_rois(*images((12, 12)), 1.0, {})


@pytest.mark.parametrize(
    ("image", "options", "message"),
    [
        (np.zeros((12, 13)), {}, "cannot be compared"),
        (np.zeros((12, 12), complex), {}, "real numbers"),
        (np.zeros((12, 12)), {"spacing_mm": (1.0,)}, "2 positive lengths"),
        (np.zeros((12, 12)), {"spacing_mm": (1.0, 0.0)}, "2 positive lengths"),
        (np.zeros((12, 12)), {"roi": np.ones((12, 11), bool)}, "does not fit"),
        (np.zeros((12, 12)), {"roi": np.full((12, 12), 0.5)}, "is not a mask"),
        (np.zeros((12, 12)), {"roi": np.full((12, 12), 2)}, "is not a mask"),
        (np.full((12, 12), np.nan), {}, "144 values that are not finite"),
        (np.full((12, 12), np.inf), {"metrics": ("mae",)}, "144 values that are not finite"),
    ],
)
def test_data_that_are_refused(image: np.ndarray, options: dict, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        image_quality(image, np.ones((12, 12)), 1.0, case="c7", **options)
    assert "c7" in str(caught.value)


@pytest.mark.parametrize("shape", [(12,), (2, 2, 12, 12), (0, 12)])
def test_shapes_that_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="cannot be compared"):
        image_quality(np.zeros(shape), np.zeros(shape), 1.0)


@pytest.mark.parametrize("metric", IMAGE_METRICS)
def test_a_value_that_is_not_finite_stops_every_figure(metric: str) -> None:
    image, reference = images((20, 20))
    image[10, 10] = np.nan
    with pytest.raises(DataError, match="the image has 1 value"):
        image_quality(image, reference, 1.0, metrics=(metric,))
    image[10, 10] = 1e71
    with pytest.raises(DataError, match="the image has 1 value"):
        image_quality(image, reference, 1.0, metrics=(metric,))
    huge = np.full((20, 20), 3e38, np.float32)  # finite, though their sum in float32 is not
    assert image_quality(huge, huge, 1e38, metrics=(metric,))["status"] == "ok"


def test_inputs_are_left_alone() -> None:
    image, reference = images((12, 14, 13))
    roi = np.ones(image.shape, bool)
    before = [array.copy() for array in (image, reference, roi)]
    image_quality(image, reference, 1.0, roi, metrics=IMAGE_METRICS)
    for array, old in zip((image, reference, roi), before, strict=True):
        np.testing.assert_array_equal(array, old)
