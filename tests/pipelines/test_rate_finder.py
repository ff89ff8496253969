"""The range test on problems whose largest stable rate is known, and on loss curves drawn by hand."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.inferers import SimpleInferer
from torch import nn
from torch.utils.data import DataLoader, Dataset

from pipelines.training.rate_finder import FIRST_RATE, RateTest, range_test, steepest_rate, write_rates
from transforms.errors import BundleError

CPU = torch.device("cpu")
CURVATURES = torch.tensor([1.0, 2.0, 4.0, 10.0])


class Nothing(Dataset):
    """Batches that do not matter: the loss below is a function of the weights alone."""

    def __len__(self) -> int:
        return 7

    def set_epoch(self, *epoch: int) -> None:
        pass

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": torch.zeros(1), "label": torch.zeros(1)}


class Point(nn.Module):
    """A network that is nothing but its weights, which start at 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(len(CURVATURES)))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.weight + 0 * image.sum()


class Bowl(nn.Module):
    """Half the sum of curvature * weight^2, scaled: gradient descent diverges beyond 2 / largest curvature."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.curvatures = scale * CURVATURES

    def forward(self, weight: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return 0.5 * (self.curvatures * weight**2).sum()


def explore(scale: float = 1.0, loss: nn.Module | None = None, rate: float = 0.5, **options: Any) -> RateTest:
    network = Point()
    optimizer = torch.optim.SGD(network.parameters(), lr=rate)
    return range_test(
        network=network,
        optimizer=optimizer,
        loss=loss or Bowl(scale),
        loader=DataLoader(Nothing()),
        device=CPU,
        inferer=SimpleInferer(),
        **{"last_rate": 100.0, **options},
    )


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_below_the_largest_stable_rate_and_within_a_sensible_factor(scale: float) -> None:
    # Gradient descent on curvature c is stable up to 2 / c. With rates growing by r per step, the sum of all rates up
    # to rate x is x r / (r - 1), so the loss falls as exp(-2 c x r / (r - 1)): fastest over log x at
    # x = (r - 1) / (2 c r). Here r = 10^(8/100), which gives .042 of the stable 2 / c for the largest c, 10 scale, and
    # ten times that for the smallest, scale.
    found = explore(scale)
    stable = 2 / (10 * scale)
    assert found.diverged
    assert 0.02 * stable < found.suggestion < stable
    # ignite's running mean is 20 steps (a factor of 40) wide: it ends that late after the loss could not but rise
    assert stable < found.rates[-1] < 40 * stable


def test_the_rates_rise_by_the_same_factor() -> None:
    found = explore(steps=50)
    factors = np.divide(found.rates[2:], found.rates[1:-1])
    assert factors == pytest.approx(10 ** (8 / 50), rel=1e-6)
    assert found.rates[0] == pytest.approx(FIRST_RATE, rel=0.5)  # not the rate that the optimiser came with
    assert len(found.rates) == len(found.losses) == len(found.smoothed)
    assert found.losses[0] == pytest.approx(0.5 * float(CURVATURES.sum()))


def test_clipping_is_that_of_a_run() -> None:
    # a gradient of norm 1e-3 at most: with rates up to 100 no weight moves further than the sum of the rates * 1e-3
    found = explore(clip_norm=1e-9)
    assert not found.diverged
    assert found.losses[-1] == pytest.approx(found.losses[0], abs=1e-4)


def test_network_and_optimiser_are_as_they_were() -> None:
    network = Point()
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.3)
    before = optimizer.state_dict()
    range_test(
        network=network,
        optimizer=optimizer,
        loss=Bowl(1.0),
        loader=DataLoader(Nothing()),
        device=CPU,
        inferer=SimpleInferer(),
        steps=20,
    )
    assert torch.equal(network.weight, torch.ones(4))
    assert optimizer.state_dict() == before


class Cliff(Bowl):
    """NaN as soon as a weight has moved by a tenth: what half precision does when it overflows."""

    def forward(self, weight: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        value = super().forward(weight, label)
        return value * float("nan") if bool((weight < 0.9).any()) else value


def test_nan_is_a_divergence_not_an_error() -> None:
    found = explore(loss=Cliff(1.0))
    assert found.diverged
    assert math.isinf(found.losses[-1])
    assert sum(map(math.isinf, found.losses)) == 1  # it stops at once
    assert found.suggestion < found.rates[-1]


def test_a_loss_that_is_never_finite_is_an_error() -> None:
    class Nan(Bowl):
        def forward(self, weight: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
            return super().forward(weight, label) * float("nan")

    with pytest.raises(BundleError, match="first step is not finite"):
        explore(loss=Nan(1.0))


def test_without_divergence_the_test_says_so() -> None:
    found = explore(scale=1e-3, last_rate=1.0)
    assert not found.diverged


# ---------------------------------------------------------------------------------------------------------- the curve

RATES = np.geomspace(1e-6, 1, 101)


def test_the_steepest_point_of_a_curve_drawn_by_hand() -> None:
    # a step from 2 to 1, steepest at 1e-3; then a rise
    losses = 1.5 - 0.5 * np.tanh(2 * np.log10(RATES / 1e-3))
    losses[90:] = 50.0
    suggestion, smoothed = steepest_rate(RATES.tolist(), losses.tolist())
    assert suggestion == pytest.approx(1e-3, rel=0.2)
    assert len(smoothed) == 101


def test_noise_moves_it_little() -> None:
    losses = 1.5 - 0.5 * np.tanh(np.log10(RATES / 1e-3))
    found = [
        steepest_rate(RATES.tolist(), (losses + np.random.default_rng(seed).normal(0, 0.03, 101)).tolist())[0]
        for seed in range(10)
    ]
    assert 1e-4 < min(found) <= max(found) < 1e-2


def test_a_lasting_fall_after_the_lowest_point_does_not_count() -> None:
    # falls gently, jumps up at the end, and falls steeply from there
    losses = np.concatenate([np.linspace(2, 1, 81), np.linspace(9, 1.5, 20)])
    suggestion, _ = steepest_rate(RATES.tolist(), losses.tolist())
    assert suggestion < RATES[80]


@pytest.mark.parametrize("losses", [np.linspace(1, 2, 101), np.ones(101)])
def test_a_loss_that_never_falls_is_an_error(losses: np.ndarray) -> None:
    with pytest.raises(BundleError, match="never falls"):
        steepest_rate(RATES.tolist(), losses.tolist())


def test_the_files(tmp_path: Path) -> None:
    found = RateTest([1e-3, 1e-2], [2.0, math.inf], [1.9, 1.5], True, 1e-3)
    write_rates(found, tmp_path / "rates")
    with (tmp_path / "rates" / "rates.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows == [
        {"rate": "0.001", "loss": "2.0", "smoothed_loss": "1.9"},
        {"rate": "0.01", "loss": "inf", "smoothed_loss": "1.5"},
    ]
    assert (tmp_path / "rates" / "rates.png").read_bytes()[1:4] == b"PNG"
