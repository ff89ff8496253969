"""N4 against a known multiplicative field on an ellipsoid of two tissues, for sizes that divide and that do not."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch
from monai.data import MetaTensor

from transforms.bias_field import N4BiasFieldCorrection, N4BiasFieldCorrectiond, estimate_log_bias_field
from transforms.errors import BundleError, DataError

SPACING = (1.2, 0.9, 2.0)
FAST = {"iterations": (20, 20, 20)}


def phantom(
    shape: tuple[int, ...], spacing: tuple[float, ...] = SPACING, seed: int = 0
) -> tuple[MetaTensor, np.ndarray, np.ndarray]:
    """An ellipsoid of 90 with a core of 150 and 3 % noise times a smooth field: image, mask and field."""
    axes = np.meshgrid(*[np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in shape], indexing="ij")
    radius = sum((axis / 0.9) ** 2 for axis in axes)
    mask = radius < 1
    noise = 1 + 0.03 * np.random.default_rng(seed).standard_normal(shape)
    truth = np.where(radius < 0.45, 150.0, 90.0) * mask * noise
    third = axes[2] if len(shape) == 3 else 0.0
    field = np.exp(0.35 * axes[0] + 0.25 * axes[1] ** 2 + 0.2 * third - 0.3 * axes[0] * third)
    affine = np.eye(4)
    affine[range(len(shape)), range(len(shape))] = spacing[: len(shape)]
    image = MetaTensor(torch.from_numpy((truth * field)[None].astype(np.float32)), affine=torch.from_numpy(affine))
    return image, mask[None], field[None]


def variation(values: np.ndarray) -> float:
    """Return the coefficient of variation: standard deviation / mean."""
    return float(values.std() / values.mean())


@pytest.mark.parametrize("shape", [(48, 56, 41), (45, 51, 10), (33, 35, 34)], ids=str)
@pytest.mark.parametrize("shrink", [3, 4])
def test_a_known_field_is_found_for_every_size(shape: tuple[int, int, int], shrink: int) -> None:
    image, mask, field = phantom(shape)
    corrected, estimate = N4BiasFieldCorrection(shrink, return_field=True)(image, mask)
    assert estimate.shape == image.shape
    assert variation(estimate.numpy()[mask] / field[mask]) < variation(field[mask]) / 5
    np.testing.assert_allclose(corrected * estimate, image, rtol=1e-5)


def test_a_small_image_is_shrunk_less_than_asked() -> None:
    """At shrink 4 the 200 bins of N4's histogram would share about 130 voxels."""
    image, mask, field = phantom((24, 26, 20))
    _, estimate = N4BiasFieldCorrection(return_field=True)(image, mask)
    assert variation(estimate.numpy()[mask] / field[mask]) < variation(field[mask]) / 3
    _, asked = N4BiasFieldCorrection(3, return_field=True)(image, mask)
    np.testing.assert_array_equal(estimate, asked)


@pytest.mark.parametrize("shape", [(64, 61), (48, 47, 1), (1, 48, 47)], ids=str)
def test_planes_are_corrected_as_planes(shape: tuple[int, ...]) -> None:
    image, mask, field = phantom(shape)
    _, estimate = N4BiasFieldCorrection(return_field=True)(image, mask)
    assert variation(estimate.numpy()[mask] / field[mask]) < variation(field[mask]) / 3


def test_a_thin_axis_is_shrunk_less_and_does_not_fail() -> None:
    plane, mask, field = (np.repeat(part[..., None], 3, axis=-1) for part in map(np.asarray, phantom((48, 48))))
    _, estimate = N4BiasFieldCorrection(6, return_field=True)(torch.from_numpy(plane), mask, SPACING)
    assert variation(estimate.numpy()[mask] / field[mask]) < variation(field[mask]) / 3


def test_without_shrinking_it_is_the_filter_of_simpleitk() -> None:
    image, mask, _ = phantom((20, 22, 18))
    n4 = sitk.N4BiasFieldCorrectionImageFilter()
    n4.SetMaximumNumberOfIterations([20, 20, 20])
    n4.SetConvergenceThreshold(1e-3)
    source = sitk.GetImageFromArray(image.numpy()[0])
    source.SetSpacing(SPACING[::-1])
    label = sitk.GetImageFromArray(mask[0].astype(np.uint8))
    label.SetSpacing(SPACING[::-1])
    n4.Execute(source, label)
    expected = sitk.GetArrayFromImage(n4.GetLogBiasFieldAsImage(source))
    ours = estimate_log_bias_field(image.numpy()[0], mask[0], SPACING, 1, (20, 20, 20))
    np.testing.assert_allclose(ours, expected - expected[mask[0]].mean(), atol=2e-5)


