"""Landmark standardisation: by hand, on rescaled copies of one image, on ties, and through its file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from monai.data import MetaTensor

from transforms.errors import BundleError, DataError
from transforms.histogram import (
    StandardizeHistogram,
    StandardizeHistogramd,
    StandardLandmarks,
    fit_landmarks,
    load_landmarks,
    standardize,
)

AFFINE_CHANGES = [(1.0, 0.0), (3.0, 100.0), (0.01, -5.0), (250.0, 1000.0)]


def sample(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two channels, skewed like tissue, and a mask that leaves out a bright rim."""
    generator = np.random.default_rng(seed)
    mask = np.zeros((1, 12, 13, 9), dtype=np.uint8)
    mask[0, 1:11, 1:12, 1:8] = 1
    image = generator.gamma(3.0, 50.0, (2, *mask.shape[1:])) + 1e4 * (1 - mask)
    return image.astype(np.float32), mask


def test_landmarks_by_hand() -> None:
    # 0 1 2 3 4 in the mask: median at 50 %. 0 0 1 1 4: median 1 of 4, at 25 %. The standard is their mean, 37.5.
    images = [np.array([[0, 1, 2, 3, 4, 99]])[:, None], np.array([[0, 0, 1, 1, 4, 99]])[:, None]]
    masks = [np.array([[1, 1, 1, 1, 1, 0]])[:, None]] * 2
    landmarks = fit_landmarks(images, masks, percentiles=(0, 50, 100))
    assert landmarks.values == ((0.0, 37.5, 100.0),)


def test_mapping_by_hand() -> None:
    # Landmarks 0 2 4 go to 0 50 60: slope 25 up to 2 and before 0, slope 5 up to 4 and beyond.
    values = np.array([-1.0, 0, 1, 2, 3, 4, 6])
    mapped = standardize(values, np.array([0.0, 2, 4]), (0, 50, 60))
    assert mapped.tolist() == [-25, 0, 25, 50, 55, 60, 70]
    assert mapped.dtype == np.float32


def test_equal_landmarks_become_one_at_their_mean() -> None:
    # Landmarks 0 0 4 for 0 20 60: one point at (0, 10), then slope 12.5.
    mapped = standardize(np.array([-1.0, 0, 2, 4, 5]), np.array([0.0, 0, 4]), (0, 20, 60))
    assert mapped.tolist() == [-2.5, 10, 35, 60, 72.5]
    # Landmarks that differ by rounding only must not give a slope of millions.
    nearly = standardize(np.array([-1.0, 0, 2, 4, 5]), np.array([0.0, 1e-7, 4]), (0, 20, 60))
    np.testing.assert_allclose(nearly, mapped, rtol=1e-5)


def test_copies_of_one_image_on_other_scales_all_become_the_same() -> None:
    image, mask = sample()
    copies = [scale * image + offset for scale, offset in AFFINE_CHANGES]
    landmarks = fit_landmarks(copies, [mask] * len(copies))
    results = [StandardizeHistogram(landmarks)(copy, mask) for copy in copies]
    inside = np.broadcast_to(mask > 0, image.shape)
    for result in results:
        np.testing.assert_allclose(result[inside], results[0][inside], atol=2e-2)
    for channel in range(2):
        reached = np.percentile(results[0][channel][mask[0] > 0], landmarks.percentiles)
        np.testing.assert_allclose(reached, landmarks.values[channel], atol=1e-3)
        assert reached[0] == pytest.approx(0, abs=1e-3)
        assert reached[-1] == pytest.approx(100, abs=1e-3)


def test_a_cohort_comes_closer_together() -> None:
    cohort = [sample(seed) for seed in range(6)]
    images = [(image / 100) ** (0.8 + 0.1 * index) * (index + 1) for index, (image, _) in enumerate(cohort)]
    masks = [mask for _, mask in cohort]
    standardized = [
        StandardizeHistogram(fit_landmarks(images, masks))(*pair) for pair in zip(images, masks, strict=True)
    ]

    def spread(these: list[np.ndarray]) -> float:
        medians = [np.median(image[0][mask[0] > 0]) for image, mask in zip(these, masks, strict=True)]
        return float(np.std(medians) / np.mean(medians))

    assert spread(standardized) < 0.01
    assert spread(images) > 0.3


@settings(max_examples=60, deadline=None)
@given(
    values=arrays(np.float64, 40, elements=st.floats(-1000, 1000)),
    landmarks=st.lists(st.integers(-50, 50), min_size=4, max_size=4).map(sorted).filter(lambda x: x[0] < x[-1]),
    standard=st.lists(st.integers(0, 100), min_size=4, max_size=4).map(sorted),
)
def test_the_map_is_monotone(values: np.ndarray, landmarks: list[int], standard: list[int]) -> None:
    mapped = standardize(np.sort(values), np.array(landmarks, dtype=float), standard)
    assert (np.diff(mapped) >= 0).all()


@settings(max_examples=20, deadline=None)
@given(image=arrays(np.int16, (1, 6, 7), elements=st.integers(0, 3)).filter(lambda x: np.ptp(x) == 3))
def test_images_with_few_grey_values_are_mapped_in_order(image: np.ndarray) -> None:
    mask = np.ones((1, 6, 7))
    landmarks = fit_landmarks([sample()[0][:1]], [sample()[1]], percentiles=(0, 25, 50, 75, 100))
    result = StandardizeHistogram(landmarks)(image, mask)
    order = np.argsort(image, axis=None, kind="stable")
    assert (np.diff(result.ravel()[order]) >= 0).all()
    assert result.max() > result.min()


