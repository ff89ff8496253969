"""Percentile clipping, z-score and Hounsfield windows: by hand, against MONAI and numpy, and their refusals."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from monai.data import MetaTensor
from monai.transforms import ClipIntensityPercentiles, Compose, NormalizeIntensity, ScaleIntensityRange

from transforms.errors import BundleError, DataError
from transforms.intensity import (
    HU_WINDOWS,
    ClipIntensityPercentilesInMask,
    ClipIntensityPercentilesInMaskd,
    HUWindow,
    HUWindowd,
    MeasureIntensityInMaskd,
    NormalizeIntensityInMask,
    NormalizeIntensityInMaskd,
    denormalize,
)


def two_channels(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two channels a thousandfold apart, and a mask with nothing of value 0 inside and only 0 outside."""
    generator = np.random.default_rng(seed)
    mask = np.zeros((1, 6, 7, 5), dtype=np.uint8)
    mask[0, 1:5, 2:6, 1:4] = 1
    image = np.stack([generator.uniform(1, 2, mask.shape[1:]), generator.uniform(1000, 3000, mask.shape[1:])]) * mask
    return image.astype(np.float32), mask


def metatensor(image: np.ndarray) -> MetaTensor:
    affine = torch.diag(torch.tensor([0.5, 0.5, 3.0, 1.0], dtype=torch.float64))
    return MetaTensor(torch.from_numpy(image.copy()), affine=affine, meta={"note": "kept"})


HEAD_CT = np.array([[-1000.0, 0.0, 20.0, 40.0, 60.0, 80.0, 1500.0]], dtype=np.float32)[:, None]

