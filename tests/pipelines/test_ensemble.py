"""Networks averaged as probabilities, and their uncertainty: cases by hand, bounds for every input, the way back."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.inferers import Inferer
from monai.transforms import Compose, Invertd

import transforms
from pipelines.inference import (
    AutocastInferer,
    EnsembleInferer,
    FlipAveragingInferer,
    SplitUncertaintyd,
    predictive_entropy,
)
from transforms.errors import BundleError

LN2 = math.log(2)


class Says(torch.nn.Module):
    """A network that gives the same probabilities (as logits) in every voxel."""

    def __init__(self, *probabilities: float) -> None:
        super().__init__()
        self.logits = torch.log(torch.tensor(probabilities, dtype=torch.float64))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.logits.view(1, -1, 1, 1).expand(image.shape[0], -1, *image.shape[2:]).float()


class Softmax(Inferer):
    """Probabilities of a network called once."""

    def __call__(self, inputs: torch.Tensor, network: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.softmax(network(inputs), dim=1)


def uncertain(*members: torch.nn.Module, image: torch.Tensor | None = None) -> torch.Tensor:
    """Return probabilities, entropy and mutual information (K + 2,) in one voxel of the members' ensemble."""
    network = torch.nn.ModuleList(members) if len(members) > 1 else members[0]
    result = EnsembleInferer(Softmax(), uncertainty=True)(torch.zeros(1, 1, 2, 2) if image is None else image, network)
    return result[0, :, 0, 0]


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        # both certain, and they disagree: the mean is (1/2, 1/2), H = ln 2; each alone has H = 0, so I = ln 2
        ([(1.0, 0.0), (0.0, 1.0)], (0.5, 0.5, LN2, LN2)),
        # both undecided: H = ln 2 in the mean as in each, so I = 0
        ([(0.5, 0.5), (0.5, 0.5)], (0.5, 0.5, LN2, 0.0)),
        # both certain, and they agree: nothing is uncertain
        ([(1.0, 0.0), (1.0, 0.0)], (1.0, 0.0, 0.0, 0.0)),
        # one certain, one undecided: mean (3/4, 1/4), H = 2 ln 2 - 3/4 ln 3; the mean of the members' H is ln 2 / 2
        ([(1.0, 0.0), (0.5, 0.5)], (0.75, 0.25, 2 * LN2 - 0.75 * math.log(3), 1.5 * LN2 - 0.75 * math.log(3))),
        # three classes, three certain members that all disagree: H = I = ln 3
        ([(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)], (1 / 3, 1 / 3, 1 / 3, math.log(3), math.log(3))),
        # a single network: its entropy, and nobody to disagree with
        ([(0.5, 0.5)], (0.5, 0.5, LN2, 0.0)),
    ],
)
def test_by_hand(members: list[tuple[float, ...]], expected: tuple[float, ...]) -> None:
    np.testing.assert_allclose(uncertain(*(Says(*p) for p in members)).numpy(), expected, atol=1e-6)


def test_probabilities_are_averaged_not_logits() -> None:
    # p = .9 and .5: their mean is .7; from the mean of the logits, ln 9 / 2, it would be 3 / 4
    both = torch.nn.ModuleList([Says(0.1, 0.9), Says(0.5, 0.5)])
    result = EnsembleInferer(Softmax())(torch.zeros(1, 1, 2, 2), both)
    np.testing.assert_allclose(result[0, :, 0, 0].numpy(), [0.3, 0.7], atol=1e-6)


def test_one_channel_is_yes_against_no() -> None:
    # p = 1/4: H = 1/4 ln 4 + 3/4 ln 4/3
    entropy = predictive_entropy(torch.full((1, 1, 1, 1), 0.25)).item()
    assert entropy == pytest.approx(0.25 * math.log(4) + 0.75 * math.log(4 / 3))
    assert predictive_entropy(torch.tensor([0.25, 0.75]).view(1, 2, 1, 1)).item() == pytest.approx(entropy)