def test_saved_and_loaded_landmarks_give_the_same_bits(tmp_path: Path) -> None:
    image, mask = sample()
    landmarks = fit_landmarks([image, sample(1)[0] ** 1.3], [mask, mask])
    (tmp_path / "landmarks.json").write_text(json.dumps(landmarks.to_dict()))
    loaded = load_landmarks(tmp_path / "landmarks.json")
    assert loaded == landmarks
    assert loaded.digest == landmarks.digest
    expected = StandardizeHistogram(landmarks)(image, mask)
    np.testing.assert_array_equal(StandardizeHistogram(tmp_path / "landmarks.json")(image, mask), expected)


def test_a_changed_missing_or_malformed_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "landmarks.json"
    path.write_text(json.dumps(StandardLandmarks((0, 50, 100), ((0.0, 40.0, 100.0),)).to_dict()))
    content = json.loads(path.read_text())
    content["values"][0][1] = 41.0
    path.write_text(json.dumps(content))
    with pytest.raises(BundleError, match="values were changed") as caught:
        load_landmarks(path)
    assert "landmarks.json" in caught.value.what
    del content["values"]
    path.write_text(json.dumps(content))
    with pytest.raises(BundleError, match="KeyError"):
        load_landmarks(path)
    path.write_text("{")
    with pytest.raises(BundleError, match=r"landmarks\.json"):
        load_landmarks(path)
    with pytest.raises(BundleError, match=r"none\.json"):
        StandardizeHistogram(tmp_path / "none.json")


def test_the_digest_depends_on_every_value() -> None:
    base = StandardLandmarks((0.0, 100.0), ((0.0, 1.0),))
    assert base.digest == StandardLandmarks.from_dict(base.to_dict()).digest
    assert base.digest != StandardLandmarks((0.0, 99.0), ((0.0, 1.0),)).digest
    assert base.digest != StandardLandmarks((0.0, 100.0), ((0.0, float(np.nextafter(1, 2))),)).digest


def test_containers_metadata_input_and_dictionary_form() -> None:
    image, mask = sample()
    landmarks = fit_landmarks([image], [mask])
    affine = torch.diag(torch.tensor([0.5, 0.5, 3.0, 1.0], dtype=torch.float64))
    meta = MetaTensor(torch.from_numpy(image.copy()), affine=affine, meta={"note": "kept"})
    expected = StandardizeHistogram(landmarks)(image, mask)
    result = StandardizeHistogram(landmarks)(meta, torch.from_numpy(mask))
    assert isinstance(result, MetaTensor)
    assert result.meta["note"] == "kept"
    torch.testing.assert_close(result.affine, affine)
    np.testing.assert_array_equal(result.numpy(), expected)
    assert torch.equal(meta.as_tensor(), torch.from_numpy(image))
    data = {"image": image, "foreground": mask}
    np.testing.assert_array_equal(StandardizeHistogramd("image", landmarks)(data)["image"], expected)
    np.testing.assert_array_equal(data["image"], sample()[0])
    with pytest.raises(BundleError, match="ForegroundMaskd"):
        StandardizeHistogramd("image", landmarks)({"image": image})


def test_data_without_a_scale_is_refused() -> None:
    image, mask = sample()
    landmarks = fit_landmarks([image], [mask])
    apply = StandardizeHistogramd("image", landmarks)
    flat = image.copy()
    flat[1] = 4
    with pytest.raises(DataError, match="both 4") as caught:
        apply({"image": flat, "foreground": mask, "case": "sub-02"})
    assert "sub-02" in caught.value.what
    with pytest.raises(DataError, match="1 channels, the landmarks 2"):
        apply({"image": image[:1], "foreground": mask})
    with pytest.raises(DataError, match="0 of 1404"):
        apply({"image": image, "foreground": np.zeros_like(mask)})
    image[0, 0, 0, 0] = np.nan
    with pytest.raises(DataError, match="NaN"):
        apply({"image": image, "foreground": mask})


def test_cohorts_that_cannot_be_fitted_are_refused() -> None:
    image, mask = sample()
    with pytest.raises(DataError, match="no image"):
        fit_landmarks([], [])
    with pytest.raises(DataError, match="one mask for each"):
        fit_landmarks([image, image], [mask])
    with pytest.raises(DataError, match="image 1 of the cohort"):
        fit_landmarks([image, image[:1]], [mask, mask])
    with pytest.raises(DataError, match="both 3"):
        fit_landmarks([np.full_like(image, 3)], [mask])
    for percentiles in ((50,), (50, 10), (0, 101)):
        with pytest.raises(BundleError, match="percentiles"):
            fit_landmarks([image], [mask], percentiles)
    for values in ((), ((0.0, 2.0),), ((0.0, 2.0, 1.0),), ((1.0, 1.0, 1.0),)):
        with pytest.raises(BundleError, match="landmarks"):
            StandardLandmarks((0.0, 50.0, 100.0), values)
