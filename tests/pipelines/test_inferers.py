"""Inferers by hand: flips that average what they should, reduced precision that really runs, devices that cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import SimpleInferer, SlidingWindowInferer
from torch import nn

from pipelines.inference import (
    AutocastInferer,
    FlipAveragingInferer,
    WholeImageInferer,
    choose_precision,
    windows_or_whole,
)
from pipelines.inference import inferers as module
from pipelines.networks import segmentation_network
from transforms.errors import BundleError


def image(seed: int = 0, shape: tuple[int, ...] = (1, 2, 6, 5, 4)) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Pointwise(nn.Module):
    """Sees one voxel at a time: it commutes with every flip."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[:, :1] * 2, x[:, 1:] - 1, -x[:, :1]], dim=1)


class Ramp(nn.Module):
    """Ignores the image: logits (0, i) for the i-th voxel along the first axis."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ramp = torch.arange(x.shape[2], dtype=torch.float32)[None, None, :, None, None].expand(len(x), 1, *x.shape[2:])
        return torch.cat([torch.zeros_like(ramp), ramp], dim=1)


class Conv(nn.Module):
    """A convolution that keeps the type of what it computed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 2, 3, padding=1)
        self.seen: list[torch.dtype] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = self.conv(x)
        self.seen.append(result.dtype)
        return result


@pytest.mark.parametrize("axes", [(), (0,), (1, 2), (0, 1, 2)])
def test_an_equivariant_network_gives_the_single_pass(axes: tuple[int, ...]) -> None:
    network = Pointwise()
    averaged = FlipAveragingInferer(SimpleInferer(), axes)(image(), network)
    torch.testing.assert_close(averaged, torch.softmax(network(image()), dim=1))


def test_another_network_gives_the_average_by_hand() -> None:
    # Along an axis of 3 the logits are 0, 1, 2 and, flipped back, 2, 1, 0. With sigma(0) = 1/2, sigma(1) = .7311 and
    # sigma(2) = .8808, both ends get (.5 + .8808) / 2 = .6904, the middle stays .7311; the other axis changes nothing.
    averaged = FlipAveragingInferer(SimpleInferer(), (0, 2))(image(shape=(1, 1, 3, 2, 2)), Ramp())
    expected = torch.tensor([0.690399, 0.731059, 0.690399])
    torch.testing.assert_close(averaged[0, 1, :, 0, 0], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(averaged[0, 1, :, 1, 1], expected, rtol=0, atol=1e-6)


def test_the_number_of_passes_and_what_they_see() -> None:
    seen: list[torch.Tensor] = []

    def network(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.clone())
        return x

    FlipAveragingInferer(SimpleInferer(), (0, 1, 2))(image(), network)
    assert len(seen) == 8
    assert torch.equal(seen[0], image())
    assert torch.equal(seen[-1], torch.flip(image(), (2, 3, 4)))


def test_probabilities_sum_to_one_and_one_channel_is_a_sigmoid() -> None:
    probabilities = FlipAveragingInferer(SlidingWindowInferer((4, 4, 4), 2, 0.5), (0,))(image(), Conv())
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(1, 6, 5, 4))
    assert probabilities.dtype == torch.float32
    single = FlipAveragingInferer(SimpleInferer(), (0,))(image(), lambda x: x[:, :1])
    torch.testing.assert_close(single, torch.sigmoid(image()[:, :1]))


def test_the_grid_of_the_image_stays_with_the_probabilities() -> None:
    affine = torch.diag(torch.tensor([0.5, 1.0, 3.0, 1.0], dtype=torch.float64))
    result = FlipAveragingInferer(SimpleInferer(), (0,))(MetaTensor(image(), affine=affine), Pointwise())
    torch.testing.assert_close(result.affine, affine)


def test_the_whole_image_is_padded_for_the_network_and_cropped_after_it() -> None:
    # 6x5x4 in multiples of 4, 2 and 1 is 8x6x4; what is behind is 0, what is before is the image
    seen: list[torch.Tensor] = []

    def network(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.as_tensor())
        return x[:, :1] + 1

    affine = torch.diag(torch.tensor([0.5, 1.0, 3.0, 1.0], dtype=torch.float64))
    result = WholeImageInferer((4, 2, 1))(MetaTensor(image(), affine=affine), network)
    (given,) = seen
    assert given.shape == (1, 2, 8, 6, 4)
    assert torch.equal(given[:, :, :6, :5], image())
    assert float(given[:, :, 6:].abs().sum() + given[:, :, :, 5:].abs().sum()) == 0
    torch.testing.assert_close(result.as_tensor(), image()[:, :1] + 1)
    torch.testing.assert_close(result.affine, affine)


