"""The averaged weights by hand and by the closed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from pipelines.training.averaging import averaged_network, ramped_decay
from transforms.errors import BundleError


def one_weight(value: float) -> nn.Linear:
    network = nn.Linear(1, 1, bias=False)
    return set_to(network, value)


def set_to(network: nn.Linear, value: float) -> nn.Linear:
    with torch.no_grad():
        network.weight.fill_(value)
    return network


def test_the_decay_ramps_up() -> None:
    # (1 + n) / (10 + n): 2/11, 3/12, 11/20, then held at the decay
    assert [ramped_decay(n, 0.5) for n in (1, 2, 10, 1000)] == pytest.approx([2 / 11, 0.25, 0.5, 0.5])
    assert ramped_decay(1000, 0.999) == pytest.approx(1001 / 1010)


def test_three_updates_by_hand() -> None:
    # Weights 7 (initial), then 1, 2, 4. The first update takes the network: 1. Then d = 2/11:
    # (2 * 1 + 9 * 2) / 11 = 20/11, then d = 3/12: 20/11 / 4 + 4 * 3/4 = 5/11 + 3 = 38/11. Of the 7 there is no trace.
    network = one_weight(7.0)
    average = averaged_network(network, 0.99)
    seen = []
    for value in (1.0, 2.0, 4.0):
        average.update_parameters(set_to(network, value))
        seen.append(float(average.module.weight))
    assert seen == pytest.approx([1.0, 20 / 11, 38 / 11], abs=1e-6)


def test_it_equals_the_closed_form() -> None:
    # w_N = sum_k w_k (1 - d_k) prod_{j > k} d_j, with the first weight taken whole
    values = np.random.default_rng(0).normal(size=60)
    decays = [0.0] + [min(0.9, (1 + n) / (10 + n)) for n in range(1, 60)]
    expected = sum(v * (1 - d) * np.prod(decays[k + 1 :]) for k, (v, d) in enumerate(zip(values, decays, strict=True)))
    network = one_weight(0.0)
    average = averaged_network(network, 0.9)
    for value in values:
        average.update_parameters(set_to(network, float(value)))
    assert float(average.module.weight) == pytest.approx(expected, abs=1e-6)


def test_running_statistics_are_averaged_like_weights() -> None:
    # Three batches, of a constant 2, 4, 8; momentum 1 takes the last: running means 2, 4, 8. First 2 as it is, then
    # d = 2/11: (2 * 2 + 9 * 4) / 11 = 40/11, then d = 3/12: 40/11 / 4 + 8 * 3/4 = 10/11 + 6 = 76/11.
    network = nn.BatchNorm3d(1, momentum=1.0)
    average = averaged_network(network, 0.99)
    for value in (2.0, 4.0, 8.0):
        network(torch.full((2, 1, 2, 2, 2), value))
        average.update_parameters(network)
    assert float(average.module.running_mean) == pytest.approx(76 / 11, abs=1e-6)
    assert int(average.module.num_batches_tracked) == 3


def test_decay_zero_is_the_network_itself() -> None:
    network = nn.Sequential(nn.Conv3d(1, 2, 3), nn.BatchNorm3d(2))
    average = averaged_network(network, 0.0)
    for _ in range(3):
        network(torch.randn(2, 1, 4, 4, 4))  # moves the running statistics
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += torch.randn_like(parameter)
        average.update_parameters(network)
    for name, tensor in network.state_dict().items():
        assert torch.equal(average.module.state_dict()[name], tensor), name


def test_the_average_has_its_own_memory() -> None:
    network = one_weight(1.0)
    average = averaged_network(network, 0.9)
    average.update_parameters(network)
    set_to(network, 100.0)
    assert float(average.module.weight) == 1.0


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5, float("nan")])
def test_another_decay_is_refused(decay: float) -> None:
    with pytest.raises(BundleError, match="ema_decay"):
        averaged_network(one_weight(0.0), decay)