def logits_of(seed: int, members: int, classes: int, scale: float) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(1, classes, 3, 4, generator=generator) for _ in range(members)]


class Fixed(torch.nn.Module):
    """A network that gives these logits, whatever the image."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.logits.clone()


def ensemble_of(logits: list[torch.Tensor]) -> torch.Tensor:
    network = torch.nn.ModuleList([Fixed(each) for each in logits])
    return EnsembleInferer(Softmax(), uncertainty=True)(torch.zeros(1, 1, 3, 4), network)


cases = {
    "seed": st.integers(0, 2**31),
    "members": st.integers(1, 5),
    "classes": st.integers(2, 5),
    "scale": st.sampled_from([0.01, 1.0, 5.0, 200.0]),  # from undecided to certain
}


@settings(max_examples=60, deadline=None)
@given(**cases)
def test_bounds(seed: int, members: int, classes: int, scale: float) -> None:
    result = ensemble_of(logits_of(seed, members, classes, scale))
    mean, entropy, information = result[:, :-2], result[:, -2:-1], result[:, -1:]
    torch.testing.assert_close(mean.sum(dim=1), torch.ones(1, 3, 4))
    assert (information >= 0).all()
    assert (information <= entropy).all()
    assert (entropy <= math.log(classes) + 1e-6).all()
    assert (information <= math.log(members) + 1e-6).all()  # which member it is, is all that can be learnt
    if members == 1:
        assert (information == 0).all()


@settings(max_examples=30, deadline=None)
@given(**cases)
def test_against_numpy_and_in_any_order(seed: int, members: int, classes: int, scale: float) -> None:
    logits = logits_of(seed, members, classes, scale)
    result = ensemble_of(logits).numpy()
    torch.testing.assert_close(ensemble_of(logits[::-1]).numpy(), result, atol=2e-6, rtol=0)
    # the definitions, in double precision
    p = np.stack([each.double().numpy() for each in logits])
    p = np.exp(p - p.max(axis=2, keepdims=True))
    p /= p.sum(axis=2, keepdims=True)

    def entropy(q: np.ndarray, axis: int) -> np.ndarray:
        return -(q * np.log(np.where(q > 0, q, 1))).sum(axis=axis)

    total = entropy(p.mean(axis=0), 1)
    np.testing.assert_allclose(result[:, :-2], p.mean(axis=0), atol=2e-6)
    np.testing.assert_allclose(result[:, -2], total, atol=5e-6)
    np.testing.assert_allclose(result[:, -1], total - entropy(p, 2).mean(axis=0), atol=1e-5)


def test_one_network_is_as_without_ensemble_to_the_last_bit() -> None:
    torch.manual_seed(0)
    network = torch.nn.Conv2d(2, 3, 3, padding=1)
    image = torch.randn(2, 2, 8, 6)
    inferer = FlipAveragingInferer(AutocastInferer("fp32"), axes=[0, 1])
    alone = inferer(image, network)
    assert torch.equal(EnsembleInferer(inferer)(image, network), alone)
    with_maps = EnsembleInferer(inferer, uncertainty=True)(image, network)
    assert torch.equal(with_maps[:, :3], alone)
    assert (with_maps[:, 4] == 0).all()  # flips are views of one network, not members
    assert torch.equal(with_maps[:, 3:4], predictive_entropy(alone))


def test_members_go_through_the_same_inferer() -> None:
    torch.manual_seed(0)
    networks = [torch.nn.Conv2d(1, 2, 3, padding=1) for _ in range(3)]
    image = torch.randn(1, 1, 8, 6)
    inferer = FlipAveragingInferer(AutocastInferer("bf16"), axes=[0])
    result = EnsembleInferer(inferer)(image, torch.nn.ModuleList(networks))
    expected = torch.stack([inferer(image, network) for network in networks]).mean(dim=0)
    torch.testing.assert_close(result, expected)
    assert result.dtype == torch.float32


def test_what_a_member_gave_is_not_written_to() -> None:
    given_out = torch.softmax(torch.arange(24.0).view(1, 2, 3, 4), dim=1)
    before = given_out.clone()
    inferer = EnsembleInferer(lambda inputs, network: given_out)  # type: ignore[arg-type]
    inferer(torch.zeros(1, 1, 3, 4), torch.nn.ModuleList([Says(0.5, 0.5), Says(0.5, 0.5)]))
    assert torch.equal(given_out, before)


def test_an_ensemble_without_members_is_refused() -> None:
    with pytest.raises(BundleError, match="without members"):
        EnsembleInferer(Softmax())(torch.zeros(1, 1, 2, 2), torch.nn.ModuleList())


def test_channels_without_uncertainty_are_refused() -> None:
    with pytest.raises(BundleError, match="2 channels"):
        SplitUncertaintyd("pred")({"pred": torch.zeros(2, 3, 3)})


def test_what_resampling_rounded_below_zero_is_zero_and_nan_stays() -> None:
    channels = torch.tensor([0.5, 0.5, -1e-9, float("nan")]).view(4, 1, 1)
    split = SplitUncertaintyd("pred")({"pred": channels})
    assert split["entropy"].item() == 0
    assert math.isnan(split["mutual_information"].item())
    assert channels[2].item() < 0  # the input is left alone


@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0, 3.0), (2.0, 1.0, 1.5)])
def test_uncertainty_goes_back_to_the_image_as_the_probabilities_do(
    tmp_path: Path, write_nifti: Callable[..., Path], spacing_mm: tuple[float, ...]
) -> None:
    # an image in left-posterior-superior order of 1 x 1 x 3 mm, dark outside of a box, so that it is turned and cropped
    rng = np.random.default_rng(0)
    voxels = np.zeros((9, 8, 7), np.float32)
    voxels[2:8, 1:7, 1:6] = rng.uniform(50, 100, (6, 6, 5))
    path = write_nifti("flair", voxels, np.diag([-1.0, -1.0, 3.0, 1.0]))
    chain = Compose(
        [
            transforms.LoadCased(modalities=["flair"], optional=[]),
            transforms.ToRASd(keys=["image"]),
            transforms.ForegroundMaskd(keys="image"),
            transforms.ResampleToSpacingd(
                image_keys="image", label_keys=["foreground"], spacing_mm=spacing_mm, order=1
            ),
            transforms.CropToForegroundd(keys=["image", "foreground"], margin=0),
        ]
    )
    item = chain({"case": "p", "image": [str(path)], "channels": [None], "digests": {}})
    image = item["image"]
    # two classes, and as uncertainty the first times two and times three: whatever way the first goes, they must too
    p = image.as_tensor() + 1
    channels = MetaTensor(torch.cat([p, 1 - p, 2 * p, 3 * p]), meta=image.meta)
    back = Compose([Invertd(keys="pred", transform=chain, orig_keys="image", nearest_interp=False)])
    plain = back({"image": image, "pred": channels[:2]})["pred"]
    split = SplitUncertaintyd("pred")(back({"image": image, "pred": channels}))
    assert split["pred"].shape == (2, *voxels.shape)
    assert torch.equal(split["pred"], plain)  # to the last bit as without the two channels
    torch.testing.assert_close(split["entropy"][0], 2 * plain[0], atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(split["mutual_information"][0], 3 * plain[0], atol=1e-3, rtol=1e-5)
    if spacing_mm == (1.0, 1.0, 3.0):  # nothing was resampled: the image itself comes back, and 0 outside of the box
        expected = np.where(voxels > 0, 2 * (voxels + 1), 0)
        np.testing.assert_allclose(split["entropy"][0].numpy(), expected, rtol=1e-5)