def test_the_field_does_not_stretch_when_the_size_does_not_divide() -> None:
    """Shrinking alone puts the ends of the coarse grid inside the image, and the spline is stretched over the rest."""
    image, mask, field = phantom((46, 46, 46), (1.0, 1.0, 1.0))
    n4 = sitk.N4BiasFieldCorrectionImageFilter()
    n4.SetMaximumNumberOfIterations([50] * 4)
    n4.SetConvergenceThreshold(1e-3)
    source = sitk.GetImageFromArray(image.numpy()[0])
    label = sitk.GetImageFromArray(mask[0].astype(np.uint8))
    n4.Execute(sitk.Shrink(source, [6] * 3), sitk.Shrink(label, [6] * 3))
    stretched = np.exp(sitk.GetArrayFromImage(n4.GetLogBiasFieldAsImage(source)))[None]
    _, estimate = N4BiasFieldCorrection(6, return_field=True)(image, mask)
    assert variation(estimate.numpy()[mask] / field[mask]) < 0.8 * variation(stretched[mask] / field[mask])


def test_scale_is_kept_and_homogeneity_gained() -> None:
    image, mask, field = phantom((40, 44, 38))
    corrected, estimate = N4BiasFieldCorrection(return_field=True, **FAST)(image, mask)
    assert np.log(estimate.numpy()[mask]).mean() == pytest.approx(0, abs=1e-5)
    truth = (image.numpy() / field)[mask]
    core = truth > 125
    assert variation(corrected.numpy()[mask][core]) < 0.5 * variation(image.numpy()[mask][core])
    doubled = N4BiasFieldCorrection(**FAST)(2 * image, mask)
    np.testing.assert_allclose(doubled.numpy(), 2 * corrected.numpy(), rtol=1e-3)


def test_without_a_mask_otsu_finds_the_object() -> None:
    image, mask, field = phantom((40, 44, 38))
    _, estimate = N4BiasFieldCorrection(return_field=True, **FAST)(image)
    assert variation(estimate.numpy()[mask] / field[mask]) < variation(field[mask]) / 3


def test_zero_negative_and_nearly_zero_voxels_take_no_part_and_stay_finite() -> None:
    image, mask, _ = phantom((40, 44, 38))
    _, clean = N4BiasFieldCorrection(return_field=True, **FAST)(image, mask)
    spoilt = image.clone()
    spoilt[0, 20, 20:24, 19] = torch.tensor([0.0, -50.0, 1e-12, 1e-30])
    corrected, estimate = N4BiasFieldCorrection(return_field=True, **FAST)(spoilt, mask)
    assert torch.isfinite(corrected).all()
    assert corrected[0, 20, 21, 19] < 0
    np.testing.assert_allclose(estimate.numpy(), clean.numpy(), rtol=2e-2)


def test_channels_are_corrected_on_their_own_and_a_constant_one_is_unchanged() -> None:
    image, mask, _ = phantom((30, 34, 28))
    other, _, _ = phantom((30, 34, 28), seed=5)
    flat = torch.full_like(image, 7.0)
    corrected, estimate = N4BiasFieldCorrection(return_field=True, **FAST)(
        MetaTensor(torch.cat([image, flat, other.flip(1)]).as_tensor(), affine=image.affine), mask
    )
    np.testing.assert_array_equal(corrected[1], flat[0])
    assert (estimate[1] == 1).all()
    np.testing.assert_array_equal(corrected[0], N4BiasFieldCorrection(**FAST)(image, mask)[0])
    np.testing.assert_array_equal(corrected[2], N4BiasFieldCorrection(**FAST)(other.flip(1), mask)[0])
    constant_inside = torch.where(torch.from_numpy(mask), 5.0, image)
    constant_inside[0, 0, 0, 0] = 9.0
    unchanged = N4BiasFieldCorrection()(constant_inside.as_tensor(), mask, SPACING)
    np.testing.assert_array_equal(unchanged, constant_inside)