TRANSFORMS: dict[str, Callable] = {
    "clip": lambda image, mask: ClipIntensityPercentilesInMask(5, 95)(image, mask),
    "normalize": lambda image, mask: NormalizeIntensityInMask(-1.0)(image, mask),
    "window": lambda image, mask: HUWindow("brain", minimum_air=None)(image[1:]),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_containers_metadata_and_input_are_kept(transform: Callable) -> None:
    image, mask = two_channels()
    expected = transform(image.copy(), mask)
    meta = metatensor(image)
    result = transform(meta, mask)
    assert isinstance(result, MetaTensor)
    assert result.meta["note"] == "kept"
    torch.testing.assert_close(result.affine, meta.affine)
    assert torch.equal(meta.as_tensor(), torch.from_numpy(image))
    assert type(transform(torch.from_numpy(image), torch.from_numpy(mask))) is torch.Tensor
    assert expected.dtype == np.float32
    np.testing.assert_array_equal(result.numpy(), expected)
    np.testing.assert_array_equal(transform(image[..., ::-1], mask[..., ::-1]), expected[..., ::-1])
    np.testing.assert_array_equal(image, two_channels()[0])


def test_percentiles_by_hand_over_the_mask_only() -> None:
    # In the mask 10 20 30 40 50: the 25th percentile lies at position .25 * 4 = 1 -> 20, the 90th at 3.6 -> 46.
    image = np.array([[10, 20, 30, 40, 50, 0, 999]], dtype=np.int16)[:, None]
    mask = np.array([[1, 1, 1, 1, 1, 0, 0]])[:, None]
    clipped = ClipIntensityPercentilesInMask(25, 90)(image, mask)
    assert clipped.ravel().tolist() == [20, 20, 30, 40, 46, 20, 46]
    assert clipped.dtype == np.float32


def test_without_the_mask_the_background_would_drag_the_percentiles() -> None:
    image, mask = two_channels()
    ours = ClipIntensityPercentilesInMask(5, 95)(image, mask)
    whole = ClipIntensityPercentilesInMask(5, 95)(image, np.ones_like(mask))
    assert ours[0].min() > 1
    assert whole[0].min() == 0


@settings(max_examples=30, deadline=None)
@given(
    arrays(np.float32, (2, 5, 6), elements=st.floats(-1000, 1000, width=32)),
    st.sampled_from([(0, 100), (0.5, 99.5), (10, 60)]),
)
def test_clipping_equals_monai_with_a_mask_of_ones(image: np.ndarray, percentiles: tuple[float, float]) -> None:
    monai = ClipIntensityPercentiles(*percentiles, sharpness_factor=None, channel_wise=True)(torch.from_numpy(image))
    ours = ClipIntensityPercentilesInMask(*percentiles)(image, np.ones((1, 5, 6)))
    np.testing.assert_allclose(ours, np.asarray(monai), rtol=1e-5, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(
    arrays(np.float32, (1, 5, 6), elements=st.floats(-1000, 1000, width=32)),
    arrays(bool, (1, 5, 6)).filter(np.any),
)
def test_clipped_values_stay_within_the_mask_and_idempotent_at_the_extremes(
    image: np.ndarray, mask: np.ndarray
) -> None:
    clipped = ClipIntensityPercentilesInMask(0, 100)(image, mask)
    np.testing.assert_array_equal(clipped[mask], image[mask])
    assert clipped.min() >= image[mask].min()
    assert clipped.max() <= image[mask].max()


def test_z_score_by_hand() -> None:
    # In the mask 2 4 4 4 5 5 7 9: mean 5, standard deviation (ddof 0) 2.
    image = np.array([[2, 4, 4, 4, 5, 5, 7, 9, 100, 0]], dtype=np.float32)[:, None]
    mask = np.array([[1] * 8 + [0, 0]])[:, None]
    result = NormalizeIntensityInMask(background=-3.0)(image, mask)
    assert result.ravel().tolist() == [-1.5, -0.5, -0.5, -0.5, 0, 0, 1, 2, -3, -3]


@pytest.mark.parametrize("seed", range(3))
def test_z_score_equals_monai_where_the_mask_is_what_is_not_zero(seed: int) -> None:
    image, mask = two_channels(seed)
    monai = NormalizeIntensity(nonzero=True, channel_wise=True)(torch.from_numpy(image.copy()))
    np.testing.assert_allclose(NormalizeIntensityInMask()(image, mask), np.asarray(monai), atol=2e-5)


@settings(max_examples=30, deadline=None)
@given(
    arrays(np.float32, (2, 4, 5), elements=st.floats(0, 1, width=32)),
    st.floats(0.001, 1000),
    st.floats(-500, 500),
)
def test_z_score_has_mean_0_std_1_and_forgets_scale_and_offset(image: np.ndarray, scale: float, offset: float) -> None:
    mask = np.ones((1, 4, 5))
    mask[0, 0] = 0
    image[:, 1, 0] += 2  # contrast in every channel
    result = NormalizeIntensityInMask()(image, mask)[:, 1:]
    np.testing.assert_allclose(result.mean(axis=(1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(result.std(axis=(1, 2)), 1, atol=1e-5)
    moved = (image.astype(np.float64) * scale + offset * scale).astype(np.float32)
    np.testing.assert_allclose(NormalizeIntensityInMask()(moved, mask)[:, 1:], result, atol=2e-3)


def test_a_constant_channel_becomes_background_and_is_not_blown_up() -> None:
    image, mask = two_channels()
    image[0] = 0.1 * mask[0]
    image[0, 2, 3, 2] = np.nextafter(np.float32(0.1), np.float32(1))  # one rounding error
    result = NormalizeIntensityInMask(background=-2.0)(image, mask)
    assert (result[0] == -2).all()
    assert result[1].std() > 0.1
    tiny = image.copy()
    tiny[1] *= 1e-12  # diffusivities in m^2/s are this small and have contrast
    np.testing.assert_allclose(
        NormalizeIntensityInMask()(tiny, mask)[1], NormalizeIntensityInMask()(image, mask)[1], atol=1e-4
    )


def test_statistics_are_summed_in_double_precision() -> None:
    image = np.full((1, 100, 100, 40), 60000.0, dtype=np.float32)
    image[..., ::2] += 1
    result = MeasureIntensityInMaskd("image")({"image": image, "foreground": np.ones_like(image)})
    np.testing.assert_allclose(result["intensity_statistics"], [[60000.5, 0.5]], rtol=1e-7)


def test_a_patch_is_normalised_with_the_statistics_of_its_case() -> None:
    image, mask = two_channels()
    data = MeasureIntensityInMaskd("image")({"image": metatensor(image), "foreground": metatensor(mask)})
    assert data["intensity_statistics"].shape == (2, 2)
    assert data["intensity_statistics"].dtype == np.float32
    whole = NormalizeIntensityInMaskd("image", statistics_key="intensity_statistics")(data)["image"]
    np.testing.assert_array_equal(whole, NormalizeIntensityInMask()(image, mask))
    corner = (slice(None), slice(3, 6), slice(4, 7), slice(0, 3))
    patch = {**data, "image": data["image"][corner], "foreground": data["foreground"][corner]}
    kept = NormalizeIntensityInMaskd("image", statistics_key="intensity_statistics")(patch)["image"]
    np.testing.assert_array_equal(kept, whole[corner])
    alone = NormalizeIntensityInMaskd("image")(patch)["image"]
    assert np.abs(alone.numpy() - kept.numpy()).max() > 0.1


def test_a_patch_of_background_is_background_when_the_statistics_are_given() -> None:
    image = np.zeros((1, 3, 3), dtype=np.float32)
    empty = np.zeros((1, 3, 3))
    result = NormalizeIntensityInMask(-1.0)(image, empty, np.array([[5.0, 2.0]]))
    assert (result == -1).all()
    with pytest.raises(DataError, match="0 of 9 voxels"):
        NormalizeIntensityInMask(-1.0)(image, empty)


def test_denormalize_undoes_the_z_score_inside_the_mask() -> None:
    image, mask = two_channels()
    statistics = MeasureIntensityInMaskd("image")({"image": image, "foreground": mask})["intensity_statistics"]
    restored = denormalize(metatensor(NormalizeIntensityInMask()(image, mask)), statistics)
    assert isinstance(restored, MetaTensor)
    inside = np.broadcast_to(mask > 0, image.shape)
    np.testing.assert_allclose(restored.numpy()[inside], image[inside], rtol=1e-5)


def test_dictionary_forms_equal_array_forms() -> None:
    image, mask = two_channels()
    chain = Compose(
        [ClipIntensityPercentilesInMaskd(["image", "more"], 2, 98), NormalizeIntensityInMaskd("image", -1.0)]
    )
    data = {"image": image, "more": image[1:], "foreground": mask}
    output = chain(data)
    clipped = ClipIntensityPercentilesInMask(2, 98)(image, mask)
    np.testing.assert_array_equal(output["image"], NormalizeIntensityInMask(-1.0)(clipped, mask))
    np.testing.assert_array_equal(output["more"], clipped[1:])
    assert data["image"] is image
    windowed = HUWindowd("ct", ["brain", "bone"])({"ct": HEAD_CT})["ct"]
    np.testing.assert_array_equal(windowed, HUWindow(["brain", "bone"])(HEAD_CT))


def test_missing_keys_are_named() -> None:
    image, mask = two_channels()
    with pytest.raises(BundleError, match="MeasureIntensityInMaskd"):
        NormalizeIntensityInMaskd("image", statistics_key="statistics")({"image": image, "foreground": mask})
    for transform in (
        ClipIntensityPercentilesInMaskd("image"),
        MeasureIntensityInMaskd("image"),
        NormalizeIntensityInMaskd("image"),
    ):
        with pytest.raises(BundleError, match="foreground"):
            transform({"image": image})


def test_statistics_need_one_name_per_key_and_one_row_per_channel() -> None:
    with pytest.raises(BundleError, match="one name of its own"):
        MeasureIntensityInMaskd(["t1", "t2"])
    with pytest.raises(BundleError, match="one name of its own"):
        NormalizeIntensityInMaskd(["t1", "t2"], statistics_key=["same", "same"])
    image, mask = two_channels()
    with pytest.raises(BundleError, match=r"\(1, 2\)"):
        NormalizeIntensityInMask()(image, mask, np.ones((1, 2)))


@pytest.mark.parametrize("transform", [ClipIntensityPercentilesInMask(), NormalizeIntensityInMask()])
def test_bad_masks_and_values_are_refused(transform: Callable) -> None:
    image, mask = two_channels()
    with pytest.raises(DataError, match="0 of 210 voxels"):
        transform(image, np.zeros_like(mask))
    with pytest.raises(DataError, match="shape"):
        transform(image, mask[:, :3])
    image[0, 0, 0, 0] = np.inf
    with pytest.raises(DataError, match="1 of 420 voxels"):
        transform(image, mask)


@pytest.mark.parametrize("bounds", [(50, 50), (-1, 99), (1, 101)])
def test_impossible_percentiles_are_refused(bounds: tuple[float, float]) -> None:
    with pytest.raises(BundleError, match="lower"):
        ClipIntensityPercentilesInMask(*bounds)


def test_brain_window_by_hand() -> None:
    # Level 40, width 80: the window runs from 0 to 80 HU.
    assert HUWindow("brain")(HEAD_CT).ravel().tolist() == [0, 0, 0.25, 0.5, 0.75, 1, 1]
    assert HUWindow("brain", output_range=(-1, 1))(HEAD_CT).ravel().tolist() == [-1, -1, -0.5, 0, 0.5, 1, 1]


def test_bone_window_does_not_saturate_bone() -> None:
    # Level 600, width 2800: from -800 to 2000 HU, so cortical bone of 1500 HU lies at (1500 + 800) / 2800.
    windowed = HUWindow("bone")(HEAD_CT)
    np.testing.assert_allclose(windowed.ravel()[-1], 2300 / 2800, rtol=1e-6)


@pytest.mark.parametrize("name", HU_WINDOWS)
def test_windows_equal_monai_scaling(name: str) -> None:
    level, width = HU_WINDOWS[name]
    image = np.linspace(-1000, 3000, 500, dtype=np.float32).reshape(1, 20, 25)
    monai = ScaleIntensityRange(level - width / 2, level + width / 2, 0, 1, clip=True)(image)
    np.testing.assert_allclose(HUWindow(name)(image), monai, atol=1e-6)


def test_several_windows_become_channels_in_their_order() -> None:
    output = HUWindow({"mine": (40, 80), "wide": (0, 4000)})(metatensor(HEAD_CT[..., None]))
    assert output.shape == (2, 1, 7, 1)
    np.testing.assert_array_equal(output[0, 0, :, 0], HUWindow("brain")(HEAD_CT)[0, 0])


REFUSED = {
    "scaled to one": (HEAD_CT - HEAD_CT.min()) / np.ptp(HEAD_CT),
    "z-scored": (HEAD_CT - HEAD_CT.mean()) / HEAD_CT.std(),
    "stored values without intercept": HEAD_CT + 1000,
    "stored values inside padding": np.where(HEAD_CT == -1000, -2000, HEAD_CT + 1000),
    "an MRI": np.arange(0, 800, 10, dtype=np.int16).reshape(1, 8, 10),
    "air only": np.linspace(-1000, -900, 12).reshape(1, 3, 4),
    "padding only": np.full((1, 3, 4), -3024.0),
    "beyond 16 bits": np.where(HEAD_CT == 1500, 40000, HEAD_CT),
}


@pytest.mark.parametrize("image", REFUSED.values(), ids=REFUSED)
def test_values_that_are_not_hounsfield_are_refused_with_their_range(image: np.ndarray) -> None:
    with pytest.raises(DataError, match="not in Hounsfield units") as caught:
        HUWindowd("ct", "brain")({"ct": image, "case": "sub-03"})
    assert f"minimum {image.min():g}, maximum {image.max():g}" in caught.value.why
    assert "sub-03" in caught.value.what


def test_padding_is_accepted_and_cropped_data_on_request() -> None:
    padded = np.concatenate([HEAD_CT, np.full((1, 1, 3), -3024, dtype=np.float32)], axis=2)
    np.testing.assert_array_equal(HUWindow("brain")(padded)[..., :7], HUWindow("brain")(HEAD_CT))
    assert (HUWindow("brain")(padded)[..., 7:] == 0).all()
    brain = np.linspace(0, 90, 12, dtype=np.float32).reshape(1, 3, 4)
    with pytest.raises(DataError, match="no air"):
        HUWindow("brain")(brain)
    assert HUWindow("brain", minimum_air=None)(brain).max() == 1
    with pytest.raises(DataError, match="span less"):
        HUWindow("brain", minimum_air=None)(brain / 90)


def test_wrong_window_definitions_and_channels_are_refused() -> None:
    with pytest.raises(BundleError, match="brian"):
        HUWindow(["brain", "brian"])
    with pytest.raises(BundleError, match="positive width"):
        HUWindow({"flat": (40, 0)})
    with pytest.raises(BundleError, match="positive width"):
        HUWindow([])
    with pytest.raises(BundleError, match="increasing"):
        HUWindow("brain", output_range=(1, 0))
    with pytest.raises(DataError, match="has 2"):
        HUWindow("brain")(np.concatenate([HEAD_CT, HEAD_CT]))
