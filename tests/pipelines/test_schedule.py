"""The learning rate by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.training.schedule import learning_rate_factor, polynomial_with_warmup
from transforms.errors import BundleError


def optimizer(rate: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)


def test_factors_by_hand() -> None:
    # 10 steps, 4 of warm-up: 1/4, 2/4, 3/4, 4/4, then (1 - k/6)^0.5 for k = 0 ... 5, and 0 at the end
    expected = [
        0.25,
        0.5,
        0.75,
        1.0,
        1.0,
        (5 / 6) ** 0.5,
        (4 / 6) ** 0.5,
        0.5**0.5,
        (2 / 6) ** 0.5,
        (1 / 6) ** 0.5,
        0.0,
    ]
    assert [learning_rate_factor(step, 10, 4, 0.5) for step in range(11)] == pytest.approx(expected)


def test_the_scheduler_sets_the_rate_of_the_coming_step() -> None:
    sgd = optimizer(0.1)
    scheduler = polynomial_with_warmup(sgd, total_steps=4, warmup_steps=2, power=1.0)
    rates = []
    for _ in range(4):
        rates.append(sgd.param_groups[0]["lr"])
        sgd.step()
        scheduler.step()
    assert rates == pytest.approx([0.05, 0.1, 0.1, 0.05])
    assert sgd.param_groups[0]["lr"] == 0.0


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 200), st.data(), st.floats(0, 3))
def test_it_rises_then_never_rises_again(total: int, data: st.DataObject, power: float) -> None:
    warmup = data.draw(st.integers(0, total - 1))
    factors = [learning_rate_factor(step, total, warmup, power) for step in range(total)]
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[:warmup] == sorted(factors[:warmup])
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)
    assert factors[warmup] == 1.0


@pytest.mark.parametrize(("total", "warmup"), [(4, 4), (4, 5), (0, 0), (4, -1)])
def test_a_warm_up_as_long_as_the_run_is_refused(total: int, warmup: int) -> None:
    with pytest.raises(BundleError, match=f"warm-up of {warmup} steps in a run of {total}"):
        polynomial_with_warmup(optimizer(), total, warmup)


def test_a_negative_power_is_refused() -> None:
    with pytest.raises(BundleError, match="decay_power"):
        polynomial_with_warmup(optimizer(), 10, 1, -0.9)