def small_unet(norm: str) -> nn.Module:
    torch.manual_seed(0)
    return segmentation_network(3, 2, 2, [1.0] * 3, [16] * 3, [4, 8, 8], norm=norm).eval()


def test_whole_is_what_windows_are_away_from_their_edges() -> None:
    """Windows of 64 on 96 voxels: 0 to 64 and 32 to 96. A network of three stages sees 20 voxels to each side.

    The first third is the first window's alone, and 32 or more from its edge; the last is the second's. In the middle
    both are blended, and their edges show.
    """
    network, scan = small_unet("batch"), image(shape=(1, 2, 96, 16, 16))
    with torch.no_grad():
        whole = windows_or_whole("whole", [16] * 3, 0.5, network)(scan, network)
        windows = windows_or_whole("patch", [64, 16, 16], 0.0, network)(scan, network)
    for alone in (slice(0, 32), slice(64, 96)):
        torch.testing.assert_close(windows[:, :, alone], whole[:, :, alone], rtol=0, atol=1e-5)
    assert not torch.allclose(windows[:, :, 32:64], whole[:, :, 32:64], atol=1e-3)


def test_whole_is_warned_of_where_what_it_sees_changes_the_answer(caplog: pytest.LogCaptureFixture) -> None:
    windows_or_whole("whole", [16] * 3, 0.5, small_unet("batch"))
    windows_or_whole("patch", [16] * 3, 0.5, small_unet("instance"))
    assert caplog.records == []
    windows_or_whole("whole", [16] * 3, 0.5, small_unet("instance"))
    assert "has learnt from windows of 16x16x16 voxels" in caplog.text


def test_a_window_that_does_not_exist_is_refused() -> None:
    with pytest.raises(BundleError, match="window 'hole'") as caught:
        windows_or_whole("hole", [16] * 3, 0.5, small_unet("batch"))
    assert "whole" in caught.value.fix


@pytest.mark.parametrize("axes", [(0, 0), (-1,)])
def test_axes_that_would_mirror_channels_are_refused(axes: tuple[int, ...]) -> None:
    with pytest.raises(BundleError, match="flip_axes"):
        FlipAveragingInferer(SimpleInferer(), axes)


@pytest.mark.parametrize("inner", [None, SlidingWindowInferer((4, 4, 4), 1, 0.0)])
def test_bf16_really_runs_and_returns_float32(inner: Any) -> None:
    network = Conv()
    reduced = AutocastInferer("bf16", inner)(image(), network)
    assert set(network.seen) == {torch.bfloat16}
    assert reduced.dtype == torch.float32
    exact = AutocastInferer("fp32", inner)(image(), network)
    assert network.seen[-1] == torch.float32
    difference = float((reduced - exact).detach().abs().max())
    assert 0 < difference < 0.05  # rounding to 8 bits, and not the same numbers


def test_gradients_flow_through_bf16() -> None:
    network = Conv()
    AutocastInferer("bf16")(image(), network).sum().backward()
    assert network.conv.weight.grad is not None
    assert network.conv.weight.grad.dtype == torch.float32


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(BundleError, match="'bf61'"):
        AutocastInferer("bf61")
    with pytest.raises(BundleError, match="'bf61'"):
        choose_precision("bf61", "cpu")


def test_fp16_on_a_cpu_is_refused() -> None:
    with pytest.raises(BundleError, match="fp16 on a CPU"):
        choose_precision("fp16", torch.device("cpu"))
    assert choose_precision("fp16", "cuda:0") == "fp16"


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_on_a_cpu_follows_the_hardware(monkeypatch: pytest.MonkeyPatch, native: bool, expected: str) -> None:
    monkeypatch.setattr(module, "_cpu_multiplies_bf16", lambda: native)
    assert choose_precision("auto", "cpu") == expected
    assert choose_precision("fp32", "cpu") == "fp32"
    assert choose_precision("auto", "mps") == "fp32"


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp16")])
def test_auto_on_a_gpu_follows_the_hardware(monkeypatch: pytest.MonkeyPatch, native: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native)
    assert choose_precision("auto", "cuda") == expected
