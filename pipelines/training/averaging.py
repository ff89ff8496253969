"""Exponential moving average of the weights: what is validated, saved and shipped."""

from __future__ import annotations

import torch
from torch.optim.swa_utils import AveragedModel


def ramped_decay(updates: int, decay: float) -> float:
    """Return the decay after ``updates`` updates: ``min(decay, (1 + n) / (10 + n))``.

    A constant decay close to 1 would carry the random initial weights far into a short run.
    """
    return min(decay, (1.0 + updates) / (10.0 + updates))


def averaged_network(network: torch.nn.Module, decay: float) -> AveragedModel:
    """Return a copy of ``network`` that follows it: ``average <- d * average + (1 - d) * network``; ``.module`` is the network.

    Args:
        network: the network in training; make the average before the first forward pass.
        decay: between 0 (the copy equals the network) and 1.
    """

    def follow(average: list[torch.Tensor], current: list[torch.Tensor], updates: torch.Tensor) -> None:
        weight = 1.0 - ramped_decay(int(updates), decay)
        for mean, value in zip(average, current, strict=True):
            mean.lerp_(value.to(mean.dtype), weight)

    return AveragedModel(network, multi_avg_fn=follow)
