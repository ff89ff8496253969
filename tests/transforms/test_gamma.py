"""Gamma: what it keeps, where it differs from MONAI's, and that a chain with gamma after a z-score is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.transforms import (
    AdjustContrast,
    AdjustContrastd,
    Compose,
    Flipd,
    NormalizeIntensity,
    NormalizeIntensityd,
    OneOf,
    RandAdjustContrast,
    RandAdjustContrastd,
    RandomOrder,
    ScaleIntensityd,
    ScaleIntensityRanged,
    SomeOf,
)

from transforms.errors import BundleError, DataError
from transforms.gamma import (
    RandGammaBeforeNormalize,
    RandGammaBeforeNormalized,
    gamma_in_mask,
    refuse_gamma_after_normalisation,
)
from transforms.intensity import HUWindowd, NormalizeIntensityInMask, NormalizeIntensityInMaskd


def sample(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    mask = np.zeros((1, 8, 9, 6), dtype=np.uint8)
    mask[0, 1:7, 2:8, 1:5] = 1
    image = np.stack([generator.uniform(0, 1, mask.shape[1:]), generator.uniform(1000, 2000, mask.shape[1:])])
    return image.astype(np.float32), mask


def test_by_hand() -> None:
    # 0, 1/2, 1 squared are 0, 1/4, 1: mean 5/12 and standard deviation sqrt(26)/12. The source 10, 20, 30 has mean 20
    # and standard deviation sqrt(200/3), so 10 becomes 20 - 5/12 * sqrt(200/3) * 12/sqrt(26) = 20 - 5 sqrt(200/78).
    image = np.array([[10, 20, 30]], dtype=np.float32)
    result = gamma_in_mask(image, [2.0])
    np.testing.assert_allclose(result[0, 0], 20 - 5 * np.sqrt(200 / 78), rtol=1e-6)
    np.testing.assert_allclose(result[0, 1], 20 - 2 * np.sqrt(200 / 78), rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), gammas=st.tuples(st.floats(0.3, 3), st.floats(0.3, 3)))
def test_mean_std_order_and_background_are_kept(seed: int, gammas: tuple[float, float]) -> None:
    image, mask = sample(seed)
    inside = mask[0] > 0
    result = gamma_in_mask(image, gammas, inside)
    for channel, changed in zip(image, result, strict=True):
        np.testing.assert_array_equal(changed[~inside], channel[~inside])
        np.testing.assert_allclose(changed[inside].mean(), channel[inside].mean(), rtol=1e-4)
        np.testing.assert_allclose(changed[inside].std(), channel[inside].std(), rtol=1e-4)
        assert (np.diff(changed[inside][np.argsort(channel[inside])]) >= 0).all()


def test_equals_monai_on_one_channel_and_not_on_two() -> None:
    image, _ = sample()
    ours = gamma_in_mask(image, [1.5, 1.5])
    for channel in range(2):
        monai = AdjustContrast(1.5, retain_stats=True)(image[channel : channel + 1])
        np.testing.assert_allclose(ours[channel], np.asarray(monai)[0], rtol=2e-5, atol=2e-5)
    # MONAI takes minimum and maximum over both channels: the first, within [0, 1], comes out nearly flat.
    together = np.asarray(AdjustContrast(1.5)(image))
    assert together[0].std() < 0.1 * image[0].std()
    assert ours[0].std() == pytest.approx(image[0].std(), rel=1e-4)


def test_signed_values_and_constant_channels_survive() -> None:
    image, mask = sample()
    image[0] -= 0.5
    image[1] = 3
    result = gamma_in_mask(image, [0.7, 0.7])
    assert np.isfinite(result).all()
    np.testing.assert_array_equal(result[1], image[1])
    np.testing.assert_array_equal(gamma_in_mask(image, [0.7, 0.7], np.zeros(mask.shape[1:], dtype=bool)), image)


def test_random_form_is_reproducible_and_draws_one_gamma_per_channel() -> None:
    image, mask = sample()
    transform = RandGammaBeforeNormalize(prob=1.0, gamma=(0.5, 2.0))
    first = transform.set_random_state(7)(image, mask)
    drawn = transform.gammas
    second = transform.set_random_state(7)(image, mask)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(transform(image, mask, randomize=False), first)
    assert len(set(drawn)) == 2
    assert all(0.5 <= gamma <= 2 for gamma in drawn)
    np.testing.assert_array_equal(first, gamma_in_mask(image, list(drawn), mask[0] > 0))
    assert np.abs(transform(image, mask) - first).max() > 1e-3


def test_probability() -> None:
    image, _ = sample()
    never = RandGammaBeforeNormalize(prob=0.0)
    np.testing.assert_array_equal(never(image), image)
    half = RandGammaBeforeNormalize(prob=0.5)
    half.set_random_state(0)
    changed = sum(not np.array_equal(half(image[:, :2, :2]), image[:, :2, :2]) for _ in range(400))
    assert 160 <= changed <= 240  # four standard deviations of 10


def test_dictionary_form_equals_array_form() -> None:
    image, mask = sample()
    data = {"image": image, "foreground": mask}
    for seed in range(4):
        expected = RandGammaBeforeNormalize(0.5).set_random_state(seed)(image, mask)
        output = RandGammaBeforeNormalized("image", 0.5).set_random_state(seed)(data)
        np.testing.assert_array_equal(output["image"], expected)
    whole = RandGammaBeforeNormalized("image", 1.0, mask_key=None).set_random_state(3)({"image": image})
    np.testing.assert_array_equal(whole["image"], RandGammaBeforeNormalize(1.0).set_random_state(3)(image))
    assert data["image"] is image


def test_containers_metadata_and_input_are_kept() -> None:
    image, mask = sample()
    meta = MetaTensor(torch.from_numpy(image.copy()), affine=torch.diag(torch.tensor([1.0, 2.0, 3.0, 1.0])))
    result = RandGammaBeforeNormalize(1.0).set_random_state(1)(meta, mask)
    assert isinstance(result, MetaTensor)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.affine, meta.affine)
    assert torch.equal(meta.as_tensor(), torch.from_numpy(image))
    expected = RandGammaBeforeNormalize(1.0).set_random_state(1)(image, mask)
    np.testing.assert_array_equal(result.numpy(), expected)
    np.testing.assert_array_equal(image, sample()[0])


def test_bad_parameters_and_data_are_refused() -> None:
    for gamma in ((1.5, 0.7), (0.0, 1.0)):
        with pytest.raises(BundleError, match="gamma"):
            RandGammaBeforeNormalize(gamma=gamma)
    with pytest.raises(BundleError, match="prob"):
        RandGammaBeforeNormalized("image", prob=1.5)
    image, mask = sample()
    with pytest.raises(BundleError, match="ForegroundMaskd"):
        RandGammaBeforeNormalized("image")({"image": image})
    with pytest.raises(DataError, match="shape"):
        RandGammaBeforeNormalize(1.0)(image, mask[..., 1:])
    image[0, 0, 0, 0] = np.nan
    with pytest.raises(DataError, match="NaN"):
        RandGammaBeforeNormalize(1.0)(image)


def test_the_facts_behind_the_rule() -> None:
    """Gamma after a z-score over non-zero voxels shifts the mean and the background; before it, neither moves."""
    image, mask = sample()
    image = (image * mask)[:1] + mask
    inside = mask > 0
    after = np.asarray(AdjustContrast(1.5)(NormalizeIntensityInMask()(image, mask)))
    assert after[inside].mean() < -0.2
    assert after[~inside].max() < -0.2
    before = NormalizeIntensityInMask()(gamma_in_mask(image, [1.5], inside[0]), mask)
    assert before[inside].mean() == pytest.approx(0, abs=1e-4)
    assert (before[~inside] == 0).all()


GAMMA = RandGammaBeforeNormalized("image")
Z_SCORE = NormalizeIntensityInMaskd("image")
FLIP = Flipd("image", 0)

REFUSED: dict[str, Any] = {
    "ours after ours": [Z_SCORE, GAMMA],
    "MONAI dictionary": [NormalizeIntensityd("image"), AdjustContrastd("image", 1.2)],
    "MONAI random dictionary": [NormalizeIntensityd("image"), RandAdjustContrastd("image")],
    "MONAI array": [NormalizeIntensity(), RandAdjustContrast()],
    "array after array": [NormalizeIntensityInMask(), AdjustContrast(1.1)],
    "array normalisation meets every key": [NormalizeIntensity(), GAMMA],
    "nested": Compose([FLIP, Compose([Z_SCORE]), OneOf([FLIP, Compose([GAMMA])])]),
    "one branch normalises": [OneOf([Z_SCORE, FLIP]), GAMMA],
    "any order": RandomOrder([GAMMA, Z_SCORE]),
    "some of, any order": SomeOf([GAMMA, Z_SCORE], num_transforms=2),
    "signed range": [ScaleIntensityRanged("image", 0, 1000, -1, 1), GAMMA],
    "signed scaling": [ScaleIntensityd("image", -1, 1), GAMMA],
    "signed window": [HUWindowd("image", "brain", (-1, 1)), GAMMA],
    "one shared key of two": [NormalizeIntensityd(["image", "ct"]), RandAdjustContrastd(["mri", "ct"])],
}

ALLOWED: dict[str, Any] = {
    "before": [GAMMA, Z_SCORE],
    "gamma alone": GAMMA,
    "other key": [NormalizeIntensityd("mri"), RandAdjustContrastd("ct")],
    "alternatives": OneOf([Z_SCORE, GAMMA]),
    "unsigned": [ScaleIntensityd("image", 0, 1), HUWindowd("ct", "brain"), GAMMA],
    "scaled to positive again": [Z_SCORE, ScaleIntensityd("image", 0, 1), GAMMA],
    "nothing": [],
}


@pytest.mark.parametrize("chain", REFUSED.values(), ids=REFUSED)
def test_gamma_after_a_signed_normalisation_is_refused(chain: Any) -> None:
    with pytest.raises(BundleError, match=r"0\.70 to 0\.33") as caught:
        refuse_gamma_after_normalisation(chain)
    assert "-0.45" in caught.value.why
    assert "-0.62" in caught.value.why


@pytest.mark.parametrize("chain", ALLOWED.values(), ids=ALLOWED)
def test_other_chains_pass(chain: Any) -> None:
    assert refuse_gamma_after_normalisation(chain) is None


def test_the_refusal_names_both_transforms_and_their_positions() -> None:
    with pytest.raises(BundleError) as caught:
        refuse_gamma_after_normalisation(REFUSED["nested"])
    assert "[2][1][0] RandGammaBeforeNormalized" in caught.value.what
    assert "[1][0] NormalizeIntensityInMaskd" in caught.value.what
    assert "'image'" in caught.value.what