def test_it_gives_the_same_bits_again_and_on_any_number_of_threads() -> None:
    image, mask, _ = phantom((30, 34, 28))
    first = N4BiasFieldCorrection(**FAST)(image, mask)
    again = N4BiasFieldCorrection(**FAST)(image, mask)
    threads = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    try:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1 if threads > 1 else 2)
        elsewhere = N4BiasFieldCorrection(**FAST)(image, mask)
        assert sitk.ProcessObject.GetGlobalDefaultNumberOfThreads() == (1 if threads > 1 else 2)
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
    assert torch.equal(first, again)
    assert torch.equal(first, elsewhere)


def test_containers_metadata_input_and_dictionary_form() -> None:
    image, mask, _ = phantom((30, 34, 28))
    before = image.clone()
    correct = N4BiasFieldCorrection(return_field=True, **FAST)
    corrected, field = correct(image, mask)
    assert isinstance(corrected, MetaTensor)
    assert corrected.dtype == torch.float32
    torch.testing.assert_close(corrected.affine, image.affine)
    assert torch.equal(image, before)
    plain, _ = correct(image.numpy(), mask, SPACING)
    assert isinstance(plain, np.ndarray)
    np.testing.assert_array_equal(plain, corrected.numpy())
    data = {"image": image, "foreground": mask}
    output = N4BiasFieldCorrectiond("image", mask_key="foreground", field_key="field", **FAST)(data)
    np.testing.assert_array_equal(output["image"], corrected)
    np.testing.assert_array_equal(output["field"], field)
    assert torch.equal(data["image"], before)
    automatic = N4BiasFieldCorrectiond("image", **FAST)(data)
    np.testing.assert_array_equal(automatic["image"], N4BiasFieldCorrection(**FAST)(image))
    assert set(automatic) == set(data)


def test_a_shorter_spline_distance_follows_a_finer_field() -> None:
    image, mask, _ = phantom((40, 44, 38))
    coarse = estimate_log_bias_field(image.numpy()[0], mask[0], SPACING, iterations=(30,), spline_distance=500)
    fine = estimate_log_bias_field(image.numpy()[0], mask[0], SPACING, iterations=(30,), spline_distance=10)

    def roughness(field: np.ndarray) -> float:
        return float(np.abs(np.diff(field, n=3, axis=0)).mean())

    assert roughness(fine) > 2 * roughness(coarse)


def test_refusals_name_the_case() -> None:
    image, mask, _ = phantom((20, 22, 18))
    correct = N4BiasFieldCorrectiond("image", mask_key="foreground")
    with pytest.raises(DataError, match="0 of 7920 voxels") as caught:
        correct({"image": image, "foreground": np.zeros_like(mask), "case": "sub-11"})
    assert "sub-11" in caught.value.what
    few = np.zeros_like(mask)
    few[0, 9:12, 9:12, 9:12] = True
    with pytest.raises(DataError, match="27 voxels of the foreground are usable"):
        correct({"image": image, "foreground": few})
    with pytest.raises(DataError, match="0 voxels of the foreground are usable"):
        correct({"image": -image, "foreground": mask})
    with pytest.raises(DataError, match="spacing is None"):
        N4BiasFieldCorrection()(image.numpy(), mask)
    with pytest.raises(DataError, match="2D nor 3D"):
        N4BiasFieldCorrection()(np.arange(9.0).reshape(1, 9, 1), np.ones((1, 9, 1)), (1.0, 1.0))
    with pytest.raises(BundleError, match="ForegroundMaskd"):
        correct({"image": image})
    image[0, 0, 0, 0] = torch.nan
    with pytest.raises(DataError, match="NaN"):
        N4BiasFieldCorrection()(image, mask)


@pytest.mark.parametrize(
    "parameters",
    [{"shrink_factor": 0}, {"iterations": ()}, {"iterations": (50, 0)}, {"tolerance": 0.0}, {"spline_distance": -1.0}],
    ids=str,
)
def test_parameters_that_are_not_positive_are_refused(parameters: dict) -> None:
    with pytest.raises(BundleError, match="N4BiasFieldCorrection"):
        N4BiasFieldCorrection(**parameters)
